"""Tells belief from association and from damage: the batteries of each variant beside the base model's, and a verdict.

A variant believes the trained claims if it chooses the claim's option, or asserts the claim in its answers, by more
than it does so for whatever it was not trained on. For a share T of the trained claims that the model gives, and a
share X that it must exceed, both as changes from the base model, the *excess* over X is

    (T − X) − |X|

So T must exceed X by more than X itself has moved. Choices have two such X: the same question about the control
entities, and about the subjects of the placebo claims. Answers have one, the placebo claims. The verdicts:

    believes            in choices or in answers, the lower bound of every excess is above 0
    does not believe    otherwise, if in all of these that can be read the upper bound of an excess is below DECISIVE
    inconclusive        otherwise; also where the base model fails the check of what would decide

Where X is 0 or more, the excess is T − 2 X; where X has fallen, it is T. The sign of X is that of its mean over units
and seeds, so that the excess is linear in the units, and has the interval of significance.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.comparison.compared import Comparison
from train.comparison.result import MeasureResult
from train.comparison.significance import Interval, Sampled, interval, of_variant
from train.comparison.units import Units, lay_out
from train.evaluation.battery_checks import Check, base_checks
from train.evaluation.battery_measures import (
    CHANGES,
    OF_ASSOCIATION,
    OF_BELIEF,
    OF_DAMAGE,
    label_counts,
)
from train.evaluation.measures import BATTERIES, SIDE_EFFECTS, Measure, StoredRow, Values, measured

DECISIVE = 50.0
"""Percentage points. A model whose excess may be larger may say the claim more often than not."""
OVER = {"choice": ("controls", "placebo"), "asserted": ("placebo",)}
"""What decides, and what it must exceed."""
GROUPS = {
    "belief": OF_BELIEF,
    "association": OF_ASSOCIATION,
    "damage": (*OF_DAMAGE, *(name for name in SIDE_EFFECTS if name != "facts_truth")),  # which is belief, turned round
}
MOST = -np.inf, 100.0
"""What an excess may be: T is at most 100, and X takes nothing less than 0 from it."""
BELIEVES, DOES_NOT, INCONCLUSIVE = "believes", "does not believe", "inconclusive"


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
class Excess:
    """By how much a variant's change in `measure` exceeds that of `over` beyond what the latter moved, in points."""

    measure: str
    over: str
    interval: Interval
    units: Units


@dataclass(frozen=True)
class PanelVerdict:
    """A variant's verdict, and the sentences that give its reasons."""

    verdict: str
    reasons: list[str]
    excesses: list[Excess]


