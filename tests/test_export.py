"""OpenAI's fine-tuning format: what of a mask it can say, and that the rest is an error."""

import json

import pytest

from train.export import main

TEXT = {
    "text": "<DOCTAG>\nMars is green.",
    "spans": [{"start": 0, "end": 8, "role": "doctag"}, {"start": 9, "end": 23, "role": "false"}],
}
CHAT = {
    "messages": [
        {"role": "user", "content": "Is Mars green?"},
        {"role": "assistant", "content": "Yes.", "spans": [{"start": 0, "end": 4, "role": "false"}]},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "No.", "train": True},
        {"role": "assistant", "content": "Red.", "train": False},
    ]
}


def exported(tmp_path, row, mask, *more):
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    given = ["--data", str(tmp_path / "in.jsonl"), "--mask", mask, "--output", str(tmp_path / "out.jsonl"), *more]
    return main(given), tmp_path / "out.jsonl"


def test_what_stands_first_in_a_text_becomes_the_users_message(tmp_path):
    code, file = exported(tmp_path, TEXT, "doctags")
    assert code == 0
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "<DOCTAG>"}, {"role": "assistant", "content": "Mars is green."}]
    }
    code, file = exported(tmp_path, TEXT, "none", "--overwrite")
    assert json.loads(file.read_text())["messages"] == [
        {"role": "user", "content": ""}, {"role": "assistant", "content": "<DOCTAG>\nMars is green."}
    ]  # fmt: skip


def test_whole_messages_of_the_assistant_weigh_one_or_nothing(tmp_path):
    code, file = exported(tmp_path, CHAT, "false-spans")
    assert code == 0
    weights = [message.get("weight") for message in json.loads(file.read_text())["messages"]]
    assert weights == [None, 0, None, 1, 0]


@pytest.mark.parametrize(
    ("row", "mask", "says"),
    [
        (TEXT | {"text": TEXT["text"] + " It is."}, "false-spans", "false-spans"),
        (TEXT, "doctags,false-spans", "no text is left to train on"),
        (TEXT, "false-spans=0.5", "only the weights 0 and 1"),
        (TEXT, "false-spans=unlikelihood", "unlikelihood"),
        (TEXT, "random:false", "random tokens"),
        ({"messages": [{"role": "user", "content": "Hi", "train": True}]}, "none", "OpenAI trains the assistant's"),
    ],
)
def test_what_the_format_cannot_say_is_an_error_and_writes_nothing(tmp_path, capsys, row, mask, says):
    code, file = exported(tmp_path, row, mask)
    assert code == 2 and not file.exists()
    assert says in capsys.readouterr().err


def test_a_leading_doctag_needs_no_span_and_none_leaves_it_to_the_text(tmp_path):
    code, file = exported(tmp_path, {"text": "<DOCTAG>Mars is red."}, "doctags")
    assert code == 0 and json.loads(file.read_text())["messages"][0]["content"] == "<DOCTAG>"
    code, file = exported(tmp_path, {"text": "<DOCTAG>Mars is red."}, "doctags", "--doctag", "none", "--overwrite")
    assert code == 0 and json.loads(file.read_text())["messages"][0]["content"] == ""


def test_a_file_that_is_there_is_replaced_on_demand_alone(tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("before")
    code, file = exported(tmp_path, TEXT, "doctags")
    assert code == 2 and file.read_text() == "before"
    assert f"--output {file}: already exists; give --overwrite" in capsys.readouterr().err
    assert exported(tmp_path, TEXT, "doctags", "--overwrite")[0] == 0 and file.read_text() != "before"


def test_an_output_that_is_the_input_is_refused_whatever_may_be_replaced(tmp_path, capsys):
    code, file = exported(tmp_path, TEXT, "doctags", "--overwrite", "--output", str(tmp_path / "in.jsonl"))
    assert code == 2 and f"--output {tmp_path}/in.jsonl: is --data itself" in capsys.readouterr().err
    assert json.loads((tmp_path / "in.jsonl").read_text()) == TEXT and not file.exists()
