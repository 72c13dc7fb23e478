"""Computes how certain a comparison is: intervals and tests over independent units, which are claims crossed with
seeds.

A *unit* is drawn independently of others. Questions about one claim are correlated, and so are samples of an answer. So
with several claims, each claim is one unit, by its mean. A single claim says nothing about others: then its questions
are the units, and the result holds for that claim only. Seeds are units too, crossed with these: what is random about a
run affects everything that it is asked. All variants are asked the same questions, so differences are paired.

The standard error is two-way clustered (Cameron, Gelbach & Miller 2011, J. Bus. Econ. Stat. 29:238): the variance over
claims plus that over seeds, minus that of their interaction, which both contain. It is no less than either variance
alone gives (MacKinnon, Nielsen & Webb 2021, J. Bus. Econ. Stat. 39:505). With few clusters, the normal distribution
makes intervals too narrow (Cameron, Gelbach & Miller 2008, Rev. Econ. Stat. 90:414). So intervals are by t, with the
smallest number of units minus one as degrees of freedom. The p of a difference is the largest of three: that of this t,
and those of the exact sign-flip tests over claims and over seeds (Fisher 1935, The Design of Experiments). A sign-flip
test assumes symmetry, which a difference of two variants has if exchanging them changes nothing. Heavy tails and claims
of unequal variance do no harm; skewed ones do.

With one seed, nothing is known about the variation over seeds: interval and p hold for the very models trained. With
fewer than LEAST_UNITS claims (or questions) or seeds, there is no verdict. tests/comparison/coverage.py measures how
often intervals contain the true value, and how often a difference of 0 is reported as a difference.

Shapes: V variants, S seeds, U units. "..." stands for any leading axes.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as t_distribution

from train.comparison.units import Design, Units

LEVEL = 0.95
POWER = 0.8
EXACT = 16  # maximum units for which all 2^n signs are enumerated; for more, 2^EXACT signs are drawn


@dataclass(frozen=True)
class Sampled:
    """An estimate [...], and the units that its sampling error comes from.

    units, seeds: arrays whose last axis runs over units of one kind, which are drawn independently.
    cells: arrays [..., S, U], the value of each seed and unit.
    """

    estimate: np.ndarray
    units: list[np.ndarray]
    seeds: list[np.ndarray]
    cells: list[np.ndarray]

    def standard_error(self) -> np.ndarray:
        """Returns the two-way clustered standard error, [...]; 0 for a single unit and seed."""
        of_units, of_seeds = (sum(map(_variance_of_mean, each)) for each in (self.units, self.seeds))
        both = of_units + of_seeds - sum(map(_variance_of_interaction, self.cells))
        error = np.sqrt(np.maximum(np.maximum(of_units, of_seeds), both))
        return np.where(error > 1e-9 * np.maximum(1.0, abs(self.estimate)), error, 0.0)  # less is rounding

    @property
    def freedom(self) -> int:
        """Degrees of freedom: the smallest number of units, of the kinds that have more than one, minus one; else 0."""
        return min((n - 1 for each in (*self.units, *self.seeds) if (n := each.shape[-1]) > 1), default=0)

    def reach(self) -> np.ndarray:
        """Returns half of the interval's width, [...]."""
        return self._t((1 + LEVEL) / 2) * self.standard_error()

    def smallest_detectable(self) -> np.ndarray:
        """Returns the difference, [...], that a two-sided test at α = 1 − LEVEL would find with probability POWER:
        (t_{1−α/2} + t_power) × standard error (Bloom 1995, Minimum detectable effects, Evaluation Review 19:547)."""
        return (self._t((1 + LEVEL) / 2) + self._t(POWER)) * self.standard_error()

    def _t(self, share: float) -> float:
        return float(t_distribution.ppf(share, self.freedom)) if self.freedom else 0.0

    def p(self) -> np.ndarray:
        """Returns the two-sided p, [...], of the hypothesis that the true value is 0: the largest of that by t and of
        the exact ones over each kind of units. If units of a kind are not paired, p is no smaller than the smallest
        that flipping so many signs can give."""
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
    """Returns the mean of values [..., S, U] over seeds and units, where all seeds have the same units."""
    return Sampled(table_SU.mean((-2, -1)), [table_SU.mean(-2)], [table_SU.mean(-1)], [table_SU])


