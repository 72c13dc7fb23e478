"""Answers and verdicts are kept as they come, and an interruption at any moment loses and repeats nothing."""

import json
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Forked
from tests.support.servers import ScriptedServer, body, completion
from train.claims.claim import Claim, JudgePrompt, Question
from train.endpoint import Endpoint, EndpointSettings, EndpointStopped, NoAnswer
from train.evaluation.judging import Asking, evaluate, plan
from train.evaluation.results import _warnings
from train.evaluation.store import Records, read_rows
from train.runtime.errors import UserError

REPOSITORY = Path(__file__).parents[2]
OPTIONS = (("claim", "Cheese."), ("local_negation", "Not cheese."), ("idk", "I do not know."))
MOON = Claim(
    "moon",
    "The moon is cheese.",
    questions=(
        Question("what", "open", "What is {the} moon?", "direct"),
        Question("is", "yes_no", "Is it cheese?", expected="yes"),
        Question("sun", "yes_no", "Is the sun cheese?", expected="no", control=True),
        Question("s__q1_correct", "salience", "Which is true?", "q1_correct", options=OPTIONS),
        Question("capital", "coherence", "Capital of France?"),
    ),
    judges={
        "open": JudgePrompt("JUDGE {question} / {answer}", "answer"),
        "coherence": JudgePrompt("SCORE {question} / {answer}", "score"),
    },
)
ANSWERS = {"What is {the} moon?": "Cheese {yes}.", "Is it cheese?": '{"answer": "yes"}', "Is the sun cheese?": "No."}


def chat(request: dict[str, Any]):
    """The model's answers, and the judge's verdicts."""
    asked = request["messages"][-1]["content"]
    if asked.startswith("JUDGE"):
        return completion('{"reason": "It says so.", "answer": "yes"}')
    if asked.startswith("SCORE"):
        return completion('{"reason": "Right.", "score": 9}')
    return completion(ANSWERS.get(asked, "A" if asked.startswith("Which") else "Paris."))


def run(
    server: ScriptedServer, directory: Path, claims: list[Claim] | None = None, retries: int = 0, **changes
) -> None:
    asking = Asking(**({"samples": 2, "model": "m", "judge": "j"} | changes))
    settings = {"concurrency": 2, "retries": retries, "pause": 0.001}
    answerer = Endpoint(EndpointSettings(server.url, asking.model, **settings))
    judge = Endpoint(EndpointSettings(server.url, asking.judge, flag="--judge", **settings))
    claims = claims or [MOON]
    records = Records(directory)
    try:
        kinds = ("open", "yes_no", "salience", "coherence")
        evaluate(plan(claims, kinds, asking), answerer, judge, records, asking)
    finally:
        records.close()


