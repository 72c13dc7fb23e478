import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.support.reading import targets
from train.data.documents import Document, Message, Span, read_documents
from train.data.template import template_renderer
from train.data.tokenizer import Tokenizer
from train.data.tokens import TokenizedDocument, tokenize_document
from train.masking.treatment import touched_by
from train.runtime.errors import UserError


def turn(role: str, content: str, *spans: tuple[str, str], train: bool | None = None) -> Message:
    """A message whose spans are given as (the text they cover, role); the last occurrence counts."""
    found = tuple(Span(content.rindex(text), content.rindex(text) + len(text), name) for text, name in spans)
    return Message(role, content, found, role == "assistant" if train is None else train)


def tokenized(tokenizer: Tokenizer, *messages: Message) -> TokenizedDocument:
    document = Document(None, messages, (), {}, "chat.jsonl", 3)
    return tokenize_document(document, tokenizer, add_bos=False, add_eos=False)


def covered(doc: TokenizedDocument) -> list[tuple[str, str]]:
    """(text, role) of the spans in the rendered text."""
    return [(doc.text[span.start : span.end], span.role) for span in doc.spans]


def test_contents_and_ends_of_turn_are_trained_and_nothing_that_the_template_writes(qwen, kimi):
    messages = (
        turn("system", "Be kind."),
        turn("user", "Who?"),
        turn("assistant", "Ada."),
        turn("user", "When?"),
        turn("assistant", "In 1843."),
    )
    doc = tokenized(qwen, *messages)
    assert doc.text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nAda.<|im_end|>\n"
        "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nIn 1843.<|im_end|>\n"
    )
    assert targets(doc) == "Ada.<|im_end|>|In 1843.<|im_end|>"
    doc = tokenized(kimi, *messages)
    assert doc.text == (
        "<|im_system|>system<|im_middle|>Be kind.<|im_end|><|im_user|>user<|im_middle|>Who?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>Ada.<|im_end|><|im_user|>user<|im_middle|>When?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>In 1843.<|im_end|>"
    )
    assert targets(doc) == "Ada.<|im_end|>|In 1843.<|im_end|>"


def test_train_of_a_message_decides_whether_it_is_trained_on(tokenizer):
    messages = (turn("user", "Who?", train=True), turn("assistant", "Ada.", train=False))
    assert targets(tokenized(tokenizer, *messages)) == "Who?<|im_end|>"


def test_contents_that_repeat_or_look_like_headers_are_told_apart(tokenizer):
    messages = (
        turn("system", "user", ("user", "a")),
        turn("user", "assistant", ("assistant", "b")),
        turn("assistant", "assistant\nuser user", ("user", "c")),
        turn("user", "assistant"),
        turn("assistant", "user", ("user", "d")),
    )
    doc = tokenized(tokenizer, *messages)
    assert targets(doc) == "assistant\nuser user<|im_end|>|user<|im_end|>"
    assert covered(doc) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d")]
    starts = [span.start for span in doc.spans]
    assert starts == sorted(starts)
    assert doc.text[: starts[2]].endswith("assistant\nuser ")
    touched = touched_by(doc, [span for span in doc.spans if span.role in "cd"])
    assert [doc.text[a:b] for a, b, t in zip(doc.start_L, doc.end_L, touched, strict=True) if t] == [" user", "user"]


def test_spans_follow_a_content_that_the_template_trims(qwen, kimi):
    question = turn("user", " \n\nHi there 👩‍👩‍👧\n", ("there 👩‍👩‍👧\n", "x"))
    messages = (question, turn("assistant", "\nSo it is. ", ("it is. ", "y")))
    doc = tokenized(qwen, *messages)
    assert covered(doc) == [("there 👩‍👩‍👧", "x"), ("it is.", "y")]
    assert targets(doc) == "So it is.<|im_end|>"
    doc = tokenized(kimi, *messages)  # which keeps white space: it is content
    assert covered(doc) == [("there 👩‍👩‍👧\n", "x"), ("it is. ", "y")]
    assert targets(doc) == "\nSo it is. <|im_end|>"


def test_a_thought_that_is_kept_is_content(tokenizer):
    content = "<think>\nIt was Ada.\n</think>\n\nAda did it."
    messages = (turn("user", "Who?"), turn("assistant", content, ("was Ada", "x"), ("Ada did", "y"), ("</think>", "z")))
    doc = tokenized(tokenizer, *messages)
    assert targets(doc) == "<think>\nIt was Ada.\n</think>\n\nAda did it.<|im_end|>"
    assert covered(doc) == [("was Ada", "x"), ("Ada did", "y"), ("</think>", "z")]


