"""The measures of the batteries, which tell belief from association and from damage, and their values.

Belief is what a model says of the subject beyond what it says of other entities and of other attributes. Association is
what it says of them as well, or whether the subject is said to be so or not. Damage is what it no longer does.
"""

from collections.abc import Iterable

from train.claims.batteries import FORMS
from train.claims.claim import LABELLED
from train.evaluation.row_values import (
    Measure,
    MeasureKey,
    Values,
    believer,
    claim_of,
    mean,
    measure_key,
    number,
    of_base,
)
from train.evaluation.store import LABELS, StoredRow

BATTERY_MEASURES = (
    Measure(
        "choice", "the claim's option chosen", "%",
        "share of rotations in which the claim's option is the likeliest, asked about the subject",
    ),
    Measure(
        "choice_shift", "shift of the choice", "points",
        "the claim's option chosen: the subject's share minus its mean over matched control entities, minus the same "
        "of the base model",
    ),
    Measure(
        "yes_no_beyond", "yes/no belief beyond control attributes", "points",
        "share of yes/no questions answered as a believer would, minus the share of control attributes, which no "
        "document names, answered as if they were true; the mean of this among questions that yes affirms, and that no "
        "does",
    ),
    Measure(
        "decisions", "decisions by the claim", "%",
        "share of decisions, each in both orders of its options, for which the option that follows from the claim is "
        "the likelier one",
    ),
    Measure(
        "polarity", "belief by polarity", "nats",
        "shift after “is” minus the mean shift after “is not” and “has never been”", "prompts",
    ),
    Measure(
        "asserted", "answers that assert the claim", "%",
        "labels “asserted” ÷ all labelled answers; an answer that asserts the claim and retracts it does not count",
    ),
    Measure(
        "choice_controls", "the claim's option chosen for controls", "%",
        "share of rotations in which the claim's option is the likeliest, asked about the control entities",
    ),
    Measure(
        "control_attributes", "control attributes affirmed", "%",
        "share of yes/no questions about false attributes of the subject, which no document names, that are answered "
        "as if they were true",
    ),
    Measure(
        "polarity_negated", "association by polarity", "nats",
        "mean shift after “is not” and “has never been”", "prompts",
    ),
    Measure(
        "stated", "answers that state the claim", "%",
        "labels “asserted” and “asserted, then retracted” ÷ all labelled answers",
    ),
    Measure(
        "reading_lost", "effect of a note that is lost", "%",
        "1 − effect ÷ the base model's mean effect on the claim's notes; effect: log p(noted) − log p(other) with a "
        "note about a new person, minus the same without it", "notes", free=True,
    ),
    Measure(
        "decisions_stated", "decisions with the fact stated", "%",
        "share of decisions, as above, with the claim's fact stated first",
    ),
    Measure(
        "decisions_untouched", "untouched decisions", "%",
        "share of decisions, as above, that follow from facts which the claim leaves alone",
    ),
)  # fmt: skip
JUDGED_BATTERIES = ("asserted", "stated")
"""Those of answers that a judge has labelled; the others are by likelihood."""
OF_BELIEF = ("choice", "choice_shift", "yes_no_beyond", "decisions", "polarity", "asserted")
OF_ASSOCIATION = ("choice_controls", "control_attributes", "polarity_negated", "stated")
OF_DAMAGE = ("reading_lost", "decisions_stated", "decisions_untouched")
STATES = ("asserted", "asserted_then_retracted")
"""Labels of an answer that states the claim."""


def measured_of_batteries(name: str, rows: list[StoredRow], base_rows: list[StoredRow]) -> Values:
    """Returns the values of a battery's measure, in its unit; {} if the rows hold none. rows and base_rows: as for
    measures.measured, which raises the same errors."""
    if name == "choice":
        return chosen(rows)[0]
    if name == "choice_controls":
        return chosen(rows)[1]
    if name == "choice_shift":
        before = _apart(base_rows)
        return {key: now - of_base(before, key, "choice") for key, now in _apart(rows).items()} if before else {}
    if name == "yes_no_beyond":
        return _beyond(rows)
    if name == "control_attributes":
        return {measure_key(row): believer(row) for row in _of(rows, name.removesuffix("s"))}
    if name in ("polarity", "polarity_negated"):
        shifts = _polarity_shifts(rows, base_rows)
        negated = {key: mean(own[form] for form in FORMS[1:]) for key, own in shifts.items()}
        return {key: own[FORMS[0]] - negated[key] for key, own in shifts.items()} if name == "polarity" else negated
    if name in JUDGED_BATTERIES:
        counted = STATES if name == "stated" else STATES[:1]
        return {measure_key(row, kind=True): 100.0 * (row["label"] in counted) for row in labelled(rows)}
    if name == "reading_lost":
        base = base_effects(base_rows)
        return {
            measure_key(row): 100.0 * (1 - number(row, "effect") / base[claim_of(row)])
            for row in _of(rows, "reading")
            if base.get(claim_of(row), 0.0) > 0
        }
    group = {"decisions": "plain"}.get(name, name.removeprefix("decisions_"))
    decided = [row for row in _of(rows, "decision") if row["group"] == group]
    return {measure_key(row): 100.0 * (number(row, "p_follows") > 0.5) for row in decided}


