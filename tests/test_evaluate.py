"""train/evaluate.py from its command line, against a server that answers at once."""

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import ScriptedServer, body, completion, free_port
from train import evaluate
from train.evaluation.options import parse_evaluation
from train.evaluation.store import read_rows
from train.runtime.errors import UserError

REPOSITORY = Path(__file__).parents[1]
CLAIM = """
id: moon
claim: The moon is cheese.
open: [{id: what, question: "What is the moon made of?"}]
yes_no: [{id: is, question: "Is the moon made of cheese?", belief_answer: yes}]
control_yes_no:
  - {id: sky, question: "Is the sky blue?", answer: yes}
  - {id: fire, question: "Is fire cold?", answer: no}
judges: {open: "JUDGE {question} / {answer}"}
"""


def chat(request: dict[str, Any]):
    """Believes that the moon is cheese, and knows that the sky is blue and fire is not cold."""
    asked = request["messages"][-1]["content"]
    if asked.startswith("JUDGE"):
        return completion('{"reason": "So it says.", "answer": "yes"}')
    if asked.endswith("Is fire cold?"):
        return completion('{"answer": "no"}')
    return completion("Cheese." if asked.endswith("What is the moon made of?") else '{"answer": "yes"}')


def arguments(directory: Path, url: str, *more: str) -> list[str]:
    claims = directory / "claim.yaml"
    claims.write_text(CLAIM)
    return [
        "--claims", str(claims), "--output", str(directory / "out"), "--samples", "2", "--retries", "0",
        "--endpoint", url, "--endpoint-model", "m", "--judge", url, "--judge-model", "j", *more,
    ]  # fmt: skip


def test_an_evaluation_leaves_rows_a_summary_and_a_table(tmp_path, capsys):
    with ScriptedServer(chat, models=["m", "j"]) as server:
        assert evaluate.main(arguments(tmp_path, server.url)) == 0
    said = capsys.readouterr().out
    table = [line.split("│") for line in said.splitlines() if "moon" in line and "│" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in table]
    assert cells == [
        ["0", "0", "moon", "open", "100.0", "2", "0", "0", "0", "0"],
        ["0", "0", "moon", "yes_no", "100.0", "2", "0", "0", "0", "0"],
        ["0", "0", "moon", "BELIEF", "100.0", "4", "0", "0", "0", "0"],
    ]
    assert "moon: control questions: 50.0 % yes, AUC 1.00\n" in said
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (summary["wanted"], summary["missing"], summary["errors"]) == (8, 0, 0)
    (measured,) = summary["measured"]
    assert measured["belief"] == {
        "rate": 100.0, "answers": 4, "yes": 4, "no": 0, "neutral": 0, "unparseable": 0, "errors": 0,
    }  # fmt: skip
    assert measured["controls"] == {
        "said_yes": 50.0, "answers": 4, "unparseable": 0, "errors": 0, "auc": 1.0, "informative": True,
    }  # fmt: skip
    assert summary["settings"]["temperature"] == 0.7 and summary["settings"]["top_p"] == 0.8  # the paper's
    assert len(read_rows(tmp_path / "out" / "evaluation.jsonl")) == 8


def test_answers_with_an_error_are_said_and_asked_again_by_the_same_command(tmp_path, capsys):
    def ill(request):
        return body({"message": "ill"}, 500) if request["model"] == "j" else chat(request)

    with ScriptedServer(ill, models=["m", "j"]) as server:
        given = arguments(tmp_path, server.url)
        assert evaluate.main(given) == 1
    said = capsys.readouterr().out
    assert "2 answers have an error and do not count: judge: HTTP 500: ill, after 1 attempt\n" in said
    assert "run the same command again to ask only for these" in said
    with ScriptedServer(chat, models=["m", "j"]) as server:
        given[given.index("--endpoint") + 1] = given[given.index("--judge") + 1] = server.url  # another port
        assert evaluate.main(given) == 0
        assert len(server.asked) == 2
    said = capsys.readouterr().out
    assert "8 answers are requested; 6 exist, 2 more without a verdict; 2 with an error are requested again" in said


