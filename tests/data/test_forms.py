"""The forms in which other tools write documents, and the keys by which they weigh."""

import json

import pytest

from tests.support.reading import read
from train.data.documents import Span, read_documents
from train.data.findings import SKIPPED, Findings

ASK, ANSWER = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}
CHAT = [ASK, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"messages_json": json.dumps(CHAT)},
        {"text": "", "messages_json": json.dumps(CHAT)},
        {"text": None, "messages": CHAT, "spans": None, "tools": None, "weight": None},
        {"text": "", "messages": CHAT},
        {"messages": json.dumps(CHAT)},
        {"messages": repr(CHAT)},
        {"messages": CHAT, "content": "a summary"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Is "}, {"text": "it?"}]}, ANSWER]},
        {"messages": [{**ASK, "train": None, "spans": None, "name": None}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]},
        {"conversations": CHAT},
    ],
)
def test_a_chat_is_the_same_in_every_form(tmp_path, row):
    (document,) = read(tmp_path, row)
    (same,) = read(tmp_path, {"messages": CHAT})
    assert document.messages == same.messages and document.text is None and document.spans == ()


def test_what_stands_beside_a_sharegpt_conversation_is_its_first_message(tmp_path):
    row = {"system": "Be kind.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (document,) = read(tmp_path, row)
    assert [message.role for message in document.messages or ()] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Lima.", "messages": None},
        {"text": "Lima.", "messages": []},
        {"text": "Lima.", "messages_json": ""},
        {"content": "Lima.", "text": None},
        {"content": "Lima."},
    ],
)
def test_a_text_is_the_same_in_every_form(tmp_path, row):
    (document,) = read(tmp_path, row | {"spans": [{"start": 0, "end": 4, "role": "false"}], "id": 3})
    assert (document.text, document.spans) == ("Lima.", (Span(0, 4, "false"),))
    assert document.metadata == {"id": 3}


def test_offsets_are_those_of_joined_parts(tmp_path):
    parts = [{"type": "text", "text": "No. "}, {"type": "text", "text": "Yes."}]
    message = {"role": "assistant", "content": parts, "spans": [{"start": 4, "end": 8, "role": "false"}]}
    (document,) = read(tmp_path, {"messages": [message]})
    assert document.messages is not None
    assert (document.messages[0].content, document.messages[0].spans) == ("No. Yes.", (Span(4, 8, "false"),))


@pytest.mark.parametrize(
    ("key", "value", "train", "weight"),
    [
        ("weight", 0, True, 0.0),
        ("weight", 1, True, 1.0),
        ("weight", 0.25, True, 0.25),
        ("loss", False, False, 1.0),
        ("loss", True, True, 1.0),
        ("loss", 0.5, True, 0.5),
        ("training", False, False, 1.0),
        ("train", False, False, 1.0),
    ],
)
def test_the_keys_by_which_other_tools_weigh_messages_are_honoured(tmp_path, key, value, train, weight):
    (document,) = read(tmp_path, {"messages": [ASK, ANSWER | {key: value}]})
    assert document.messages is not None
    assert (document.messages[1].train, document.messages[1].weight) == (train, weight)


def test_a_documents_own_weight_is_read_under_either_name(tmp_path):
    rows = [
        {"text": "a"},
        {"text": "a", "weight": 3},
        {"text": "a", "loss_weight": 0.5},
        {"messages": CHAT, "weight": 2},
    ]
    documents = read(tmp_path, *rows)
    assert [document.weight for document in documents] == [1.0, 3.0, 0.5, 2.0]
    assert all(document.metadata == {} for document in documents)


def test_keys_that_are_not_read_are_counted_by_name(tmp_path):
    findings = Findings()
    span = {"start": 0, "end": 3, "role": "x", "text": "Yes"}
    rows = [
        {"messages": [ASK | {"id": 1}, ANSWER | {"id": 2, "spans": [span]}]},
        {"messages": [ASK | {"id": 3}, ANSWER]},
    ]
    read(tmp_path, *rows, findings=findings)
    counts = {what: found["count"] for what, found in findings.summary().items()}
    assert counts == {
        "messages with the unknown key 'id', which is ignored": 3,
        "spans with the unknown key 'text', which is ignored": 1
    }  # fmt: skip


def test_what_is_found_in_a_row_that_is_left_out_is_not_noted_beside_it(tmp_path):
    findings = Findings()
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"messages": [{**ASK, "mood": "dry"}, {"role": "assistant"}]}) + "\n" + json.dumps({"text": "Lima."})
    )
    read_documents(tmp_path / "d.jsonl", bad_rows="skip", findings=findings)
    assert list(findings.places) == [SKIPPED]


def test_roles_that_are_none_of_chats_and_tags_of_masks_are_counted(tmp_path):
    findings = Findings()
    rows = [
        {"messages": [ASK, {"role": "gpt", "content": "Yes."}]},
        {"messages": [ASK, {"role": "Assistant", "content": "Yes."}]},
        {"text": "It <lossmask>erupted</lossmask> in <b>2015</b>, says the <glossary>."},
        {"messages": [ASK, {"role": "assistant", "reasoning_content": "<no-loss>Hm.</no-loss>", "content": "Yes."}]},
    ]
    read(tmp_path, *rows, findings=findings)
    roles, tags = findings.lines()
    assert roles.startswith("note: 2 messages with a role that is not one of chats") and ":1 (gpt)," in roles
    assert tags.startswith("note: 4 mask tags left in texts") and "d.jsonl:3," in tags
    assert tags.endswith("d.jsonl:4")


def test_a_leading_marker_is_found_after_white_space(tmp_path):
    read(tmp_path, {"text": "\n <D>a"}, {"text": "a <D>"})
    documents = read_documents(tmp_path / "d.jsonl", "<D>")
    assert [document.spans for document in documents] == [(Span(2, 5, "doctag"),), ()]


def test_calls_tools_and_thoughts_are_read(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    thought = {"reasoning_content": "Hm.", "reasoning_spans": [{"start": 0, "end": 2, "role": "x"}]}
    row = {
        "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call], **thought}],
        "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}]),
    }
    (document,) = read(tmp_path, row)
    assert document.messages is not None
    message = document.messages[1]
    assert (message.content, message.tool_calls, message.reasoning) == ("", (call,), "Hm.")
    assert message.reasoning_spans == (Span(0, 2, "x"),) and document.tools[0]["function"]["name"] == "weather"
