"""What a measure is, the form of its values, and how they are read from the rows of evaluation.jsonl."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from train.evaluation.store import StoredRow
from train.runtime.errors import UserError

MeasureKey = tuple[str, str, int]
"""(claim, question, sample). Where kinds are mixed, the question's name includes its kind, because questions of
different kinds may have the same id."""
Values = dict[MeasureKey, float]


@dataclass(frozen=True)
class Measure:
    """A measure that is compared. says: its definition, as reports print it. asked: what its questions are called.
    free: of a percentage, that it may be below 0 or above 100."""

    name: str
    label: str
    unit: str
    says: str
    asked: str = "questions"
    free: bool = False

    @property
    def bounded(self) -> bool:
        """Whether its values lie between 0 and 100."""
        return self.unit == "%" and not self.free


def claim_of(row: StoredRow) -> str:
    """Returns the id of a row's claim; "" for none."""
    return str(row.get("claim") or "")


def measure_key(row: StoredRow, kind: bool = False) -> MeasureKey:
    """Returns the key of a row's value. kind: whether the question's name includes its kind."""
    question = str(row.get("question") or "")
    return claim_of(row), f"{row['kind']}:{question}" if kind else question, int(row.get("sample") or 0)


def number(row: StoredRow, name: str) -> float:
    """Returns a value of a row. Raises UserError if it is not a finite number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where(row)}: {name} is {value!r}; it must be a finite number. Measure it again.")
    return float(value)


def believer(row: StoredRow) -> float:
    """Returns 100 if the likelier of yes and no is a believer's answer; 0 if it is not, or if both are equally
    likely."""
    p_yes = number(row, "p_yes")
    return 100.0 * (p_yes > 0.5 if row["expected"] == "yes" else p_yes < 0.5)


def of_base(before: Values, key: MeasureKey, what: str) -> float:
    """Returns the base model's value. Raises UserError if it has none. what: what the key's question is."""
    if key not in before:
        raise UserError(
            f"evaluation of the base model: lacks {what} {key[1]!r} of claim {key[0] or 'none'!r}, which the trained "
            "models were measured on. Evaluate the base model on the same claims."
        )
    return before[key]


def where(row: StoredRow) -> str:
    """Returns how messages name a row: its file and its keys."""
    names = ("step", "claim", "kind", "question", "sample", "entity")
    return "evaluation.jsonl: the row of " + ", ".join(f"{n} {row[n]}" for n in names if row.get(n) is not None)


def mean(numbers: Iterable[float]) -> float:
    """Returns the mean of at least one number."""
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)
