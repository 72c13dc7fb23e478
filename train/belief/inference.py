"""How sure a comparison is: intervals and tests over independent units, claims and, crossed with them, seeds.

A *unit* is what is drawn by itself. Questions about one claim move together, as do samples of an answer: so with
several claims each claim is a unit, by its mean. One claim says nothing of others: then its questions are the units,
and what is found holds for that claim. Seeds are units too, crossed with these: a run's luck is common to all that it
is asked. Every variant is asked the same, so differences are paired.

The standard error is two-way clustered (Cameron, Gelbach & Miller 2011, J. Bus. Econ. Stat. 29:238): the variance over
claims plus that over seeds, less what both hold of their interaction, and no less than either (MacKinnon, Nielsen &
Webb 2021, J. Bus. Econ. Stat. 39:505). From few clusters the normal distribution makes too much of it (Cameron, Gelbach
& Miller 2008, Rev. Econ. Stat. 90:414), so intervals are by t, with the fewest units less one as degrees of freedom.
The p of a difference is the largest of three: that of this t, and those of the exact sign-flip tests over claims and
over seeds (Fisher 1935, The Design of Experiments). A sign flip rests on symmetry, which a difference of two variants
has where exchanging them changes nothing; heavy tails and claims of unequal variance do no harm, skewed ones do.

With one seed, nothing is known of seeds: interval and p are those of the very models trained. With fewer than
LEAST_UNITS claims (or questions) or seeds there is no verdict. tests/belief/coverage.py measures how often
intervals hold the truth, and how often a difference of 0 is said to differ.

Shapes: V variants, S seeds, C claims, A answers of a claim (its samples, question by question), U units, Q questions of
a claim. "..." stands for any axes before.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as t_distribution

from train.belief.values import Values
from train.errors import UserError

LEVEL = 0.95
POWER = 0.8
LEAST_UNITS = 8
"""An exact sign-flip test over 5 units cannot go below .0625, over 8 not below .0078: Holm allows for 6 variants."""
EXACT = 16  # units up to which all 2^n signs are gone through; beyond, as many are drawn


@dataclass(frozen=True)
class Units:
    """What a figure rests on. of: "claims", or what a single one was asked; number: how many; seeds: of the variant
    with the fewest."""

    of: str
    number: int
    seeds: int

    @property
    def too_few(self) -> str:
        """The verdict where either is too few for one; else ""."""
        few = self.of if self.number < LEAST_UNITS else "seeds" if self.seeds < LEAST_UNITS else ""
        return few and f"too few {few}"

    @property
    def smallest_p(self) -> float:
        """That the exact sign-flip tests can give."""
        return max(min(1.0, 2 / 2**n) if n > 1 else 0.0 for n in (self.number, self.seeds)) or 1.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"smallest_p": self.smallest_p}


@dataclass(frozen=True)
class Layout:
    """The values of all runs as arrays.

    answer_VSA: for each claim; NaN where a run lacks a value that others have. question_A: the number of each answer's
    question within its claim. present_VS: False beyond a variant's seeds, where answers are 0. seeds: those of all
    variants; [] where they differ, and each variant's are units by themselves. asked: what questions are called."""

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
        """Values that some runs lack and others have."""
        return sum(int(np.isnan(answer_VSA).sum()) for answer_VSA in self.answer_VSA)

    @property
    def crossed(self) -> bool:
        """Whether all variants have the same seeds."""
        return bool(self.seeds)

    @property
    def units(self) -> Units:
        several, seeds = len(self.claims) > 1, int(self.present_VS.sum(1).min())
        return Units("claims" if several else self.asked, len(self.claims if several else self.questions[0]), seeds)

    def unit_values(self) -> np.ndarray:
        """[V, S, U]: the means of claims, or one claim's questions; 0 where there is no run."""
        if len(self.claims) == 1:
            return self.question_values(0)
        return np.stack([np.nanmean(answer_VSA, axis=-1) for answer_VSA in self.answer_VSA], axis=-1)

    def question_values(self, claim: int) -> np.ndarray:
        """[V, S, Q]: what each question contributes to the claim's mean over answers, which is the mean of these: the
        question's own mean where all have as many answers, else the mean m plus Q n (mean − m) ÷ N, with n of N answers
        (the linearized ratio: Cochran 1977, Sampling Techniques, section 6.4)."""
        answer_VSA, of_AQ = self.answer_VSA[claim], np.eye(len(self.questions[claim]))[self.question_A[claim]]
        there_VSA, mean_VS1 = ~np.isnan(answer_VSA), np.nanmean(answer_VSA, axis=-1, keepdims=True)
        excess_VSQ = np.where(there_VSA, answer_VSA - mean_VS1, 0.0) @ of_AQ
        return mean_VS1 + len(self.questions[claim]) * excess_VSQ / there_VSA.sum(-1, keepdims=True)


