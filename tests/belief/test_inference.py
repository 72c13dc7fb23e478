"""The bootstrap and its tests against answers worked by hand, and against scipy where that does the same."""

import itertools

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import norm

from train.belief.inference import (
    bootstrap,
    bounded_interval,
    differences,
    holm,
    interval,
    lay_out,
    sign_flip,
    smallest_detectable,
    two_sided_p,
)
from train.errors import UserError

CLAIMS = [f"claim {c:02}" for c in range(12)]


def one_level(values_C: np.ndarray) -> dict:
    """One run, one question a claim, one sample a question: nothing but claims."""
    return {0: {(claim, "q", 0): float(value) for claim, value in zip(CLAIMS, values_C, strict=False)}}


def test_the_estimate_is_a_mean_over_seeds_and_claims_of_means_over_answers():
    first = {("a", "1", 0): 0.0, ("a", "1", 1): 100.0, ("a", "2", 0): 100.0, ("b", "1", 0): 0.0}
    second = {("a", "1", 0): 100.0, ("a", "1", 1): 100.0, ("a", "2", 0): 100.0, ("b", "1", 0): 40.0}
    result = bootstrap(lay_out({"x": {0: first, 1: second}}, ["a", "b", "never asked"]), draws=50)
    # seed 0: a is 200 / 3, b is 0; seed 1: a is 100, b is 40
    assert result.layout.claims == ["a", "b"]
    assert result.estimate_VC[0] == pytest.approx([250 / 3, 20])
    assert result.estimate_V[0] == pytest.approx(155 / 3)


def test_a_run_that_lacks_answers_has_the_mean_of_those_that_are_there_in_every_draw_too():
    whole = {("a", "1", 0): 10.0, ("a", "1", 1): 20.0, ("a", "2", 0): 60.0, ("a", "3", 0): 0.0}
    partial = {("a", "1", 1): 20.0, ("a", "2", 0): 60.0}
    layout = lay_out({"x": {0: whole}, "y": {0: partial}}, ["a"])
    assert layout.missing == 2
    assert layout.claim_means()[:, 0, 0].tolist() == [22.5, 40.0]
    result = bootstrap(layout, draws=2000)
    assert result.estimate_V.tolist() == [22.5, 40.0]
    # of y every draw is a mean of 20s and 60s alone; one of question 3 alone holds none of y, and is y's own mean
    draws = {20, 60, *((20 * one + 60 * two) / (one + two) for one in (1, 2, 3, 4) for two in (1, 2, 3, 4))}
    assert {round(value, 6) for value in result.draw_BV[:, 1]} <= {round(value, 6) for value in draws | {40.0}}
    assert result.draw_BV[:, 1].min() == 20 and result.draw_BV[:, 1].max() == 60


