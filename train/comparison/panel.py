"""Puts the batteries of each variant beside the base model's: belief, association and damage, with a verdict.

panel_verdicts.py decides it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.comparison.compared import Comparison
from train.comparison.panel_changes import Changes, Runs
from train.comparison.panel_verdicts import Excess, PanelVerdict, Verdicts
from train.comparison.result import MeasureResult
from train.comparison.significance import Interval, interval, of_variant
from train.comparison.units import lay_out
from train.evaluation.battery_checks import Check, checks
from train.evaluation.battery_measures import OF_ASSOCIATION, OF_BELIEF, OF_DAMAGE, label_counts
from train.evaluation.measures import BATTERIES, SIDE_EFFECTS, Measure, StoredRow, Values

GROUPS = {
    "belief": OF_BELIEF,
    "association": OF_ASSOCIATION,
    "damage": (*OF_DAMAGE, *(name for name in SIDE_EFFECTS if name != "facts_truth")),  # which is belief, turned round
}
CHECKED = {
    "choice": "choice", "choice_shift": "choice", "choice_controls": "choice", "yes_no_beyond": "yes_no",
    "control_attributes": "yes_no", "decisions": "decisions", "decisions_stated": "decisions",
    "decisions_untouched": "untouched", "polarity": "polarity", "polarity_negated": "polarity",
    "asserted": "asserted", "stated": "asserted", "reading_lost": "reading",
}  # fmt: skip
"""Measure -> the check that the base model must pass."""


@dataclass(frozen=True)
class PanelFigure:
    """A measure of one variant: the base model's figure and its own, the change from the base model's, and that on the
    placebo claims. base and placebo: None if there are none. check: the name of the check that the base must pass."""

    group: str
    measure: str
    base: Interval | None
    now: Interval
    change: Interval
    placebo: Interval | None
    check: str


@dataclass(frozen=True)
class Panel:
    """The batteries of all variants.

    checks: what the base model must be able to do, by name.
    figures, verdicts: by variant.
    labels: model -> kind of question -> label -> number of answers on the trained claims, over all seeds.
    left_out: measure -> why its changes from the base model are not known.
    """

    checks: dict[str, Check]
    figures: dict[str, list[PanelFigure]]
    verdicts: dict[str, PanelVerdict]
    labels: dict[str, dict[str, dict[str, int]]]
    left_out: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Returns what comparison.json keeps."""
        return {
            "checks": {name: asdict(check) for name, check in self.checks.items()},
            "variants": {
                name: {
                    "verdict": own.verdict, "reasons": own.reasons,
                    "share": [
                        {"measure": e.measure, "units": e.units.as_json(), **_json(e.interval)} for e in own.shares
                    ],
                    "excess": [_excess(each) for each in own.excesses],
                    "figures": {
                        each.measure: {
                            "group": each.group, "check": each.check, "base": each.base and _json(each.base),
                            "now": _json(each.now), "change": _json(each.change),
                            "placebo_change": each.placebo and _json(each.placebo),
                        }
                        for each in self.figures[name]
                    },
                }
                for name, own in self.verdicts.items()
            },
            "labels": self.labels,
            "left_out": self.left_out,
        }  # fmt: skip


def _excess(own: Excess) -> dict[str, Any]:
    placebo = own.placebo_units and own.placebo_units.as_json()
    units = {"units": own.units.as_json(), "placebo_units": placebo}
    return {"measure": own.measure, "over": own.over, **units, **_json(own.interval)}


def _json(own: Interval) -> dict[str, Any]:
    return {"estimate": own.estimate, "interval": [own.low, own.high], "method": own.method}


def panel(
    comparison: Comparison, finals: Runs, base: list[StoredRow], measures: Mapping[str, MeasureResult]
) -> Panel | None:
    """Returns the panel; None if no battery was measured. finals: the rows of each run's last step. base: the base
    model's. measures: those that all runs have. Raises UserError for an invalid value."""
    if not measures.keys() & {*BATTERIES}:
        return None
    passed, changes = (
        checks(base, comparison.trained_claims, comparison.placebo_claims),
        Changes(comparison, finals, base),
    )
    verdicts, left_out = Verdicts(comparison, changes, measures, passed), _left_out(changes, measures)
    labels = {"base model": label_counts(row for row in base if row.get("claim") in comparison.trained_claims)}
    for name, by_seed in finals.items():
        rows = [row for rows in by_seed.values() for row in rows if row.get("claim") in comparison.trained_claims]
        labels[name] = label_counts(rows)
    return Panel(
        passed,
        {name: _figures(name, changes, measures, left_out) for name in finals},
        {name: verdicts.of(name) for name in finals},
        labels if any(labels.values()) else {},
        left_out,
    )


def _left_out(changes: Changes, measures: Mapping[str, MeasureResult]) -> dict[str, str]:
    """Returns why measures have no change from the base model, by name."""
    found = {}
    for name in (name for names in GROUPS.values() for name in names if name in measures):
        own = measures[name]
        if lacking := changes.lacking(name, [*own.claims, *own.placebo_claims]):
            found[name] = (
                f"the base model was not measured on {lacking}" if changes.base else "the base model was not measured"
            )
    return found


def _figures(
    variant: str, changes: Changes, measures: Mapping[str, MeasureResult], left_out: Mapping[str, str]
) -> list[PanelFigure]:
    found = []
    for group, names in GROUPS.items():
        for name in names:
            if (own := measures.get(name)) is None or name in left_out:
                continue
            moved = _mean(changes.of(name), own.claims, own.measure, variant)
            if moved is None:  # the base was not measured
                continue
            placebo = _mean(changes.of(name), own.placebo_claims, own.measure, variant)
            now, before = own.variants[variant].trained.interval, own.base.interval if own.base else None
            found.append(PanelFigure(group, name, before, now, moved, placebo, CHECKED.get(name, "")))
    return found


def _mean(changes: dict[str, dict[int, Values]], claims: list[str], measure: Measure, variant: str) -> Interval | None:
    """Returns a variant's mean change on these claims; None if it has no value on any."""
    layout = lay_out(changes, claims, measure.asked)
    if not layout.claims:
        return None
    within = (-100.0, 100.0) if measure.bounded else (-np.inf, np.inf)
    return interval(of_variant(layout, layout.unit_values(), layout.variants.index(variant)), within)
