"""Computes what each phase of training changed: belief at its end minus belief at its start, paired by claim and seed.

The change in the last phase is the *rebound*, if what comes before it kept belief down. Whether it is more than the
same phase does from another start is the difference from the baseline's change in its phase of the same number.

Shapes: S seeds, U units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from train.comparison.compared import ComparedVariant, Comparison
from train.comparison.significance import Interval, crossed, estimated_mean, interval, of_pair
from train.comparison.units import Design, lay_out
from train.evaluation.measures import StoredRow, Values, at_step, measured

if TYPE_CHECKING:  # which imports this module
    from train.comparison.result import MeasureResult


@dataclass(frozen=True)
class PhaseBelief:
    """A measure before and after one phase of a variant.

    carried: whether it goes on with the optimizer's state of the phase before. schedule_from: the step of the learning
        rate's schedule before its first one; 0 if the schedule begins anew.
    first, last: the step before the phase, and its last step, on the axis of all phases.
    trained, placebo: at the end of the phase. change, placebo_change: in the phase.
    against: the change minus that of the baseline in its phase of the same number; None for the baseline itself, or if
        it has no such phase or other seeds. placebo: None without placebo claims.
    """

    name: str
    mask: str
    first: int
    last: int
    trained: Interval
    placebo: Interval | None
    change: Interval
    placebo_change: Interval | None
    against: Interval | None
    carried: bool = False
    schedule_from: int = 0


def over_phases(
    comparison: Comparison, measures: "Sequence[MeasureResult]", base: list[StoredRow]
) -> tuple[str, dict[str, list[PhaseBelief]]]:
    """Returns the first of the measures that was taken at the end of a first phase, and in it {variant: its phases},
    for variants whose runs all have it at the end of each phase; "" and {} if no variant has several phases. base: the
    base model's rows, of one step."""
    if any(run.phases for variant in comparison.variants for run in variant.runs):
        for own in measures:
            found = _in_measure(comparison, own, base)
            if any(len(phases) > 1 for phases in found.values()):
                return own.measure.name, found
    return "", {}


def _in_measure(comparison: Comparison, own: "MeasureResult", base: list[StoredRow]) -> dict[str, list[PhaseBelief]]:
    ends = {variant.name: _ends(variant, own.measure.name, base) for variant in comparison.variants}
    reference = ends[comparison.baseline]
    found = {}
    for variant in comparison.variants:
        values = ends[variant.name]
        if all(_whole(each, own.claims) for each in values) and len(values) > 1:
            same = variant.name == comparison.baseline
            found[variant.name] = _phases(variant, own, values, [] if same else reference)
    return found


Ends = list[dict[int, Values]]
"""{seed: values} before the first phase, and at the end of each."""


def _ends(variant: ComparedVariant, measure: str, base: list[StoredRow]) -> Ends:
    seeds = [run.seed for run in variant.runs]
    before = [{seed: measured(measure, base, base) for seed in seeds}]
    if len({(*run.boundaries, run.summary["steps"]) for run in variant.runs}) > 1:
        return before  # the runs have other steps, so that there is no one axis
    own = variant.runs[0]
    return before + [
        {run.seed: measured(measure, at_step(run.rows, step), base) for run in variant.runs}
        for step in (*own.boundaries, own.summary["steps"])
    ]


def _whole(values: dict[int, Values], claims: list[str]) -> bool:
    return all({*claims} <= {claim for claim, *_ in each} for each in values.values())


def _phases(variant: ComparedVariant, own: "MeasureResult", values: Ends, reference: Ends) -> list[PhaseBelief]:
    run = variant.runs[0]
    steps = [0, *run.boundaries, run.summary["steps"]]
    found = []
    for i, part in enumerate(run.parts):
        after, change = _change(own, values[i : i + 2], own.claims)
        placebo = placebo_change = against = None
        if own.placebo_claims and all(_whole(each, own.placebo_claims) for each in values[i : i + 2]):
            placebo, placebo_change = _change(own, values[i : i + 2], own.placebo_claims)
        pair = reference[i : i + 2]
        if len(pair) == 2 and own.same_seeds and all(_whole(each, own.claims) for each in pair):
            against = _against(own, values[i : i + 2], pair)
        name = variant.phases[i] if variant.phases else f"phase {i + 1}" if run.phases else ""
        mask = part.settings.get("mask", "none")
        carried, begins = part.settings.get("carry_optimizer"), part.settings.get("schedule_from")
        one = PhaseBelief(
            name, mask, steps[i], steps[i + 1], after, placebo, change, placebo_change, against, bool(carried),
            int(begins or 0),
        )  # fmt: skip
        found.append(one)
    return found


def _change(own: "MeasureResult", pair: Ends, claims: list[str]) -> tuple[Interval, Interval]:
    """Returns the mean at the end of a phase, and the change in it, over claims and seeds."""
    layout = lay_out({"before": pair[0], "after": pair[1]}, claims, own.measure.asked)
    values = layout.unit_values()
    after = estimated_mean(layout, values, 1, own.measure.bounded)
    return after, interval(of_pair(layout, values, 1, 0), _bounds(own))


def _against(own: "MeasureResult", pair: Ends, reference: Ends) -> Interval:
    parts = {"before": pair[0], "after": pair[1], "before, baseline": reference[0], "after, baseline": reference[1]}
    layout: Design = lay_out(parts, own.claims, own.measure.asked)
    before, after, theirs_before, theirs_after = layout.unit_values()
    difference_SU: np.ndarray = (after - before) - (theirs_after - theirs_before)
    return interval(crossed(difference_SU))


def _bounds(own: "MeasureResult") -> tuple[float, float]:
    return (-100.0, 100.0) if own.measure.bounded else (-np.inf, np.inf)