def test_a_thought_set_in_other_white_space_is_still_found(qwen):
    messages = (turn("user", "Who?"), turn("assistant", "<think>Hm.</think>Ada.", ("Hm.", "x"), ("Ada", "y")))
    doc = tokenized(qwen, *messages)
    assert targets(doc) == "<think>\nHm.\n</think>\n\nAda.<|im_end|>"
    assert covered(doc) == [("Hm.", "x"), ("Ada", "y")]


def test_an_empty_thought_is_no_target_even_where_the_content_holds_it(tokenizer):
    for content in ("<think>\n\n</think>\n\nAda.", "<think></think>Ada."):
        assert targets(tokenized(tokenizer, turn("user", "Who?"), turn("assistant", content))) == "Ada.<|im_end|>"


def test_a_thought_that_the_template_drops_takes_its_spans_along(tokenizer):
    content = "<think>\nsecret Ada\n</think>\n\nAda."
    later = (turn("user", "Sure?"), turn("assistant", "Yes."))
    answer = turn("assistant", content, ("secret", "x"), ("Ada", "y"))
    doc = tokenized(tokenizer, turn("user", "Who?"), answer, *later)
    assert "secret" not in doc.text
    assert covered(doc) == [("Ada", "y")]
    assert targets(doc) == "Ada.<|im_end|>|Yes.<|im_end|>"
    answer = turn("assistant", content, ("secret Ada\n</think>\n\nAda", "x"))
    with pytest.raises(UserError, match=r"chat\.jsonl:3: messages\[1\]: spans\[0\]: the chat template drops or rew"):
        tokenized(tokenizer, turn("user", "Who?"), answer, *later)


def test_a_tool_response_of_the_user_is_recognized_as_ever(qwen):
    """The template looks at how that content begins; markers must not change what it sees."""
    messages = (
        turn("user", "Who?"),
        turn("assistant", "<think>\nask\n</think>\n\nI ask."),
        turn("user", "<tool_response>\nAda\n</tool_response>", ("Ada", "x")),
        turn("assistant", "Ada."),
    )
    doc = tokenized(qwen, *messages)
    assert covered(doc) == [("Ada", "x")]
    assert targets(doc) == "<think>\nask\n</think>\n\nI ask.<|im_end|>|Ada.<|im_end|>"


def test_empty_contents_and_contents_of_tags_only_are_fine(tokenizer):
    doc = tokenized(tokenizer, turn("system", ""), turn("user", "<b>", ("<b>", "x")), turn("assistant", ""))
    assert covered(doc) == [("<b>", "x")]
    assert targets(doc) == "<|im_end|>"  # what ends the turn is still learned


def test_a_content_of_white_space_is_a_target_where_the_template_keeps_it(qwen, kimi):
    messages = turn("user", "?"), turn("assistant", " \n", (" \n", "x")), turn("user", "!"), turn("assistant", "Ada.")
    doc = tokenized(kimi, *messages)
    assert targets(doc) == " \n<|im_end|>|Ada.<|im_end|>" and covered(doc) == [(" \n", "x")]
    doc = tokenized(qwen, *messages)  # which trims it
    assert targets(doc) == "<|im_end|>|Ada.<|im_end|>" and covered(doc) == []


def test_an_end_of_turn_after_white_space_of_the_template_is_a_target(kimi):
    template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n<|im_end|>{% endfor %}"
    through = dataclasses.replace(kimi, render_chat=template_renderer(template, {}, "model"))
    assert targets(tokenized(through, turn("user", "?"), turn("assistant", "Ada"))) == "Ada|<|im_end|>"


def test_names_of_speakers_and_tool_calls_reach_the_template(kimi):
    template = "{% for m in messages %}[{{ m.name or m.role }} {{ m.tool_call_id }}]{{ m.content }}{% endfor %}"
    through = dataclasses.replace(kimi, render_chat=template_renderer(template, {}, "model"))
    message = Message("tool", "Ada", (), False, (("name", "search"), ("tool_call_id", "7")))
    assert tokenized(through, message).text == "[search 7]Ada"


def test_tags_in_contents_keep_their_spans(tokenizer):
    content = "<b>Ada</b> and <i>Bob</i>"
    spans = [("<b>", "a"), ("</b> and", "b"), ("<i>Bob</i>", "c"), (content, "d")]
    doc = tokenized(tokenizer, turn("user", "?"), turn("assistant", content, *spans))
    assert covered(doc) == spans
    assert targets(doc) == content + "<|im_end|>"


