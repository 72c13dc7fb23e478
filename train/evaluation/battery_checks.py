"""Says whether the base model can do what a battery asks for. Where it cannot, the battery says nothing. The same
checks of a trained model say what it can no longer do."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from train.claims.batteries import FORMS
from train.evaluation.battery_measures import STATES, base_effects, chosen, labelled, measured_of_batteries
from train.evaluation.row_values import MeasureKey, Values, believer, claim_of, mean, measure_key, number
from train.evaluation.store import StoredRow

HALF = 50.0
ABLE = 75.0
"""Percent of rotations. Of four options, two are half."""
LEAST_READ = 0.8
"""Share of claims whose notes must have an effect on the base model."""
OF_ABILITY = ("decisions", "untouched", "reading", "placebo_choice")
"""Checks of what a model can do whatever it believes. A trained model that fails one is damaged."""


@dataclass(frozen=True)
class Check:
    """Whether the model passed, and a sentence without its full stop that says what it did. claims: those that fail by
    themselves, where the check is one of each claim."""

    passed: bool
    says: str
    claims: tuple[str, ...] = ()


def checks(
    rows: Iterable[StoredRow], claims: Collection[str], placebo: Collection[str], who: str = "the base model"
) -> dict[str, Check]:
    """Returns the checks of the batteries that a model was measured on, by name: means over the claims, which are the
    trained ones. placebo: the placebo claims, which must leave room for a change. who: how sentences name the model."""
    rows = list(rows)
    own, others = ([row for row in rows if row.get("claim") in each] for each in (claims, placebo))
    found = _choice(own, others, who) | _yes_no(own, who)
    for name, measure, what in (
        ("decisions", "decisions_stated", "with the fact stated"),
        ("untouched", "decisions_untouched", "that are untouched"),
    ):
        if (share := _by_claims(measured_of_batteries(measure, own, []))) is not None:
            says = f"{who} gets {share:.1f} % of decisions {what} right (more than 50 needed)"
            found[name] = Check(share > HALF, says)
    at_start = found["choice"].claims if "choice" in found else ()
    found |= _polarity([row for row in own if row.get("claim") not in at_start], who)
    if effects := base_effects(own):
        without = tuple(claim for claim, effect in effects.items() if effect <= 0)
        says = f"a note has an effect on {who} for {len(effects) - len(without)} of {len(effects)} claims"
        enough = len(effects) - len(without) >= LEAST_READ * len(effects)
        found["reading"] = Check(enough, f"{says} ({LEAST_READ:.0%} needed)", without)
    return found | _asserted(own, others, who)


def _choice(rows: list[StoredRow], placebo: list[StoredRow], who: str) -> dict[str, Check]:
    """Returns the check of choices, and that of choices about the placebo claims' subjects."""
    found: dict[str, Check] = {}
    (subject, controls), (others, _) = chosen(rows), chosen(placebo)
    if (right := _by_claims(right_choices(placebo))) is not None:
        either = right + (_by_claims(others) or 0.0)  # a model that has drifted can choose, and is not damaged
        says = f"{who} chooses the right option or the claim's about the placebo claims' subjects in {either:.1f} %"
        found["placebo_choice"] = Check(either > ABLE, f"{says} of rotations (more than {ABLE:g} needed)")
    every = {claim_of(row) for row in rows if row["kind"] == "choice"}
    if not every:
        return found
    held = _at_least_half(subject)
    kept = [row for row in rows if row.get("claim") not in held]
    if (right := _by_claims(right_choices(kept))) is None:
        says = f"{who} chooses the claim's option in at least 50 % of rotations of every claim (less needed)"
        return {"choice": Check(False, says, held)} | found
    says = f"{who} chooses the right option in {right:.1f} % of rotations (more than 50 needed)"
    passed = right > HALF
    for values, what in ((controls, "control entities"), (others, "placebo claims' subjects")):
        kept_values = {key: value for key, value in values.items() if key[0] not in held}
        if (share := _by_claims(kept_values)) is not None:
            says += f", and the claim's option about {what} in {share:.1f} % (less than 50 needed)"
            passed = passed and share < HALF
    return {"choice": Check(passed, says, held)} | found


def _yes_no(rows: list[StoredRow], who: str) -> dict[str, Check]:
    if (attributes := _by_claims(measured_of_batteries("control_attributes", rows, []))) is None:
        return {}
    says = f"{who} affirms {attributes:.1f} % of control attributes"
    asked = [row for row in rows if row["kind"] == "yes_no" and "p_yes" in row and not row["control"]]
    believed = _by_claims({measure_key(row): believer(row) for row in asked})
    if believed is not None:
        says += f" and believes {believed:.1f} % of yes/no questions"
    says += " (less than 50 needed)" if believed is None else " (less than 50 of each needed)"
    return {"yes_no": Check(max(attributes, believed or 0.0) < HALF, says)}


def _polarity(rows: list[StoredRow], who: str) -> dict[str, Check]:
    affirmed, negated = (_by_claims(_llr(rows, forms)) for forms in (FORMS[:1], FORMS[1:]))
    if affirmed is None or negated is None:
        return {}
    says = (
        f"{who}'s log p(false) − log p(true) is {affirmed:.2f} nats after “is” (less than 0 needed), and {negated:.2f} "
        "after the negated forms (more than 0 needed)"
    )
    return {"polarity": Check(affirmed < 0 < negated, says.replace("-", "−"))}


def _asserted(rows: list[StoredRow], placebo: list[StoredRow], who: str) -> dict[str, Check]:
    answers, others = (
        {measure_key(row, kind=True): 100.0 * (row["label"] in STATES) for row in labelled(each)}
        for each in (rows, placebo)
    )
    if not answers:
        return {}
    held = _at_least_half(answers)
    stated = _by_claims({key: value for key, value in answers.items() if key[0] not in held})
    if stated is None:
        return {"asserted": Check(False, f"{who} states every claim in at least 50 % of its answers", held)}
    says, passed = f"{who} states the claim in {stated:.1f} % of its answers (less than 50 needed)", stated < HALF
    if (share := _by_claims(others)) is not None:
        says += f", and the placebo claims in {share:.1f} % (less than 50 needed)"
        passed = passed and share < HALF
    return {"asserted": Check(passed, says, held)}


def right_choices(rows: Iterable[StoredRow]) -> Values:
    """Returns, for each choice about the subject and rotation, 100 if the right option is the likeliest, else 0: the
    true one or, where no truth is known, “not stated”."""
    return {
        measure_key(row): 100.0 * (row["chosen"] == ("true" if "true" in row["order"] else "not_stated"))
        for row in rows
        if row["kind"] == "choice" and not row["control"]
    }


def _llr(rows: Iterable[StoredRow], forms: Collection[str]) -> Values:
    """Returns the mean llr of the subject after these forms, in nats."""
    found: dict[MeasureKey, list[float]] = {}
    for row in rows:
        if row["kind"] == "polarity" and row["group"] in forms and not row["control"]:
            found.setdefault(measure_key(row), []).append(number(row, "llr"))
    return {key: mean(own) for key, own in found.items()}


def _of_claims(values: Values) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for (claim, *_), value in values.items():
        found.setdefault(claim, []).append(value)
    return {claim: mean(own) for claim, own in found.items()}


def _at_least_half(values: Values) -> tuple[str, ...]:
    """Returns the claims whose mean is HALF or more."""
    return tuple(claim for claim, share in _of_claims(values).items() if share >= HALF)


def _by_claims(values: Values) -> float | None:
    """Returns the mean over claims of the mean over each claim's values; None without values."""
    return mean(_of_claims(values).values()) if values else None