def lay_out(values: Mapping[str, Mapping[int, Values]], claims: list[str], asked: str = "questions") -> Layout:
    """The values of `claims` as arrays: variant → seed → values, as `measured` gives them. UserError where a run has
    none on a claim that another was measured on; claims that no run has values on are left out."""
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
                    f"evaluation of {variants[v]}, seed {sorted(values[variants[v]])[s]}: holds nothing on claim "
                    f"{claim!r}, which other runs were measured on. Evaluate all runs on the same claims."
                )
        answers.append(answer_VSA)
        numbers.append(question_A)
        names.append(questions)
    seeds = [sorted(by_seed) for by_seed in values.values()]
    shared = seeds[0] if all(own == seeds[0] for own in seeds) else []
    return Layout(variants, claims, names, answers, numbers, present_VS, shared, asked)


@dataclass(frozen=True)
class Sampled:
    """An estimate, and the units whose luck is in it: arrays whose last axis runs over units of one kind, each drawn by
    itself. cells: [..., S, U], where each seed met each unit."""

    estimate: np.ndarray
    units: list[np.ndarray]
    seeds: list[np.ndarray]
    cells: list[np.ndarray]

    def standard_error(self) -> np.ndarray:
        """Two-way clustered; of one unit and one seed 0."""
        of_units, of_seeds = (sum(map(_variance_of_mean, each)) for each in (self.units, self.seeds))
        both = of_units + of_seeds - sum(map(_variance_of_interaction, self.cells))
        error = np.sqrt(np.maximum(np.maximum(of_units, of_seeds), both))
        return np.where(error > 1e-9 * np.maximum(1.0, abs(self.estimate)), error, 0.0)  # but for rounding

    @property
    def freedom(self) -> int:
        """Degrees of freedom: the fewest units of those kinds that are more than one, less one."""
        return min((n - 1 for each in (*self.units, *self.seeds) if (n := each.shape[-1]) > 1), default=0)

    def reach(self) -> np.ndarray:
        """Half of the interval's width."""
        return self._t((1 + LEVEL) / 2) * self.standard_error()

    def smallest_detectable(self) -> np.ndarray:
        """The difference that a two-sided test at α = 1 − LEVEL would find with POWER: (t_{1−α/2} + t_power) × standard
        error (Bloom 1995, Minimum detectable effects, Evaluation Review 19:547)."""
        return (self._t((1 + LEVEL) / 2) + self._t(POWER)) * self.standard_error()

    def _t(self, share: float) -> float:
        return float(t_distribution.ppf(share, self.freedom)) if self.freedom else 0.0

    def p(self) -> np.ndarray:
        """Two-sided, of an estimate of 0: the largest of that by t and of the exact ones over each kind of units. Where
        units of a kind are not paired, no smaller than the smallest that flipping so many signs can give."""
        p = np.ones(self.estimate.shape)
        if not self.freedom:
            return p
        error = self.standard_error()
        ratio = np.divide(abs(self.estimate), error, out=np.full(p.shape, np.inf), where=error > 0)
        p = 2 * t_distribution.sf(np.where(abs(self.estimate) < 1e-9, 0.0, ratio), self.freedom)
        for kind in (self.units, self.seeds):
            several = [each for each in kind if each.shape[-1] > 1]
            if len(kind) == 1 and several:
                p = np.maximum(p, sign_flip(several[0]))
            elif several:
                p = np.maximum(p, 2 / 2 ** min(each.shape[-1] for each in several))
        return p


