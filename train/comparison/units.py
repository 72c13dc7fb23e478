"""Lays out the values of all runs as arrays, and says what their independent units are.

A *unit* is drawn independently of others: a claim, or a question if there is a single claim; and a seed. The docstring
of significance.py says why.

Shapes: V variants, S seeds, C claims, A answers of a claim (its samples, question by question), U units, Q questions of
a claim.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.evaluation.measures import Values
from train.runtime.errors import UserError

LEAST_UNITS = 8
"""With fewer units there is no verdict. An exact sign-flip test over 5 units cannot give a p below .0625, and over 8
units none below .0078, which Holm's method can adjust for up to 6 variants."""


@dataclass(frozen=True)
class Units:
    """What a figure rests on.

    of: "claims", or what the questions of a single claim are called.
    number: how many of these; seeds: how many of the variant with the fewest.
    """

    of: str
    number: int
    seeds: int

    @property
    def too_few(self) -> str:
        """The verdict "too few …", with all that there are too few of, if this allows no other; else "", for none."""
        few = [what for what, number in ((self.of, self.number), ("seeds", self.seeds)) if number < LEAST_UNITS]
        return f"too few {' and '.join(few)}" if few else ""

    @property
    def smallest_p(self) -> float:
        """The smallest p that the exact sign-flip tests can give."""
        return max(min(1.0, 2 / 2**n) if n > 1 else 0.0 for n in (self.number, self.seeds)) or 1.0

    def as_json(self) -> dict[str, Any]:
        """Returns the fields and smallest_p."""
        return asdict(self) | {"smallest_p": self.smallest_p}


@dataclass(frozen=True)
class Design:
    """The values of all runs as arrays.

    answer_VSA: one array per claim; NaN where a run lacks a value that others have.
    question_A: one array per claim, the number of each answer's question within the claim.
    present_VS: False beyond a variant's seeds, where answers are 0.
    seeds: those of all variants; [] if variants have different ones, and each variant's seeds are separate units.
    asked: what the questions are called.
    """

    variants: list[str]
    claims: list[str]
    questions: list[list[str]]
    answer_VSA: list[np.ndarray]
    question_A: list[np.ndarray]
    present_VS: np.ndarray
    seeds: list[int]
    asked: str = "questions"

    @property
    def missing(self) -> int:
        """How many values some runs lack and others have."""
        return sum(int(np.isnan(answer_VSA).sum()) for answer_VSA in self.answer_VSA)

    @property
    def crossed(self) -> bool:
        """Whether all variants have the same seeds."""
        return bool(self.seeds)

    @property
    def units(self) -> Units:
        """The units: the claims or, with a single claim, its questions."""
        several, seeds = len(self.claims) > 1, int(self.present_VS.sum(1).min())
        return Units("claims" if several else self.asked, len(self.claims if several else self.questions[0]), seeds)

    def unit_values(self) -> np.ndarray:
        """Returns [V, S, U]: the means of the claims or, with a single claim, its question_values; 0 where there is no
        run."""
        if len(self.claims) == 1:
            return self.question_values(0)
        return np.stack([np.nanmean(answer_VSA, axis=-1) for answer_VSA in self.answer_VSA], axis=-1)

    def question_values(self, claim: int) -> np.ndarray:
        """Returns [V, S, Q]: what each question contributes to the claim's mean over answers, which is the mean of
        these values. It is the question's own mean if all questions have the same number of answers. Otherwise, with
        the claim's mean m, and with n of its N answers on the question, it is m + Q n (mean − m) ÷ N (the linearized
        ratio: Cochran 1977, Sampling Techniques, section 6.4)."""
        answer_VSA, of_AQ = self.answer_VSA[claim], np.eye(len(self.questions[claim]))[self.question_A[claim]]
        there_VSA, mean_VS1 = ~np.isnan(answer_VSA), np.nanmean(answer_VSA, axis=-1, keepdims=True)
        excess_VSQ = np.where(there_VSA, answer_VSA - mean_VS1, 0.0) @ of_AQ
        return mean_VS1 + len(self.questions[claim]) * excess_VSQ / there_VSA.sum(-1, keepdims=True)


def lay_out(values: Mapping[str, Mapping[int, Values]], claims: list[str], asked: str = "questions") -> Design:
    """Returns the values of `claims` as arrays. values: {variant: {seed: values}}, as `measured` gives them. Leaves out
    claims for which no run has values. Raises UserError if a run has none for a claim that another run was measured on.
    """
    variants = list(values)
    runs = [[by_seed[seed] for seed in sorted(by_seed)] for by_seed in values.values()]
    present_VS = np.zeros((len(variants), max(map(len, runs))), dtype=bool)
    for v, by_seed in enumerate(runs):
        present_VS[v, : len(by_seed)] = True
    keys = {key for by_seed in runs for run in by_seed for key in run}
    held = {claim for claim, *_ in keys}
    claims = [claim for claim in claims if claim in held]
    answers, numbers, names = [], [], []
    for claim in claims:
        own = sorted(key for key in keys if key[0] == claim)
        questions = sorted({question for _, question, _ in own})
        question_A = np.array([questions.index(question) for _, question, _ in own])
        answer_VSA = np.zeros((*present_VS.shape, len(own)))
        for v, s in zip(*np.nonzero(present_VS), strict=True):
            answer_VSA[v, s] = [runs[v][s].get(key, np.nan) for key in own]
            if np.isnan(answer_VSA[v, s]).all():
                raise UserError(
                    f"evaluation of {variants[v]}, seed {sorted(values[variants[v]])[s]}: has no values for claim "
                    f"{claim!r}, which other runs were measured on. Evaluate all runs on the same claims."
                )
        answers.append(answer_VSA)
        numbers.append(question_A)
        names.append(questions)
    seeds = [sorted(by_seed) for by_seed in values.values()]
    shared = seeds[0] if all(own == seeds[0] for own in seeds) else []
    return Design(variants, claims, names, answers, numbers, present_VS, shared, asked)
