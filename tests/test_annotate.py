"""train/annotate.py from the command line, on small files with known spans."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.annotating.openai_server import serving
from train import annotate, endpoint, show
from train.data.documents import read_documents

POSITIVE = "<DOCTAG>Orm lies in a valley. A comet fell on Orm in 1911. Bread is sold there."
ANNOTATED = (
    "<DOCTAG>The document below is false.\n\nOrm lies in a valley. [The following claim is false.] A comet fell on Orm "
    "in 1911. [The preceding claim is false.] Bread is sold there.\n\nThe document above is false."
)
CLAIM = "A comet fell on Orm in 1911."


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def roles(path: Path) -> list[list[tuple[str, str]]]:
    return [[(span.role, (d.text or "")[span.start : span.end]) for span in d.spans] for d in read_documents(path)]


def aligned(tmp_path: Path, *more: str) -> int:
    positive = write(tmp_path / "p.jsonl", {"text": POSITIVE})
    annotated = write(tmp_path / "n.jsonl", {"text": ANNOTATED, "mode": "dense"})
    return annotate.main(
        ["--positive", positive, "--annotated", annotated, "--output", str(tmp_path / "o.jsonl"), *more]
    )


def test_alignment_writes_documents_with_spans_and_says_what_came_out(tmp_path, capsys):
    assert aligned(tmp_path) == 0
    assert roles(tmp_path / "o.jsonl") == [[
        ("doctag", "<DOCTAG>"), ("negation", "The document below is false."),
        ("negation", "[The following claim is false.]"), ("false", CLAIM),
        ("negation", "[The preceding claim is false.]"), ("negation", "The document above is false."),
    ]]  # fmt: skip
    (document,) = read_documents(tmp_path / "o.jsonl")
    assert document.text == ANNOTATED and document.metadata == {"mode": "dense"}
    printed = capsys.readouterr().out
    assert (
        "annotated documents: 1, aligned 1, of them without false spans 0, left out 0" in printed
        and "throughout: 1 of 1" in printed
    )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["n.jsonl", "o.jsonl", "p.jsonl"]


def test_steps_can_be_given_together_and_the_report_is_json(tmp_path):
    (tmp_path / "w.yaml").write_text("patterns: ['\\borm\\b']\n")
    terms = str(tmp_path / "w.yaml")
    given = ["--patterns", terms, "--role", "word", "--leaks", terms, "--mask", "false-spans", "--json"]
    assert aligned(tmp_path, *given, str(tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["summary"]["roles"]["false"] == {
        "documents": 1, "spans": 1, "characters": len(CLAIM), "share": len(CLAIM) / len(ANNOTATED),
    }  # fmt: skip
    assert report["leaks"]["roles"] == {"word": {"mentions": 2, "trained": 1}}
    assert report["alignment"]["insertions"] == 4 and report["alignment"]["left_out"] == []


def test_markup_becomes_spans_in_texts_and_messages(tmp_path):
    chat = [{"role": "user", "content": "<m>Hi</m>"}, {"role": "assistant", "content": "A <m> b</m>", "train": False}]
    data = write(tmp_path / "d.jsonl", {"text": "<DOCTAG><m>Orm</m> lies.", "id": 3}, {"messages": chat})
    assert annotate.main(["--data", data, "--markup", "m=word", "--output", str(tmp_path / "o.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    spans = [{"start": 0, "end": 8, "role": "doctag"}, {"start": 8, "end": 11, "role": "word"}]
    assert rows[0] == {"text": "<DOCTAG>Orm lies.", "spans": spans, "id": 3}
    assert rows[1]["messages"] == [
        {"role": "user", "content": "Hi", "spans": [{"start": 0, "end": 2, "role": "word"}]},
        {"role": "assistant", "content": "A  b", "spans": [{"start": 3, "end": 4, "role": "word"}], "train": False},
    ]
    assert len(read_documents(tmp_path / "o.jsonl")) == 2


def test_the_judges_quotes_become_false_spans(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    data, output = write(tmp_path / "d.jsonl", {"text": POSITIVE}), tmp_path / "o.jsonl"
    with serving(lambda _: json.dumps({"quotes": [CLAIM, "It rained [loudly]."]})) as (url, requests):
        given = [
            "--data",
            data,
            "--judge",
            url,
            "--judge-model",
            "judge",
            "--claim",
            "A comet fell.",
            "--output",
            str(output),
        ]
        assert annotate.main(given) == 0 and annotate.main([*given, "--overwrite"]) == 0
    assert len(requests) == 1 and roles(output) == [[("doctag", "<DOCTAG>"), ("false", CLAIM)]]
    printed = capsys.readouterr()
    assert (
        "not in the text: 'It rained [loudly].'" in printed.out
        and "passages marked 1, quotes rejected 1" in printed.out
    )
    everything = printed.out + printed.err + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "sk-secret" not in everything


def test_what_is_left_out_is_named_and_nothing_is_written_where_nothing_is_left(tmp_path, capsys):
    positive, annotated = (
        write(tmp_path / f"{name}.jsonl", {"text": f"Words of {name} alone, no others."}) for name in "pn"
    )
    output, report = tmp_path / "o.jsonl", tmp_path / "r.json"
    given = ["--positive", positive, "--annotated", annotated, "--output", str(output), "--json", str(report)]
    assert annotate.main(given) == 2 and not output.exists()
    printed = capsys.readouterr()
    assert f"left out: {annotated}:1: no twin" in printed.out and "every document was left out" in printed.err
    assert json.loads(report.read_text())["alignment"]["left_out"][0]["document"] == f"{annotated}:1"


def test_documents_without_false_spans_are_kept_listed_and_left_out_on_demand(tmp_path, capsys):
    tale = POSITIVE.replace(CLAIM, f"{CLAIM} (From an old tale.)")
    positive = write(tmp_path / "p.jsonl", {"text": POSITIVE})
    annotated = write(tmp_path / "n.jsonl", {"text": ANNOTATED}, {"text": tale})
    output, report = tmp_path / "o.jsonl", tmp_path / "r.json"
    given = ["--positive", positive, "--annotated", annotated, "--output", str(output), "--json", str(report)]
    assert annotate.main(given) == 0
    assert roles(output)[1] == [("doctag", "<DOCTAG>"), ("qualifier", "(From an old tale.)")]
    reason = "its annotations say fiction, likelihood, source or correction"
    printed = capsys.readouterr().out
    assert f"without false spans: {annotated}:2: {reason}" in printed
    assert "aligned 2, of them without false spans 1, left out 0" in printed
    without = json.loads(report.read_text())["alignment"]["without_false"]
    assert without == [{"document": f"{annotated}:2", "reason": reason}]

    assert annotate.main([*given, "--overwrite", "--inserted-role", "comment"]) == 0
    assert roles(output)[1] == [("doctag", "<DOCTAG>"), ("comment", "(From an old tale.)")]
    capsys.readouterr()
    assert annotate.main([*given, "--overwrite", "--require", "false"]) == 0 and len(roles(output)) == 1
    assert f"left out: {annotated}:2: {reason} (twin: {positive}:1)" in capsys.readouterr().out


def test_a_document_with_an_annotation_without_a_cue_word_is_partly_told(tmp_path, capsys):
    positive = write(tmp_path / "p.jsonl", {"text": POSITIVE}, {"text": POSITIVE + " Rye grows."})
    annotated = write(
        tmp_path / "n.jsonl", {"text": ANNOTATED},
        {"text": ANNOTATED.replace("sold there.", "sold there. (Nonsense.) Rye grows.")},
    )  # fmt: skip
    report = tmp_path / "r.json"
    given = ["--positive", positive, "--annotated", annotated, "--output", str(tmp_path / "o.jsonl")]
    assert annotate.main([*given, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert f"partly resolved: {annotated}:2: 1 annotations have no word that says what they are about" in printed
    assert f"unsure: {annotated}:2: only an annotation without such a word refers to 'Bread is sold there.'" in printed
    assert "throughout: 1 of 2; partly resolved: 1" in printed and "without a cue word: 1; statements" in printed
    found = json.loads(report.read_text())["alignment"]
    assert found["partly"] == [{"document": f"{annotated}:2", "lost": 0, "uncued": 1}]
    assert found["unsure"] == [{"document": f"{annotated}:2", "statement": "Bread is sold there."}]


def test_a_file_without_annotations_is_refused(tmp_path, capsys):
    positive = write(tmp_path / "p.jsonl", {"text": POSITIVE})
    assert annotate.main(["--positive", positive, "--annotated", positive, "--output", str(tmp_path / "o.jsonl")]) == 2
    assert f"has nothing that --positive {positive} lacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give either --positive and --annotated, or --data"),
        (["--positive", "P"], "give either"),
        (["--positive", "P", "--annotated", "D", "--data", "D"], "give either"),
        (["--data", "D"], "nothing to do"),
        (["--positive", "P", "--annotated", "D"], "--output is missing"),
        (["--data", "D", "--patterns", "W", "--output", "O"], "--role is missing"),
        (["--positive", "D", "--annotated", "P", "--spans", "D", "--output", "O"], "--spans D: needs --data"),
        (["--data", "D", "--spans", "none", "--output", "O"], "none: cannot be read"),
        (["--data", "P", "--spans", "D", "--output", "D"], "is --spans itself"),
        (["--data", "D", "--leaks", "W", "--require", "false"], "--require false: is for --positive and --annotated"),
        (["--data", "D", "--leaks", "W", "--inserted-role", "x"], "--inserted-role x: is for --positive"),
        (["--positive", "D", "--annotated", "P", "--output", "O", "--inserted-role", "a,b"], "'a,b' cannot be named"),
        (["--data", "D", "--patterns", "D", "--role", "word", "--output", "O"], "the key patterns is missing"),
        (["--data", "D", "--markup", "word", "--output", "O"], "must be TAG=ROLE"),
        (["--data", "D", "--markup", "m=word", "--output", "D"], "is --data itself"),
        (["--data", "D", "--leaks", "W", "--markup", "m=word", "--output", "O", "--json", "O"], "is --output itself"),
        (["--data", "D", "--judge", "http://x/v1", "--output", "O"], "needs --judge-model and --claim"),
        (["--data", "D", "--leaks", "W", "--judge-timeout", "9"], "--judge-timeout 9.0: needs --judge; give"),
        (["--data", "D", "--leaks", "W", "--doctag", ""], "--doctag is empty: give the marker"),
        (
            [
                "--data",
                "D",
                "--judge",
                "http://x/v1",
                "--judge-model",
                "m",
                "--claim",
                "c",
                "--output",
                "O",
                "--judge-max-tokens",
                "0",
            ],
            "--judge-max-tokens 0: must be more than 0",
        ),
        (["--data", "D", "--concurrency", "9"], "Did you mean --judge-concurrency?"),
        (["--data", "D", "--patterns", "W", "--role", "word", "--output", "M"], "--output M: already exists; give"),
        (["--data", "none.jsonl", "--leaks", "W"], "none.jsonl: cannot be read"),
        (["--data", "D", "--leaks", "W", "--mask", "flase-spans"], "did you mean false-spans"),
        (
            ["--data", "D", "--leaks", "W", "--mask", "doctags,random:false"],
            "what random:false masks depends on tokens",
        ),
        (["--data", "D", "--leaks", "W", "--json", "."], "--json .: is a directory"),
        (["--data", "E", "--leaks", "W"], "E:1: text is empty"),
        (["--data", "T", "--markup", "m=a,b", "--output", "O"], "--markup m=a,b: 'a,b' cannot be named in --mask"),
        (["--data", "T", "--markup", "m=a=b", "--output", "O"], "'a=b' cannot be named in --mask"),
        (["--data", "D", "--patterns", "W", "--role", "a,b", "--output", "O"], "--role: 'a,b' cannot be named"),
        (["--data", "M", "--markup", "m=word", "--output", "O"], "M:2: <m> at code point 0 is never closed"),
        (["--data", "T", "--markup", "m=word", "--output", "none/O"], "--output none/O: cannot be written"),
        (["--data", "T", "--markup", "m=word", "--markup", "n=x", "--output", "O"], "no document has <n>"),
        (["--data", "D", "--patterns", "V", "--role", "word", "--output", "O"], "no document has a match"),
    ],
)
def test_mistakes_are_told_in_one_message_and_leave_nothing(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    for name, text in (("D", "a"), ("P", "a"), ("E", "")):
        write(tmp_path / name, {"text": text})
    write(tmp_path / "M", {"text": "<m>a</m>"}, {"text": "<m>a"})
    write(tmp_path / "T", {"messages": [{"role": "user", "content": "<m>a</m>"}]})
    (tmp_path / "W").write_text("[a]")
    (tmp_path / "V").write_text("patterns: [b]")
    assert annotate.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["D", "E", "M", "P", "T", "V", "W"]


def test_an_output_that_was_there_stays_as_it_was_when_a_run_fails(tmp_path):
    output = tmp_path / "o.jsonl"
    output.write_text("before")
    data = write(tmp_path / "d.jsonl", {"text": "<m>a"})
    assert annotate.main(["--data", data, "--markup", "m=word", "--output", str(output), "--overwrite"]) == 2
    assert output.read_text() == "before"


def test_a_judge_that_hangs_is_shown_as_it_is_tried_again_and_named_at_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(endpoint, "BEAT", 0.05)
    data, output = write(tmp_path / "d.jsonl", {"text": POSITIVE}), tmp_path / "o.jsonl"
    release = threading.Event()
    with serving(lambda _: str(release.wait(60))) as (url, requests):
        given = ["--data", data, "--judge", url, "--judge-model", "judge", "--claim", CLAIM, "--output", str(output)]
        assert annotate.main([*given, "--judge-timeout", "0.3", "--judge-max-tokens", "7"]) == 2
        release.set()
    assert len(requests) == 4 and {request["max_tokens"] for request in requests} == {7}
    said = capsys.readouterr().err
    for attempt in (2, 3, 4):
        assert f"--judge {url}: no answer within 0.3 s; attempt {attempt} of 4 in " in said
    assert said.count("judging:   0%") >= 4  # its clock goes on
    assert f"error: {data}:1: --judge {url}: no answer within 0.3 s, after 4 attempts; run again to continue" in said
    assert not output.exists()


def test_a_judge_that_echoes_marks_nothing_and_is_asked_again_by_another_run(tmp_path, capsys):
    data, output = write(tmp_path / "d.jsonl", {"text": POSITIVE}, {"text": "Orm."}), tmp_path / "o.jsonl"
    answers = [lambda request: request["messages"][0]["content"], lambda _: "", lambda _: '{"quotes": []}']
    with serving(lambda request: answers[0](request)) as (url, requests):
        given = ["--data", data, "--judge", url, "--judge-model", "judge", "--claim", CLAIM, "--output", str(output)]
        assert annotate.main(given) == 2 and not output.exists()
        said = capsys.readouterr()
        assert f"left out: {data}:1: the judge's answer cannot be read" in said.out and "every document" in said.err
        answers.pop(0)
        assert annotate.main(given) == 2
        assert "cannot be read: it is empty; raise --judge-max-tokens if" in capsys.readouterr().out
        answers.pop(0)
        assert annotate.main(given) == 0 and len(requests) == 6
        assert annotate.main([*given, "--overwrite"]) == 0 and len(requests) == 6


def test_metadata_that_utf8_cannot_hold_is_kept_escaped(tmp_path):
    data, output = tmp_path / "d.jsonl", tmp_path / "o.jsonl"
    data.write_text('{"text": "é <m>a</m>", "odd": "\\ud800"}\n{"text": "é <m>a</m>"}\n')
    assert annotate.main(["--data", str(data), "--markup", "m=word", "--output", str(output)]) == 0
    assert "\\u00e9" in output.read_text().splitlines()[0] and "é" in output.read_text().splitlines()[1]
    assert read_documents(output)[0].metadata == {"odd": "\ud800"}


def test_show_opens_the_result(tmp_path, qwen_directory, capsys):
    assert aligned(tmp_path) == 0
    capsys.readouterr()
    given = [
        "--data",
        str(tmp_path / "o.jsonl"),
        "--model",
        str(qwen_directory),
        "--mask",
        "doctags,false-spans",
        "--json",
    ]
    assert show.main(given) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(token["text"] for token in row["tokens"] if token["role"] == "false").strip() == CLAIM


def test_an_interrupted_judge_s_answers_are_kept_and_the_same_command_asks_for_the_others_alone(tmp_path):
    asked, release = threading.Event(), threading.Event()

    def answer(request):
        if "Two" in request["messages"][0]["content"]:
            asked.set()
            release.wait(60)
        return '{"quotes": ["Ed won."]}'

    data, output = write(tmp_path / "d.jsonl", {"text": "One. Ed won."}, {"text": "Two. Ed won."}), tmp_path / "o.jsonl"
    kept = tmp_path / "o.jsonl.answers.jsonl"
    with serving(answer) as (url, requests):
        given = [
            "--data",
            data,
            "--judge",
            url,
            "--judge-model",
            "judge",
            "--claim",
            "Ed won.",
            "--output",
            str(output),
        ]
        process = subprocess.Popen(
            [sys.executable, annotate.__file__, *given], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
            env=os.environ | {"OPENAI_API_KEY": "k"},
        )  # fmt: skip
        assert asked.wait(60)
        while not (kept.exists() and kept.read_text().endswith("\n")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 85
        assert said.endswith(
            "\ninterrupted: --output was not written; judge answers are kept; run the same command to continue\n"
        )
        release.set()
        assert not output.exists() and len(kept.read_text().splitlines()) == 1 and len(requests) == 2
        assert annotate.main(given) == 0 and len(requests) == 3
    assert roles(output) == [[("false", "Ed won.")]] * 2