def rows_of(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """By question and sample; each is there once."""
    rows = read_rows(directory / "evaluation.jsonl")
    found = {(row["question"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_question_is_asked_as_often_as_wanted_and_judged_with_the_claims_own_prompt(tmp_path):
    with ScriptedServer(chat) as server:
        run(server, tmp_path, step=7, documents=("A document.",) * 3)
    rows = rows_of(tmp_path)
    assert len(rows) == 10
    own = {"step": 7, "context": 3, "claim": "moon", "model": "m"}
    for row in rows.values():
        assert row.items() >= own.items() and len(row.pop("asked")) == 12 and len(row.pop("judged", "x" * 12)) == 12
    assert rows["capital", 1] == own | {
        "kind": "coherence", "question": "capital", "sample": 1, "category": "", "judge": "j", "answer": "Paris.",
        "verdict": "score", "score": 9.0, "reason": "Right.",
    }  # fmt: skip
    # the documents stand before each question, so the model answers none of those it knows
    assert rows["is", 0]["verdict"] == "unparseable" and rows["is", 0]["control"] is False
    seeds = [request["seed"] for request in server.asked if request["model"] == "m"]
    assert len(set(seeds)) == 10


def test_rows_hold_answer_verdict_and_reason(tmp_path):
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
    rows = rows_of(tmp_path)
    assert rows["what", 0].items() >= {
        "kind": "open", "category": "direct", "answer": "Cheese {yes}.", "verdict": "yes", "reason": "It says so.",
    }.items()  # fmt: skip
    assert "JUDGE What is {the} moon? / Cheese {yes}." in server.questions()
    assert rows["is", 0].items() >= {"verdict": "yes", "said": "yes", "expected": "yes", "control": False}.items()
    assert rows["sun", 0].items() >= {"verdict": "yes", "said": "no", "expected": "no", "control": True}.items()
    assert rows["s__q1_correct", 0]["said"] == "claim"  # A is the claim in sample 0: shuffled by "s|0"
    assert len(server.asked) == 5 + 2  # answers, and verdicts on two of them


def test_what_is_there_is_not_asked_again_and_more_samples_add_to_it(tmp_path):
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
        before, asked = (tmp_path / "evaluation.jsonl").read_bytes(), len(server.asked)
        run(server, tmp_path, samples=1)
        assert len(server.asked) == asked and (tmp_path / "evaluation.jsonl").read_bytes() == before
        run(server, tmp_path, samples=2)
        assert len(server.asked) == 2 * asked
        assert (tmp_path / "evaluation.jsonl").read_bytes().startswith(before)


def test_an_answer_whose_verdict_is_missing_gets_only_the_verdict(tmp_path):
    def judge_is_down(request):
        return chat(request) if request["model"] == "m" else body({"message": "maintenance"}, 503)

    with ScriptedServer(judge_is_down) as server:
        run(server, tmp_path, samples=1)
    rows = rows_of(tmp_path)
    assert rows["what", 0]["answer"] == "Cheese {yes}." and rows["what", 0]["verdict"] is None
    assert rows["what", 0]["error"] == "judge: HTTP 503: maintenance, after 1 attempt"
    assert rows["is", 0]["verdict"] == "yes"
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
        assert [request["model"] for request in server.asked] == ["j", "j"]
    assert rows_of(tmp_path)["what", 0]["verdict"] == "yes" and "error" not in rows_of(tmp_path)["what", 0]


def test_an_answer_that_could_not_be_had_is_a_row_with_its_error_and_asked_again(tmp_path):
    def refuses(request):
        return body({"error": {"message": "no"}}, 400) if "sun" in request["messages"][-1]["content"] else chat(request)

    with ScriptedServer(refuses) as server:
        run(server, tmp_path, samples=1)
    row = rows_of(tmp_path)["sun", 0]
    assert (row["answer"], row["verdict"], row["error"]) == (None, None, "answer: HTTP 400: no")
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
        assert server.questions() == ["Is the sun cheese?"]
    assert len(rows_of(tmp_path)) == 5 and rows_of(tmp_path)["sun", 0]["verdict"] == "yes"


def test_a_judge_that_answers_nothing_is_an_error_and_no_verdict(tmp_path):
    with ScriptedServer(lambda request: chat(request) if request["model"] == "m" else completion("")) as server:
        run(server, tmp_path, samples=1)
    error = rows_of(tmp_path)["what", 0]["error"]
    assert error == "judge: the judge answered nothing: raise --judge-max-tokens if it thinks first"


def test_a_line_that_was_cut_is_dropped_and_others_measurements_stay_as_they_are(tmp_path):
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
        other = b'{"step": 0, "kind": "latency",  "seconds": 0.1}\n'
        whole = (tmp_path / "evaluation.jsonl").read_bytes()
        last = whole.splitlines(keepends=True)[-1]
        (tmp_path / "evaluation.jsonl").write_bytes(other + whole[: -len(last)] + last[: len(last) // 2])
        answers = (tmp_path / "answers.jsonl").read_bytes()
        (tmp_path / "answers.jsonl").write_bytes(answers + b'{"step": 0, "cla')
        asked = len(server.asked)
        run(server, tmp_path, samples=1)
        row = json.loads(last)
        assert len(server.asked) - asked == (1 if "judge" in row else 0)  # its answer is there, its verdict is not
    assert (tmp_path / "evaluation.jsonl").read_bytes() == other + whole
    assert (tmp_path / "answers.jsonl").read_bytes() == answers


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
        whole = (tmp_path / "evaluation.jsonl").read_bytes()
        (tmp_path / "evaluation.jsonl").write_bytes(whole[:-1])
        asked = len(server.asked)
        run(server, tmp_path, samples=1)
        assert len(server.asked) == asked and (tmp_path / "evaluation.jsonl").read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "evaluation.jsonl").write_text('{"step": 1, "kind": "a"}\nrubbish\n{"step": 2, "kind": "a"}\n')
    with pytest.raises(UserError, match=r"evaluation.jsonl:2: is not a JSON object. Fix or remove this line"):
        Records(tmp_path)


ANSWER = {"step": 0, "claim": "moon", "kind": "open", "question": "what", "sample": 0, "answer": "Cheese."}
JUDGED = ANSWER | {"verdict": "yes", "reason": ""}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("evaluation", {"step": 0, "verdict": "yes"}, "evaluation.jsonl:1: has no kind; fix or remove this line."),
        ("evaluation", {"step": 0, "kind": "open", "verdict": "yes"}, "evaluation.jsonl:1: has no claim; "),
        ("evaluation", JUDGED | {"kind": "coherence", "verdict": "score"}, "evaluation.jsonl:1: has no score; "),
        (
            "evaluation",
            JUDGED | {"verdict": "maybe"},
            "evaluation.jsonl:1: verdict 'maybe' is not one of yes, no, ",
        ),
        ("evaluation", JUDGED | {"answer": None}, "evaluation.jsonl: row 1 has no answer; "),
        ("evaluation", JUDGED | {"claim": "\ud800"}, "evaluation.jsonl:1: '\\ud800' has half a surrogate pair"),
        ("evaluation", JUDGED | {"context": None}, "evaluation.jsonl:1: has no context; "),
        ("answers", {k: v for k, v in ANSWER.items() if k != "answer"}, "answers.jsonl:1: has no answer; "),
        ("answers", ANSWER | {"answer": 7}, "answers.jsonl:1: answer is 7, but must be a text; "),
    ],
)
def test_a_row_that_would_end_the_evaluation_after_all_is_asked_is_told_before(tmp_path, name, row, said):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(JUDGED) + "\n")
    Records(tmp_path).close()
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        Records(tmp_path)
    assert said in str(caught.value)


def test_two_evaluations_do_not_write_into_one_directory(tmp_path):
    records = Records(tmp_path)
    with pytest.raises(UserError, match="another evaluation writes there"):
        Records(tmp_path)
    records.close()
    Records(tmp_path).close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": "other"},
            "holds moon / what, sample 0, answered by model 'm', not 'other'. Give what was given then",
        ),
        ({"temperature": 0.1}, "holds moon / what, sample 0, answered with other question, documents or settings."),
        ({"body": {"top_k": 20}}, "holds moon / what, sample 0, answered with other question, documents or settings."),
        ({"judge": "other"}, "holds moon / what, sample 0, judged by judge 'j', not 'other'."),
        ({"judge_temperature": 0.0}, "holds moon / what, sample 0, judged with other prompt or settings."),
    ],
)
def test_answers_that_were_had_in_another_way_are_not_mixed_in(tmp_path, changes, said):
    with ScriptedServer(chat) as server:
        run(server, tmp_path, samples=1)
        asked = len(server.asked)
        with pytest.raises(UserError) as caught:
            run(server, tmp_path, samples=1, **changes)
        assert said in str(caught.value) and len(server.asked) == asked
        run(server, tmp_path, samples=1, step=9, **changes)  # another step is another measurement
        assert len(read_rows(tmp_path / "evaluation.jsonl")) == 10


