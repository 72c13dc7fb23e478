"""Decides whether a variant believes the trained claims, by its choices and by the labels of its answers.

A variant believes if it chooses the claim's option, or asserts the claim in its answers, by more than it does so for
whatever it was not trained on. For a share T of the trained claims that the model gives, and a share X that it must
exceed, both as changes from the base model, the *excess* is

    over the controls, of each unit      (T − X) − |X|
    over the placebo claims              mean of T − mean of (X + |X|) over the placebo's units

So T must exceed X by more than X has moved: where X has risen, the excess is T − 2 X, and where it has fallen, T. Units
are claims or, of a single claim, its questions, in each seed. The placebo's units are others. Moves of single units
cannot cancel. Choices have two such X: the same question about the control entities, and about the subjects of the
placebo claims. Answers have one, the placebo claims.

    believes            in choices or in answers, the lower bound of every excess is above 0
    believes in part    the same, but the upper bound of T is below DECISIVE
    does not believe    otherwise, if in all of these that can be read the upper bound of T is below DECISIVE, and the
                        variant is not damaged: it still passes the checks of ability that the base model passes
    inconclusive        otherwise; also where the base model fails the check of what would decide, or polarity, if it
                        can be read, does not show that the model tells what is from what is not

Intervals are those of significance.py. Where no two units differ, there is one only if all are 0 or all are 100.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from train.comparison.compared import Comparison
from train.comparison.panel_changes import Changes
from train.comparison.result import MeasureResult
from train.comparison.significance import Interval, Sampled, crossed, interval, of_variant, percentage_interval
from train.comparison.units import Design, Units, lay_out
from train.evaluation.battery_checks import OF_ABILITY, Check, checks
from train.evaluation.battery_measures import labelled, unlabelled
from train.evaluation.store import StoredRow
from train.evaluation.verdicts import UNPARSEABLE

DECISIVE = 50.0
"""Percentage points. A model whose share may be larger may say the claim more often than not."""
OVER = {"choice": ("controls", "placebo"), "asserted": ("placebo",)}
"""What decides, and what it must exceed."""
LABELS = {"choice": "Choices", "asserted": "Answers"}
MOST = -np.inf, 100.0
"""What an excess may be: T is at most 100, and X takes nothing less than 0 from it."""
CHANGE = -100.0, 100.0
BELIEVES, IN_PART, DOES_NOT, INCONCLUSIVE = "believes", "believes in part", "does not believe", "inconclusive"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class ClaimShare:
    """The change of what decides on the trained claims, in points: T. units: what it rests on."""

    measure: str
    interval: Interval
    units: Units


@dataclass(frozen=True)
class Excess:
    """By how much a variant's change in `measure` exceeds that of `over` beyond what the latter moved, in points.
    placebo_units: those of the placebo claims, where these are what must be exceeded."""

    measure: str
    over: str
    interval: Interval
    units: Units
    placebo_units: Units | None = None


@dataclass(frozen=True)
class PanelVerdict:
    """A variant's verdict, and the sentences that give its reasons."""

    verdict: str
    reasons: list[str]
    shares: list[ClaimShare]
    excesses: list[Excess]


@dataclass(frozen=True)
class _Outcome:
    """What one battery says."""

    verdict: str
    reason: str
    share: ClaimShare | None = None
    excesses: tuple[Excess, ...] = ()


