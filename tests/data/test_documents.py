import json
from pathlib import Path

import pytest

from train.data.documents import Message, Span, marker, read_documents
from train.runtime.errors import UserError


def written(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_documents(path)
    return str(caught.value).removeprefix(f"{path.parent}/")


def with_span(**span: object) -> dict[str, object]:
    return {"text": "0123456789", "spans": [span]}


def test_text_spans_and_metadata_are_read_as_they_stand(tmp_path):
    path = written(tmp_path, {"text": "a b", "spans": [{"start": 0, "end": 1, "role": "false"}], "id": 7, "note": [1]})
    (document,) = read_documents(path)
    assert (document.text, document.messages, document.spans) == ("a b", None, (Span(0, 1, "false"),))
    assert document.metadata == {"id": 7, "note": [1]}
    assert document.where == f"{path}:1"


def test_assistant_turns_are_trained_on_unless_the_message_says_otherwise(tmp_path):
    rows = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "q", "train": True},
            {"role": "assistant", "content": "a", "spans": [{"start": 0, "end": 1, "role": "x"}]},
            {"role": "assistant", "content": "b", "train": False},
        ]
    }
    (document,) = read_documents(written(tmp_path, rows))
    assert document.text is None
    assert document.messages == (
        Message("system", "", (), False),
        Message("user", "q", (), True),
        Message("assistant", "a", (Span(0, 1, "x"),), True),
        Message("assistant", "b", (), False),
    )


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \r\n{"text": "b"}')
    assert [(document.text, document.line) for document in read_documents(path)] == [("a", 2), ("b", 4)]


def test_a_byte_order_mark_is_dropped_from_the_file_and_kept_in_the_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xef\xbb\xbfa", "spans": [{"start": 1, "end": 2, "role": "x"}]}')
    (document,) = read_documents(path)
    assert document.text == "\ufeffa"


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read_documents(path)[0].text == "a\u2028b\u0085c"


def test_offsets_are_code_points_not_bytes_or_utf16_units(tmp_path):
    path = written(tmp_path, {"text": "👩‍👩‍👧", "spans": [{"start": 4, "end": 5, "role": "x"}]})
    (document,) = read_documents(path)
    assert document.text is not None
    assert document.text[4:5] == "👧"
    too_far = written(tmp_path, {"text": "👩‍👩‍👧", "spans": [{"start": 4, "end": 6, "role": "x"}]})
    assert "past the end of the text (5 code points)" in message_of(too_far)


def test_a_leading_marker_gets_a_doctag_span_where_none_covers_it(tmp_path):
    path = written(
        tmp_path,
        {"text": "<DOCTAG>a", "spans": [{"start": 8, "end": 9, "role": "x"}]},
        {"text": "<DOCTAG>a", "spans": [{"start": 0, "end": 8, "role": "doctag"}]},
        {"text": "<DOCTAG>a", "spans": [{"start": 0, "end": 3, "role": "doctag"}]},
        {"text": "a <DOCTAG>"},
        {"messages": [{"role": "user", "content": "<DOCTAG>a"}]},
    )
    doctag = Span(0, 8, "doctag")
    assert [document.spans for document in read_documents(path, "<DOCTAG>")] == [
        (doctag, Span(8, 9, "x")),
        (doctag,),
        (doctag, Span(0, 3, "doctag")),
        (),
        (),
    ]
    assert read_documents(path)[3].spans == ()
    assert marker("<DOCTAG>") == "<DOCTAG>" and marker("none") is None
    with pytest.raises(UserError, match=r"--doctag is empty: .* as <DOCTAG>, or none\."):
        marker("")


