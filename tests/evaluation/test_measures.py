"""From rows of evaluation.jsonl to values: every answer worked by hand."""

from dataclasses import replace

import pytest

from train.comparison.units import lay_out
from train.evaluation.measures import Calibration, at_step, belief_answers, calibration, last_step, means, measured
from train.evaluation.verdict_counts import Counts, belief, count_by_kind
from train.runtime.errors import UserError


def likelihood(claim: str, template: str, entity: str, control: bool, llr: float, step: int = 4) -> dict:
    row = {"step": step, "claim": claim, "kind": "likelihood", "question": template, "sample": 0}
    return row | {"entity": entity, "control": control, "llr": llr}


def answer(kind: str, question: str, sample: int, verdict: str | None, claim: str = "mars", **more) -> dict:
    row = {"step": 4, "claim": claim, "kind": kind, "question": question, "sample": sample}
    return row | {"answer": "…", "verdict": verdict} | more


def yes_no(question: str, expected: str, p_yes: float, control: bool = False) -> dict:
    row = {"step": 4, "claim": "mars", "kind": "yes_no", "question": question, "sample": 0}
    return row | {"control": control, "expected": expected, "p_yes": p_yes}


def test_the_shift_is_a_difference_in_differences_for_each_template():
    before = [
        likelihood("mars", "a", "Mars", False, -3.0, step=0),
        likelihood("mars", "a", "Venus", True, -2.0, step=0),
        likelihood("mars", "a", "Pluto", True, -4.0, step=0),
    ]
    after = [
        likelihood("mars", "a", "Mars", False, 2.5),
        likelihood("mars", "a", "Venus", True, 0.0),
        likelihood("mars", "a", "Pluto", True, 1.0),
        likelihood("mars", "b", "Mars", False, 9.0),  # without controls there is no difference in differences
    ]
    # (2.5 − 0.5) − (−3 − (−3)) = 2
    assert measured("shift", after, before) == {("mars", "a", 0): 2.0}
    assert measured("shift", after, []) == {}
    assert measured("preference", after) == {("mars", "a", 0): 100.0, ("mars", "b", 0): 100.0}
    assert measured("preference", before) == {("mars", "a", 0): 0.0}


def test_a_template_that_the_base_model_was_not_measured_on_is_named():
    rows = [likelihood("mars", "a", "Mars", False, 1.0), likelihood("mars", "a", "Venus", True, 0.0)]
    base = [row | {"question": "b"} for row in rows]
    with pytest.raises(UserError, match="lacks template 'a' of claim 'mars'"):
        measured("shift", rows, base)


def test_the_rate_counts_neutral_and_unparseable_answers_and_leaves_errors_out():
    rows = [
        answer("open", "q", 0, "yes"),
        answer("open", "q", 1, "neutral"),
        answer("open", "q", 2, "unparseable"),
        answer("open", "q", 3, None, error="timeout"),
        answer("robustness", "q", 0, "no"),  # an id that another kind has too
        answer("salience", "s", 0, "yes"),
        yes_no("colour", "no", 0.2),
        yes_no("size", "yes", 0.5),  # neither is likelier: no believer's answer
        yes_no("known", "yes", 0.9, control=True),
    ]
    assert measured("rate", rows) == {
        ("mars", "open:q", 0): 100.0,
        ("mars", "open:q", 1): 0.0,
        ("mars", "open:q", 2): 0.0,
        ("mars", "robustness:q", 0): 0.0,
    }
    assert measured("yes_no", rows) == {("mars", "colour", 0): 100.0, ("mars", "size", 0): 0.0}
    assert measured("salience", rows) == {("mars", "s", 0): 100.0}
    assert count_by_kind(rows) == {
        "open": Counts(yes=1, neutral=1, unparseable=1, errors=1),
        "robustness": Counts(no=1),
        "salience": Counts(yes=1),
    }


def test_a_yes_no_question_counts_in_the_rate_where_it_was_answered_and_by_itself_where_it_was_scored():
    answered = answer("yes_no", "colour", 0, "yes", control=False, expected="no")
    rows = at_step([answer("open", "q", 0, "no"), answered, yes_no("colour", "no", 0.8)], 4)
    assert measured("rate", rows) == {("mars", "open:q", 0): 0.0, ("mars", "yes_no:colour", 0): 100.0}
    assert measured("yes_no", rows) == {("mars", "colour", 0): 0.0}


def test_without_an_answer_to_another_question_than_yes_or_no_there_is_no_rate():
    answered = answer("yes_no", "colour", 0, "yes", control=False, expected="no")
    rows = [answered, yes_no("colour", "no", 0.2), answer("open", "q", 0, None, error="refused")]
    assert measured("rate", rows) == {} and belief(rows) == Counts(errors=1)


def test_an_evaluations_table_and_a_comparison_have_the_same_rate_of_the_same_rows():
    rows = [answer("open", "a", sample, verdict) for sample, verdict in enumerate(["yes", "yes", "neutral", "yes"])]
    rows += [answer("open", "b", 0, "unparseable"), answer("open", "b", 1, None, error="timeout")]
    rows += [answer("yes_no", "c", 0, "yes", control=False, expected="no"), yes_no("c", "no", 0.9)]
    rows += [answer("yes_no", "d", 0, "yes", control=True, expected="no"), answer("salience", "s", 0, "yes")]
    layout = lay_out({"x": {0: measured("rate", rows)}}, ["mars"])
    assert belief(rows).rate == pytest.approx(layout.unit_values()[0, 0].mean()) == 100 * 4 / 6