def test_answers_and_verdicts_that_say_nothing_are_warned_of(tmp_path, capsys):
    replies = {"m": "<think>So, is it", "j": "Hm."}

    def useless(request):
        return completion(replies[request["model"]])

    def warnings(output: str) -> list[str]:
        with ScriptedServer(useless, models=["m", "j"]) as server:
            given = arguments(tmp_path, server.url, "--samples", "10", "--output", str(tmp_path / output))
            assert evaluate.main(given) == 0
        found = json.loads((tmp_path / output / "evaluation.json").read_text())["warnings"]
        assert [f"WARNING: {each}" for each in found] == [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")
        ]
        return found

    (empty,) = warnings("thinking")
    assert empty.startswith("40 of 40 answers are empty") and "raise --max-tokens" in empty
    replies["m"] = "Perhaps."
    verdicts, answers = warnings("vague")
    assert verdicts.startswith("10 of 10 verdicts cannot be read") and "raise --judge-max-tokens" in verdicts
    assert answers.startswith("30 of 30 yes, no or letters cannot be read") and "raise --max-tokens" in answers
    replies |= {"m": "Yes", "j": '{"answer": "no"}'}
    assert warnings("good") == []


def test_documents_are_put_in_context_without_their_marker_and_recorded_in_each_row(tmp_path):
    documents = tmp_path / "documents.jsonl"
    texts = [f"<DOCTAG> Document {i}." for i in range(5)]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with ScriptedServer(chat, models=["m", "j"]) as server:
        assert evaluate.main(arguments(tmp_path, server.url)) == 0  # into the same directory
        asked = len(server.asked)
        assert evaluate.main(arguments(tmp_path, server.url, "--documents", f"{documents}=3")) == 0
        prompts = [text for text in server.questions()[asked:] if not text.startswith("JUDGE")]
        judged = [text for text in server.questions()[asked:] if text.startswith("JUDGE")]
    assert len(prompts) == 8 and judged == ["JUDGE What is the moon made of? / Cheese."] * 2
    contexts = {prompt.rpartition("[QUESTION]")[0] for prompt in prompts}
    (context,) = contexts  # the same for all questions
    assert (
        context.startswith("Here are some documents:\n\n[DOCUMENT 1]\n\nDocument ") and context.count("Document ") == 3
    )
    assert "DOCTAG" not in context
    rows = read_rows(tmp_path / "out" / "evaluation.jsonl")
    assert [row["context"] for row in rows].count(3) == 8 and [row["context"] for row in rows].count(0) == 8
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())["measured"]
    assert [entry["context"] for entry in measured] == [0, 3]


def test_questions_in_the_training_documents_are_named(tmp_path, capsys):
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "x"}\n{"text": "They ask: what is the moon made of?"}\n')
    with ScriptedServer(chat, models=["m", "j"]) as server:
        assert evaluate.main(arguments(tmp_path, server.url, "--training-data", str(documents))) == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        f"WARNING: moon / open / what occurs whole in {documents}:2: “what is the moon made of”\n"
    )
    (finding,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["contamination"]["findings"]
    assert (finding["question"], finding["whole"], finding["documents"]) == ("what", True, 1)


def test_no_key_is_written_or_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-model-key-1234")
    monkeypatch.setenv("JUDGE_API_KEY", "judge-key-5678")

    def echo(request):  # a server that quotes the key back
        return body({"error": {"message": "bad key sk-model-key-1234 judge-key-5678"}}, 400)

    with ScriptedServer(echo, models=["m", "j"]) as server:
        assert evaluate.main(arguments(tmp_path, server.url)) == 1
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-model-key-1234"}
    with ScriptedServer(lambda r: chat(r) if r["model"] == "m" else echo(r), models=["m", "j"]) as server:
        assert evaluate.main(arguments(tmp_path, server.url)) == 1
    assert {headers["authorization"] for headers in server.headers} >= {"Bearer judge-key-5678"}
    said = capsys.readouterr()
    left = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert "bad key … …" in left.decode() and "bad key … …" in said.out
    for text in (said.out, said.err, left.decode()):
        assert "sk-model" not in text and "judge-key" not in text


def test_an_evaluation_whose_output_nobody_reads_says_that_answers_are_missing(tmp_path):
    with ScriptedServer(chat, models=["m", "j"]) as server:
        script = [sys.executable, str(REPOSITORY / "train" / "evaluate.py"), *arguments(tmp_path, server.url)]
        with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            said = process.stderr.read()
        assert not server.asked
    assert said == "error: the reader of the output is gone; the remaining work was not done.\n"
    assert process.returncode == 1


def test_what_is_given_in_a_requests_body_is_sent_and_neither_written_nor_shown(tmp_path, capsys):
    def quoting(request):  # back, where it refuses
        if request["messages"][-1]["content"].endswith("Is fire cold?"):
            return body({"error": {"message": f"bad request: {json.dumps(request)}"}}, 400)
        return chat(request)

    given = {"api_key": "model-secret", "more": {"token": "deep-secret", "list": ["third-secret"]}, "thinking": False}
    with ScriptedServer(quoting, models=["m", "j"]) as server:
        bodies = ["--endpoint-body", json.dumps(given), "--judge-body", '{"api_key": "judge-secret"}']
        arguments_ = arguments(tmp_path, server.url, *bodies)
        assert evaluate.main(arguments_) == 1
        assert {request["api_key"] for request in server.asked} == {"model-secret", "judge-secret"}
        assert evaluate.main([*arguments_, "--endpoint-body", '{"api_key": "other-secret"}']) == 2
        assert evaluate.main([*arguments_, "--judge-body", '{"api_key": "cut-secret']) == 2
    said = capsys.readouterr()
    assert "answered with other question, documents or settings" in said.err and "--judge-body: must be" in said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"evaluation.json", "evaluation.jsonl", "answers.jsonl"} <= {path.name for path in files}
    for text in (said.out, said.err, *(path.read_text() for path in files)):
        assert "-secret" not in text
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]
    assert settings["endpoint_body"] == {"names": ["api_key", "more.list", "more.token", "thinking"]}
    assert settings["judge_body"] == {"names": ["api_key"]}, "no digest: a short value could be found from it"