def test_with_unequal_numbers_of_answers_a_rate_is_a_ratio_of_two_sums():
    values = {("a", "1", k): 100.0 for k in range(3)} | {("a", "2", 0): 0.0}
    result = bootstrap(lay_out({"x": {0: values}}, ["a"]), draws=20_000)
    assert result.estimate_V.tolist() == [75.0]
    # two questions are drawn: 1 and 1, 1 and 2 or 2 and 1, 2 and 2
    shares = [float((np.abs(result.draw_BV[:, 0] - value) < 1e-9).mean()) for value in (100.0, 75.0, 0.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_a_run_that_lacks_a_whole_claim_is_refused():
    with pytest.raises(UserError, match="evaluation of y, seed 3: holds nothing on claim 'a'"):
        lay_out({"x": {3: {("a", "1", 0): 1.0}}, "y": {3: {("b", "1", 0): 1.0}}}, ["a", "b"])


def test_with_claims_alone_it_is_scipys_bootstrap():
    values_C = np.array([3.0, 7.5, -2.0, 11.0, 4.0, 0.5, 8.0, 6.0, -1.0, 2.0, 9.0, 5.0])
    result = bootstrap(lay_out({"x": one_level(values_C)}, CLAIMS), draws=40_000, seed=1)
    own = interval(result.estimate_V[0], result.draw_BV[:, 0])
    theirs = scipy_bootstrap((values_C,), np.mean, n_resamples=40_000, method="percentile", rng=2)
    assert own.estimate == pytest.approx(values_C.mean())
    # Monte Carlo errors of 40,000 draws: about 0.02 of the limits, 0.4 % of the standard error
    assert own.low == pytest.approx(theirs.confidence_interval.low, abs=0.08)
    assert own.high == pytest.approx(theirs.confidence_interval.high, abs=0.08)
    assert own.standard_error == pytest.approx(theirs.standard_error, rel=0.015)
    assert own.standard_error == pytest.approx(values_C.std() / 12**0.5, rel=0.015)


def test_the_variance_of_draws_is_that_of_resampling_claims_questions_and_samples():
    rng = np.random.default_rng(3)
    value_CQK = rng.normal(size=(6, 4, 3)) + rng.normal(size=(6, 4, 1)) + rng.normal(size=(6, 1, 1))
    keys = itertools.product(range(6), range(4), range(3))
    values = {(CLAIMS[c], f"q{q}", k): float(value_CQK[c, q, k]) for c, q, k in keys}
    result = bootstrap(lay_out({"x": {0: values}}, CLAIMS), draws=60_000, seed=4)
    # each level is drawn given the one above: the mean over claims of n draws has variance (variance of claims' means
    # + mean over claims of that of questions' means ÷ Q + mean over questions of that of samples ÷ Q K) ÷ C
    claims = value_CQK.mean((1, 2)).var()
    questions = value_CQK.mean(2).var(1).mean() / 4
    samples = value_CQK.var(2).mean() / (4 * 3)
    assert result.draw_BV.var() == pytest.approx((claims + questions + samples) / 6, rel=0.03)
    # one claim alone: its claim is not drawn
    one = value_CQK[0].mean(1).var() / 4 + value_CQK[0].var(1).mean() / 12
    assert result.draw_BVC[:, 0, 0].var() == pytest.approx(one, rel=0.03)


def test_seeds_are_crossed_one_draw_of_seeds_holds_for_every_claim():
    # 12 claims that differ in nothing: what is left is the seeds' variance, not a twelfth of it
    values = {seed: {(claim, "q", 0): value for claim in CLAIMS} for seed, value in enumerate((0.0, 3.0, 9.0))}
    result = bootstrap(lay_out({"x": values}, CLAIMS), draws=40_000)
    assert result.draw_BV.var() == pytest.approx(np.var([0.0, 3.0, 9.0]) / 3, rel=0.03)
    zero = {seed: dict.fromkeys(run, 0.0) for seed, run in values.items()}
    (found,) = differences(bootstrap(lay_out({"x": values, "y": zero}, CLAIMS)), "y", bound=1, bounded=False)
    assert found.by_seed == {0: 0.0, 1: 3.0, 2: 9.0} and found.seed_share == 1.0  # 2/3 of it is drawn
    placebo = bootstrap(lay_out({"x": values}, CLAIMS[:5]), draws=40_000)
    assert np.allclose(placebo.draw_BV, result.draw_BV)  # the same seeds in other claims' draws


def test_variants_share_their_draws_so_what_they_share_drops_out():
    rng = np.random.default_rng(5)
    values_C = rng.normal(size=12) * 50
    both = {"x": one_level(values_C), "y": one_level(values_C + 2)}
    result = bootstrap(lay_out(both, CLAIMS), draws=1000)
    assert np.allclose(result.draw_BV[:, 1] - result.draw_BV[:, 0], 2.0)
    alone = bootstrap(lay_out({"y": one_level(values_C + 2)}, CLAIMS), draws=1000)
    assert np.allclose(alone.draw_BV[:, 0], result.draw_BV[:, 1])  # and not changed by other variants


def test_seeds_that_are_not_the_same_in_all_variants_are_drawn_by_themselves():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=3) * 10, rng.normal(size=2) * 10
    values = {
        "x": {seed: {("a", "q", 0): float(v)} for seed, v in enumerate(x)},
        "y": {seed: {("a", "q", 0): float(v)} for seed, v in enumerate(y, start=7)},
    }
    layout = lay_out(values, ["a"])
    result = bootstrap(layout, draws=40_000)
    assert not layout.crossed
    assert result.estimate_V == pytest.approx([x.mean(), y.mean()])
    gap_B = result.draw_BV[:, 1] - result.draw_BV[:, 0]
    assert gap_B.var() == pytest.approx(x.var() / 3 + y.var() / 2, rel=0.03)
    (found,) = differences(result, "x", bound=1, bounded=False)
    assert found.by_seed == {} and found.seed_share is None  # one question: seeds and chance cannot be told apart


def test_the_same_seed_gives_the_same_draws_and_another_seed_others():
    layout = lay_out({"x": one_level(np.arange(12.0))}, CLAIMS)
    first, again, other = (bootstrap(layout, draws=100, seed=seed).draw_BV for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_the_two_sided_p_counts_the_rarer_side():
    assert two_sided_p(np.array([-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])) == pytest.approx(2 * 2 / 10)
    assert two_sided_p(np.full(99, 3.0)) == pytest.approx(2 / 100)
    assert two_sided_p(np.array([-1.0, 1.0])) == 1.0


def test_holm_by_hand():
    # sorted: .01 × 4, .02 × 3, .03 × 2 (as much), .5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [1.0, -2.0, 3.0, 0.5], [0.0, 0.0, 1.0], [5.0] * 9])
def test_the_sign_flip_test_is_that_of_all_signs(values):
    p, smallest = sign_flip(np.array(values))
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(sign, values, strict=True))) for sign in signs]
    assert p == pytest.approx(sum(total >= abs(sum(values)) - 1e-12 for total in sums) / len(sums))
    assert smallest == 2 / 2 ** len(values)


