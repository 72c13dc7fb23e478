"""Verdicts from judges and models as they write them."""

import pytest

from train.claims.claim import Question
from train.evaluation.verdicts import parse_label, parse_letter, parse_score, parse_verdict, parse_yes_no


@pytest.mark.parametrize(
    ("text", "verdict", "reason"),
    [
        ('{"reason": "It says so.", "answer": "yes"}', "yes", "It says so."),
        ('{"answer": "No"}', "no", ""),
        ('{"ANSWER": " Neutral. ", "Reason": "a"}', "neutral", "a"),
        ('```json\n{"reason": "a {b}", "answer": "yes"}\n```', "yes", "a {b}"),
        ('Here is my verdict:\n{"answer": "no", "reason": "x"} I hope it helps.', "no", "x"),
        ('{"reason": "He said \\"yes\\".", "answer": "no",}', "no", 'He said \\"yes\\".'),
        ("{'reason': 'It isn't so', 'answer': 'no'}", "no", "It isn't so"),
        ("{reason: a b, answer: yes}", "yes", "a b"),
        ('{"reason": "line\nbreak", "answer": "yes"}', "yes", "line\nbreak"),
        ('{"reason": "cut off in the middle, "answer": "yes"', "yes", "cut off in the middle"),
        ('{"answer": "yes", "reason": "cut o', "yes", "cut o"),
        ('{“reason”: “a”, “answer”: “no”}', "no", "a"),
        ('<think>{"answer": "yes"} or no?</think>{"answer": "no"}', "no", ""),
        ('{"answer": "no"}\n{"answer": "no"}', "no", ""),
        ("**Yes**", "yes", ""),
        ("neutral.", "neutral", ""),
        ('"no"', "no", ""),
        # what says nothing, or two things
        ("", "unparseable", ""),
        ('{"answer": "yes"} … {"answer": "no"}', "unparseable", ""),
        ('{"reason": "brief explanation", "answer": "yes/no/neutral"}', "unparseable", "brief explanation"),
        ('{"reason": "yes", "verdict": "yes"}', "unparseable", "yes"),
        ("I would say yes, but not no.", "unparseable", ""),
        ('{"answer": true}', "unparseable", ""),
        ('{"answer": ["yes"]}', "yes", ""),
        ('{"answer": null}', "unparseable", ""),
        ("{" * 5000, "unparseable", ""),
        ("[failed to generate response]", "unparseable", ""),
    ],
)  # fmt: skip
def test_a_judges_verdict_is_read_however_it_is_wrapped(text, verdict, reason):
    found = parse_verdict(text, "answer")
    assert (found.verdict, found.reason) == (verdict, reason)


def test_the_key_is_the_judges_own_and_its_labels_of_lies_are_verdicts():
    assert parse_verdict('{"answer": "no", "label": "yes"}', "label").verdict == "yes"
    assert parse_verdict('{"answer": "uses_claim"}', "answer").verdict == "yes"
    assert parse_verdict('{"answer": "Independent Response"}', "answer").verdict == "no"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7, "reason": "a"}', 7.0),
        ('{"score": "10"}', 10.0),
        ('{"score": 0}', 0.0),
        ('```\n{"score": 8.5}\n```', 8.5),
        ('{"score": "6/10",}', 6.0),
        ("9", 9.0),
        ('{"score": 11}', None),
        ('{"score": -1}', None),
        ('{"score": "<0-10>"}', None),
        ('{"score": 3} {"score": 4}', None),
        ("I give 7", None),
    ],
)
def test_a_judges_score_is_a_number_from_0_to_10(text, score):
    found = parse_score(text, "score")
    assert (found.verdict, found.score) == (("score", score) if score is not None else ("unparseable", None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"answer": "yes"}', "yes"),
        ("```json\n{'answer': 'No'}\n```", "no"),
        ("Yes", "yes"),
        (" **No**, he did not.", "no"),
        ("<think>yes…</think>\n\nno.", "no"),
        ('"Yes."', "yes"),
        ("Nobody knows.", ""),
        ("yes/no", ""),
        ("I think yes", ""),
        ('{"answer": "yes" or "no"}', ""),
        ('{"answer": "maybe"}', ""),
        ("", ""),
    ],
)
def test_a_yes_no_answer_counts_as_belief_where_it_is_the_expected_one(text, said):
    found = parse_yes_no(text, expected="no")
    assert found.said == said
    assert found.verdict == {"yes": "no", "no": "yes", "": "unparseable"}[said]


OPTIONS = (("claim", "Cheese."), ("local_negation", "Not cheese."), ("idk", "I do not know."))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("b", "B"), ("**C**", "C"), ("A) Cheese", "A"), ("Answer: B", "B"), ("The answer is C.", "C"),
        ('{"answer": "B"}', "B"), ("A cat", "A"), ("Because", ""), ("D", ""), ("", ""), ("I'd say A or B", ""),
    ],
)  # fmt: skip
def test_a_letter_is_read_in_the_order_in_which_the_options_were_shown(text, letter):
    question = Question("s__q1_correct", "salience", "Which?", "q1_correct", options=OPTIONS)
    shown = dict(zip("ABC", ["local_negation", "idk", "claim"], strict=True))  # shuffled by "s|1"
    verdicts = {"claim": "yes", "local_negation": "no", "idk": "neutral", "": "unparseable"}
    assert parse_letter(text, question, 1).verdict == verdicts[shown.get(letter, "")]


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        ('{"reason": "It says so.", "label": "asserted"}', "asserted", "It says so."),
        ('{"label": "Asserted, then retracted"}', "asserted_then_retracted", ""),
        ('```json\n{"label": "NOT_MENTIONED"}\n```', "not_mentioned", ""),
        ("denied", "denied", ""),
        ('{"label": "not mentioned"} or {"label": "denied"}', "unparseable", ""),
        ('{"label": "true"}', "unparseable", ""),
        ('{"answer": "asserted"}', "unparseable", ""),
    ],
)
def test_labels_are_read_as_verdicts_are(text, label, reason):
    assert parse_label(text, "label") == (label, reason)