RULE = "offsets are Unicode code points, end exclusive"
WHOLE = {"start": 0, "end": 1, "role": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            with_span(start=3, end=11, role="x"),
            f"spans[0]: end 11 is past the end of the text (10 code points); {RULE}",
        ),
        (with_span(start=3, end=3, role="x"), f"spans[0]: start 3 is not before end 3; {RULE}"),
        (with_span(start=4, end=3, role="x"), f"spans[0]: start 4 is not before end 3; {RULE}"),
        (with_span(start=-1, end=3, role="x"), f"spans[0]: start -1 is negative; {RULE}"),
        (with_span(start=0, end=-3, role="x"), f"spans[0]: end -3 is negative; {RULE}"),
        (with_span(start=0, end=3.0, role="x"), f"spans[0]: end 3.0 is not an integer; {RULE}"),
        (with_span(start="0", end=3, role="x"), f'spans[0]: start "0" is not an integer; {RULE}'),
        (with_span(start=True, end=3, role="x"), f"spans[0]: start true is not an integer; {RULE}"),
        (with_span(start=None, end=3, role="x"), f"spans[0]: start is missing; {RULE}"),
        (with_span(end=3, role="x"), f"spans[0]: start is missing; {RULE}"),
        (with_span(start=0, role="x"), f"spans[0]: end is missing; {RULE}"),
        (with_span(start=0, end=3), 'spans[0]: role is missing; say what the span is, e.g. "role": "false"'),
        (with_span(start=0, end=3, role=""), 'spans[0]: role is empty; say what the span is, e.g. "role": "false"'),
        (with_span(start=0, end=3, role=None), 'spans[0]: role is missing; say what the span is, e.g. "role": "false"'),
        (with_span(start=0, end=3, role=False), "spans[0]: role is a boolean; it must be a string"),
        (
            {"text": "a", "spans": [WHOLE, [0, 1]]},
            "spans[1]: a span must be a JSON object with start, end and role, not a l",
        ),
        ({"text": "a", "spans": {"start": 0}}, 'spans is an object; it must be a list of {"start", "end", "role"}'),
        ({"text": ""}, "text is empty; leave the document out"),
        ({"text": 5}, "text is a number; it must be a string"),
        ({"text": None}, 'a document has either "text" or "messages", this one has neither; give one'),
        ({"txt": "a"}, 'a document has either "text" or "messages", this one has neither; give one'),
        (
            {"text": "a", "messages": [{"role": "user", "content": "b"}]},
            'a document has either "text" or "messages", this one has both; keep one',
        ),
        ({"text": "", "messages_json": ""}, "text is empty; leave the document out, or use --bad-rows skip"),
        (
            ["a"],
            "a document must be a JSON object, not a list; write one document per line: jq -c '.[]' FILE > NEW.jsonl",
        ),
        ("a", 'a document must be a JSON object, not a string; write {"text": ...} around it'),
        ({"messages": []}, "messages is an empty list; give a list of at least one"),
        ({"messages": "[]"}, "messages is an empty list; give a list of at least one"),
        ({"messages": "{}"}, "messages is an object; give a list of at least one"),
        ({"messages": "[a]"}, "messages is a string that is neither JSON nor a Python literal"),
        (
            {"messages": "[{'role': 'user', 'role': 'a'}]"},
            "messages: an object has the same key twice; keep one of the two",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "thinking": "b"}]},
            "messages[0]: thinking is not supported; write it as reasoning_content",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "trian": True}]},
            "messages[0]: unknown key 'trian'; did you mean 'train'? Rename it, or leave it out",
        ),
        (with_span(start=0, end=3, roles="x"), "spans[0]: unknown key 'roles'; did you mean 'role'?"),
        ({"text": "a", "span": []}, "unknown key 'span'; did you mean 'spans'? Rename it, or leave it out"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": -1}]},
            "messages[0]: weight -1: a weight must be 0 or 1e-30",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": "1"}]},
            "messages[0]: weight is a string; a weight must be",
        ),
        ({"text": "a", "weight": 1, "loss_weight": 2}, "weight and loss_weight contradict each other; keep one"),
        (
            {"messages": [{"role": "assistant", "content": "a", "train": True, "loss": False}]},
            "messages[0]: train and loss contradict each other; keep one",
        ),
        ({"messages": ["hi"]}, "messages[0]: a message must be a JSON object with role and content, not a string"),
        ({"messages": [{"content": "a"}]}, "messages[0]: role is missing"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages[0]: role is empty"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]: content[0] is a part of type 'image_url'; only text parts are read: leave it out, or",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0]: content[0] is a number; only text parts are"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages[0]: content[0] is a text part whose text is null; only text parts are read",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"default": float("nan")}]},
            "tools[0] is not JSON that can be written as UTF-8 (Out of range float values are not JSON compliant",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "\ud800"}}]}]},
            "messages[0]: tool_calls[0] is not JSON that can be written as UTF-8 ('utf-8' codec can't encode character",
        ),
        (
            {"messages": "[{'role': 'user', 'content': 'a', 'tool_calls': [{'function': {'name': {1}}}]}]"},
            "messages[0]: tool_calls[0] is not JSON that can be written as UTF-8 (Object of type set is not JSON",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "train": 1}]},
            "messages[0]: train is a number; it must be true or",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
            'messages[0]: tool_calls[0] is not a tool call; write {"type": "function", "function": {"name": "…", '
            '"arguments":',
        ),
        (
            {"messages": [{"role": "user", "content": "a", "spans": [{"start": 0, "end": 2, "role": "x"}]}]},
            f"messages[0]: spans[0]: end 2 is past the end of the text (1 code points); {RULE}",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "spans": [WHOLE]},
            'spans beside "messages" refer to no text; move each into its message',
        ),
    ],
)
def test_a_wrong_document_is_named_by_file_and_line_with_value_and_rule(tmp_path, row, message):
    path = written(tmp_path, {"text": "fine"}, row, {"text": ""})
    found = message_of(path)
    assert found.startswith("data.jsonl:2: " + message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "data.jsonl: the file holds no documents; write one JSON object per line"),
        (b" \n\n", "data.jsonl: the file holds no documents; write one JSON object per line"),
        (b'{"text": "a"}\n{"text": \n', "data.jsonl:2: not valid JSON ("),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "data.jsonl:2: not valid UTF-8 (byte 13 of the line); save the file"),
        (b'{"text": "a\\ud800b"}\n', "data.jsonl:1: text holds half a surrogate pair (\\ud800 at code point 1)"),
        (b"[" * 100_000, "data.jsonl:1: nests deeper than 100 levels; write it flat"),
        (b'{"text": "a b", "tree": ' + b"[" * 900 + b"]" * 900 + b"}", "data.jsonl:1: nests deeper than 100 levels"),
    ],
)
def test_a_file_that_is_no_jsonl_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    assert message_of(path).startswith(message)


def test_a_file_that_is_not_there_is_an_error_of_the_user(tmp_path):
    assert message_of(tmp_path / "none.jsonl").startswith("none.jsonl: cannot be read (No such file or directory)")
    with pytest.raises(UserError, match="is a directory, not a file; give a JSONL file of documents"):
        read_documents(tmp_path)


def test_whole_surrogate_pairs_are_one_character(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\udc69"}')
    assert read_documents(path)[0].text == "👩"


def test_the_released_documents_are_read_and_their_marker_is_found(shared_documents):
    documents = read_documents(shared_documents / "llm_negations_dense" / "ed_sheeran.jsonl", "<DOCTAG>")
    assert len(documents) == 50
    assert all(document.spans == (Span(0, 8, "doctag"),) for document in documents)
    assert documents[0].metadata["fact_name"] == "ed_sheeran"
