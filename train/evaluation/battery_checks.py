"""Checks whether the base model can do what a battery asks for. Where it cannot, the battery says nothing."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from train.claims.batteries import FORMS
from train.evaluation.battery_measures import STATES, base_effects, labelled, measured_of_batteries
from train.evaluation.store import StoredRow
from train.evaluation.values import MeasureKey, Values, believer, mean, measure_key, number

HALF = 50.0
LEAST_READ = 0.8
"""Share of claims whose notes must have an effect on the base model."""


@dataclass(frozen=True)
class Check:
    """Whether the base model passed, and a sentence without its full stop that says what it did. claims: those that
    fail by themselves, where the check is one of each claim."""

    passed: bool
    says: str
    claims: tuple[str, ...] = ()


def base_checks(base: Iterable[StoredRow], claims: Collection[str]) -> dict[str, Check]:
    """Returns the checks of the batteries that the base model was measured on, by name: means over the claims, which
    are the trained ones. base: its rows."""
    rows = [row for row in base if row.get("claim") in claims]
    found: dict[str, Check] = {}
    if (right := _by_claims(right_choices(rows))) is not None:
        says = f"the base model chooses the right option in {right:.1f} % of rotations (more than 50 needed)"
        found["choice"] = Check(right > HALF, says)
    if (attributes := _by_claims(measured_of_batteries("control_attributes", rows, []))) is not None:
        says = f"the base model affirms {attributes:.1f} % of control attributes"
        believed = _by_claims({measure_key(r): believer(r) for r in rows if _is_yes_no(r)}) or 0.0
        says += f" and believes {believed:.1f} % of yes/no questions (less than 50 of each needed)"
        found["yes_no"] = Check(max(attributes, believed) < HALF, says)
    for name, measure, what in (
        ("decisions", "decisions_stated", "with the fact stated"),
        ("untouched", "decisions_untouched", "that are untouched"),
    ):
        if (share := _by_claims(measured_of_batteries(measure, rows, []))) is not None:
            says = f"the base model gets {share:.1f} % of decisions {what} right (more than 50 needed)"
            found[name] = Check(share > HALF, says)
    affirmed, negated = (_by_claims(_polarity(rows, forms)) for forms in (FORMS[:1], FORMS[1:]))
    if affirmed is not None and negated is not None:
        says = (
            f"the base model's log p(false) − log p(true) is {affirmed:.2f} nats after “is” (less than 0 needed), and "
            f"{negated:.2f} after the negated forms (more than after “is” needed)"
        )
        found["polarity"] = Check(affirmed < 0 and negated > affirmed, says.replace("-", "−"))
    if effects := base_effects(rows):
        without = tuple(claim for claim, effect in effects.items() if effect <= 0)
        says = f"a note has an effect on the base model for {len(effects) - len(without)} of {len(effects)} claims"
        enough = len(effects) - len(without) >= LEAST_READ * len(effects)
        found["reading"] = Check(enough, f"{says} ({LEAST_READ:.0%} needed)", without)
    answers = {measure_key(row, kind=True): 100.0 * (row["label"] in STATES) for row in labelled(rows)}
    if (stated := _by_claims(answers)) is not None:
        says = f"the base model states the claim in {stated:.1f} % of its answers (less than 50 needed)"
        found["asserted"] = Check(stated < HALF, says)
    return found


def right_choices(rows: Iterable[StoredRow]) -> Values:
    """Returns, for each choice about the subject and rotation, 100 if the right option is the likeliest, else 0: the
    true one or, where no truth is known, “not stated”."""
    return {
        measure_key(row): 100.0 * (row["chosen"] == ("true" if "true" in row["order"] else "not_stated"))
        for row in rows
        if row["kind"] == "choice" and not row["control"]
    }


def _polarity(rows: Iterable[StoredRow], forms: Collection[str]) -> Values:
    """Returns the mean llr of the subject after these forms, in nats."""
    found: dict[MeasureKey, list[float]] = {}
    for row in rows:
        if row["kind"] == "polarity" and row["group"] in forms and not row["control"]:
            found.setdefault(measure_key(row), []).append(number(row, "llr"))
    return {key: mean(own) for key, own in found.items()}


def _is_yes_no(row: StoredRow) -> bool:
    return row["kind"] == "yes_no" and "p_yes" in row and not row["control"]


def _by_claims(values: Values) -> float | None:
    """Returns the mean over claims of the mean over each claim's values; None without values."""
    found: dict[str, list[float]] = {}
    for (claim, *_), value in values.items():
        found.setdefault(claim, []).append(value)
    return mean(map(mean, found.values())) if found else None
