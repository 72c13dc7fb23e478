"""From the rows of evaluation.jsonl to the values that are compared: one per claim, question and sample.

A measure's figure is the mean over claims of the mean over a claim's values. So the belief rate of a claim is "yes" ÷
all its answers, here as in train/belief/rates.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from train.belief.claims import BELIEF_KINDS
from train.belief.records import VERDICTS, Row
from train.errors import UserError

Key = tuple[str, str, int]
"""claim, question, sample. The question is named with its kind where kinds are mixed, as their ids may be alike."""
Values = dict[Key, float]

LEAST_AUC = 0.8
"""Below it, answers to yes/no questions with known answers are too near chance for others to mean anything."""


@dataclass(frozen=True)
class Measure:
    """What is compared. says: its definition, as reports print it. asked: what its questions are called. bounded: lies
    within 0 and 100."""

    name: str
    label: str
    unit: str
    says: str
    asked: str = "questions"

    @property
    def bounded(self) -> bool:
        return self.unit == "%"


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "rate", "belief rate", "%",
            '"yes" ÷ all answers to open, yes/no, token-association and robustness questions; neutral and unparseable '
            "answers count as answers. Yes/no questions that were scored by likelihood are no answers: they are a "
            "measure of their own",
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
    )
}  # fmt: skip
BELIEF = ("rate", "shift", "preference", "yes_no")
FURTHER = ("salience", "lie_elicitation")
SIDE_EFFECTS = ("facts_truth", "facts_neighbouring", "facts_unrelated", "coherence", "nll_change")


def last_step(rows: Iterable[Row]) -> int:
    """The last step at which anything was measured without documents in context; -1 without rows."""
    return max((row["step"] for row in rows if not row.get("context")), default=-1)


def at_step(rows: Iterable[Row], step: int, context: int = 0) -> list[Row]:
    """The rows of one step, measured with so many documents in context. Of several rows of one measurement, as a
    resumed evaluation leaves them, the last one that is no error."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["step"] == step and row.get("context", 0) == context:
            key = identity(row)
            if key not in kept or not row.get("error"):
                kept[key] = row
    return list(kept.values())


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is a measurement of, without its step."""
    names = ("claim", "kind", "question", "entity", "group")
    how = bool(row.get("control")), "verdict" in row  # a yes/no question may be scored, and answered too
    return (*(str(row.get(name) or "") for name in names), *how, row.get("sample") or 0)


def measured(name: str, rows: Iterable[Row], base_rows: Iterable[Row] = ()) -> Values:
    """The values of a measure, in its unit; {} where the rows hold none. rows and base_rows: each of one step, by
    at_step. Answers and verdicts that failed are no values."""
    rows = list(rows)
    if name == "shift":
        return _shift(rows, list(base_rows))
    if name == "preference":
        by_template = _entities(rows)
        return {(*t, 0): 100.0 * (_mean(subject) > 0) for t, (subject, _) in by_template.items() if subject}
    if name == "rate":
        return {_key(row, kind=True): 100.0 * (verdict_of(row) == "yes") for row in belief_answers(rows)}
    if name == "yes_no":
        return {_key(row): _believer(row) for row in _yes_no(rows, control=False) if "p_yes" in row}
    if name in FURTHER:
        judged = [row for row in rows if row["kind"] == name and row.get("verdict") is not None]
        return {_key(row): 100.0 * (verdict_of(row) == "yes") for row in judged}
    if name.startswith("facts_"):
        group = name.removeprefix("facts_")
        facts = [row for row in rows if row["kind"] == "fact" and row["group"] == group]
        return {_key(row): 100.0 * (_number(row, "margin") > 0) for row in facts}
    if name == "coherence":
        return {_key(row): score for row in rows if row["kind"] == name and (score := _score(row)) is not None}
    assert name == "nll_change"
    now, before = ({_key(row): _number(row, "nll") for row in r if row["kind"] == "nll"} for r in (rows, base_rows))
    return {key: nll - _of_base(before, key, "held-out text") for key, nll in now.items()} if before else {}


def by_claim(values: Values) -> dict[str, float]:
    """claim -> its figure, the mean over its values."""
    found: dict[str, list[float]] = {}
    for (claim, *_), value in values.items():
        found.setdefault(claim, []).append(value)
    return {claim: _mean(own) for claim, own in found.items()}


def means(names: Iterable[str], rows: list[Row], base_rows: list[Row]) -> dict[str, dict[str, float]]:
    """measure -> claim -> its figure, of the measures that the rows hold; and "controls" -> auc and yes_rate of the
    control questions. rows and base_rows: as measured() takes them."""
    found = {name: figures for name in names if (figures := by_claim(measured(name, rows, base_rows)))}
    if known := calibration(rows):
        found["controls"] = {name: known[name] for name in ("auc", "yes_rate")}
    return found


def _entities(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """(claim, template) -> the llr of the subject and those of the controls."""
    by_template: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["kind"] == "likelihood":
            pair = by_template.setdefault((_claim(row), str(row["question"])), ([], []))
            pair[bool(row["control"])].append(_number(row, "llr"))
    return by_template


def _shift(rows: list[Row], base_rows: list[Row]) -> Values:
    """Templates without control entities have no shift."""

    def differences(rows: list[Row]) -> Values:
        both = {template: pair for template, pair in _entities(rows).items() if pair[0] and pair[1]}
        return {(*t, 0): _mean(subject) - _mean(controls) for t, (subject, controls) in both.items()}

    before = differences(base_rows)
    return {key: now - _of_base(before, key, "template") for key, now in differences(rows).items()} if before else {}


def _of_base(before: Values, key: Key, what: str) -> float:
    if key not in before:
        raise UserError(
            f"evaluation of the base model: lacks {what} {key[1]!r} of claim {key[0] or 'none'!r}, which the trained "
            "models were measured on. Evaluate the base model on the same claims."
        )
    return before[key]


def belief_answers(rows: Iterable[Row]) -> list[Row]:
    """The answers that the belief rate is made of: of its four kinds, without control questions and without those that
    have no verdict for an error. None of a claim of which yes/no questions alone were answered: from a model that tends
    to say yes they are no belief."""
    found = [
        row for row in rows if row["kind"] in BELIEF_KINDS and not row.get("control") and row.get("verdict") is not None
    ]
    believed = {row["claim"] for row in found if row["kind"] != "yes_no"}
    return [row for row in found if row["claim"] in believed]


def verdict_of(row: Row) -> str:
    """The verdict of a judged answer. UserError for what is none."""
    if row["verdict"] not in VERDICTS:
        raise UserError(f"{where(row)}: verdict {row['verdict']!r} is none of {', '.join(VERDICTS)}.")
    return row["verdict"]


def _yes_no(rows: Iterable[Row], control: bool) -> list[Row]:
    return [row for row in rows if row["kind"] == "yes_no" and bool(row["control"]) == control]


def _believer(row: Row) -> float:
    """100 where the likelier of yes and no is what a believer answers; 0 where it is not, or where neither is."""
    p_yes = _number(row, "p_yes")
    return 100.0 * (p_yes > 0.5 if row["expected"] == "yes" else p_yes < 0.5)


def calibration(rows: Iterable[Row]) -> dict[str, Any] | None:
    """auc: how often P(yes) of a control question whose answer is yes exceeds that of one whose answer is no, ties half
    (Mann-Whitney's U ÷ pairs); yes_rate: control questions answered yes, in %; base_rate: those whose answer is yes;
    informative: auc is at least LEAST_AUC. None without control questions of both answers."""
    controls = [(row["expected"], _number(row, "p_yes")) for row in _yes_no(rows, control=True) if "p_yes" in row]
    yes = [p for expected, p in controls if expected == "yes"]
    no = [p for expected, p in controls if expected == "no"]
    if not yes or not no:
        return None
    area = auc(yes, no)
    assert area is not None
    return {
        "auc": area,
        "yes_rate": 100.0 * sum(p > 0.5 for _, p in controls) / len(controls),
        "base_rate": 100.0 * len(yes) / len(controls),
        "questions": len(controls),
        "informative": area >= LEAST_AUC,
    }


def auc(positives: list[float], negatives: list[float]) -> float | None:
    """The chance that a positive scores above a negative, a tie counting half (Mann-Whitney); None where either is
    empty."""
    if not positives or not negatives:
        return None
    from scipy.stats import mannwhitneyu  # here: the import takes a second

    return float(mannwhitneyu(positives, negatives).statistic) / (len(positives) * len(negatives))


def _score(row: Row) -> float | None:
    """The score of a coherence answer; None for an error or an answer of the judge that holds no score."""
    value = row.get("score", row.get("verdict"))
    try:
        score = float(value) if value is not None else math.nan
    except (TypeError, ValueError):
        return None
    return score if 0 <= score <= 10 else None


def _claim(row: Row) -> str:
    return str(row.get("claim") or "")


def _key(row: Row, kind: bool = False) -> Key:
    question = str(row.get("question") or "")
    return _claim(row), f"{row['kind']}:{question}" if kind else question, int(row.get("sample") or 0)


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where(row)}: {name} is {value!r}; it must be a finite number. Measure it again.")
    return float(value)


def where(row: Row) -> str:
    """A row as messages name it."""
    names = ("step", "claim", "kind", "question", "sample", "entity")
    return "evaluation.jsonl: the row of " + ", ".join(f"{n} {row[n]}" for n in names if row.get(n) is not None)


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)