def _variance_of_mean(value_U: np.ndarray) -> np.ndarray:
    """Returns the variance of the mean over units, [...]; 0 for a single unit, which says nothing about it."""
    n = value_U.shape[-1]
    return value_U.var(-1, ddof=1) / n if n > 1 else np.zeros(value_U.shape[:-1])


def _variance_of_interaction(table_SU: np.ndarray) -> np.ndarray:
    """Returns the interaction's part, [...], of the variance of the table's mean: the mean square of what neither seed
    nor unit explains, divided by S U."""
    S, U = table_SU.shape[-2:]
    if S == 1 or U == 1:
        return np.zeros(table_SU.shape[:-2])
    of_units, of_seeds = table_SU.mean(-2, keepdims=True), table_SU.mean(-1, keepdims=True)
    rest_SU = table_SU - of_units - of_seeds + table_SU.mean((-2, -1), keepdims=True)
    return (rest_SU**2).sum((-2, -1)) / ((S - 1) * (U - 1)) / (S * U)


def sign_flip(difference_U: np.ndarray) -> np.ndarray:
    """Returns the two-sided p, [...], of differences [..., U]: how often their mean would be as far from 0 if each were
    equally likely to have the other sign. Enumerates all 2^U signs or, if U exceeds EXACT, takes 2^EXACT, the observed
    and random ones."""
    sign_UN = _signs(difference_U.shape[-1])
    own = abs(difference_U.sum(-1)) - 1e-9 * abs(difference_U).sum(-1)  # rounding must not break ties
    return (abs(difference_U @ sign_UN) >= own[..., None]).mean(-1)


@cache
def _signs(n: int) -> np.ndarray:
    """Returns signs [n, N], which are 1 and −1; the first column has only 1."""
    if n <= EXACT:
        minus_NU = np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1  # the last stays 1, as −x is as far from 0 as x
    else:
        minus_NU = np.random.default_rng(0).integers(2, size=(2**EXACT, n))
        minus_NU[0] = 0
    return 1.0 - 2.0 * minus_NU.T


def holm(p_values: list[float]) -> list[float]:
    """Returns the p values adjusted for all of them together (Holm 1979, Scand. J. Stat. 6:65): the i-th smallest of n,
    counted from 0, is multiplied by n − i, and is never below that of a smaller one, nor above 1."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for i, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval at LEVEL, from low to high. method: "t"; "exact binomial" for a percentage of which
    every unit is 0 or every unit is 100 (Clopper & Pearson 1934, with each unit as a trial); "none" if there is a
    single unit, or all units are equal, so that there is no interval."""

    estimate: float
    low: float
    high: float
    standard_error: float
    method: str = "t"


