"""Phases and doses in a comparison's report: rebounds and half doses, worked by hand."""

import json
import math

import pytest
from scipy.stats import t as t_distribution

from tests.comparison.test_report import likelihoods
from train.comparison.analysis import analyse
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.comparison.dose_response import HalfDose, half_dose
from train.comparison.joined import joined
from train.comparison.report import write_report
from train.comparison.significance import Interval
from train.config.experiment import Dose
from train.runtime.errors import UserError
from train.training.lineage import phases_before

T = t_distribution.ppf(0.975, 1)  # of two claims or two seeds
SUMMARY = {"random_shortfall": 1, "tokens": {}}


def phase(steps: int, mask: str, seed: int, values: dict[int, tuple[float, float, float]]) -> RunResult:
    """A run with these shifts of mars, venus and the placebo at some steps, in nats above the base's."""
    rows = [
        row
        for step, shifts in values.items()
        for claim, shift in zip(("mars", "venus", "pluto"), shifts, strict=True)
        for row in likelihoods(step, claim, shift)
    ]
    metrics = [{"step": step + 1, "nll": {"all": 1.0}} for step in range(steps)]
    counts = {"total": 9, "trained": steps, "excluded": 9 - steps, "unlikelihood": 0, "held": 0}
    summary = SUMMARY | {"steps": steps, "tokens": {"all": counts}}
    hashes = {"tokens": "t", "order": f"o{steps}", "initial_weights": f"i{steps}"}
    return RunResult("run", seed, rows, metrics, summary, {"mask": mask}, hashes)


def compared(*variants: ComparedVariant, **more) -> Comparison:
    base = [row for claim in ("mars", "venus", "pluto") for row in likelihoods(0, claim, 0.0)]
    return Comparison([*variants], base, ["mars", "venus"], ["pluto"], variants[0].name, **more)


def two_phases(name: str, before: tuple, after: dict[int, tuple], names=("first", "then")) -> ComparedVariant:
    """Of two seeds. before: shifts at the end of the first phase, of 4 steps; after: by seed, of the second, of 2."""
    runs = [
        joined([phase(4, "held", seed, {0: (0, 0, 0), 4: before}), phase(2, "none", seed, {0: before, 2: own})])
        for seed, own in after.items()
    ]
    return ComparedVariant(name, "held → none", {}, runs, names)


def test_a_rebound_is_the_change_in_a_phase_paired_by_claim_and_seed_beside_the_controls(tmp_path):
    control = two_phases("control", (0.0, 0.0, 0.0), {0: (1.0, 1.0, 0.5), 1: (1.0, 1.0, 0.5)})
    held = two_phases("held", (0.5, 1.5, 0.0), {0: (3.5, 4.5, 0.5), 1: (4.5, 5.5, 0.5)})
    whole = ComparedVariant("plain", "none", {}, [phase(6, "none", seed, {6: (2.0, 2.0, 0.0)}) for seed in (0, 1)])
    result = write_report(compared(control, held, whole), tmp_path)
    first, then = result.phases["held"]
    assert (first.name, first.first, first.last, first.mask) == ("first", 0, 4, "held")
    assert (then.name, then.first, then.last, then.mask) == ("then", 4, 6, "none")
    assert first.trained.estimate == first.change.estimate == 1.0
    # mars and venus change by 3 in seed 0 and by 4 in seed 1: only seeds vary, with a standard error of ½
    assert then.trained.estimate == 4.5 and then.change.estimate == 3.5
    assert (then.change.low, then.change.high) == pytest.approx((3.5 - T / 2, 3.5 + T / 2))
    assert then.placebo_change is not None and then.placebo_change.estimate == 0.5
    assert then.against is not None and then.against.estimate == 2.5  # the control changes by 1
    assert (then.against.low, then.against.high) == pytest.approx((2.5 - T / 2, 2.5 + T / 2))
    assert result.phases["control"][1].against is None
    [alone] = result.phases["plain"]
    assert (alone.name, alone.first, alone.last, alone.change.estimate) == ("", 0, 6, 2.0)
    assert alone.against is None or alone.against.estimate == 2.0
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["phases"]["held"][1]["change"]["interval"] == [then.change.low, then.change.high]
    assert found["curves"]["held"]["steps"] == [0, 4, 6] and found["variants"]["held"]["steps"] == [6]
    text = (tmp_path / "comparison.md").read_text()
    assert "## Phases" in text and "| held | then | none | optimizer anew, schedule anew | 4–6 | 4.50" in text
    assert "minus control’s" in text


def test_what_a_phase_measured_before_its_first_step_counts_once_and_the_bases_judged_answers_stay():
    first, then = phase(4, "a", 0, {0: (0, 0, 0), 4: (1, 1, 1)}), phase(2, "b", 0, {0: (1, 1, 1), 2: (2, 2, 2)})
    judged = {"step": 0, "claim": "mars", "kind": "open", "question": "1", "sample": 0, "verdict": "no"}
    then.rows.append(judged)
    whole = joined([first, then])
    assert sorted({row["step"] for row in whole.rows}) == [0, 4, 6] and len(whole.rows) == 3 * 18 + 1
    assert whole.rows[-1] == judged and [m["step"] for m in whole.metrics] == [1, 2, 3, 4, 5, 6]
    assert whole.summary["tokens"]["all"]["trained"] == 6 and whole.summary["random_shortfall"] == 2
    assert whole.hashes["tokens"] == "t" and whole.hashes["initial_weights"] == "i4"
    assert whole.hashes["order"] not in ("o4", "o2") and whole.boundaries == [4]