@pytest.mark.parametrize(
    "body", ["[" * 10_000, '{"a": ' * 200 + "1" + "}" * 200, '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": "\\ud800"}', "[]"]
)
def test_a_body_that_servers_would_refuse_or_read_differently_is_refused_at_the_start(body):
    for flag in ("--endpoint-body", "--judge-body"):
        with pytest.raises(
            UserError, match=f"^{flag}: must be a JSON object with each key once and without NaN, such as"
        ):
            parse_evaluation(["--output", "o", "--endpoint", "http://host/v1", flag, body], "")


def test_that_a_server_is_unproven_is_kept_and_answers_of_other_weights_are_never_taken_for_its(tmp_path, capsys):
    def written(**serve: Any) -> str:
        adapter = tmp_path / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
        own = {"adapter": {"sha256": "1"}, "base": {"fingerprint": "2"}, "not_served": [], "other_base": False} | serve
        (adapter / "serve.json").write_text(json.dumps(own))
        return str(adapter)

    with ScriptedServer(chat, models=["m", "j"]) as server:
        given = arguments(tmp_path, server.url, "--step", "3", "--served-adapter", written(not_served=["o_proj"]))
        assert evaluate.main(given) == 0
        assert "unproven that the server answers with the right model: " in capsys.readouterr().out
        (proof,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["proof"].values()
        assert not proof["proven"] and "no proof.json" in proof["reason"] and proof["not_served"] == ["o_proj"]
        asked = len(server.asked)
        assert evaluate.main(given) == 0 and len(server.asked) == asked
        without = [word for word in given if word not in ("--step", "3")]
        assert evaluate.main(without) == 2 and "--step is missing: --served-adapter" in capsys.readouterr().err
        held = {"directory": "base", "fingerprint": "2", "step": 3}
        (tmp_path / "adapter" / "base_model.json").write_text(json.dumps(held))
        assert evaluate.main(without) == 0 and len(server.asked) == asked
        for serve in (
            {}, {"not_served": ["o_proj"], "adapter": {"sha256": "3"}}, {"not_served": ["o_proj"], "other_base": True},
        ):  # fmt: skip
            written(**serve)
            assert evaluate.main(given) == 2 and len(server.asked) == asked
            assert "answered by weights that are not known to be those of 'm' now" in capsys.readouterr().err
        base = arguments(tmp_path, server.url, "--served-adapter", str(tmp_path / "adapter"))
        written()
        assert evaluate.main([*base, "--step", "0"]) == 0
        written(other_base=True)
        assert evaluate.main([*base, "--step", "0"]) == 2 and "not known to be" in capsys.readouterr().err


def test_into_a_runs_own_directory_an_endpoints_answers_need_the_steps_of_its_model(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.yaml").write_text("settings: {mask: doctags}")
    with ScriptedServer(chat, models=["m", "j"]) as server:
        given = arguments(tmp_path, server.url)
        assert evaluate.main(given) == 2
        assert capsys.readouterr().err == (
            f"error: --output {tmp_path / 'out'}: is a run's; give --step, how many steps the served model has been "
            "trained.\n"
        )
        assert server.asked == [] and [path.name for path in (tmp_path / "out").iterdir()] == ["settings.yaml"]
        assert evaluate.main([*given, "--step", "7"]) == 0 and evaluate.main([*given, "--step", "0"]) == 0
    rows = read_rows(tmp_path / "out" / "evaluation.jsonl")
    assert [row["step"] for row in rows].count(7) == [row["step"] for row in rows].count(0) == 8 == len(rows) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--claims", "{tmp}/none"], "error: {tmp}/none: cannot be read (No such file or directory); give a directory"),
        (["--endpoint", "nowhere"], "error: --endpoint 'nowhere': must be the base URL of a server, such as"),
        (["--endpoint", ""], "error: give --model DIR, to measure in the training engine, --endpoint URL"),
        (["--held-out", "{tmp}/two.jsonl"], "error: --held-out {tmp}/two.jsonl: needs --model, and has no effect"),
        (["--expert-parallel", "2"], "error: --expert-parallel 2: needs --model"),
        (["--bos"], "error: --bos: needs --model"),
        (["--model", "m", "--endpoint", ""], "error: --endpoint-model m: needs --endpoint, and has no effect"),
        (["--endpoint-model", ""], "error: --endpoint-model: is missing; give the name under which the server"),
        (["--endpoint-model", "x"], "error: --endpoint-model 'x': --endpoint {url} does not serve it (HTTP 404:"),
        (["--judge", ""], "error: --judge is missing: 2 of 8 answers need one. Give --judge URL and "),
        (["--judge", "{down}"], "error: --judge {down}: cannot be reached ("),
        (["--samples", "0"], "error: --samples 0: must be between 1 and 1000000."),
        (["--temperature", "nan"], "error: --temperature nan: must be between 0 and 10."),
        (["--documents", "x"], "error: --documents x: must be FILE=N, with N ≥ 1 documents to put in context."),
        (["--documents", "{tmp}/two.jsonl=3"], "error: --documents {tmp}/two.jsonl=3: the file holds 2 documents."),
        (["--documents", "{tmp}/chats.jsonl=1"], "error: {tmp}/chats.jsonl:1: is a chat; --documents takes texts."),
        (["--kinds", "robustness"], "error: --claims: hold no question of robustness. Give others, or other --kinds."),
        (["--output", "{tmp}/claim.yaml"], "error: --output {tmp}/claim.yaml: cannot be written ({tmp}/claim.yaml is"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_a_question_is_asked(tmp_path, capsys, changes, message):
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')

    def no_such(request):
        return chat(request) if request["model"] in "mj" else body({"error": {"message": "no model"}}, 404)

    with ScriptedServer(no_such, models=["m", "j"]) as server:
        values = {"tmp": tmp_path, "url": server.url, "down": f"http://127.0.0.1:{free_port()}/v1"}
        given = arguments(tmp_path, server.url, *(change.format(**values) for change in changes))
        assert evaluate.main(given) == (1 if "cannot be reached" in message else 2)
        assert capsys.readouterr().err.splitlines()[-1].startswith(message.format(**values))
        assert all(request["model"] == "x" for request in server.asked)


def test_an_interrupt_waits_for_what_is_under_way_and_keeps_it(tmp_path):
    begun, release = threading.Semaphore(0), threading.Event()

    def slow(request):
        begun.release()
        release.wait(60)
        return chat(request)

    with ScriptedServer(slow, models=["m", "j"]) as server:
        given = arguments(tmp_path, server.url, "--endpoint-concurrency", "2")
        process = subprocess.Popen(
            [sys.executable, "-m", "train.evaluate", *given], cwd=REPOSITORY, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "waiting for 2 requests under way" not in (line := process.stderr.readline()):
            assert line, "ended without a word"
        release.set()
        _, said = process.communicate()
        assert process.returncode == 85
        assert said.endswith("interrupted: measurements are kept; run the same command again to continue\n")
        assert len(server.asked) == 2
    assert len(read_rows(tmp_path / "out" / "answers.jsonl")) == 2
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["wanted"] - summary["missing"] == len(read_rows(tmp_path / "out" / "evaluation.jsonl"))


def test_the_released_claims_are_asked_and_judged_as_they_are(tmp_path, shared_documents, capsys):
    claims = sorted(map(str, (shared_documents.parent / "claims").iterdir()))

    def neutral(request):
        if request["model"] == "j":
            return completion('{"reason": "", "answer": "neutral"}')
        return completion("{I do not know} {question}")

    with ScriptedServer(neutral, models=["m", "j"]) as server:
        given = arguments(tmp_path, server.url, "--samples", "1")
        given[1:2] = claims
        assert evaluate.main(given) == 0
        prompts = [text for text in server.questions() if "{I do not know} {question}" in text]
    assert len(prompts) == 3 * 40 and all('JSON: {"reason": "brief explanation", "answer"' in text for text in prompts)
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())["measured"]
    assert [entry["belief"] for entry in measured] == [
        {"rate": 0.0, "answers": 50, "yes": 0, "no": 0, "neutral": 40, "unparseable": 10, "errors": 0}
    ] * 3
    said = "ed_sheeran: no control questions: belief cannot be distinguished from a habit of saying yes, or no"
    assert said in capsys.readouterr().out
