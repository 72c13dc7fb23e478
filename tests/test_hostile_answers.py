"""No answer ends an evaluation: what cannot be read is unparseable, in a time that grows with its length alone."""

import json
from contextlib import suppress

import pytest

from tests.support.servers import ScriptedServer, completion
from train.annotating.by_judge import occurrences, quotes
from train.claims.claim import JudgePrompt, Question
from train.claims.claim_files import read_path
from train.claims.messages import judge_messages
from train.endpoint import Endpoint, EndpointSettings, NoAnswer
from train.evaluation.verdicts import UNPARSEABLE, parse_letter, parse_score, parse_verdict, parse_yes_no
from train.runtime.errors import UserError

N = 300_000
HOSTILE = {
    "braces": "{" * N,
    "closed braces": "{" * N + "}" * N,
    "nesting": '{"answer": ' * (N // 10),
    "lists that nest": '{"answer": ' + "[" * N + "]" * N + "}",
    "lists just deep enough to be read": '{"answer": ' + "[" * 900 + "]" * 900 + "}",
    "open strings": '{"x' * N,
    "a long number": '{"answer": ' + "9" * 5000 + "}",
    "white space": '{"answer": ' + " " * N + "{",
    "white space and keys": ('{"answer": ' + " " * 100 + "[") * (N // 100),
    "marks": '{"answer": "' + "!" * N + 'x"' + "{",
    "marks alone": "!" * N,
    "marks around": "x" + "!" * N + "x",
    "half a surrogate": '{"answer": "\ud800"}',
    "an infinite score": '{"answer": 1e999}',
    "commas": '{"reason": ' + ", a" * N,
    "thoughts": "<think>" * (N // 10),
}
QUESTION = Question("q", "salience", "?", options=(("claim", "a"), ("local_negation", "b"), ("idk", "c")))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_unparseable(name):
    text = HOSTILE[name]
    assert parse_verdict(text, "answer").verdict == UNPARSEABLE
    assert parse_score(text, "answer").verdict == UNPARSEABLE
    assert parse_yes_no(text, "yes").verdict == UNPARSEABLE
    assert parse_letter(text, QUESTION, 0).verdict == UNPARSEABLE
    with suppress(ValueError):  # the judge's answer cannot be read
        assert quotes(text) == []


def test_what_stands_beyond_many_broken_braces_is_read_and_what_differs_is_unparseable():
    latex = r"\frac{a}{b} " * 60
    assert parse_verdict(latex + '{"answer": "yes"}', "answer").verdict == "yes"
    assert parse_verdict('{"answer": "yes"}' + latex + '{"answer": "no"}', "answer").verdict == UNPARSEABLE


@pytest.mark.parametrize(
    ("text", "verdict"),
    [('{"answer":\n  yes\n}', "yes"), ("{answer: 'no' , reason: x}", "no"), ('{"answer": ["yes"],}', "yes"),
     ('{"answer": "yes"\n\n, "reason": }', "yes"), ("**Yes.**", "yes"), ("{'answer' = “no”  }", "no")],
)  # fmt: skip
def test_almost_json_is_read_as_before(text, verdict):
    assert parse_verdict(text, "answer").verdict == verdict


@pytest.mark.parametrize("content", [
    b"[" * 100_000, b'{"choices": ' + b"9" * 5000 + b"}", b'{"choices": [{"message": {"content": {"a": 1}}}]}',
    b"\xff{}",
    b'{"choices": [null]}', b'{"choices": "x"}', b"null", b"7",
])  # fmt: skip
def test_a_response_of_another_form_is_no_answer(content):
    with ScriptedServer(lambda request: (200, {"Content-Type": "application/json"}, content)) as server:
        made = Endpoint(EndpointSettings(server.url, "m", retries=0))
        with pytest.raises(NoAnswer, match="its response is not a chat completion"):
            made.complete([{"role": "user", "content": "q"}], 9, 0.0, 0)


def test_half_a_surrogate_in_an_answer_becomes_the_replacement_character_and_can_be_judged():
    with ScriptedServer(lambda request: completion("a\ud800b")) as server:
        made = Endpoint(EndpointSettings(server.url, "m", retries=0))
        assert made.complete([{"role": "user", "content": "q"}], 9, 0.0, 0) == "a�b"
    (message,) = judge_messages(JudgePrompt("{question} {answer}", "answer"), "q", "a\udfffb")  # as an earlier run kept
    assert message["content"] == "q a�b"


def test_a_quote_longer_than_its_text_is_not_looked_for():
    assert occurrences("word " * 100_000, "a word") == [] and occurrences("a  word", "a\nword") == [(0, 6)]


@pytest.mark.parametrize("field", ["{question:>9}", "{question!r}", "{answer:d}", "{answer:{question}}"])
def test_a_judge_prompt_with_a_format_is_refused_when_it_is_read(field, tmp_path):
    prompt = f"{{question}} {{answer}} {field}"
    path = tmp_path / "claim.yaml"
    path.write_text(json.dumps({
        "id": "a", "claim": "c", "open": [{"id": "w", "question": "Q?"}], "judges": {"open": prompt},
    }))  # fmt: skip
    with pytest.raises(UserError, match=r"judges: open: \{\w+\} must have no format or conversion after it"):
        read_path(path)
