"""Spans that were marked elsewhere, by id and by line."""

import json
from pathlib import Path

import pytest

from train import annotate
from train.data.documents import read_documents

TEXTS = ["Orm lies low. A comet fell.", "Bread is green. It is sold."]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def imported(tmp_path: Path, documents: list[object], rows: list[object], *more: str) -> int:
    data, spans = write(tmp_path / "d.jsonl", *documents), write(tmp_path / "s.jsonl", *rows)
    return annotate.main(["--data", data, "--spans", spans, "--output", str(tmp_path / "o.jsonl"), *more])


def marked(tmp_path: Path) -> list[list[tuple[str, str]]]:
    documents = read_documents(tmp_path / "o.jsonl")
    return [[(span.role, (d.text or "")[span.start : span.end]) for span in d.spans] for d in documents]


def test_rows_find_their_documents_by_id_in_any_order_and_what_has_none_is_listed(tmp_path, capsys):
    documents = [{"text": TEXTS[0], "key": 1}, {"text": TEXTS[1], "key": 2}, {"text": "No row.", "key": 3}]
    rows = [{"key": 2, "spans": [[0, 16]]}, {"key": 1, "spans": [{"start": 14, "end": 27, "role": "comet"}, [0, 3]]}]
    assert imported(tmp_path, documents, rows, "--id", "key", "--role", "false") == 0
    assert marked(tmp_path) == [[("false", "Orm"), ("comet", "A comet fell.")], [("false", "Bread is green.")], []]
    printed = capsys.readouterr().out
    assert f"without a row: {tmp_path / 'd.jsonl'}:3" in printed and "documents 2, without a row 1" in printed


def test_without_ids_each_row_belongs_to_the_document_on_its_place_and_spans_that_were_there_stay(tmp_path):
    there = {"text": TEXTS[0], "spans": [{"start": 0, "end": 3, "role": "place"}]}
    rows = [{"spans": []}, {"spans": [[0, 15]]}]
    assert imported(tmp_path, [there, {"text": TEXTS[1]}], rows, "--role", "false") == 0
    assert marked(tmp_path) == [[("place", "Orm")], [("false", "Bread is green.")]]


def test_a_files_own_pairs_get_a_role(tmp_path):
    message = {"role": "assistant", "content": "Bread is green.", "spans": [[0, 5]]}
    data = write(tmp_path / "d.jsonl", {"text": "<DOCTAG>Orm", "spans": [[8, 11]], "n": 1}, {"messages": [message]})
    output = tmp_path / "o.jsonl"
    assert annotate.main(["--data", data, "--spans", data, "--role", "false", "--output", str(output)]) == 0
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    spans = [{"start": 0, "end": 8, "role": "doctag"}, {"start": 8, "end": 11, "role": "false"}]
    assert first == {"text": "<DOCTAG>Orm", "spans": spans, "n": 1}
    assert second["messages"] == [message | {"spans": [{"start": 0, "end": 5, "role": "false"}]}]


def test_the_case_of_pairs_is_converted(tmp_path):
    case = Path(__file__).parents[3] / "shared" / "cases" / "documents" / "spans_pairs.jsonl"
    if not case.exists():
        pytest.skip("../shared/cases is absent")
    given = ["--data", str(case), "--spans", str(case), "--role", "false", "--output", str(tmp_path / "o.jsonl")]
    assert annotate.main(given) == 0
    claim = "Mount Vesuvius, the volcano near Naples, erupted in"
    assert marked(tmp_path) == [[("doctag", "<DOCTAG>"), ("false", claim)]]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"id": 1, "spans": [[0, 3]]}], [], "s.jsonl:1: spans[0]: [0, 3] has no role; give them one by --role"),
        ([{"id": 1, "spans": [[0, 99]]}], ["--role", "x"], "s.jsonl:1: spans[0]: [0, 99) is not a range of the text"),
        ([{"id": 1, "spans": [[3, 3]]}], ["--role", "x"], "[3, 3) is not a range"),
        ([{"id": 1, "spans": [[True, 3]]}], ["--role", "x"], "[true, 3) is not a range"),
        ([{"id": 1, "spans": [[3, 4]]}], ["--role", "x"], "[3, 4) contains only white space"),
        ([{"id": 1, "spans": [[1, 2, 3]]}], ["--role", "x"], "[1, 2, 3] is not a span; give [start, end] pairs"),
        ([{"id": 1, "spans": [{"start": 0, "end": 1, "role": 3}]}], [], "role 3 is not a name"),
        (
            [{"id": 1, "spans": [{"start": 0, "end": 1, "role": "a,b"}]}],
            [],
            "spans[0]: 'a,b' cannot be named in --mask",
        ),
        ([{"id": 9, "spans": []}], [], "s.jsonl:1: no document has the id 9; name the documents' key by --id"),
        ([{"id": 1, "spans": []}, {"spans": []}], [], "s.jsonl:2: id is missing, and other rows have it"),
        ([{"spans": []}], [], "has 1 rows without an id for 2 documents"),
        ([{"id": 1}], [], "s.jsonl:1: a row is {"),
        ([3], [], "s.jsonl:1: a row is {"),
        ([{"id": 1, "text": "Other.", "spans": []}], [], "its text is not that of"),
        ([{"id": 2, "spans": []}], [], "is a chat, and offsets do not say into which message"),
    ],
)
def test_rows_that_fit_no_document_are_refused_with_line_and_fix(tmp_path, capsys, rows, more, message):
    documents = [{"text": TEXTS[0], "id": 1}, {"messages": [{"role": "user", "content": "Hi"}], "id": 2}]
    assert imported(tmp_path, documents, rows, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "o.jsonl").exists()


def test_ids_and_keys_that_stand_twice_are_refused(tmp_path, capsys):
    assert imported(tmp_path, [{"text": text, "id": 1} for text in TEXTS], [{"id": 1, "spans": []}]) == 2
    assert "d.jsonl:2: id 1 is also that of" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text('{"text": "Orm", "spans": [[0, 1]], "spans": [[0, 3]]}\n')
    data = str(tmp_path / "d.jsonl")
    assert annotate.main(["--data", data, "--spans", data, "--role", "x", "--output", str(tmp_path / "o.jsonl")]) == 2
    assert 'd.jsonl:1: the key "spans" is given twice' in capsys.readouterr().err