def test_three_claims_cannot_give_a_sign_flip_p_below_a_quarter_and_one_none_below_1():
    assert sign_flip(np.array([90.0, 95.0, 99.0])) == (0.25, 0.25)
    assert sign_flip(np.array([90.0])) == (1.0, 1.0)
    assert sign_flip(np.zeros(4)) == (1.0, 0.125)


def test_the_smallest_detectable_difference_is_found_in_80_of_100_runs():
    size = smallest_detectable(1.5)
    assert size == pytest.approx((1.959964 + 0.841621) * 1.5, rel=1e-6)
    # the power of a z-test at α = .05 for that difference; the other tail is next to nothing
    assert norm.sf(1.959964 - size / 1.5) == pytest.approx(0.8, abs=1e-6)


def test_rates_of_0_and_100_get_an_exact_interval_in_place_of_an_empty_one():
    none = bounded_interval(0.0, np.zeros(100), trials=12)
    assert (none.low, none.method) == (0.0, "exact binomial")
    assert none.high == pytest.approx(100 * (1 - 0.025 ** (1 / 12)))
    every = bounded_interval(100.0, np.full(100, 100.0), trials=3)
    assert (every.low, every.high) == pytest.approx((100 * 0.025 ** (1 / 3), 100.0))
    assert bounded_interval(40.0, np.full(100, 40.0), trials=3).method == "none"


def test_differences_their_verdicts_and_what_they_could_have_found():
    rng = np.random.default_rng(7)
    base_C = rng.normal(size=12) * 30
    values = {
        "far": one_level(base_C + 40 + rng.normal(size=12)),
        "base": one_level(base_C),
        "same": one_level(base_C + rng.normal(size=12) * 0.1),
        "vague": one_level(base_C + rng.normal(size=12) * 30),
    }
    result = bootstrap(lay_out(values, CLAIMS), draws=2000)
    found = differences(result, "base", bound=5, bounded=False)
    assert [d.variant for d in found] == ["far", "same", "vague"]
    assert [d.verdict for d in found] == ["differs", "no effect beyond the bound", "not told apart"]
    far, same, vague = found
    assert far.interval.estimate == pytest.approx(result.estimate_V[0] - result.estimate_V[1])
    assert far.interval.low < far.interval.estimate < far.interval.high
    assert (far.p, far.p_holm) == (2 / 2001, 3 * 2 / 2001)
    assert same.equivalent and not vague.equivalent
    assert vague.smallest_detectable == pytest.approx(2.8016 * vague.interval.standard_error, rel=1e-4)
    assert far.by_claim == {} and far.sign_flip_p is None  # 12 claims are enough


