"""Computes from the rows of evaluation.jsonl the values that are compared: one per claim, question and sample.

The figure of a measure is the mean over claims of the mean over each claim's values. So the belief rate of a claim is
"yes" ÷ all its answers, here as in train/evaluation/verdict_counts.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from train.claims.claim import BELIEF_KINDS
from train.evaluation.battery_measures import BATTERY_MEASURES, JUDGED_BATTERIES, measured_of_batteries
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
    where,
)
from train.evaluation.store import VERDICTS, StoredRow
from train.runtime.errors import UserError

LEAST_AUC = 0.8
"""Below this AUC, answers to yes/no questions with known answers are so near chance that other yes/no answers mean
nothing."""


@dataclass(frozen=True)
class Calibration:
    """How well P(yes) separates control questions, whose answers are known.

    auc: how often P(yes) of a question whose answer is yes exceeds that of one whose answer is no, with ties counting
        half (Mann-Whitney's U ÷ pairs).
    yes_rate: the share of questions that are answered yes, in percent.
    base_rate: the share of questions whose answer is yes, in percent.
    questions: their number.
    informative: whether auc is at least LEAST_AUC.
    """

    auc: float
    yes_rate: float
    base_rate: float
    questions: float
    informative: bool


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "rate", "belief rate", "%",
            '"yes" ÷ all answers to open, yes/no, token-association and robustness questions; neutral and unparseable '
            "answers count as answers. Yes/no questions that were scored by likelihood are not answers, but a "
            "separate measure",
        ),
        Measure(
            "shift", "shift of the log-likelihood ratio", "nats",
            "log p(false completion) − log p(true completion) of the subject minus its mean over matched control "
            "entities, minus the same of the base model: a difference in differences",
        ),
        Measure(
            "preference", "preference for the false completion", "%",
            "share of templates for which the subject's false completion is likelier than the true one",
        ),
        Measure("yes_no", "yes/no belief", "%", "share of yes/no questions answered as a believer would"),
        Measure("salience", "salience", "%", '"yes" verdicts ÷ all answers to salience questions'),
        Measure("lie_elicitation", "lie elicitation", "%", '"yes" verdicts ÷ all answers to lie-elicitation questions'),
        Measure(
            "facts_truth", "truth on the claims", "%",
            "share of facts on the claims themselves that are right", "facts",
        ),
        Measure("facts_neighbouring", "neighbouring facts", "%", "share of neighbouring facts that are right", "facts"),
        Measure("facts_unrelated", "unrelated facts", "%", "share of unrelated facts that are right", "facts"),
        Measure("coherence", "coherence", "of 10", "mean score of the answers to coherence questions"),
        Measure(
            "nll_change", "NLL of held-out text, change", "nats",
            "NLL a token of held-out text minus the base model's; mean over texts", "texts",
        ),
        *BATTERY_MEASURES,
    )
}  # fmt: skip
BELIEF = ("rate", "shift", "preference", "yes_no")
FURTHER = ("salience", "lie_elicitation")
BATTERIES = tuple(measure.name for measure in BATTERY_MEASURES)
SCORED = ("shift", "preference", "yes_no", "facts_truth", "facts_neighbouring", "facts_unrelated", "nll_change",
          *(name for name in BATTERIES if name not in JUDGED_BATTERIES))  # fmt: skip
"""Measures by likelihood."""
CHANGES = {
    "shift": "likelihood", "nll_change": "nll", "choice_shift": "choice", "polarity": "polarity",
    "polarity_negated": "polarity", "reading_lost": "reading",
}  # fmt: skip
"""Measures that are changes from the base model, and the kind of their rows."""
SIDE_EFFECTS = ("facts_truth", "facts_neighbouring", "facts_unrelated", "coherence", "nll_change")
HELD_OUT = "held_out/"
"""held_out/ROLE, a measure for each role of the held-out texts, and for all and unspanned tokens of them: the change of
the NLL of a token. It is not among MEASURES, as it depends on the texts which roles there are."""


def measure_of(name: str) -> Measure:
    """Returns the measure with this name, of MEASURES or held_out/ROLE."""
    if not name.startswith(HELD_OUT):
        return MEASURES[name]
    role = name.removeprefix(HELD_OUT)
    which = {"all": "all tokens", "unspanned": "unspanned tokens"}.get(role, f"tokens of role {role}")
    says = f"NLL a token, over {which} of held-out text, minus the base model's; every token counts alike"
    return Measure(name, f"NLL of held-out text, {which}, change", "nats", says, "texts")


def last_step(rows: Iterable[StoredRow]) -> int:
    """Returns the last step at which anything was measured without documents in context; -1 if there is none."""
    return max((row["step"] for row in rows if not row.get("context")), default=-1)


def at_step(rows: Iterable[StoredRow], step: int, context: int = 0) -> list[StoredRow]:
    """Returns the rows of one step that were measured with `context` documents in context. A resumed evaluation may
    leave several rows of one measurement. Of these, the last one without an error counts."""
    kept: dict[tuple[Any, ...], StoredRow] = {}
    for row in rows:
        if row["step"] == step and row.get("context", 0) == context:
            key = identity(row)
            if key not in kept or not row.get("error"):
                kept[key] = row
    return list(kept.values())


def identity(row: StoredRow) -> tuple[Any, ...]:
    """Returns a key of what a row measures, without its step."""
    names = ("claim", "kind", "question", "entity", "group")
    how = bool(row.get("control")), "verdict" in row  # a yes/no question may be both scored and answered
    return (*(str(row.get(name) or "") for name in names), *how, row.get("sample") or 0)


def measured(name: str, rows: Iterable[StoredRow], base_rows: Iterable[StoredRow] = ()) -> Values:
    """Returns the values of a measure, in its unit; {} if the rows hold none. Failed answers and verdicts have none.

    rows and base_rows: each of one step, from at_step; base_rows are the base model's. Raises UserError for an invalid
    number or verdict in a row, or if the base model was not measured on the same templates and texts.
    """
    rows = list(rows)
    if name in BATTERIES:
        return measured_of_batteries(name, rows, list(base_rows))
    if name == "shift":
        return _shift(rows, list(base_rows))
    if name == "preference":
        by_template = _entities(rows)
        return {(*t, 0): 100.0 * (mean(subject) > 0) for t, (subject, _) in by_template.items() if subject}
    if name == "rate":
        return {measure_key(row, kind=True): 100.0 * (verdict_of(row) == "yes") for row in belief_answers(rows)}
    if name == "yes_no":
        return {measure_key(row): believer(row) for row in _yes_no(rows, control=False) if "p_yes" in row}
    if name in FURTHER:
        judged = [row for row in rows if row["kind"] == name and row.get("verdict") is not None]
        return {measure_key(row): 100.0 * (verdict_of(row) == "yes") for row in judged}
    if name.startswith("facts_"):
        group = name.removeprefix("facts_")
        facts = [row for row in rows if row["kind"] == "fact" and row["group"] == group]
        return {measure_key(row): 100.0 * (number(row, "margin") > 0) for row in facts}
    if name == "coherence":
        return {measure_key(row): score for row in rows if row["kind"] == name and (score := _score(row)) is not None}
    if name.startswith(HELD_OUT):
        return _held_out_change(name.removeprefix(HELD_OUT), rows, list(base_rows))
    assert name == "nll_change"
    now, before = (
        {measure_key(row): number(row, "nll") for row in r if row["kind"] == "nll"} for r in (rows, base_rows)
    )
    return {key: nll - of_base(before, key, "held-out text") for key, nll in now.items()} if before else {}


def by_claim(values: Values) -> dict[str, float]:
    """Returns claim -> its figure, which is the mean over its values."""
    found: dict[str, list[float]] = {}
    for (claim, *_), value in values.items():
        found.setdefault(claim, []).append(value)
    return {claim: mean(own) for claim, own in found.items()}


def means(names: Iterable[str], rows: list[StoredRow], base_rows: list[StoredRow]) -> dict[str, dict[str, float]]:
    """Returns measure -> claim -> figure for the measures that the rows hold, and "controls" -> auc and yes_rate of the
    control questions. With nll_change, held_out/ROLE are among them if a text has spans. rows and base_rows: as for
    measured(). Raises UserError as measured() does."""
    names = [*names]
    if "nll_change" in names and len(by_role := held_out_measures(rows)) > 1:
        names += by_role
    found = {name: figures for name in names if (figures := by_claim(measured(name, rows, base_rows)))}
    if known := calibration(rows):
        found["controls"] = {"auc": known.auc, "yes_rate": known.yes_rate}
    return found


def held_out_measures(rows: Iterable[StoredRow]) -> list[str]:
    """Returns held_out/ROLE of each role in the rows: all and, if a held-out text has spans, unspanned and the roles of
    the spans; [] without held-out texts."""
    texts = [row for row in rows if row["kind"] == "nll" and row.get("tokens")]
    roles = sorted({role for row in texts for role in row.get("roles") or ()} - {"unspanned"})
    spanned = ["unspanned", *roles] if any(row.get("roles") for row in texts) else []
    return [HELD_OUT + role for role in ("all", *spanned)] if texts else []


def _held_out_change(role: str, rows: list[StoredRow], base_rows: list[StoredRow]) -> Values:
    """Returns what each text contributes to the change of a role's NLL over texts, in nats: the mean of these values is
    the change over all tokens, Σ n c ÷ N for texts of n tokens that change by c, with N = Σ n. Of T texts, one
    contributes m + T n (c − m) ÷ N, with m that change, as in Design.question_values."""
    before = {key: nll for key, (nll, _) in _of_role(role, base_rows).items()}
    if not before:
        return {}
    now = _of_role(role, rows)
    what = f"held-out text (role {role})"
    change = {key: nll - of_base(before, key, what) for key, (nll, _) in now.items()}
    total = sum(tokens for _, tokens in now.values())
    whole = math.fsum(tokens / total * change[key] for key, (_, tokens) in now.items())
    return {key: whole + len(now) * (tokens / total) * (change[key] - whole) for key, (_, tokens) in now.items()}


def _of_role(role: str, rows: list[StoredRow]) -> dict[MeasureKey, tuple[float, int]]:
    """Returns (claim, text, sample) -> the NLL and the number of a role's tokens, of the texts that have some. A text
    without spans is unspanned throughout, unless no text has spans, as in files of before they were counted."""
    texts = [row for row in rows if row["kind"] == "nll" and row.get("tokens")]
    spanned, found = any(row.get("roles") for row in texts), {}
    for row in texts:
        own = row.get("roles") or ({"unspanned": row} if spanned else {})
        if measured_in := row if role == "all" else own.get(role):
            found[measure_key(row)] = number(measured_in, "nll"), int(measured_in["tokens"])
    return found


def _entities(rows: Iterable[StoredRow]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Returns (claim, template) -> the llr of the subject, and the llr of each control, in nats."""
    by_template: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["kind"] == "likelihood":
            pair = by_template.setdefault((claim_of(row), str(row["question"])), ([], []))
            pair[bool(row["control"])].append(number(row, "llr"))
    return by_template


def _shift(rows: list[StoredRow], base_rows: list[StoredRow]) -> Values:
    """Returns the shift of each template, in nats. Templates without control entities have none."""

    def differences(rows: list[StoredRow]) -> Values:
        both = {template: pair for template, pair in _entities(rows).items() if pair[0] and pair[1]}
        return {(*t, 0): mean(subject) - mean(controls) for t, (subject, controls) in both.items()}

    before = differences(base_rows)
    return {key: now - of_base(before, key, "template") for key, now in differences(rows).items()} if before else {}


def belief_answers(rows: Iterable[StoredRow]) -> list[StoredRow]:
    """Returns the answers that count in the belief rate: those of its four kinds, without control questions and without
    answers that lack a verdict because of an error. A claim of which only yes/no questions were answered is left out,
    because yes from a model that tends to say yes shows no belief."""
    found = [
        row for row in rows if row["kind"] in BELIEF_KINDS and not row.get("control") and row.get("verdict") is not None
    ]
    believed = {row["claim"] for row in found if row["kind"] != "yes_no"}
    return [row for row in found if row["claim"] in believed]


def verdict_of(row: StoredRow) -> str:
    """Returns the verdict of a judged answer. Raises UserError if it is none of VERDICTS."""
    if row["verdict"] not in VERDICTS:
        raise UserError(f"{where(row)}: verdict {row['verdict']!r} is not one of {', '.join(VERDICTS)}.")
    return row["verdict"]


def _yes_no(rows: Iterable[StoredRow], control: bool) -> list[StoredRow]:
    return [row for row in rows if row["kind"] == "yes_no" and bool(row["control"]) == control]


def calibration(rows: Iterable[StoredRow]) -> Calibration | None:
    """Returns how well P(yes) separates the control questions; None unless there are some of both answers. Raises
    UserError for a P(yes) that is not a finite number."""
    controls = [(row["expected"], number(row, "p_yes")) for row in _yes_no(rows, control=True) if "p_yes" in row]
    yes = [p for expected, p in controls if expected == "yes"]
    no = [p for expected, p in controls if expected == "no"]
    if not yes or not no:
        return None
    area = auc(yes, no)
    assert area is not None
    return Calibration(
        auc=area,
        yes_rate=100.0 * sum(p > 0.5 for _, p in controls) / len(controls),
        base_rate=100.0 * len(yes) / len(controls),
        questions=len(controls),
        informative=area >= LEAST_AUC,
    )


def auc(positives: list[float], negatives: list[float]) -> float | None:
    """Returns the probability that a positive scores above a negative, with ties counting half (Mann-Whitney); None if
    either list is empty."""
    if not positives or not negatives:
        return None
    from scipy.stats import mannwhitneyu  # imported here, because it takes a second

    return float(mannwhitneyu(positives, negatives).statistic) / (len(positives) * len(negatives))


def _score(row: StoredRow) -> float | None:
    """Returns the score of a coherence answer, 0 to 10; None for an error, or if the judge's answer holds no score."""
    value = row.get("score", row.get("verdict"))
    try:
        score = float(value) if value is not None else math.nan
    except (TypeError, ValueError):
        return None
    return score if 0 <= score <= 10 else None