def crossed(table_SU: np.ndarray) -> Sampled:
    """The mean of values [..., S, U] of seeds and units, each seed's of the same units."""
    return Sampled(table_SU.mean((-2, -1)), [table_SU.mean(-2)], [table_SU.mean(-1)], [table_SU])


def _variance_of_mean(value_U: np.ndarray) -> np.ndarray:
    """0 of a single one, of which nothing is known."""
    n = value_U.shape[-1]
    return value_U.var(-1, ddof=1) / n if n > 1 else np.zeros(value_U.shape[:-1])


def _variance_of_interaction(table_SU: np.ndarray) -> np.ndarray:
    """Of the mean of the table: the mean square of what neither seed nor unit explains, ÷ S U."""
    S, U = table_SU.shape[-2:]
    if S == 1 or U == 1:
        return np.zeros(table_SU.shape[:-2])
    of_units, of_seeds = table_SU.mean(-2, keepdims=True), table_SU.mean(-1, keepdims=True)
    rest_SU = table_SU - of_units - of_seeds + table_SU.mean((-2, -1), keepdims=True)
    return (rest_SU**2).sum((-2, -1)) / ((S - 1) * (U - 1)) / (S * U)


def sign_flip(difference_U: np.ndarray) -> np.ndarray:
    """The two-sided p of differences [..., U]: how often their mean would be as far from 0 if each were as likely to
    have the other sign, over all 2^U signs; over 2^EXACT of them, the observed and drawn ones, where U is larger."""
    sign_UN = _signs(difference_U.shape[-1])
    own = abs(difference_U.sum(-1)) - 1e-9 * abs(difference_U).sum(-1)  # ties but for rounding
    return (abs(difference_U @ sign_UN) >= own[..., None]).mean(-1)


@cache
def _signs(n: int) -> np.ndarray:
    """[n, N], of 1 and −1; the first are 1 alone."""
    if n <= EXACT:
        minus_NU = np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1  # the last stays 1: −x is as far from 0 as x
    else:
        minus_NU = np.random.default_rng(0).integers(2, size=(2**EXACT, n))
        minus_NU[0] = 0
    return 1.0 - 2.0 * minus_NU.T


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for all of them together (Holm 1979, Scand. J. Stat. 6:65): the i-th smallest of n, from 0, times n − i,
    and never below a smaller one's."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for i, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Interval:
    """An estimate and what lies around it at LEVEL. method: "t"; or "exact binomial" for a percentage of which every
    unit is 0 or every one 100 (Clopper & Pearson 1934, each unit a trial); or "none" where a single unit, or units that
    are all alike, give none."""

    estimate: float
    low: float
    high: float
    standard_error: float
    method: str = "t"