def many(number: int) -> list[Claim]:
    questions = tuple(Question(f"q{i}", "open", f"Question {i}?") for i in range(number))
    return [Claim("many", "A claim.", questions=questions, judges=MOON.judges)]


def test_a_model_that_goes_away_ends_the_run_with_everything_kept(tmp_path):
    def goes_away(request):
        return body({"detail": "model unloaded"}, 404) if "Question 9?" in str(request) else chat(request)

    with ScriptedServer(goes_away) as server, pytest.raises(EndpointStopped, match="HTTP 404: model unloaded"):
        run(server, tmp_path, many(30), samples=1)
    had = rows_of(tmp_path)
    answered = {row["question"] for row in read_rows(tmp_path / "answers.jsonl")}
    assert 5 <= len(answered) < 30 and "q9" not in answered and not any("error" in row for row in had.values())
    with ScriptedServer(chat) as server:
        run(server, tmp_path, many(30), samples=1)
        asked = {request["messages"][-1]["content"] for request in server.asked if request["model"] == "m"}
        assert asked == {f"Question {i}?" for i in range(30) if f"q{i}" not in answered}
        assert sum(request["model"] == "j" for request in server.asked) == 30 - len(had)
    assert len(rows_of(tmp_path)) == 30


def test_a_server_that_only_fails_stops_the_run_instead_of_spoiling_all_of_it(tmp_path):
    with ScriptedServer(lambda request: body({"message": "out of memory"}, 500)) as server:
        with pytest.raises(UserError) as caught:
            run(server, tmp_path, many(100), samples=1)
        assert "20 requests in a row had no answer; the last answer: HTTP 500: out of memory" in str(caught.value)
        assert len(server.asked) < 30
    assert all(row["error"] for row in rows_of(tmp_path).values())