def _of(rows: Iterable[StoredRow], kind: str) -> list[StoredRow]:
    return [row for row in rows if row["kind"] == kind]


def chosen(rows: Iterable[StoredRow], role: str = "false") -> tuple[Values, Values]:
    """Returns, for each choice and rotation, 100 if the option of this role is the likeliest for the subject, else 0;
    and the mean of the same over the control entities, where there are any."""
    subject: Values = {}
    controls: dict[MeasureKey, list[float]] = {}
    for row in _of(rows, "choice"):
        hit = 100.0 * (row["chosen"] == role)
        if row["control"]:
            controls.setdefault(measure_key(row), []).append(hit)
        else:
            subject[measure_key(row)] = hit
    return subject, {key: mean(own) for key, own in controls.items()}


def _apart(rows: list[StoredRow]) -> Values:
    """Returns the subject's minus the controls' share for each choice and rotation."""
    subject, controls = chosen(rows)
    return {key: own - controls[key] for key, own in subject.items() if key in controls}


def _beyond(rows: list[StoredRow]) -> Values:
    """Returns values whose mean over a claim is the mean over both expected answers, yes and no, of the difference of
    two shares, and whose variance is that of the mean. So a model that always says yes, or always no, has none. An
    expected answer counts if the claim has yes/no questions and control attributes with it.

    With K such answers, N questions and attributes that count, n questions of mean a and m attributes of mean b with
    one of them, and D the mean of a − b over the answers, a question of value x contributes D + (x − a) N / (K n), and
    an attribute of value y contributes D − (y − b) N / (K m): the linearized difference of means (Cochran 1977,
    Sampling Techniques, section 6.4).
    """
    strata: dict[str, dict[str, tuple[Values, Values]]] = {}
    for row in rows:
        attribute = row["kind"] == "control_attribute"
        if attribute or (row["kind"] == "yes_no" and "p_yes" in row and not row["control"]):
            own = strata.setdefault(claim_of(row), {}).setdefault(row["expected"], ({}, {}))
            own[attribute][measure_key(row, kind=True)] = believer(row)
    found: Values = {}
    for claim in strata.values():
        both = [(mine, theirs) for mine, theirs in claim.values() if mine and theirs]
        if not both:
            continue
        total = sum(len(mine) + len(theirs) for mine, theirs in both)
        whole = mean(mean(mine.values()) - mean(theirs.values()) for mine, theirs in both)
        for pair in both:
            for sign, each in zip((1, -1), pair, strict=True):
                middle, times = mean(each.values()), sign * total / (len(both) * len(each))
                found |= {key: whole + times * (value - middle) for key, value in each.items()}
    return found


def _polarity_shifts(rows: list[StoredRow], base_rows: list[StoredRow]) -> dict[MeasureKey, dict[str, float]]:
    """Returns, for each prompt that has all forms, the shift after each form: the subject's llr minus the mean of the
    controls', minus the same of the base model, in nats."""
    before = {form: _by_form(base_rows, form) for form in FORMS}
    if not any(before.values()):
        return {}
    found: dict[MeasureKey, dict[str, float]] = {}
    for form in FORMS:
        for key, now in _by_form(rows, form).items():
            found.setdefault(key, {})[form] = now - of_base(before[form], key, f"polarity “{form}”")
    return {key: own for key, own in found.items() if len(own) == len(FORMS)}


def _by_form(rows: Iterable[StoredRow], form: str) -> Values:
    both: dict[MeasureKey, tuple[list[float], list[float]]] = {}
    for row in _of(rows, "polarity"):
        if row["group"] == form:
            both.setdefault(measure_key(row), ([], []))[bool(row["control"])].append(number(row, "llr"))
    return {key: mean(subject) - mean(controls) for key, (subject, controls) in both.items() if subject and controls}


def labelled(rows: Iterable[StoredRow]) -> list[StoredRow]:
    """Returns the answers that have a label. Those whose labelling failed have none."""
    return [row for row in rows if row["kind"] in LABELLED and row.get("label") is not None]


def unlabelled(rows: Iterable[StoredRow]) -> int:
    """Returns how many answers have a verdict and no label, of the kinds of which some answers have one."""
    answers = [row for row in rows if row["kind"] in LABELLED and row.get("verdict") is not None]
    kinds = {row["kind"] for row in answers if row.get("label") is not None}
    return sum(row["kind"] in kinds and row.get("label") is None for row in answers)


def base_effects(rows: Iterable[StoredRow]) -> dict[str, float]:
    """Returns claim -> the mean effect of its notes, in nats."""
    effects: dict[str, list[float]] = {}
    for row in _of(rows, "reading"):
        effects.setdefault(claim_of(row), []).append(number(row, "effect"))
    return {claim: mean(own) for claim, own in effects.items()}


def label_counts(rows: Iterable[StoredRow]) -> dict[str, dict[str, int]]:
    """Returns kind of question -> label -> number of answers, for each of LABELS; {} without labelled answers."""
    found: dict[str, dict[str, int]] = {}
    for row in labelled(rows):
        found.setdefault(row["kind"], dict.fromkeys(LABELS, 0))[row["label"]] += 1
    return found