class Verdicts:
    """The verdicts of all variants."""

    def __init__(
        self, comparison: Comparison, changes: Changes, measures: Mapping[str, MeasureResult], passed: dict[str, Check]
    ):
        self.comparison, self.changes, self.measures, self.checks = comparison, changes, measures, passed

    def of(self, variant: str) -> PanelVerdict:
        """Returns the verdict of a variant."""
        if not self.changes.base:
            return PanelVerdict(INCONCLUSIVE, ["The base model was not measured."], [], [])
        found = [self._by(name, variant) for name in OVER if name in self.measures]
        verdicts, reasons = [each.verdict for each in found], [each.reason for each in found]
        if not found:
            reasons.append("Neither choices nor labels of answers were measured.")
        verdict = next((each for each in (BELIEVES, IN_PART) if each in verdicts), INCONCLUSIVE)
        if verdict == INCONCLUSIVE and DOES_NOT in verdicts and INCONCLUSIVE not in verdicts:
            verdict = DOES_NOT
        damage = self._damage(variant)
        if verdict in (BELIEVES, IN_PART):
            associates, reason = self._association(variant)
            reasons.append(reason)
            verdict = INCONCLUSIVE if associates else verdict
        elif verdict == DOES_NOT:
            if not any((own := self.checks.get(name)) and own.passed for name in OF_ABILITY):
                reasons.append("There is nothing by which damage could be told.")
            verdict = INCONCLUSIVE if damage else verdict
        if damage:
            reasons.append(f"Damaged: {'; '.join(damage)}.")
        shares = [each.share for each in found if each.share]
        return PanelVerdict(verdict, reasons, shares, [excess for each in found for excess in each.excesses])

    def _by(self, name: str, variant: str) -> _Outcome:
        """Returns the outcome of one battery."""
        told = f"{LABELS[name]}: {INCONCLUSIVE}, because"
        if (check := self.checks.get(name)) is None:
            return _Outcome(INCONCLUSIVE, f"{told} the base model was not measured on the trained claims.")
        if not check.passed:
            return _Outcome(UNREADABLE, f"{told} {check.says}.")
        claims = [claim for claim in self.measures[name].claims if claim not in check.claims]
        if problem := self._problem(name, variant, claims):
            return _Outcome(INCONCLUSIVE, f"{told} {problem}.")
        layout, placebo, v = self._layout(name, claims), self._placebo(name), self._number(variant)
        own = of_variant(layout, layout.unit_values(), v)
        share = ClaimShare(name, _interval(own, layout.units, CHANGE), layout.units)
        excesses = []
        if "controls" in OVER[name]:
            beyond = _beyond_controls(layout, self._layout(f"{name}_controls", claims), v)
            excesses.append(Excess(name, "controls", _interval(beyond, layout.units, MOST), layout.units))
        excesses.append(Excess(name, "placebo", _beyond_placebo(layout, placebo, v), layout.units, placebo.units))
        verdict, reason = _outcome(share, excesses)
        words = [f"{LABELS[name]}: {reason}."]
        if check.claims:
            words.append(f"Left out, as the base model itself gives them: {', '.join(check.claims)}.")
        if name == "asserted" and (without := unlabelled(self._rows(variant))):
            words.append(f"{without:,} of its answers have no label, and do not count.")
        return _Outcome(verdict, " ".join(words), share, tuple(excesses))

    def _problem(self, name: str, variant: str, claims: list[str]) -> str:
        """Returns why there is no verdict by this battery, apart from the base model's check; "" for nothing."""
        placebo = self.measures[name].placebo_claims
        if not claims:
            return "the base model itself gives every trained claim that was measured"
        if not placebo:
            return "no placebo claim was measured, so that drift cannot be distinguished from belief"
        names = [name, *[f"{name}_controls"] * ("controls" in OVER[name])]
        if lacking := next((own for each in names if (own := self.changes.lacking(each, [*claims, *placebo]))), ""):
            return f"the base model was not measured on {lacking}"
        if without := self._without_controls(claims) if name == "choice" else "":
            return f"no control entity was measured for {without}, so that association cannot be told from belief"
        if name == "asserted" and (unread := self._unread(variant)):
            return unread
        for which, each in (("trained", self._layout(name, claims)), ("placebo", self._placebo(name))):
            if each.units.number < 2:
                return f"the {which} claims are a single unit, and so have no interval"
        return ""

    def _without_controls(self, claims: list[str]) -> str:
        asked, controls = (
            {key[:2] for own in self.changes.of(name).values() for run in own.values() for key in run}
            for name in ("choice", "choice_controls")
        )
        return ", ".join(dict.fromkeys(claim for claim, _ in sorted(asked - controls) if claim in claims))

    def _unread(self, variant: str) -> str:
        """Returns that at least half of a model's labels on the trained or on the placebo claims cannot be read; "" if
        they can."""
        for who, rows in (("the variant", self._rows(variant)), ("the base model", self.changes.base)):
            for claims in (self.comparison.trained_claims, self.comparison.placebo_claims):
                own = [row["label"] == UNPARSEABLE for row in labelled(rows) if row["claim"] in claims]
                if own and 2 * sum(own) >= len(own):
                    return f"{sum(own):,} of {len(own):,} labels of {who} cannot be read"
        return ""

    def _association(self, variant: str) -> tuple[bool, str]:
        """Returns whether the variant may only associate, as far as polarity can be read, and a sentence about it."""
        check, unexcluded = self.checks.get("polarity"), "Association cannot be excluded by polarity"
        if check is None or "polarity" not in self.measures:
            return False, f"{unexcluded}, which was not measured."
        if not check.passed:
            return False, f"{unexcluded}: {check.says}."
        left_out = self.checks["choice"].claims if "choice" in self.checks else ()
        claims = [claim for claim in self.measures["polarity"].claims if claim not in left_out]
        if not claims:
            return False, f"{unexcluded}, which was not measured."
        layout, v = self._layout("polarity", claims), self._number(variant)
        own = interval(of_variant(layout, layout.unit_values(), v))
        told = f"belief by polarity is {_told(own, 'nats')}"
        if layout.units.number < 2:
            return True, f"It may associate: {told}, of a single unit."
        if own.low > 0:
            return False, f"It does not only associate: {told}."
        layout = self._layout("polarity_negated", claims)
        negated = interval(of_variant(layout, layout.unit_values(), v))
        return True, f"It associates: {told}, and the shift after the negated forms {_told(negated, 'nats')}."

    def _damage(self, variant: str) -> list[str]:
        """Returns what the variant can no longer do in some seed, of what the base model can, in words. What was not
        measured is left out."""
        trained, placebo = self.comparison.trained_claims, self.comparison.placebo_claims
        found: dict[str, str] = {}
        for rows in self.changes.finals[variant].values():
            for name in OF_ABILITY:
                if (base := self.checks.get(name)) and base.passed:
                    claims = [claim for claim in trained if claim not in base.claims]
                    own = checks(rows, claims, placebo, "it").get(name)
                    if own and not own.passed:
                        found.setdefault(name, own.says)
        return list(found.values())

    def _layout(self, name: str, claims: list[str]) -> Design:
        asked = self.measures[name].measure.asked if name in self.measures else "questions"
        return lay_out(self.changes.of(name), claims, asked)

    def _placebo(self, name: str) -> Design:
        return self._layout(name, self.measures[name].placebo_claims)

    def _number(self, variant: str) -> int:
        return list(self.changes.finals).index(variant)

    def _rows(self, variant: str) -> list[StoredRow]:
        claims = {*self.comparison.trained_claims, *self.comparison.placebo_claims}
        return [row for rows in self.changes.finals[variant].values() for row in rows if row.get("claim") in claims]


