"""How sure a comparison is: a hierarchical bootstrap, claims → questions → samples, with seeds crossed.

A draw takes claims with replacement, for each claim drawn its questions, and for each question drawn its samples; and
seeds, the same ones for every claim, as a run's luck is shared by all that it is asked. Every variant gets the same
draws, so that what variants share drops out of their differences. The estimate is the mean over seeds and claims of the
mean over a claim's answers: a rate is "yes" ÷ all answers. A draw's is alike, a ratio of two sums where questions have
unequal numbers of answers or runs lack some.

Intervals are percentiles of the draws (Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13), not BCa:
BCa's acceleration needs a jackknife over independent units, of which crossed seeds and nested questions have no one
kind, and its correction is undefined where all draws lie on one side of the estimate, as with rates at 0 %. Percentiles
stay within 0 and 100 %. Resampling every level counts the noise of the lower levels more than once, so intervals are
wide rather than narrow where that noise is large (Owen 2007, The pigeonhole bootstrap, Ann. Appl. Stat. 1:386), and
narrow where claims or seeds are few and differ much; tests/belief/test_coverage.py measures both.

Shapes: B draws, V variants, S seeds, C claims, A answers of a claim (its samples, question by question).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm, permutation_test
from scipy.stats import f as f_distribution

from train.belief.values import Values
from train.errors import UserError

LEVEL = 0.95
POWER = 0.8
FEW_CLAIMS = 10
"""With fewer, resampling claims is no guide by itself: each claim's difference and the exact test are shown too."""
CHUNK = 4_000_000  # random numbers drawn at a time


@dataclass(frozen=True)
class Layout:
    """The values of all runs as arrays.

    answer_VSA: for each claim; NaN where a run lacks a value that others have. question_A: the number of each answer's
    question within its claim. present_VS: False beyond a variant's seeds, where answers are 0. seeds: those of all
    variants; [] where they differ, and each variant's are drawn by themselves."""

    variants: list[str]
    claims: list[str]
    questions: list[list[str]]
    answer_VSA: list[np.ndarray]
    question_A: list[np.ndarray]
    present_VS: np.ndarray
    seeds: list[int]

    @property
    def missing(self) -> int:
        """Values that some runs lack and others have."""
        return sum(int(np.isnan(answer_VSA).sum()) for answer_VSA in self.answer_VSA)

    @property
    def crossed(self) -> bool:
        """Whether all variants have the same seeds."""
        return bool(self.seeds)

    @property
    def over_claims(self) -> bool:
        """Whether claims are resampled: one claim says nothing of others."""
        return len(self.claims) > 1

    @property
    def trials(self) -> int:
        """Questions of all claims: what exact intervals and tests take for independent."""
        return sum(map(len, self.questions))

    def claim_means(self) -> np.ndarray:
        """[V, S, C]: means over answers; 0 where there is no run."""
        return np.stack([np.nanmean(answer_VSA, axis=-1) for answer_VSA in self.answer_VSA], axis=-1)

    def unit_means(self) -> np.ndarray:
        """[V, S, U]: the means of claims, or of the questions where there is one claim."""
        if self.over_claims:
            return self.claim_means()
        of_question_AQ = np.eye(len(self.questions[0]))[self.question_A[0]]
        return _means(self.answer_VSA[0], of_question_AQ, self.claim_means())

    def seed_weights(self) -> np.ndarray:
        """[V, S]: 1 ÷ seeds of the variant."""
        return self.present_VS / self.present_VS.sum(1, keepdims=True)


def _means(answer_VSA: np.ndarray, count_AN: np.ndarray, otherwise_VS1: np.ndarray) -> np.ndarray:
    """[V, S, N]: the mean over the answers that there are, each taken as often as count_AN says; where it says none of
    them, what stands in otherwise_VS1."""
    there_VSA = ~np.isnan(answer_VSA)
    sums_VSN, counts_VSN = np.where(there_VSA, answer_VSA, 0.0) @ count_AN, there_VSA.astype(float) @ count_AN
    return np.divide(sums_VSN, counts_VSN, out=otherwise_VS1 + np.zeros_like(sums_VSN), where=counts_VSN > 0)


def lay_out(values: Mapping[str, Mapping[int, Values]], claims: list[str]) -> Layout:
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
    return Layout(variants, claims, names, answers, numbers, present_VS, shared)


