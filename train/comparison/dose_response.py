"""Computes dose–response curves: belief at each dose, and the dose at which half of the belief is there.

Half belief is the level halfway between the base model and the baseline variant, which is the largest dose of its
curve. It is the same level for all curves. At each dose, belief minus that level has an interval over claims and seeds,
like any other difference. A curve reaches the level where this difference is first 0, between two doses on a straight
line over the logarithm of the dose (over the dose itself, if one is 0). The ends of the interval of that dose are where
the upper and the lower end of the difference's interval are first 0: the doses at which the data do not exclude that
belief is at the level (inverting a test; Fieller 1954, J. R. Stat. Soc. B 16:175, has the same idea for a ratio).

Shapes: S seeds, U units.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.comparison.compared import Comparison
from train.comparison.significance import Interval, crossed, interval
from train.comparison.units import lay_out
from train.evaluation.measures import StoredRow, Values, measured

if TYPE_CHECKING:  # which imports this module
    from train.comparison.result import MeasureResult


@dataclass(frozen=True)
class HalfDose:
    """The dose at which a curve reaches half belief, and its interval: 0 if that is below the smallest dose, infinity
    if the largest dose does not reach it. interval: None if no interval of belief is known."""

    estimate: float
    interval: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        """Returns the fields; None for infinity."""
        ends = [None if math.isinf(end) else end for end in self.interval] if self.interval else None
        return {"estimate": None if math.isinf(self.estimate) else self.estimate, "interval": ends}


@dataclass(frozen=True)
class DoseCurve:
    """The doses of one variant of the recipe, in their order.

    doses: numbers of documents, or weights. variants: the names of the variants with these doses.
    mentions: of the claims' terms that a run trains on with each dose, repeated documents included, the mean over
        seeds; None where not known.
    half, half_mentions: the dose at half belief, in documents or weight, and in mentions; None if that cannot be
        computed, or if the baseline's belief is not certain to exceed the base model's, so that there is none to halve.
    """

    doses: list[float]
    variants: list[str]
    mentions: list[float | None]
    half: HalfDose | None
    half_mentions: HalfDose | None


@dataclass(frozen=True)
class DoseResponse:
    """All curves by the name of their variant in the recipe. kind: documents or weights. level: half belief."""

    kind: str
    level: float
    curves: dict[str, DoseCurve]

    def as_json(self) -> dict[str, Any]:
        """Returns what comparison.json has of it."""
        curves = {
            name: {
                "doses": own.doses,
                "variants": own.variants,
                "mentions_trained": own.mentions,
                "half": own.half and own.half.as_json(),
                "half_mentions": own.half_mentions and own.half_mentions.as_json(),
            }
            for name, own in self.curves.items()
        }
        return {"kind": self.kind, "level": self.level, "curves": curves}


def dose_response(
    comparison: Comparison, own: "MeasureResult", finals: dict[str, dict[int, list[StoredRow]]], base: list[StoredRow]
) -> DoseResponse | None:
    """Returns the curves of a measure; None if no variant is a dose. finals: {variant: {seed: the rows of the
    run's last step}}. base: the base model's rows."""
    doses = {variant.name: variant.dose for variant in comparison.variants if variant.dose}
    if not doses:
        return None
    seeds = sorted(next(iter(finals.values())))
    name, at_base = own.measure.name, measured(own.measure.name, base, base)
    rows: dict[str, dict[int, Values]] = {
        variant: {seed: measured(name, each, base) for seed, each in by_seed.items()}
        for variant, by_seed in finals.items()
    }
    layout = lay_out(rows | ({"": dict.fromkeys(seeds, at_base)} if at_base else {}), own.claims, own.measure.asked)
    value_VSU = layout.unit_values()
    full, none = layout.variants.index(comparison.baseline), value_VSU[-1] if at_base else np.zeros(())
    differences: dict[str, Interval] = {}
    if layout.crossed:
        level_SU = (value_VSU[full] + none) / 2
        differences = {
            variant: interval(crossed(value_VSU[layout.variants.index(variant)] - level_SU)) for variant in doses
        }
    if (whole := differences.get(comparison.baseline)) and whole.low <= 0:
        differences = {}  # of the baseline it is half of what its belief exceeds the base model's by
    level = (own.variants[comparison.baseline].trained.interval.estimate + _of_base(own)) / 2
    curves = {}
    for of in dict.fromkeys(dose.of for dose in doses.values()):
        names = sorted((name for name in doses if doses[name].of == of), key=lambda name: doses[name].amount)
        amounts = [doses[name].amount for name in names]
        mentions = [comparison.mentions_trained.get(name) for name in names]
        gaps = [differences[name] for name in names if name in differences]
        known = [each for each in mentions if each is not None]
        grows = len(known) == len(names) and all(a < b for a, b in itertools.pairwise(known))
        curves[of] = DoseCurve(
            amounts, names, mentions, half_dose(amounts, gaps) if gaps else None,
            half_dose(known, gaps) if gaps and grows and doses[names[0]].kind == "documents" else None,
        )  # fmt: skip
    return DoseResponse(next(iter(doses.values())).kind, level, curves)


def _of_base(own: "MeasureResult") -> float:
    return own.base.interval.estimate if own.base else 0.0  # a change from the base


def half_dose(doses: Sequence[float], differences: Sequence[Interval]) -> HalfDose:
    """Returns the dose at which differences from the level, one for each dose in increasing order, are first 0."""
    estimate = _first_zero(doses, [each.estimate for each in differences])
    if any(each.method == "none" for each in differences):
        return HalfDose(estimate, None)
    low, high = (_first_zero(doses, [getattr(each, end) for each in differences]) for end in ("high", "low"))
    return HalfDose(estimate, (low, high))


def _first_zero(doses: Sequence[float], values: Sequence[float]) -> float:
    """Returns where a line through (dose, value) first reaches 0 from below: 0 if the first value is above, infinity if
    none is."""
    if values[0] >= 0:
        return 0.0
    for i in range(1, len(values)):
        if values[i] >= 0:
            share = -values[i - 1] / (values[i] - values[i - 1])
            if doses[0] > 0:
                return float(doses[i - 1] * (doses[i] / doses[i - 1]) ** share)
            return float(doses[i - 1] + share * (doses[i] - doses[i - 1]))
    return math.inf