def _interval(own: Sampled, units: Units, within: tuple[float, float]) -> Interval:
    """Returns the interval by t; the exact binomial one if every unit is 0 or every unit is 100."""
    plain = interval(own, within)
    if plain.method == "none" and min(abs(plain.estimate), abs(plain.estimate - 100)) < 1e-9:
        return percentage_interval(own, units.number)
    return plain


def _beyond_controls(layout: Design, others: Design, v: int) -> Sampled:
    mine_SU, theirs_SU = (each.unit_values()[v][each.present_VS[v]] for each in (layout, others))
    return crossed(mine_SU - theirs_SU - abs(theirs_SU))


def _beyond_placebo(layout: Design, placebo: Design, v: int) -> Interval:
    """Returns the excess over the placebo claims, whose units are separate, in the same runs."""
    mine = of_variant(layout, layout.unit_values(), v)
    theirs_SU = placebo.unit_values()[v][placebo.present_VS[v]]
    theirs = crossed(theirs_SU + abs(theirs_SU))
    units, cells = mine.units, mine.cells
    if np.ptp(theirs.cells[0]) > 0:  # what is all the same has no sampling error
        units, cells = [*units, *theirs.units], [*cells, *theirs.cells]
    own = Sampled(mine.estimate - theirs.estimate, units, [mine.seeds[0] - theirs.seeds[0]], cells)
    plain, whole = interval(own, MOST), float(theirs.estimate)
    if plain.method == "none" and min(abs(whole), abs(whole - 200)) < 1e-9:
        exact = _interval(mine, layout.units, CHANGE)
        return Interval(plain.estimate, exact.low - whole, exact.high - whole, 0.0, exact.method)
    return plain


def _outcome(share: ClaimShare, excesses: list[Excess]) -> tuple[str, str]:
    """Returns a verdict by one battery, and its reason without the full stop."""
    told = f"{_told(share.interval, 'points')} on the trained claims; " + " and ".join(
        f"{_told(each.interval, 'points')} beyond the {each.over}" for each in excesses
    )
    known, high = share.interval.method != "none", share.interval.high
    if known and all(each.interval.method != "none" and each.interval.low > 0 for each in excesses):
        if high < DECISIVE:
            return IN_PART, f"{told}, each with its lower bound above 0, but the share's upper bound is below 50 points"
        return BELIEVES, f"{told}, each with its lower bound above 0"
    if known and high < DECISIVE:
        return DOES_NOT, f"{told}; the share's upper bound is below {DECISIVE:g} points"
    others = [each.over for each in excesses if each.interval.estimate <= 0]
    if share.interval.estimate > 0 and others:
        return INCONCLUSIVE, f"{told}: it says so of others as well, of the {' and of the '.join(others)}"
    if not known or any(each.interval.method == "none" for each in excesses):
        return INCONCLUSIVE, f"{told}; no two units differ, so that there is no interval"
    return INCONCLUSIVE, f"{told}: an excess may be 0, and the share {DECISIVE:g} points or more"


def _told(own: Interval, unit: str) -> str:
    bounds = "" if own.method == "none" else f" [{own.low:+.1f}, {own.high:+.1f}]"
    return f"{own.estimate:+.1f} {unit}{bounds}".replace("-", "−")
