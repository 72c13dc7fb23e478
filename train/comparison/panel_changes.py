"""Computes the changes of a measure from the base model, and says what the base model was not measured on."""

from collections.abc import Sequence

from train.comparison.compared import Comparison
from train.evaluation.measures import CHANGES, StoredRow, Values, measured
from train.evaluation.row_values import mean

Runs = dict[str, dict[int, list[StoredRow]]]
"""{variant: {seed: the rows of the run's last step}}."""
OF_SAMPLES = ("asserted", "stated", "coherence")
"""Measures of answers that were drawn: sample 0 of one model has nothing to do with sample 0 of another."""


def change(name: str, rows: Sequence[StoredRow], base: Sequence[StoredRow]) -> tuple[Values, set[tuple[str, str]]]:
    """Returns the change of each value of a measure from the base model's, and the (claim, question) that the base
    model lacks, whose values are left out. Of OF_SAMPLES, it is the change from the base model's mean of the question.
    """
    now = measured(name, rows, base)
    if name in CHANGES:
        return now, set()
    before = measured(name, base)
    if name in OF_SAMPLES:
        drawn: dict[tuple[str, str], list[float]] = {}
        for (claim, question, _), value in before.items():
            drawn.setdefault((claim, question), []).append(value)
        means = {question: mean(own) for question, own in drawn.items()}
        before = {key: means[key[:2]] for key in now if key[:2] in means}
    lacking = {key[:2] for key in now.keys() - before.keys()}
    return {key: value - before[key] for key, value in now.items() if key in before}, lacking


class Changes:
    """The changes of all measures in all runs, each computed once."""

    def __init__(self, comparison: Comparison, finals: Runs, base: list[StoredRow]):
        self.comparison, self.finals, self.base = comparison, finals, base
        self._known: dict[str, dict[str, dict[int, Values]]] = {}
        self._lacking: dict[str, set[tuple[str, str]]] = {}

    def of(self, name: str) -> dict[str, dict[int, Values]]:
        """Returns {variant: {seed: the changes of this measure}}."""
        if name not in self._known:
            self._lacking[name] = set()
            self._known[name] = {}
            for variant, by_seed in self.finals.items():
                own = self._known[name][variant] = {}
                for seed, rows in by_seed.items():
                    own[seed], lacking = change(name, rows, self.base)
                    self._lacking[name] |= lacking
        return self._known[name]

    def lacking(self, name: str, claims: Sequence[str]) -> str:
        """Returns which of these claims, or questions of them, the base model lacks, in words; "" for none."""
        self.of(name)
        lacking = sorted(each for each in self._lacking[name] if each[0] in claims)
        had = {claim for own in self.of(name).values() for run in own.values() for claim, *_ in run}
        words = [f"claim {claim}" for claim in dict.fromkeys(claim for claim, _ in lacking) if claim not in had]
        words += [f"{question} of {claim}" for claim, question in lacking if claim in had]
        return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