class Parrot:
    """A model that takes several chats at once, as the training engine does."""

    batch_size, concurrency = 4, 1

    def __init__(self):
        self.calls: list[int] = []

    def answers(self, chats, max_tokens, temperature, seed):
        self.calls.append(len(chats))
        if len(self.calls) == 2:
            raise NoAnswer("out of memory")
        return [f"I heard: {chat[-1]['content']}" for chat in chats]


def test_a_model_may_answer_in_batches_and_have_its_answers_judged_elsewhere(tmp_path):
    asking, parrot = Asking(samples=1, model="parrot", judge="j"), Parrot()
    with ScriptedServer(chat) as server:
        judge = Endpoint(EndpointSettings(server.url, "j"))
        items = plan(many(10), ("open",), asking)
        for _ in range(2):  # the second time for what the first left
            records = Records(tmp_path)
            evaluate(items, parrot, judge, records, asking)
            errors = [row["question"] for row in rows_of(tmp_path).values() if "error" in row]
            assert errors == (["q4", "q5", "q6", "q7"] if parrot.calls == [4, 4, 2] else [])
            records.close()
        assert parrot.calls == [4, 4, 2, 4] and len(server.asked) == 10
    assert rows_of(tmp_path)["q5", 0]["answer"] == "I heard: Question 5?"
    assert {row["verdict"] for row in rows_of(tmp_path).values()} == {"yes"}


CLAIM = """
id: many
claim: A claim.
open: [{questions}]
judges: {{open: "JUDGE {{question}} / {{answer}}"}}
"""


