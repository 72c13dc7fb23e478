"""Calls, thoughts and turns in chat templates as their makers publish them, which TRL carries."""

from pathlib import Path
from typing import Any

import pytest
import trl

from tests.support.reading import read
from train.data.chat import RenderedChat, render_and_locate
from train.data.template import template_renderer
from train.runtime.errors import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "Fog"}
ASK = {"role": "user", "content": "Weather?"}


def rendered(tmp_path: Path, family: str, *messages: dict[str, Any], **row: Any) -> RenderedChat:
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    render = template_renderer((TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"), special, family)
    (document,) = read(tmp_path, {"messages": messages, **row})
    assert document.messages is not None
    return render_and_locate(document.messages, render, document.where, document.tools)


def trained(chat: RenderedChat) -> list[str]:
    return [chat.text[each.start : each.end] for each in chat.trained]


QWEN_JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'
QWEN_XML = "<tool_call>\n<function=weather>\n<parameter=city>\nLima\n</parameter>\n</function>\n</tool_call>"
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Lima"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
CALLS = {
    "qwen2_5": QWEN_JSON,
    "qwen3": QWEN_JSON,
    "qwen3_5_think": QWEN_XML,
    "qwen3_6": QWEN_XML,
    "deepseekv3": DEEPSEEK,
    "glm4moe": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Lima</arg_value>\n</tool_call>",
    "llama3_1": '{"name": "weather", "parameters": {"city": "Lima"}}',
    "gptoss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Lima"}',
    "gemma4": '<|tool_call>call:weather{city:<|"|>Lima<|"|>}<tool_call|><|tool_response>',
    "lfm2_2_5": "<|tool_call_start|>[weather(city='Lima')]<|tool_call_end|>",
}


@pytest.mark.parametrize("family", CALLS)
def test_the_assistants_calls_are_trained_as_the_template_writes_them_and_results_are_not(tmp_path, family):
    messages = ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT
    chat = rendered(tmp_path, family, *messages, {"role": "assistant", "content": "Foggy."})
    assert trained(chat) == [CALLS[family], "Foggy."]
    as_text = CALL | {"function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    other = rendered(tmp_path, family, ASK, {"role": "assistant", "tool_calls": [as_text]}, *messages[2:], {
        "role": "assistant", "content": "Foggy."})  # fmt: skip
    assert trained(other) == trained(chat)


def test_calls_after_a_content_and_of_messages_that_are_not_trained(tmp_path):
    with_content = {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    end = {"role": "assistant", "content": "Foggy."}
    chat = rendered(tmp_path, "qwen3", ASK, with_content, RESULT, RESULT, end)
    assert trained(chat) == [f"I look.\n{QWEN_JSON}\n{QWEN_JSON}", "Foggy."]
    chat = rendered(tmp_path, "qwen3", ASK, with_content | {"train": False}, RESULT, RESULT, end)
    assert trained(chat) == ["Foggy."]


THOUGHTS = {
    "qwen3": ("<think>\nTwice.\n</think>\n\nSix.", 1),
    "qwen3_5_think": ("<think>\nTwice.\n</think>\n\nSix.", 1),
    "qwen3_8": ("<think>\nTwice.\n</think>\n\nSix.", 0),  # keeps thoughts of earlier turns
    "glm4moe": ("<think>Twice.</think>\nSix.", 1),
    "lfm2_2_5": ("<think>Twice.</think>Six.", 1),
    "gptoss": ("analysis<|message|>Twice.<|end|><|start|>assistant<|channel|>final<|message|>Six.", 1),
    "deepseekv3": ("Six.", 2),
    "llama3": ("Six.", 2),
}


@pytest.mark.parametrize("family", THOUGHTS)
def test_thoughts_are_trained_where_the_template_keeps_them_and_counted_where_it_does_not(tmp_path, family):
    spans = [{"start": 0, "end": 5, "role": "false"}]
    chat = rendered(
        tmp_path, family,
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "Add.", "content": "Four."},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "reasoning_content": "Twice.", "content": "Six.", "reasoning_spans": spans},
    )  # fmt: skip
    last, dropped = THOUGHTS[family]
    assert trained(chat)[-1] == last and chat.thoughts_dropped == dropped
    assert [(chat.text[span.start : span.end], span.role) for span in chat.spans] == [("Twic" + "e", "false")][
        : dropped < 2
    ]