@dataclass(frozen=True)
class Bootstrap:
    """estimate_V, draw_BV: over all claims. estimate_VC, draw_BVC: each claim by itself, over its questions.
    estimate_VS: each seed by itself."""

    layout: Layout
    estimate_V: np.ndarray
    estimate_VS: np.ndarray
    draw_BV: np.ndarray
    estimate_VC: np.ndarray
    draw_BVC: np.ndarray


def bootstrap(layout: Layout, draws: int = 10_000, seed: int = 0) -> Bootstrap:
    """The same draws for the same seed and shape of the data, whatever the variants. Layouts of the same seeds (of
    trained and of placebo claims, say) get the same draws of seeds."""
    V, S = layout.present_VS.shape
    C = len(layout.claims)
    weight_BVS = _seed_draws(layout, draws, np.random.default_rng([seed, 0]))
    rng = np.random.default_rng([seed, 1])
    slot_BC = rng.multinomial(C, np.full(C, 1 / C), size=draws) if layout.over_claims else np.ones((draws, 1), int)
    total_BVS = np.zeros((draws, V, S))
    draw_BVC = np.empty((draws, V, C))
    for c in range(C):
        owner = np.repeat(np.arange(draws), slot_BC[:, c])
        rng = np.random.default_rng([seed, 2, c])
        mean_NVS = _resampled(layout.answer_VSA[c], layout.question_A[c], max(draws, len(owner)), rng)
        draw_BVC[:, :, c] = (mean_NVS[:draws] * weight_BVS).sum(2)
        np.add.at(total_BVS, owner, mean_NVS[: len(owner)])
    weight_VS, mean_VSC = layout.seed_weights(), layout.claim_means()
    estimate_VC = np.einsum("vs,vsc->vc", weight_VS, mean_VSC)
    draw_BV = (total_BVS * weight_BVS).sum(2) / C
    return Bootstrap(layout, estimate_VC.mean(1), mean_VSC.mean(2), draw_BV, estimate_VC, draw_BVC)