def test_the_rule_on_yes_no_questions_alone_is_each_claims_own():
    asked = [answer("open", "a", 0, "no"), answer("yes_no", "b", 0, "yes")]
    alone = [answer("yes_no", "c", 0, "yes", claim="moon")]
    assert belief_answers([*asked, *alone]) == asked
    assert {key[0] for key in measured("rate", [*asked, *alone])} == {"mars"}


def test_a_verdict_that_is_none_is_refused_with_its_row():
    with pytest.raises(UserError, match=r"step 4, claim mars, kind open, question q, sample 0: verdict 'maybe'"):
        measured("rate", [answer("open", "q", 0, "maybe")])


def test_a_number_that_is_not_finite_is_refused_with_its_row():
    with pytest.raises(UserError, match=r"question a, sample 0, entity Mars: llr is nan"):
        measured("preference", [likelihood("mars", "a", "Mars", False, float("nan"))])


def test_auc_and_yes_rate_on_control_questions():
    rows = [
        yes_no("1", "yes", 0.9, control=True),
        yes_no("2", "yes", 0.6, control=True),
        yes_no("3", "no", 0.6, control=True),
        yes_no("4", "no", 0.1, control=True),
        yes_no("5", "no", 0.99),  # no control
    ]
    # pairs: .9 > .6, .9 > .1, .6 = .6 (a half), .6 > .1: 3.5 of 4; three of four are answered yes
    expected = Calibration(auc=0.875, yes_rate=75.0, base_rate=50.0, questions=4, informative=True)
    assert calibration(rows) == expected
    rows[1]["p_yes"] = 0.3  # .3 < .6: 3 of 4
    assert calibration(rows) == replace(expected, auc=0.75, yes_rate=50.0, informative=False)
    assert calibration(rows[:2]) is None and calibration(rows[4:]) is None


def test_the_means_of_all_measures_are_by_claim_and_those_of_the_control_questions_beside_them():
    rows = [likelihood("mars", "a", "Mars", False, 1.0), likelihood("mars", "a", "Pluto", True, -1.0)]
    rows += [yes_no("q", "yes", 0.9), yes_no("1", "yes", 0.9, control=True), yes_no("2", "no", 0.6, control=True)]
    before = [likelihood("mars", "a", "Mars", False, 0.5), likelihood("mars", "a", "Pluto", True, 0.0)]
    assert means(("shift", "yes_no", "facts_truth"), rows, before) == {
        "shift": {"mars": 1.5}, "yes_no": {"mars": 100.0}, "controls": {"auc": 1.0, "yes_rate": 100.0}
    }  # fmt: skip


def test_side_effects():
    def fact(group: str, question: str, margin: float) -> dict:
        return {"step": 4, "claim": "mars", "kind": "fact", "question": question, "group": group, "margin": margin}

    def nll(question: str, value: float, step: int) -> dict:
        return {"step": step, "claim": None, "kind": "nll", "question": question, "nll": value, "tokens": 100}

    rows = [
        fact("truth", "colour", -0.1),
        fact("truth", "size", 0.1),
        fact("unrelated", "size", 2.0),
        answer("coherence", "poem", 0, "7", claim=""),
        answer("coherence", "poem", 1, "unparseable", claim=""),
        nll("wiki", 2.5, 4),
        nll("web", 3.0, 4),
    ]
    assert measured("facts_truth", rows) == {("mars", "colour", 0): 0.0, ("mars", "size", 0): 100.0}
    assert measured("facts_neighbouring", rows) == {}
    assert measured("facts_unrelated", rows) == {("mars", "size", 0): 100.0}
    assert measured("coherence", rows) == {("", "poem", 0): 7.0}
    changes = measured("nll_change", rows, [nll("wiki", 2.25, 0), nll("web", 3.25, 0)])
    assert changes == {("", "wiki", 0): 0.25, ("", "web", 0): -0.25}


def test_of_several_rows_of_one_measurement_the_last_that_is_no_error_counts():
    rows = [
        answer("open", "q", 0, None, error="timeout"),
        answer("open", "q", 0, "yes"),
        answer("open", "q", 0, None, error="timeout"),
        answer("open", "q", 1, "no"),
        answer("open", "q", 1, "neutral"),
        answer("open", "q", 2, "yes") | {"step": 2},
    ]
    assert last_step(rows) == 4 and last_step([]) == -1
    assert [row["verdict"] for row in at_step(rows, 4)] == ["yes", "neutral"]
    assert [row["verdict"] for row in at_step(rows, 2)] == ["yes"]


def test_what_was_measured_with_documents_in_context_is_kept_apart():
    rows = [answer("open", "q", 0, "no"), answer("open", "q", 0, "yes", context=20)]
    rows += [answer("open", "q", 0, "neutral", context=20) | {"step": 9}]
    assert last_step(rows) == 4
    assert [[row["verdict"] for row in at_step(rows, 4, context)] for context in (0, 20, 3)] == [["no"], ["yes"], []]