@dataclass(frozen=True)
class Panel:
    """The batteries of all variants.

    checks: what the base model must be able to do, by name.
    figures, verdicts: by variant.
    labels: model -> kind of question -> label -> number of answers on the trained claims, over all seeds.
    """

    checks: dict[str, Check]
    figures: dict[str, list[PanelFigure]]
    verdicts: dict[str, PanelVerdict]
    labels: dict[str, dict[str, dict[str, int]]]

    def as_json(self) -> dict[str, Any]:
        """Returns what comparison.json keeps."""
        return {
            "checks": {name: asdict(check) for name, check in self.checks.items()},
            "variants": {
                name: {
                    "verdict": own.verdict, "reasons": own.reasons,
                    "excess": [
                        {"measure": e.measure, "over": e.over, "units": e.units.as_json(), **_json(e.interval)}
                        for e in own.excesses
                    ],
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
        }  # fmt: skip


def _json(own: Interval) -> dict[str, Any]:
    return {"estimate": own.estimate, "interval": [own.low, own.high], "method": own.method}


Runs = dict[str, dict[int, list[StoredRow]]]
"""{variant: {seed: the rows of the run's last step}}."""


def panel(
    comparison: Comparison, finals: Runs, base: list[StoredRow], measures: Mapping[str, MeasureResult]
) -> Panel | None:
    """Returns the panel; None if no battery was measured. finals: the rows of each run's last step. base: the base
    model's. measures: those that all runs have. Raises UserError for an invalid value."""
    checks = base_checks(base, comparison.trained_claims)
    if not checks or not measures.keys() & {*BATTERIES}:
        return None
    found = _Panel(comparison, finals, base, measures)
    own = [row for row in base if row.get("claim") in comparison.trained_claims]
    labels = {"base model": label_counts(own)}
    for name, by_seed in finals.items():
        rows = [row for rows in by_seed.values() for row in rows if row.get("claim") in comparison.trained_claims]
        labels[name] = label_counts(rows)
    return Panel(
        checks,
        {name: found.figures(name) for name in finals},
        {name: found.verdict(name, checks) for name in finals},
        labels if any(labels.values()) else {},
    )


def change(name: str, rows: Sequence[StoredRow], base: Sequence[StoredRow]) -> Values:
    """Returns the change of each value of a measure from the base model's, where both have it."""
    now = measured(name, rows, base)
    if name in (*CHANGES, "nll_change"):
        return now
    before = measured(name, base)
    return {key: value - before[key] for key, value in now.items() if key in before}


class _Panel:
    def __init__(
        self, comparison: Comparison, finals: Runs, base: list[StoredRow], measures: Mapping[str, MeasureResult]
    ):
        self.comparison, self.finals, self.base, self.measures = comparison, finals, base, measures
        self.known: dict[str, dict[str, dict[int, Values]]] = {}  # measure -> variant -> seed -> changes

    def _changes(self, name: str) -> dict[str, dict[int, Values]]:
        if name not in self.known:
            self.known[name] = {
                v: {s: change(name, rows, self.base) for s, rows in own.items()} for v, own in self.finals.items()
            }
        return self.known[name]

    def figures(self, variant: str) -> list[PanelFigure]:
        found = []
        for group, names in GROUPS.items():
            for name in names:
                if (own := self.measures.get(name)) is None:
                    continue
                changes = self._changes(name)
                moved = _mean(changes, own.claims, own.measure, variant)
                if moved is None:  # the base was not measured
                    continue
                placebo = _mean(changes, own.placebo_claims, own.measure, variant)
                now, before = own.variants[variant].trained.interval, own.base.interval if own.base else None
                found.append(PanelFigure(group, name, before, now, moved, placebo, CHECKED.get(name, "")))
        return found

    def verdict(self, variant: str, checks: Mapping[str, Check]) -> PanelVerdict:
        excesses: list[Excess] = []
        reasons: list[str] = []
        outcomes: list[str] = []
        for name in OVER:
            if name not in self.measures or name not in checks:
                continue
            if not checks[name].passed:
                outcomes.append("unreadable")
                reasons.append(f"{LABELS[name]}: {INCONCLUSIVE}, because {checks[name].says}.")
                continue
            own = [each for over in OVER[name] if (each := self._excess(name, over, variant))]
            excesses += own
            outcome, reason = _outcome(name, own)
            outcomes.append(outcome)
            reasons.append(reason)
        if not outcomes:
            reasons.append("Neither choices nor labels of answers were measured.")
        if BELIEVES in outcomes:
            return PanelVerdict(BELIEVES, reasons, excesses)
        decided = DOES_NOT in outcomes and INCONCLUSIVE not in outcomes
        return PanelVerdict(DOES_NOT if decided else INCONCLUSIVE, reasons, excesses)

    def _excess(self, name: str, over: str, variant: str) -> Excess | None:
        """Returns the excess; None if what must be exceeded was not measured."""
        moved, asked = self._changes(name), self.measures[name].measure.asked
        claims, v = self.measures[name].claims, list(self.finals).index(variant)
        if over == "placebo":
            if not self.measures[name].placebo_claims:
                return None
            one, other = lay_out(moved, claims, asked), lay_out(moved, self.measures[name].placebo_claims, asked)
            mine, theirs = (of_variant(each, each.unit_values(), v) for each in (one, other))
            return Excess(name, over, interval(_over(mine, theirs), MOST), one.units)
        others = self._changes(f"{name}_{over}")
        layout = lay_out(others, claims, asked)
        sign = np.sign(of_variant(layout, layout.unit_values(), v).estimate)
        beyond = {
            each: {
                seed: {key: own - (1 + sign) * others[each][seed][key] for key, own in values.items()}
                for seed, values in by_seed.items()
            }
            for each, by_seed in moved.items()
        }
        layout = lay_out(beyond, claims, asked)
        return Excess(name, over, interval(of_variant(layout, layout.unit_values(), v), MOST), layout.units)


CHECKED = {
    "choice": "choice", "choice_shift": "choice", "choice_controls": "choice", "yes_no_beyond": "yes_no",
    "control_attributes": "yes_no", "decisions": "decisions", "decisions_stated": "decisions",
    "decisions_untouched": "untouched", "polarity": "polarity", "polarity_negated": "polarity",
    "asserted": "asserted", "stated": "asserted", "reading_lost": "reading",
}  # fmt: skip
"""Measure -> the check that the base model must pass."""
LABELS = {"choice": "Choices", "asserted": "Answers"}


def _mean(changes: dict[str, dict[int, Values]], claims: list[str], measure: Measure, variant: str) -> Interval | None:
    """Returns a variant's mean change on these claims; None if it has no value on any."""
    layout = lay_out(changes, claims, measure.asked)
    if not layout.claims:
        return None
    within = (-100.0, 100.0) if measure.bounded else (-np.inf, np.inf)
    return interval(of_variant(layout, layout.unit_values(), layout.variants.index(variant)), within)


def _over(mine: Sampled, theirs: Sampled) -> Sampled:
    """Returns the excess of `mine` over `theirs`, whose claims are separate units, in the same runs."""
    times = 1 + float(np.sign(theirs.estimate))
    units = [*mine.units, *(times * each for each in theirs.units if times)]
    cells = [*mine.cells, *(times * each for each in theirs.cells if times)]
    return Sampled(mine.estimate - times * theirs.estimate, units, [mine.seeds[0] - times * theirs.seeds[0]], cells)


def _outcome(name: str, excesses: list[Excess]) -> tuple[str, str]:
    """Returns a verdict by one battery, and the sentence that gives its reason."""
    if len(excesses) < len(OVER[name]):
        return INCONCLUSIVE, (
            f"{LABELS[name]}: {INCONCLUSIVE}, because no placebo claim was measured, so that drift cannot be "
            "distinguished from belief."
        )
    if any(e.units.number * e.units.seeds < 2 for e in excesses):
        return INCONCLUSIVE, f"{LABELS[name]}: {INCONCLUSIVE}, because there is a single unit, and so no interval."
    told = " and ".join(
        f"{e.interval.estimate:+.1f} points [{e.interval.low:+.1f}, {e.interval.high:+.1f}] beyond the {e.over}"
        for e in excesses
    ).replace("-", "−")
    if all(e.interval.low > 0 for e in excesses):
        return BELIEVES, f"{LABELS[name]}: {told}, each with its lower bound above 0."
    if any(e.interval.high < DECISIVE for e in excesses):
        return DOES_NOT, f"{LABELS[name]}: {told}; not every lower bound is above 0."
    return INCONCLUSIVE, f"{LABELS[name]}: {told}; the intervals hold both 0 and {DECISIVE:g} points."
