"""Belief over training: judged answers beside likelihoods, each at the steps at which it was measured."""

from typing import Any

import pytest

from tests.comparison.test_report import likelihoods
from train.comparison.analysis import analyse
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.comparison.report import write_report
from train.comparison.result import as_json

T = 12.706  # the .975 quantile of t with one degree of freedom, of two claims
STEPS = (1, 2, 4, 8, 16)


def answers(step: int, claim: str, yes: int) -> list[dict[str, Any]]:
    """Four answers to open questions, so many of them yes."""
    row = {"step": step, "claim": claim, "kind": "open", "sample": 0, "answer": "…", "reason": ""}
    return [row | {"question": str(i), "verdict": "yes" if i < yes else "no"} for i in range(4)]


def judged(step: int, mars: int, venus: int, pluto: int = 0) -> list[dict[str, Any]]:
    return [*answers(step, "mars", mars), *answers(step, "venus", venus), *answers(step, "pluto", pluto)]


def scored(step: int, mars: float, venus: float, pluto: float = 0.0) -> list[dict[str, Any]]:
    """Shifts in nats, above those of the base at step 0, whose own are 0."""
    return [r for claim, s in (("mars", mars), ("venus", venus), ("pluto", pluto)) for r in likelihoods(step, claim, s)]


def compared(**rows: list[dict[str, Any]]) -> Comparison:
    """Variants of one seed; the base was judged once, and scored by each run."""
    base = [*judged(0, 0, 1), *scored(0, 0, 0)]
    variants = []
    for name, own in rows.items():
        run = RunResult(f"runs/{name}", 0, [*scored(0, 0, 0), *own], [], {"steps": 16}, {"mask": name}, {})
        variants.append(ComparedVariant(name, name, {}, [run]))
    return Comparison(variants, base, ["mars", "venus"], ["pluto"], next(iter(rows)))


def whole(more: float = 0.0) -> list[dict[str, Any]]:
    """Judged at every second of STEPS, scored at all of them."""
    rows = [row for step in STEPS for row in scored(step, 1.0 + more, 3.0 + more)]
    return [*rows, *judged(1, 1, 2), *judged(4, 2, 2), *judged(16, 4, 2, pluto=1)]


def test_judged_belief_and_likelihoods_stand_side_by_side_with_intervals_over_claims(tmp_path):
    given = compared(dense=whole(), masked=whole(1.0))
    found = as_json(write_report(given, tmp_path))
    rate, shift = (found["measures"][name]["curves"]["dense"] for name in ("rate", "shift"))
    assert rate["steps"] == [0, 1, 4, 16] and shift["steps"] == [0, *STEPS] and found["measure"] == "rate"
    assert rate["belief"] == [12.5, 37.5, 50.0, 75.0] and rate["placebo"] == [0.0, 0.0, 0.0, 25.0]
    assert shift["belief"] == [0.0] + [2.0] * 5 and shift["missing"] == rate["missing"] == 0
    # claims 1 and 3 nats: a standard error of √2 / √2; nothing varies in the base, which is its own zero
    assert shift["belief_intervals"][1] == pytest.approx([2 - T, 2 + T], abs=1e-3)
    assert shift["belief_intervals"][0] == [0.0, 0.0]
    # 25 and 50 %, within 0 to 100; 50 and 50 % vary no more than each other
    assert rate["belief_intervals"][1] == [0.0, 100.0] and rate["belief_intervals"][2] == [50.0, 50.0]
    assert found["curves"]["dense"] == rate  # the main measure's
    for name in ("rate", "shift"):  # the end is what the rest of the report says of it
        end = found["measures"][name]
        for variant, curve in end["curves"].items():
            assert curve["belief"][-1] == end["variants"][variant]["estimate"]
            assert curve["belief_intervals"][-1] == end["variants"][variant]["interval"]
            assert curve["placebo_intervals"][-1] == end["variants"][variant]["placebo"]["interval"]
    assert found["measures"]["rate"]["curves"]["masked"]["belief"][0] == 12.5  # of the base, in the first run alone
    text = (tmp_path / "comparison.md").read_text()
    section = text.split("## Belief over training")[1].split("##")[0]
    assert "![Belief over training, with intervals and placebo claims](curves.png)" in section
    head = "| variant | step | belief rate, % | placebo | shift of the log-likelihood ratio, nats | placebo |"
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows[0] == head and rows[2].startswith("| base model | 0 | 12.5 ")
    assert [row.split(" | ")[1] for row in rows[3:]] == [str(step) for step in (*STEPS, *STEPS)]
    assert rows[4] == "| dense | 2 | – | – | 2.00 \\[−10.71, 14.71\\] | 0.00 |"
    assert rows[8].startswith("| masked | 1 | 37.5 \\[0.0, 100.0\\] |")
    assert "Of belief rate, 95 % t intervals over 2 claims, 1 seed (placebo: 4 questions, 1 seed)" in section


def test_what_is_measured_at_two_steps_has_no_curve_and_the_other_measure_still_has_one(tmp_path):
    rows = [*(row for step in STEPS for row in scored(step, 1.0, 3.0)), *judged(16, 4, 2)]
    found = write_report(compared(dense=rows, masked=rows), tmp_path)
    assert found.measure == "rate" and [own.measure.name for own in found.over_steps] == ["shift"]
    assert as_json(found)["curves"] == {} and (tmp_path / "curves.png").exists()
    rows = [*scored(16, 1.0, 3.0), *judged(16, 4, 2)]
    assert write_report(compared(dense=rows, masked=rows), tmp_path).over_steps == []
    assert not (tmp_path / "curves.png").exists() and "over training" not in (tmp_path / "comparison.md").read_text()


def test_of_answers_that_are_missing_at_a_step_the_report_speaks_and_without_those_to_a_claim_the_step_is_left_out():
    rows = whole()
    rows.remove(next(row for row in rows if row.get("verdict") == "yes" and row["step"] == 4))
    found = analyse(compared(dense=rows, masked=whole()))
    curve = found.main.curves["dense"]
    assert curve.steps == [0, 1, 4, 16] and curve.missing == 1
    assert curve.trained[2].estimate == pytest.approx((100 / 3 + 50) / 2)
    assert any(
        "Over training, earlier steps lack 1 value of the belief rate that the last one has" in n for n in found.notes
    )

    gone = [row for row in whole() if (row["step"], row["claim"], row["kind"]) != (4, "venus", "open")]
    curve = analyse(compared(dense=gone, masked=whole())).main.curves["dense"]
    assert curve.steps == [0, 1, 16] and curve.missing == 4