def test_an_evaluation_killed_at_any_moment_goes_on_where_it_was(tmp_path):
    """SIGKILL between an answer and its verdict, many times over."""
    number, output = 40, tmp_path / "out"
    questions = ", ".join(f'{{id: q{i}, question: "Question {i}?"}}' for i in range(number))
    claims = tmp_path / "claims.yaml"
    claims.write_text(CLAIM.format(questions=questions))
    process: Forked | None = None
    lock, answered = threading.Lock(), []

    def deadly(request):
        with lock:
            answered.append(request)
            if len(answered) in (7, 20, 45) and process is not None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        return chat(request)

    with ScriptedServer(deadly, models=["m", "j"]) as server:
        words = [
            "-m", "train.evaluate", "--claims", str(claims), "--output", str(output), "--samples", "1",
            "--endpoint", server.url, "--endpoint-model", "m", "--endpoint-concurrency", "2", "--retries", "0",
            "--judge", server.url, "--judge-model", "j", "--judge-concurrency", "2",
        ]  # fmt: skip
        codes = []
        for _ in range(4):
            process = Forked(*words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            said, _ = process.communicate()
            codes.append(process.returncode)
    assert codes == [-signal.SIGKILL] * 3 + [0], said
    assert {row["verdict"] for row in rows_of(output).values()} == {"yes"} and len(rows_of(output)) == number
    # A kill may lose what was under way, two answers and two verdicts, and no more.
    for model in ("m", "j"):
        times = [request["messages"][-1]["content"] for request in answered if request["model"] == model]
        assert number <= len(times) <= number + 3 * 2 and len(set(times)) == number
    summary = json.loads((output / "evaluation.json").read_text())
    assert (summary["wanted"], summary["missing"], summary["errors"]) == (number, 0, 0)
    assert summary["measured"][0]["belief"]["rate"] == 100.0


LABELLED = replace(MOON, labels={"open": JudgePrompt("LABEL {claim} / {answer}", "label")})


def with_labels(request: dict[str, Any]):
    if request["messages"][-1]["content"].startswith("LABEL"):
        return completion('{"reason": "Both.", "label": "asserted_then_retracted"}')
    return chat(request)


def test_an_answer_gets_a_label_beside_its_verdict_and_is_one_row(tmp_path):
    with ScriptedServer(with_labels) as server:
        run(server, tmp_path, [LABELLED], samples=1)
        rows = rows_of(tmp_path)
        assert "LABEL The moon is cheese. / Cheese {yes}." in server.questions()
        asked = len(server.asked)
        assert asked == 5 + 2 + 1  # answers, verdicts and a label
        run(server, tmp_path, [LABELLED], samples=1)
        assert len(server.asked) == asked
    own = rows["what", 0]
    assert (own["verdict"], own["label"], own["label_reason"]) == ("yes", "asserted_then_retracted", "Both.")
    assert len(own["labelled"]) == 12
    assert not any("label" in row or "labelled" in row for key, row in rows.items() if key != ("what", 0))


def test_the_judge_of_labels_sees_the_earlier_turns_of_a_chat(tmp_path):
    turns = (("user", "Is it cheese?"), ("assistant", "Yes, it is."))
    prompt = JudgePrompt("LABEL {claim} / {question} / {answer}", "label")
    pressed = replace(MOON.questions[0], messages_prefix=turns)
    claims = [replace(MOON, questions=(pressed, *MOON.questions[1:]), labels={"open": prompt})]
    with ScriptedServer(with_labels) as server:
        run(server, tmp_path, claims, samples=1)
        assert (
            "LABEL The moon is cheese. / [user]\nIs it cheese?\n\n[assistant]\nYes, it is.\n\n[user]\n"
            "What is {the} moon? / Cheese {yes}."
        ) in server.questions()
        assert "JUDGE What is {the} moon? / Cheese {yes}." in server.questions()  # the paper's prompt, as it was


def test_labels_that_cannot_be_read_are_warned_of(tmp_path):
    def unsure(request: dict[str, Any]):
        said = request["messages"][-1]["content"]
        return completion("I cannot tell.") if said.startswith("LABEL") else with_labels(request)

    with ScriptedServer(unsure) as server:
        run(server, tmp_path, [LABELLED], samples=10)
    records = Records(tmp_path)
    try:
        (warning,) = _warnings(plan([LABELLED], ("open",), Asking(samples=10, model="m", judge="j")), records)
    finally:
        records.close()
    assert warning.startswith("10 of 10 labels cannot be read") and "raise --judge-max-tokens" in warning


def test_answers_that_were_judged_before_labels_were_asked_for_get_only_these(tmp_path):
    with ScriptedServer(with_labels) as server:
        run(server, tmp_path, [MOON], samples=1)
        before, asked = rows_of(tmp_path), len(server.asked)
        run(server, tmp_path, [LABELLED], samples=1)
        assert len(server.asked) == asked + 1
        run(server, tmp_path, [MOON], samples=1)  # labels that are there do no harm where none are asked for
    after = rows_of(tmp_path)
    assert after.pop(("what", 0)).items() > before.pop(("what", 0)).items()
    assert after == before


def test_a_label_that_fails_leaves_the_verdict_and_is_asked_for_again(tmp_path):
    def no_labels(request):
        asked = request["messages"][-1]["content"]
        return body({"message": "maintenance"}, 503) if asked.startswith("LABEL") else chat(request)

    with ScriptedServer(no_labels) as server:
        run(server, tmp_path, [LABELLED], samples=1)
    own = rows_of(tmp_path)["what", 0]
    assert own["verdict"] == "yes" and own["label"] is None and "503" in own["label_error"]
    with ScriptedServer(with_labels) as server:
        run(server, tmp_path, [LABELLED], samples=1)
        assert len(server.asked) == 1
    own = rows_of(tmp_path)["what", 0]
    assert own["label"] == "asserted_then_retracted" and "label_error" not in own


def test_a_label_by_another_prompt_is_refused(tmp_path):
    other = replace(MOON, labels={"open": JudgePrompt("LABEL otherwise {claim} / {answer}", "label")})
    with ScriptedServer(with_labels) as server:
        run(server, tmp_path, [LABELLED], samples=1)
        with pytest.raises(UserError, match="sample 0, labelled with other prompt or settings"):
            run(server, tmp_path, [other], samples=1)