def interval(sampled: Sampled, within: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """By t over units; within: the values that are possible."""
    estimate, reach = float(sampled.estimate), float(sampled.reach())
    low, high = max(within[0], estimate - reach), min(within[1], estimate + reach)
    return Interval(estimate, low, high, float(sampled.standard_error()), "t" if reach else "none")


def percentage_interval(sampled: Sampled, trials: int) -> Interval:
    """The interval of a percentage: exact where every unit is 0 or every one is 100."""
    plain = interval(sampled, (0.0, 100.0))
    if plain.method != "none" or not (abs(plain.estimate) < 1e-9 or abs(plain.estimate - 100) < 1e-9):
        return plain
    hits = trials if plain.estimate > 50 else 0
    exact = binomtest(hits, trials).proportion_ci(confidence_level=LEVEL, method="exact")
    return Interval(plain.estimate, 100 * float(exact.low), 100 * float(exact.high), 0.0, "exact binomial")


def of_variant(layout: Layout, value_VSU: np.ndarray, v: int) -> Sampled:
    """One variant's mean over its seeds and units."""
    return crossed(value_VSU[v][layout.present_VS[v]])


def of_pair(layout: Layout, value_VSU: np.ndarray, v: int, base: int) -> Sampled:
    """Variant v minus the base: units are paired, and seeds where all variants have the same."""
    if layout.crossed:
        return crossed(value_VSU[v] - value_VSU[base])
    one, other = (of_variant(layout, value_VSU, i) for i in (v, base))
    seeds, cells = [*one.seeds, *other.seeds], [*one.cells, *other.cells]
    return Sampled(one.estimate - other.estimate, [one.units[0] - other.units[0]], seeds, cells)


def of_claims_apart(one: Layout, other: Layout, v: int) -> Sampled:
    """A variant's mean on some claims minus that on others: each are units by themselves, of the same runs."""
    mine, theirs = (of_variant(layout, layout.unit_values(), v) for layout in (one, other))
    seeds, cells = [mine.seeds[0] - theirs.seeds[0]], [*mine.cells, *theirs.cells]
    return Sampled(mine.estimate - theirs.estimate, [*mine.units, *theirs.units], seeds, cells)


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline.

    p_holm: over all variants. smallest_detectable: None where units do not differ. equivalent: the interval lies within
    ±bound; that alone is "no effect", as in two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657),
    here with the interval of LEVEL, which is stricter; None without an interval. by_claim: each claim's, over its
    questions. by_seed: each seed's difference, {} where the variants' seeds are not the same ones."""

    variant: str
    units: Units
    interval: Interval
    p: float
    p_holm: float
    smallest_detectable: float | None
    bound: float
    equivalent: bool | None
    by_claim: dict[str, Interval]
    by_seed: dict[int, float]

    @property
    def verdict(self) -> str:
        """In words, by the p that is adjusted for all variants; none with too few units."""
        if self.units.too_few:
            return self.units.too_few
        here = "" if self.units.of == "claims" else " on this claim"
        if self.p_holm < 1 - LEVEL:
            return f"differs{here}, but by less than the bound" if self.equivalent else f"differs{here}"
        return f"no effect beyond the bound{here}" if self.equivalent else f"not told apart{here}"


def differences(layout: Layout, baseline: str, bound: float, bounded: bool) -> list[Difference]:
    """Every other variant minus the baseline, in the order of the variants. bounded: the values are percentages."""
    base, value_VSU = layout.variants.index(baseline), layout.unit_values()
    others = [v for v in range(len(layout.variants)) if v != base]
    pairs = [of_pair(layout, value_VSU, v, base) for v in others]
    p_values = [float(pair.p()) for pair in pairs]
    adjusted = holm(p_values)
    return [
        _difference(layout, v, base, pair, (p, p_holm), bound, bounded)
        for v, pair, p, p_holm in zip(others, pairs, p_values, adjusted, strict=True)
    ]


def _difference(
    layout: Layout, v: int, base: int, pair: Sampled, p: tuple[float, float], bound: float, bounded: bool
) -> Difference:
    within = (-100.0, 100.0) if bounded else (-np.inf, np.inf)
    own = _gap(layout, v, base, interval(pair, within), bounded)
    claims = {
        claim: interval(of_pair(layout, layout.question_values(c), v, base), within)
        for c, claim in enumerate(layout.claims)
    }
    return Difference(
        variant=layout.variants[v],
        units=layout.units,
        interval=own,
        p=p[0],
        p_holm=p[1],
        smallest_detectable=float(pair.smallest_detectable()) or None,
        bound=bound,
        equivalent=None if own.method == "none" else bool(-bound < own.low and own.high < bound),
        by_claim=claims,
        by_seed=dict(zip(layout.seeds, pair.seeds[0].tolist(), strict=True)) if layout.crossed else {},
    )


def _gap(layout: Layout, v: int, base: int, own: Interval, bounded: bool) -> Interval:
    """Where no two units differ, that of a percentage is what two exact intervals leave."""
    if own.method == "none" and bounded:
        value_VSU, trials = layout.unit_values(), layout.units.number
        mine, theirs = (percentage_interval(of_variant(layout, value_VSU, i), trials) for i in (v, base))
        if mine.method == theirs.method == "exact binomial":
            return Interval(own.estimate, mine.low - theirs.high, mine.high - theirs.low, 0.0, "exact binomial")
    return own