def test_with_few_claims_each_claims_difference_and_the_exact_test_are_given():
    values = {"x": one_level(np.array([10.0, 20.0, 60.0])), "y": one_level(np.array([0.0, 0.0, 0.0]))}
    (found,) = differences(bootstrap(lay_out(values, CLAIMS), draws=500), "y", bound=5, bounded=True)
    assert {c: i.estimate for c, i in found.by_claim.items()} == dict(zip(CLAIMS, [10.0, 20.0, 60.0], strict=False))
    assert (found.sign_flip_p, found.sign_flip_p_holm, found.sign_flip_smallest) == (0.25, 0.25, 0.25)


def test_with_one_claim_questions_are_drawn_and_there_is_no_sign_flip_test():
    values = {
        name: {0: {("a", f"q{q}", 0): 100.0 * (q < right) for q in range(20)}} for name, right in (("x", 15), ("y", 5))
    }
    result = bootstrap(lay_out(values, ["a"]), draws=4000)
    assert not result.layout.over_claims and result.layout.trials == 20
    (found,) = differences(result, "y", bound=5, bounded=True)
    assert found.sign_flip_p is None and list(found.by_claim) == ["a"]
    # ten of 20 questions differ by 100: the standard error is √(.5 × .5 / 20)
    assert found.interval.standard_error == pytest.approx(100 * (0.25 / 20) ** 0.5, rel=0.05)


def test_all_against_nothing_has_exact_limits_and_the_p_of_a_sign_test():
    values = {"x": one_level(np.full(3, 100.0)), "y": one_level(np.zeros(3)), "z": one_level(np.zeros(3))}
    all_, nothing = differences(bootstrap(lay_out(values, CLAIMS), draws=500), "z", bound=5, bounded=True)
    lowest = 100 * 0.025 ** (1 / 3)  # 29.2 of the one, 70.8 of the other
    assert (all_.interval.estimate, all_.p, all_.smallest_detectable) == (100.0, 0.25, None)
    assert (all_.interval.low, all_.interval.high) == pytest.approx((lowest - (100 - lowest), 100.0))
    assert (nothing.p, nothing.equivalent, nothing.verdict) == (1.0, False, "not told apart")
    assert (nothing.interval.low, nothing.interval.high) == pytest.approx((lowest - 100, 100 - lowest))


def test_one_question_of_one_claim_with_one_seed_tells_nothing():
    values = {"x": one_level(np.array([3.0])), "y": one_level(np.array([1.0]))}
    (found,) = differences(bootstrap(lay_out(values, CLAIMS), draws=500), "y", bound=0.25, bounded=False)
    assert (found.interval.estimate, found.interval.method, found.p, found.equivalent) == (2.0, "none", 1.0, None)


def test_the_seeds_share_leaves_out_what_chance_adds():
    # two seeds, two claims. x: seeds 0 and 4 apart in both claims; y: 0, 4 and 4, 0, which is no seed's luck
    def run(a: float, b: float) -> dict:
        return {("a", "q", 0): a, ("b", "q", 0): b}

    nothing = {0: run(0, 0), 1: run(0, 0)}
    values = {"x": {0: run(0, 1), 1: run(4, 5)}, "y": {0: run(0, 4), 1: run(4, 0)}, "base": nothing}
    result = bootstrap(lay_out(values, ["a", "b"]), draws=20_000)
    x, y = differences(result, "base", bound=1, bounded=False)
    # x: mean square of seeds 2 × 8 = 16, of the rest 0: 16 / 4 = 4, more than the draws' 2 + 1/8; y: none
    assert (x.seed_share, y.seed_share) == (1.0, 0.0)