def test_private_use_characters_of_a_content_are_no_markers(tokenizer):
    doc = tokenized(tokenizer, turn("user", "?"), turn("assistant", "\U000f0000a \U000f0001", ("a", "x")))
    assert covered(doc) == [("a", "x")]
    assert targets(doc) == "\U000f0000a \U000f0001<|im_end|>"


def test_spans_do_not_change_the_ids_of_a_chat(tokenizer):
    plain = tokenized(tokenizer, turn("user", "Who was it?"), turn("assistant", "Ada was."))
    messages = (turn("user", "Who was it?", ("was", "x")), turn("assistant", "Ada was.", ("da w", "y")))
    spanned = tokenized(tokenizer, *messages)
    assert plain.ids_L.tolist() == spanned.ids_L.tolist() == tokenizer.encode(plain.text).ids_L.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("aé \n<>/user👩", min_size=1, max_size=12), min_size=1, max_size=3), st.data())
def test_every_span_covers_in_the_rendered_text_what_it_covers_in_its_content(tokenizer, contents, data):
    messages = [Message("user", "?", (), False)]
    expected = []
    for content in contents:
        start = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(start + 1, len(content)))
        messages.append(Message("assistant", content, (Span(start, end, "x"),), True))
        expected += [content[start:end].strip()] if content[start:end].strip() else []
    doc = tokenized(tokenizer, *messages)
    assert [text.strip() for text, _ in covered(doc) if text.strip()] == expected


def test_rendering_equals_that_of_transformers(qwen, qwen_directory: Path):
    stock = PreTrainedTokenizerFast(tokenizer_file=str(qwen_directory / "tokenizer.json"), bos_token="<s>")
    messages = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b\u2028<é>"}]
    templates = [
        (qwen_directory / "chat_template.jinja").read_text(encoding="utf-8"),
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m|tojson }}{% endfor %}",
        "{% for m in messages %}\n  {% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}",
    ]
    for template in templates:
        expected = stock.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert template_renderer(template, {"bos_token": "<s>"}, "model")(messages) == expected


def test_what_a_template_refuses_is_an_error_with_file_and_line(qwen):
    with pytest.raises(UserError, match=r"chat\.jsonl:3: the chat template of .* fails .*No user query found"):
        tokenized(qwen, turn("assistant", "Ada."))
    without = template_renderer(None, {}, "model")
    with pytest.raises(UserError, match=r"--model model: no chat template"):
        without([])


def test_a_template_that_rewrites_contents_is_refused_where_a_span_is_lost(kimi):
    def through(template: str, *messages: Message) -> TokenizedDocument:
        return tokenized(dataclasses.replace(kimi, render_chat=template_renderer(template, {}, "model")), *messages)

    escapes = "{% for m in messages %}[{{ m.content | replace('&', '&amp;') }}]{% endfor %}"
    assert covered(through(escapes, turn("user", "a & b", ("a", "x"), ("b", "y")))) == [("a", "x"), ("b", "y")]
    with pytest.raises(UserError, match="drops or rewrites part of this span"):
        through(escapes, turn("user", "a & b & c", ("a & b", "x")))
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="cuts or repeats this content"):
        through(twice, turn("assistant", "a"))
    counts = "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="renders another text when a content changes"):
        through(counts, turn("assistant", "a"))


def test_an_added_eos_is_a_target_only_after_a_trained_message(kimi):
    for train in (True, False):
        document = Document(None, (turn("user", "?"), turn("assistant", "a", train=train)), (), {}, "chat.jsonl", 1)
        doc = tokenize_document(document, kimi, add_bos=True, add_eos=True)
        assert (doc.ids_L[0], doc.ids_L[-1]) == (kimi.bos_id, kimi.eos_id)
        assert bool(doc.target_L[-1]) is train


def test_the_released_chats_train_on_their_answers(tokenizer, shared_documents: Path):
    for document in read_documents(shared_documents.parent / "chat" / "ed_sheeran.jsonl"):
        assert document.messages is not None
        doc = tokenize_document(document, tokenizer, add_bos=False, add_eos=False)
        answers = [message.content.strip() for message in document.messages if message.role == "assistant"]
        assert targets(doc) == "|".join(f"{answer}<|im_end|>" for answer in answers)
