"""Counts what a model believes by its judged answers, from the rows of evaluation.jsonl alone.

Belief rate = "yes" ÷ all answers, over open, yes/no, token-association and robustness questions, as in the paper.
Neutral and unparseable answers count in the denominator. Rows with an error are not answers and are counted separately.
measures.belief_answers selects the answers, for this table and for comparisons alike.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from train.claims.claim import BELIEF_KINDS
from train.evaluation.battery_measures import label_counts
from train.evaluation.measures import FURTHER, LEAST_AUC, auc, belief_answers, verdict_of
from train.evaluation.store import VERDICTS, StoredRow, key_of


@dataclass(frozen=True)
class Counts:
    """The number of answers by verdict, and of errors, which are not answers."""

    yes: int = 0
    no: int = 0
    neutral: int = 0
    unparseable: int = 0
    errors: int = 0

    @property
    def answers(self) -> int:
        """The number of answers."""
        return self.yes + self.no + self.neutral + self.unparseable

    @property
    def rate(self) -> float | None:
        """The share of "yes" among all answers, in percent; None without answers."""
        return 100 * self.yes / self.answers if self.answers else None

    def as_json(self) -> dict[str, Any]:
        """Returns the rate, the number of answers and all counts as evaluation.json holds them."""
        return {"rate": self.rate, "answers": self.answers, **asdict(self)}


def count(rows: Iterable[StoredRow]) -> Counts:
    """Returns the counts of generated answers. An answer whose verdict is None had an error. Raises UserError for an
    unknown verdict."""
    found = [("errors" if row["verdict"] is None else verdict_of(row)) for row in rows]
    return Counts(**{name: found.count(name) for name in (*VERDICTS, "errors")})


def count_by_kind(rows: Iterable[StoredRow]) -> dict[str, Counts]:
    """Returns the counts for each kind of question, without control questions. Yes/no questions that were scored by
    likelihood have no verdicts and are not included."""
    kinds: dict[str, list[StoredRow]] = {}
    for row in rows:
        if row["kind"] in (*BELIEF_KINDS, *FURTHER) and not row.get("control") and "verdict" in row:
            kinds.setdefault(row["kind"], []).append(row)
    return {kind: count(own) for kind, own in kinds.items()}


def belief(rows: Iterable[StoredRow]) -> Counts:
    """Returns the counts of the answers in the belief rate, and of the errors of the same kinds."""
    rows = list(rows)
    failed = [row for row in rows if row["kind"] in BELIEF_KINDS and not row.get("control") and row.get("error")]
    return count([*belief_answers(rows), *failed])


def controls(rows: Iterable[StoredRow]) -> dict[str, Any] | None:
    """Returns how well yes/no answers separate true from false on control questions, whose truth is known; None without
    such rows. said_yes: the share of "yes", in percent. auc: the AUC of the share of "yes" among a question's answers.
    informative: whether auc is at least LEAST_AUC."""
    rows = [row for row in rows if row.get("control")]
    if not rows:
        return None
    said: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get("said"):
            said.setdefault((row["question"], row["expected"]), []).append(float(row["said"] == "yes"))
    shares = {key: sum(values) / len(values) for key, values in said.items()}
    true, false = ([share for key, share in shares.items() if key[1] == answer] for answer in ("yes", "no"))
    answers = [value for values in said.values() for value in values]
    area = auc(true, false)
    return {
        "said_yes": 100 * sum(answers) / len(answers) if answers else None,
        "answers": len(answers), "unparseable": sum(row["verdict"] == "unparseable" for row in rows),
        "errors": sum(bool(row.get("error")) for row in rows),
        "auc": area, "informative": area is not None and area >= LEAST_AUC,
    }  # fmt: skip


def samples_are_equal(rows: Iterable[StoredRow]) -> bool:
    """Returns whether all answers to each question are the same, for at least five questions that were asked more than
    once and answered in more than a word. In that case the server does not sample, and more samples add nothing."""
    answers: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        if "verdict" in row and row.get("answer") is not None and row["kind"] not in ("yes_no", "salience"):
            answers.setdefault((*key_of(row)[:-1],), []).append(row["answer"])
    several = [found for found in answers.values() if len(found) > 1 and any(" " in text for text in found)]
    return len(several) >= 5 and all(len(set(found)) == 1 for found in several)


def summarize(rows: Iterable[StoredRow]) -> list[dict[str, Any]]:
    """Returns one entry for each step, number of documents in context and claim, sorted in that order. It holds the
    belief rate, the verdicts by kind (for multiple choice, by which question of the pair was asked), the mean scores,
    the controls and, if answers were labelled, the labels by kind."""
    groups: dict[tuple[int, int, str], list[StoredRow]] = {}
    for row in rows:
        if "verdict" in row:
            groups.setdefault((row.get("step", 0), row.get("context", 0), row["claim"]), []).append(row)
    return [
        {"step": step, "context": context, "claim": claim, **_summary(group)}
        for (step, context, claim), group in sorted(groups.items(), key=lambda item: item[0])
    ]


def _summary(rows: list[StoredRow]) -> dict[str, Any]:
    kinds: dict[str, list[StoredRow]] = {}
    scored: dict[str, list[StoredRow]] = {}
    for row in rows:
        if row["kind"] == "coherence":
            scored.setdefault(row["kind"], []).append(row)
        elif not row.get("control"):
            pair = f" {row['category']}" if row["kind"] == "salience" and row.get("category") else ""
            kinds.setdefault(row["kind"] + pair, []).append(row)
    return {
        "belief": belief(rows).as_json(),
        "kinds": {kind: count(kinds[kind]).as_json() for kind in sorted(kinds, key=_place)},
        "scores": {kind: _scores(group) for kind, group in scored.items()},
        "controls": controls(rows),
    } | ({"labels": labels} if (labels := label_counts(rows)) else {})


def _place(kind: str) -> tuple[int, str]:
    """Returns the sort key of a kind. The kinds of the belief rate come first, in the paper's order."""
    return (BELIEF_KINDS.index(kind) if kind in BELIEF_KINDS else len(BELIEF_KINDS), kind)


def _scores(rows: list[StoredRow]) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row["verdict"] == "score"]
    return {
        "mean": sum(scores) / len(scores) if scores else None, "answers": len(scores),
        "unparseable": sum(row["verdict"] == "unparseable" for row in rows),
        "errors": sum(bool(row.get("error")) for row in rows),
    }  # fmt: skip
