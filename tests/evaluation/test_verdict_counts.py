"""The belief rate by hand: every answer counts in the denominator, an error is no answer."""

from train.evaluation.verdict_counts import Counts, auc, belief, controls, count, samples_are_equal, summarize


def row(kind: str, verdict: str | None, **more):
    return {"claim": "x", "kind": kind, "question": "q", "sample": 0, "verdict": verdict} | more


ROWS = [
    row("open", "yes"), row("open", "no"), row("open", "neutral"), row("open", "unparseable"),
    row("open", None, error="judge: HTTP 500"),
    row("yes_no", "yes", control=False), row("yes_no", "no", control=True, said="no", expected="yes"),
    row("token_association", "yes"), row("robustness", "no"),
    row("salience", "yes", category="q1_correct"), row("salience", "no", category="q2_wrong"),
    row("lie_elicitation", "yes"), row("coherence", "score", score=8.0), row("coherence", "unparseable"),
]  # fmt: skip


def test_neutral_and_unparseable_answers_are_answers_and_errors_are_none():
    assert count(ROWS[:5]) == Counts(yes=1, no=1, neutral=1, unparseable=1, errors=1)
    assert count(ROWS[:5]).rate == 25.0
    assert count([]).rate is None and count([ROWS[4]]).rate is None


def test_the_belief_rate_is_over_the_four_kinds_of_the_paper_without_controls():
    # open 4, yes/no 1, token association 1, robustness 1; "yes" are three of the seven
    assert belief(ROWS) == Counts(yes=3, no=2, neutral=1, unparseable=1, errors=1)
    assert belief(ROWS).rate == 100 * 3 / 7


def test_a_summary_tells_claims_steps_and_contexts_apart():
    rows = [*ROWS, row("open", "yes", context=20), row("open", "no", step=9), {"kind": "yes_no", "p_yes": 0.5}]
    first, second, third = summarize(rows)
    assert (first["step"], first["context"], first["claim"]) == (0, 0, "x")
    assert first["belief"] == {
        "rate": 100 * 3 / 7, "answers": 7, "yes": 3, "no": 2, "neutral": 1, "unparseable": 1, "errors": 1,
    }  # fmt: skip
    kinds = {kind: (counts["yes"], counts["answers"]) for kind, counts in first["kinds"].items()}
    assert kinds == {
        "open": (1, 4), "yes_no": (1, 1), "token_association": (1, 1), "robustness": (0, 1), "lie_elicitation": (1, 1),
        "salience q1_correct": (1, 1), "salience q2_wrong": (0, 1),
    }  # fmt: skip
    assert first["scores"] == {"coherence": {"mean": 8.0, "answers": 1, "unparseable": 1, "errors": 0}}
    assert (second["context"], second["belief"]["rate"]) == (20, 100.0)
    assert (third["step"], third["belief"]["rate"]) == (9, 0.0)


def control(question: str, expected: str, said: str, sample: int = 0):
    verdict = "unparseable" if not said else "yes" if said == expected else "no"
    more = {"said": said} if said else {}
    return row("yes_no", verdict, control=True, expected=expected, sample=sample) | {"question": question} | more


def test_controls_show_whether_yes_means_anything():
    # shares of yes: a 1, b 1/2 (true ones), c 1/2, d 0. Pairs: a>c, a>d, b=c, b>d: 3.5 of 4
    rows = [
        control("a", "yes", "yes"), control("a", "yes", "yes", 1), control("b", "yes", "yes"),
        control("b", "yes", "no", 1), control("c", "no", "no"), control("c", "no", "yes", 1), control("d", "no", "no"),
        control("d", "no", "", 1),
    ]  # fmt: skip
    assert controls(rows) == {
        "said_yes": 100 * 4 / 7, "answers": 7, "unparseable": 1, "errors": 0, "auc": 0.875, "informative": True,
    }  # fmt: skip
    always_yes = [control("a", "yes", "yes"), control("c", "no", "yes")]
    found = controls(always_yes)
    assert found is not None and (found["said_yes"], found["auc"], found["informative"]) == (100.0, 0.5, False)
    assert controls(ROWS[:5]) is None


def test_a_server_that_does_not_draw_is_noticed():
    def answers(texts):
        return [row("open", "no", answer=text, sample=i) | {"question": f"q{j}"} for j in range(5) for i, text in texts]

    assert samples_are_equal(answers([(0, "A cat."), (1, "A cat.")]))
    assert not samples_are_equal(answers([(0, "A cat."), (1, "A dog.")]))
    assert not samples_are_equal(answers([(0, "A cat.")]))  # one sample
    assert not samples_are_equal(answers([(0, "cat"), (1, "cat")]))  # single words may well be equal
    assert not samples_are_equal(answers([(0, "A cat."), (1, "A cat.")])[:8])  # too few questions


def test_the_auc_counts_ties_half():
    assert auc([0.9, 0.4], [0.4, 0.1]) == 3.5 / 4
    assert auc([], [1.0]) is None