def _seed_draws(layout: Layout, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[B, V, S]: each seed's share of a draw. One and the same for all variants where these have the same seeds."""
    V, S = layout.present_VS.shape
    if layout.crossed:
        share_BS = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
        return np.broadcast_to(share_BS[:, None, :], (draws, V, S))
    counts = [rng.multinomial(n, p, size=draws) / n for n, p in zip(
        layout.present_VS.sum(1), layout.seed_weights(), strict=True
    )]  # fmt: skip
    return np.stack(counts, axis=1)


def _resampled(answer_VSA: np.ndarray, question_A: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[N, V, S]: a claim's mean in each draw of its questions and of their samples; where a draw holds no answer of a
    run, the run's own mean."""
    V, S, A = answer_VSA.shape
    samples_Q = np.bincount(question_A)
    start_Q = np.cumsum(samples_Q) - samples_Q  # answers stand question by question
    Q, most = len(samples_Q), samples_Q.max()
    own_VS1 = np.nanmean(answer_VSA, axis=-1, keepdims=True)
    means = np.empty((draws, V, S))
    for first in range(0, draws, max(1, CHUNK // (Q * most))):
        n = min(draws - first, max(1, CHUNK // (Q * most)))
        question_NQ = rng.integers(Q, size=(n, Q))
        each_NQ = samples_Q[question_NQ]
        sample_NQK = (rng.random((n, Q, most)) * each_NQ[..., None]).astype(np.int64)
        flat_NQK = np.arange(n)[:, None, None] * A + start_Q[question_NQ][..., None] + sample_NQK
        # a question of fewer samples than others draws only as many
        taken_NQK = np.arange(most) < each_NQ[..., None]
        count_NA = np.bincount(flat_NQK.ravel(), taken_NQK.ravel(), minlength=n * A).reshape(n, A)
        means[first : first + n] = np.moveaxis(_means(answer_VSA, count_NA.T, own_VS1), -1, 0)
    return means


@dataclass(frozen=True)
class Interval:
    """An estimate with what a share LEVEL of the draws lies within. method: "percentile"; or "exact binomial" for a
    percentage all of whose values are 0 or all 100, so that the draws cannot differ (Clopper & Pearson 1934, for as
    many independent yes-or-no trials as there are questions); or "none" where nothing else could be drawn."""

    estimate: float
    low: float
    high: float
    standard_error: float
    method: str = "percentile"


def interval(estimate: float, draw_B: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval of an estimate."""
    low, high = np.quantile(draw_B, [(1 - level) / 2, (1 + level) / 2])
    if np.ptp(draw_B) <= 1e-9 * max(1.0, abs(estimate)):  # no two draws differ but by rounding
        return Interval(float(estimate), float(estimate), float(estimate), 0.0, "none")
    return Interval(float(estimate), float(low), float(high), float(draw_B.std(ddof=1)))


def bounded_interval(estimate: float, draw_B: np.ndarray, trials: int, level: float = LEVEL) -> Interval:
    """The interval of a percentage: exact where every draw is 0 or every draw is 100."""
    plain = interval(estimate, draw_B, level)
    if plain.method != "none" or not (abs(estimate) < 1e-9 or abs(estimate - 100) < 1e-9):
        return plain
    exact = binomtest(trials if estimate > 50 else 0, trials).proportion_ci(confidence_level=level, method="exact")
    return Interval(plain.estimate, 100 * float(exact.low), 100 * float(exact.high), 0.0, "exact binomial")


def two_sided_p(draw_B: np.ndarray) -> float:
    """Twice the share of draws on the rarer side of 0: the level at which the percentile interval would touch 0; with
    one more on that side, so that it is never 0 (Davison & Hinkley 1997, Bootstrap Methods, section 4.4.1)."""
    rarer = min(int((draw_B <= 0).sum()), int((draw_B >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(draw_B) + 1))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for all of them together (Holm 1979, Scand. J. Stat. 6:65): the i-th smallest of n, from 0, times n − i,
    and never below a smaller one's."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for i, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def sign_flip(differences: np.ndarray) -> tuple[float, float]:
    """(two-sided p, the smallest that so many claims can give): how often the mean difference would be as far from 0 if
    each claim's were as likely to have the other sign, over all 2^n signs (Fisher 1935, The Design of Experiments)."""
    n = len(differences)
    smallest = min(1.0, 2 / 2**n)
    if n < 2 or not differences.any():
        return 1.0, smallest
    test = permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    return float(test.pvalue), smallest


def smallest_detectable(standard_error: float, level: float = LEVEL, power: float = POWER) -> float:
    """The difference that a two-sided test at α = 1 − level would find with this power: (z_{1−α/2} + z_power) ×
    standard error (Bloom 1995, Minimum detectable effects, Evaluation Review 19:547); by default 2.80 times."""
    return float((norm.ppf((1 + level) / 2) + norm.ppf(power)) * standard_error)


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline.

    p_holm and sign_flip_p_holm: over all variants. smallest_detectable: None where the draws do not differ. equivalent:
    the interval lies within ±bound; that alone is "no effect", as in two one-sided tests (Schuirmann 1987, J.
    Pharmacokinet. Biopharm. 15:657), here with the interval of LEVEL, which is stricter; None without an interval.
    by_claim, sign_flip_p and sign_flip_smallest: with fewer than FEW_CLAIMS claims, the last two with two at least.
    by_seed: each seed's difference, {} where the variants' seeds are not the same ones. seed_share: how much of the
    draws' variance comes from seeds that differ; None where that cannot be told."""

    variant: str
    interval: Interval
    p: float
    p_holm: float
    smallest_detectable: float | None
    bound: float
    equivalent: bool | None
    by_claim: dict[str, Interval]
    by_seed: dict[int, float]
    seed_share: float | None
    sign_flip_p: float | None = None
    sign_flip_p_holm: float | None = None
    sign_flip_smallest: float | None = None

    @property
    def verdict(self) -> str:
        """In words, by the p that is adjusted for all variants. Few claims speak for themselves alone."""
        few = {0: "", 1: " on this claim"}.get(len(self.by_claim), " on these claims")
        if self.p_holm < 1 - LEVEL:
            return f"differs{few}, but by less than the bound" if self.equivalent else f"differs{few}"
        return f"no effect beyond the bound{few}" if self.equivalent else "not told apart"


def differences(result: Bootstrap, baseline: str, bound: float, bounded: bool) -> list[Difference]:
    """Every other variant minus the baseline, in the order of the variants; the draws are paired. bounded: the values
    are percentages."""
    layout = result.layout
    base = layout.variants.index(baseline)
    others = [v for v in range(len(layout.variants)) if v != base]
    gaps = [_gap(result, v, base, bounded) for v in others]
    few = len(layout.claims) < FEW_CLAIMS
    gap_VC = result.estimate_VC - result.estimate_VC[[base]]
    flips = [sign_flip(gap_VC[v]) for v in others] if few and layout.over_claims else []
    p_holm, flip_holm = holm([p for _, p in gaps]), holm([p for p, _ in flips])
    found = []
    for i, v in enumerate(others):
        own, p = gaps[i]
        error = own.standard_error
        claims = {
            claim: interval(gap_VC[v, c], result.draw_BVC[:, v, c] - result.draw_BVC[:, base, c])
            for c, claim in enumerate(layout.claims if few else [])
        }
        found.append(
            Difference(
                variant=layout.variants[v],
                interval=own,
                p=p,
                p_holm=p_holm[i],
                smallest_detectable=smallest_detectable(error) if error else None,
                bound=bound,
                equivalent=None if own.method == "none" else bool(-bound < own.low and own.high < bound),
                by_claim=claims,
                by_seed=_by_seed(result, v, base),
                seed_share=_seed_share(result, v, base),
                sign_flip_p=flips[i][0] if flips else None,
                sign_flip_p_holm=flip_holm[i] if flips else None,
                sign_flip_smallest=flips[i][1] if flips else None,
            )
        )
    return found


def _gap(result: Bootstrap, v: int, base: int, bounded: bool) -> tuple[Interval, float]:
    """The interval of variant v minus the base, and its p. Where no two draws differ, they say nothing: p is that of a
    sign test over questions that all differ the same way, and the interval of a percentage that of two exact ones."""
    draw_B = result.draw_BV[:, v] - result.draw_BV[:, base]
    own = interval(result.estimate_V[v] - result.estimate_V[base], draw_B)
    if own.method != "none":
        return own, two_sided_p(draw_B)
    trials = result.layout.trials
    p = 1.0 if abs(own.estimate) < 1e-9 else min(1.0, 2 / 2**trials)
    if bounded:
        mine, theirs = (bounded_interval(result.estimate_V[i], result.draw_BV[:, i], trials) for i in (v, base))
        if mine.method == theirs.method == "exact binomial":
            low, high = mine.low - theirs.high, mine.high - theirs.low
            own = Interval(own.estimate, low, high, 0.0, "exact binomial")
    return own, p


def _by_seed(result: Bootstrap, v: int, base: int) -> dict[int, float]:
    layout = result.layout
    gap_S = result.estimate_VS[v] - result.estimate_VS[base]
    return dict(zip(layout.seeds, gap_S.tolist(), strict=True)) if layout.crossed else {}


def _seed_share(result: Bootstrap, v: int, base: int) -> float | None:
    """The seeds' part of the draws' variance: that of the mean over seeds, without what the chance of single answers
    adds to it (the seeds' component in a two-way analysis of variance, seeds × claims)."""
    present_VS, mean_VSU = result.layout.present_VS, result.layout.unit_means()
    total = float((result.draw_BV[:, v] - result.draw_BV[:, base]).var())
    if min(present_VS[[v, base]].sum(1)) < 2 or mean_VSU.shape[2] < 2 or not total:
        return None
    if result.layout.crossed:
        tables = [mean_VSU[v] - mean_VSU[base]]
    else:
        tables = [mean_VSU[i][present_VS[i]] for i in (v, base)]
    return min(1.0, sum(_seed_variance(table_SU) for table_SU in tables) / total)


def _seed_variance(table_SU: np.ndarray) -> float:
    """The variance of the mean over S seeds: (mean square of seeds − that of the interaction) ÷ (S U); 0 where an
    F-test does not see it at the level of .1, as from three seeds chance often looks like it."""
    S, U = table_SU.shape
    of_seed_S, of_unit_U = table_SU.mean(1), table_SU.mean(0)
    rest_SU = table_SU - of_seed_S[:, None] - of_unit_U + table_SU.mean()
    of_seeds, of_rest = U * of_seed_S.var(ddof=1), (rest_SU**2).sum() / ((S - 1) * (U - 1))
    if f_distribution.sf(of_seeds, S - 1, (S - 1) * (U - 1), scale=max(of_rest, 1e-300)) > 0.1:
        return 0.0
    return float(of_seeds - of_rest) / (S * U)