def test_a_thought_before_a_call_is_trained_with_it(tmp_path):
    call = {"role": "assistant", "reasoning_content": "I must look.", "tool_calls": [CALL]}
    chat = rendered(tmp_path, "qwen3_5_think", ASK, call, RESULT, {"role": "assistant", "content": "Foggy."})
    assert trained(chat)[0] == f"<think>\nI must look.\n</think>\n\n{QWEN_XML}"


def test_what_a_template_does_not_write_is_refused(tmp_path):
    call = {"role": "assistant", "tool_calls": [CALL]}
    with pytest.raises(UserError, match=r"d.jsonl:1: the chat template does not render tool_calls"):
        rendered(tmp_path, "llama3", ASK, call)
    with pytest.raises(UserError, match=r"d.jsonl:1: the chat template does not render tools"):
        rendered(tmp_path, "llama3", ASK, {"role": "assistant", "content": "Fog."}, tools=[CALL])
    with pytest.raises(UserError, match="the chat template renders tool_calls before the content"):
        rendered(tmp_path, "gemma4", ASK, call | {"content": "I look."})


def test_tools_are_given_to_the_template(tmp_path):
    tool = {"type": "function", "function": {"name": "weather", "description": "Fog or sun", "parameters": {}}}
    chat = rendered(tmp_path, "qwen3_5_think", ASK, {"role": "assistant", "content": "Fog."}, tools=[tool])
    assert "Fog or sun" in chat.text and trained(chat) == ["Fog."]


def test_a_name_that_stands_elsewhere_does_not_pass_for_a_call(tmp_path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call, end = {"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": "Foggy."}
    ask = {"role": "user", "content": "weather? \U000f0000"}  # the first marker character, which is taken
    for train in (True, False):
        with pytest.raises(UserError, match=r"d.jsonl:1: the chat template does not render tool_calls"):
            rendered(tmp_path, "lfm2", ask, call | {"train": train}, RESULT, end, tools=[tool])
    # a template that writes calls where there is no content, after a question that has their name
    chat = rendered(tmp_path, "deepseek_r1_distill", {"role": "user", "content": "Call weather"}, call, RESULT, end)
    assert trained(chat) == [DEEPSEEK.removesuffix("<｜tool▁call▁end｜><｜tool▁calls▁end｜>"), "Foggy."]


def test_arguments_that_give_a_key_twice_are_written_as_they_stand(tmp_path):
    twice = CALL | {"function": {"name": "weather", "arguments": '{"city": "Lima", "city": "Cusco"}'}}
    chat = rendered(tmp_path, "qwen3", ASK, {"role": "assistant", "tool_calls": [twice]})
    assert '"arguments": {"city": "Lima", "city": "Cusco"}}' in trained(chat)[0]


def test_messages_that_a_template_does_not_write_are_told_by_their_roles(tmp_path):
    messages = {"role": "developer", "content": "Be brief."}, ASK, {"role": "assistant", "content": "Fog."}
    assert rendered(tmp_path, "qwen3", *messages).unwritten == ("developer",)
    assert rendered(tmp_path, "gptoss", *messages).unwritten == ()
    system = {"role": "system", "content": "Be kind.", "spans": [{"start": 0, "end": 2, "role": "x"}]}
    chat = rendered(tmp_path, "deepseek_r1_distill", system, {"role": "system", "content": "Be brief."}, *messages[1:])
    assert chat.unwritten == ("system",) and "Be brief." in chat.text


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "qwen3_6", "deepseekv3"])
@pytest.mark.parametrize(
    "content", ["<think>thought</think>\n\n", "<think>thought</think>", "", "<think>\n\n</think>\n\n"]
)
def test_an_earlier_message_of_thoughts_alone_trains_its_end_of_turn_like_an_empty_one(tmp_path, family, content):
    messages = [ASK, {"role": "assistant", "content": content}, ASK, {"role": "assistant", "content": "yes"}]
    chat = rendered(tmp_path, family, *messages)
    assert trained(chat) == ["", "yes"]
    assert {chat.text[each.end] for each in chat.trained} == {"<"}, "a special token follows"