def test_phases_that_are_gone_or_continue_themselves_are_told(tmp_path):
    for name, after in (("a", "nowhere"), ("b", str(tmp_path / "c")), ("c", str(tmp_path / "b"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.yaml").write_text(f"settings: {{after: {after}}}\n")
    with pytest.raises(UserError, match="continues the run in nowhere, which is not there, nor beside it"):
        phases_before(tmp_path / "a")
    with pytest.raises(UserError, match="a run cannot continue itself"):
        phases_before(tmp_path / "b")


def interval(low: float, estimate: float, high: float) -> Interval:
    return Interval(estimate, low, high, 1.0)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # −1 at 10 and +1 at 1,000: 0 in the middle of the logarithm. Its ends: +1 … +3 at once; −3 at 10, −1 at 1,000
        ([interval(-3, -1, 1), interval(-1, 1, 3)], HalfDose(100.0, (0.0, math.inf))),
        ([interval(-2, -1.5, -1), interval(1, 1.5, 3)], HalfDose(100.0, (10 * 100**0.25, 10 * 100 ** (2 / 3)))),
        ([interval(1, 2, 3), interval(1, 2, 3)], HalfDose(0.0, (0.0, 0.0))),
        ([interval(-3, -2, -1), interval(-3, -2, -1)], HalfDose(math.inf, (math.inf, math.inf))),
    ],
)
def test_the_dose_at_half_belief_is_where_a_line_over_the_logarithm_is_zero(differences, expected):
    found = half_dose([10, 1000], differences)
    assert found.estimate == pytest.approx(expected.estimate) and found.interval == pytest.approx(expected.interval)


def test_with_a_dose_of_zero_the_line_is_over_the_dose_itself():
    found = half_dose([0, 0.5, 1], [interval(-4, -3, -2), interval(-2, -1, 0), interval(2, 3, 4)])
    assert found.estimate == pytest.approx(0.625) and found.interval == pytest.approx((0.5, 0.75))


def test_without_intervals_there_is_none_of_the_dose():
    assert half_dose([1, 4], [Interval(-1, -1, -1, 0.0, "none"), interval(0, 1, 2)]) == HalfDose(2.0, None)


def doses(kind: str, of: str, believed: dict[float, float], spread: float = 0.0) -> list[ComparedVariant]:
    """Variants of two seeds whose shift is this, and more by `spread` in the second seed."""
    return [
        ComparedVariant(
            f"{of}, {amount:g}", "none", {}, [
                phase(4, "none", seed, {4: (shift + seed * spread, shift + seed * spread, 0.0)}) for seed in (0, 1)
            ],
            dose=Dose(of, kind, amount),
        )
        for amount, shift in believed.items()
    ]  # fmt: skip


def test_curves_reach_half_of_the_baselines_belief_at_doses_with_intervals(tmp_path):
    dense = doses("documents", "dense", {10: 0.0, 100: 2.0, 1000: 8.0}, spread=1.0)
    masked = doses("documents", "masked", {10: 0.0, 100: 0.0, 1000: 1.0})
    mentions = {"dense, 10": 20.0, "dense, 100": 200.0, "dense, 1000": 2000.0}
    given = compared(*dense, *masked, mentions_trained=mentions)
    given.baseline = "dense, 1000"
    result = write_report(given, tmp_path)
    assert result.doses is not None and result.doses.kind == "documents"
    assert result.doses.level == 4.25  # half of 8.5, the mean of both seeds
    curve = result.doses.curves["dense"]
    assert curve.doses == [10.0, 100.0, 1000.0] and curve.mentions == [20.0, 200.0, 2000.0]
    assert curve.half is not None and curve.half_mentions is not None
    # belief minus the level: 2.5 − 4.25 at 100, 8.5 − 4.25 at 1,000
    assert curve.half.estimate == pytest.approx(100 * 10 ** (1.75 / 6))
    assert curve.half_mentions.estimate == pytest.approx(2 * curve.half.estimate)
    # in each seed the level is half of that seed's, so belief minus it varies by half of 1: a standard error of ¼
    # by T = 12.7 the upper end is above 0 at 100 already, and below at 10, where it is 1 − 0.5 − 4.25 + T ÷ 4
    assert curve.half.interval is not None
    assert curve.half.interval[0] == pytest.approx(10 * 10 ** ((3.75 - T / 4) / 2))
    assert curve.half.interval[1] == pytest.approx(100 * 10 ** ((1.75 + T / 4) / 6))
    other = result.doses.curves["masked"]
    assert other.half is not None and math.isinf(other.half.estimate) and other.half_mentions is None
    found = json.loads((tmp_path / "comparison.json").read_text())["doses"]
    assert found["curves"]["masked"]["half"]["estimate"] is None
    assert found["curves"]["dense"]["half"]["estimate"] == curve.half.estimate
    text = (tmp_path / "comparison.md").read_text().replace("\\", "")
    assert "## Dose and response" in text and "| dense | 196 [" in text and "| masked | above 1,000 [" in text
    assert (tmp_path / "doses.png").exists()


def test_weights_are_doses_too_and_variants_that_are_none_have_no_curve(tmp_path):
    given = compared(*doses("weights", "false", {0: 0.0, 0.1: 1.0, 1: 4.0}))
    given.baseline = "false, 1"
    result = write_report(given, tmp_path)
    assert result.doses is not None and result.doses.curves["false"].half is not None
    assert result.doses.curves["false"].half.estimate == pytest.approx(0.1 + 0.9 / 3)
    assert "| false | 0.4 |" in (tmp_path / "comparison.md").read_text().replace("\\", "")
    plain = [ComparedVariant(v.name, v.mask, {}, v.runs) for v in given.variants]
    assert analyse(compared(*plain)).doses is None