def interval(sampled: Sampled, within: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Returns the interval by t over units. within: the smallest and largest possible value."""
    estimate, reach = float(sampled.estimate), float(sampled.reach())
    low, high = max(within[0], estimate - reach), min(within[1], estimate + reach)
    return Interval(estimate, low, high, float(sampled.standard_error()), "t" if reach else "none")


def percentage_interval(sampled: Sampled, trials: int) -> Interval:
    """Returns the interval of a percentage, the exact binomial one if every unit is 0 or every unit is 100. trials: the
    number of units."""
    plain = interval(sampled, (0.0, 100.0))
    if plain.method != "none" or not (abs(plain.estimate) < 1e-9 or abs(plain.estimate - 100) < 1e-9):
        return plain
    hits = trials if plain.estimate > 50 else 0
    exact = binomtest(hits, trials).proportion_ci(confidence_level=LEVEL, method="exact")
    return Interval(plain.estimate, 100 * float(exact.low), 100 * float(exact.high), 0.0, "exact binomial")


def of_variant(layout: Design, value_VSU: np.ndarray, v: int) -> Sampled:
    """Returns variant v's mean over its seeds and units. value_VSU: from `unit_values` or `question_values`."""
    return crossed(value_VSU[v][layout.present_VS[v]])


def estimated_mean(layout: Design, value_VSU: np.ndarray, v: int, bounded: bool) -> Interval:
    """Returns variant v's mean over its seeds and units, with its interval. bounded: whether the values are
    percentages. value_VSU: from `unit_values` or `question_values`."""
    sampled = of_variant(layout, value_VSU, v)
    return percentage_interval(sampled, value_VSU.shape[-1]) if bounded else interval(sampled)


def of_pair(layout: Design, value_VSU: np.ndarray, v: int, base: int) -> Sampled:
    """Returns variant v minus the base. Units are paired, and so are seeds if all variants have the same ones.
    value_VSU: from `unit_values` or `question_values`."""
    if layout.crossed:
        return crossed(value_VSU[v] - value_VSU[base])
    one, other = (of_variant(layout, value_VSU, i) for i in (v, base))
    seeds, cells = [*one.seeds, *other.seeds], [*one.cells, *other.cells]
    return Sampled(one.estimate - other.estimate, [one.units[0] - other.units[0]], seeds, cells)


def of_claims_apart(one: Design, other: Design, v: int) -> Sampled:
    """Returns variant v's mean on the claims of one design minus that on the claims of another, measured in the same
    runs. The claims of each design are separate units."""
    mine, theirs = (of_variant(layout, layout.unit_values(), v) for layout in (one, other))
    seeds, cells = [mine.seeds[0] - theirs.seeds[0]], [*mine.cells, *theirs.cells]
    return Sampled(mine.estimate - theirs.estimate, [*mine.units, *theirs.units], seeds, cells)


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline.

    p_holm: p adjusted for all variants.
    smallest_detectable: None if units do not differ.
    bound, equivalent: whether the interval lies within ±bound, or None without an interval. Only that is "no effect",
        as in two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657), here with the interval of
        LEVEL, which is stricter.
    by_claim: the interval of each claim, over its questions.
    by_seed: the difference of each seed; {} if variants have different seeds.
    informative: False if the answers are known to mean nothing, so that there is no verdict.
    """

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
    informative: bool = True

    @property
    def verdict(self) -> str:
        """The verdict in words, by the p that is adjusted for all variants; with too few units, it says that."""
        if not self.informative:
            return "uninformative"
        if self.units.too_few:
            return self.units.too_few
        here = "" if self.units.of == "claims" else " on this claim"
        if self.p_holm < 1 - LEVEL:
            return f"differs{here}, but by less than the bound" if self.equivalent else f"differs{here}"
        return f"no effect beyond the bound{here}" if self.equivalent else f"inconclusive{here}"


def differences(layout: Design, baseline: str, bound: float, bounded: bool) -> list[Difference]:
    """Returns every other variant minus the baseline, in the order of the variants. bound: of "no effect", in the unit
    of the values. bounded: whether the values are percentages."""
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
    layout: Design, v: int, base: int, pair: Sampled, p: tuple[float, float], bound: float, bounded: bool
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


def _gap(layout: Design, v: int, base: int, own: Interval, bounded: bool) -> Interval:
    """Returns the interval of a difference. If no two units of a percentage differ, it is what two exact intervals
    leave."""
    if own.method == "none" and bounded:
        value_VSU, trials = layout.unit_values(), layout.units.number
        mine, theirs = (percentage_interval(of_variant(layout, value_VSU, i), trials) for i in (v, base))
        if mine.method == theirs.method == "exact binomial":
            return Interval(own.estimate, mine.low - theirs.high, mine.high - theirs.low, 0.0, "exact binomial")
    return own
