"""Intervals and tests over units, against answers worked by hand and against scipy's own."""

import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_1samp

from train.comparison.significance import (
    Sampled,
    crossed,
    differences,
    holm,
    interval,
    of_claims_apart,
    of_pair,
    of_variant,
    percentage_interval,
    sign_flip,
)
from train.comparison.units import Units, lay_out
from train.runtime.errors import UserError

CLAIMS = [f"claim {c:02}" for c in range(12)]


def one_level(values_C: np.ndarray) -> dict:
    """One run, one question a claim, one sample a question: nothing but claims."""
    return {0: {(claim, "q", 0): float(value) for claim, value in zip(CLAIMS, values_C, strict=False)}}


def seeds_of_one_claim(value_SQ: np.ndarray, first: int = 0) -> dict:
    """Runs on one claim, one sample a question."""
    return {s: {("a", f"q{q:02}", 0): float(v) for q, v in enumerate(own)} for s, own in enumerate(value_SQ, first)}


def test_the_estimate_is_a_mean_over_seeds_and_claims_of_means_over_answers():
    first = {("a", "1", 0): 0.0, ("a", "1", 1): 100.0, ("a", "2", 0): 100.0, ("b", "1", 0): 0.0}
    second = {("a", "1", 0): 100.0, ("a", "1", 1): 100.0, ("a", "2", 0): 100.0, ("b", "1", 0): 40.0}
    layout = lay_out({"x": {0: first, 1: second}}, ["a", "b", "never asked"])
    # seed 0: a is 200 / 3, b is 0; seed 1: a is 100, b is 40
    assert layout.claims == ["a", "b"] and layout.units == Units("claims", 2, 2)
    assert layout.unit_values()[0] == pytest.approx(np.array([[200 / 3, 0], [100, 40]]))
    assert of_variant(layout, layout.unit_values(), 0).estimate == pytest.approx(155 / 3)


def test_questions_with_unequal_numbers_of_answers_count_by_their_answers():
    whole = {("a", "1", 0): 10.0, ("a", "1", 1): 20.0, ("a", "2", 0): 60.0, ("a", "3", 0): 0.0}
    partial = {("a", "1", 1): 20.0, ("a", "2", 0): 60.0}
    layout = lay_out({"x": {0: whole}, "y": {0: partial}}, ["a"])
    assert layout.missing == 2 and layout.units == Units("questions", 3, 1)
    # x: mean 22.5; question 1 has two of four answers, 7.5 below it each: 22.5 − 3 × 15 / 4
    assert layout.unit_values()[0, 0] == pytest.approx([11.25, 22.5 + 3 * 37.5 / 4, 22.5 - 3 * 22.5 / 4])
    # y: mean 40; no answer to question 3, which adds nothing
    assert layout.unit_values()[1, 0] == pytest.approx([40 - 3 * 20 / 2, 40 + 3 * 20 / 2, 40])
    assert layout.unit_values().mean(2).ravel() == pytest.approx([22.5, 40.0])


def test_a_run_that_lacks_a_whole_claim_is_refused():
    with pytest.raises(UserError, match="evaluation of y, seed 3: has no values for claim 'a'"):
        lay_out({"x": {3: {("a", "1", 0): 1.0}}, "y": {3: {("b", "1", 0): 1.0}}}, ["a", "b"])


def test_over_claims_alone_the_interval_is_students():
    values_C = np.array([3.0, 7.5, -2.0, 11.0, 4.0, 0.5, 8.0, 6.0, -1.0, 2.0, 9.0, 5.0])
    sampled = crossed(values_C[None])
    own, theirs = interval(sampled), ttest_1samp(values_C, 0)
    low, high = theirs.confidence_interval(0.95)
    assert (own.estimate, own.low, own.high) == pytest.approx((values_C.mean(), low, high))
    assert own.standard_error == pytest.approx(values_C.std(ddof=1) / 12**0.5) and own.method == "t"
    assert sampled.p() == pytest.approx(max(theirs.pvalue, sign_flip(values_C)))


def test_the_three_questions_of_one_claim_that_were_once_said_to_differ_are_too_few():
    values = {"x": seeds_of_one_claim(np.array([[-0.39, -2.28, -2.71]])), "y": seeds_of_one_claim(np.zeros((1, 3)))}
    (found,) = differences(lay_out(values, ["a"]), "y", bound=0.25, bounded=False)
    assert found.verdict == "too few questions and seeds" and found.units == Units("questions", 3, 1)
    assert found.p == pytest.approx(0.25) and found.units.smallest_p == 0.25  # t alone would say .13
    # mean −1.793, standard deviation 1.234, t of 2 degrees of freedom 4.303: −1.793 ± 4.303 × 1.234 / √3
    assert (found.interval.low, found.interval.high) == pytest.approx((-4.860, 1.273), abs=0.002)


def test_seeds_and_claims_that_both_differ_add_their_variances():
    # claims at −1, 0, 1 and seeds at −2, 2, without interaction: 1 / 3 + 8 / 2
    table_SU = np.array([[-2.0], [2.0]]) + np.array([-1.0, 0.0, 1.0])
    sampled = crossed(table_SU)
    assert sampled.standard_error() == pytest.approx((1 / 3 + 8 / 2) ** 0.5)
    assert sampled.freedom == 1 and sampled.reach() == pytest.approx(12.7062 * (1 / 3 + 4) ** 0.5, rel=1e-5)


def test_what_claims_and_seeds_hold_of_their_interaction_counts_once():
    # seeds' means are 2 and 1, claims' 1 and 2: variances of the mean ¼ and ¼; the rest is ±1.5: 4 × 1.5² ÷ 4 is more
    sampled = crossed(np.array([[0.0, 4.0], [2.0, 0.0]]))
    assert sampled.standard_error() == pytest.approx(0.25**0.5)  # no less than either
    # seeds' means 0 and 4, claims' 1 and 3: 4 and 1; the rest is ±½: 4 × ½² ÷ 4
    sampled = crossed(np.array([[-0.5, 0.5], [2.5, 5.5]]))
    assert sampled.standard_error() == pytest.approx((4 + 1 - 0.25) ** 0.5)


def test_one_luck_of_all_claims_is_not_averaged_away_by_their_number():
    gap_SC = np.array([[0.0], [3.0], [9.0]]) + np.zeros(12)
    sampled = crossed(gap_SC)
    assert sampled.standard_error() == pytest.approx((np.var([0, 3, 9], ddof=1) / 3) ** 0.5)
    values = {
        name: {s: dict(one_level(own)[0]) for s, own in enumerate(table)}
        for name, table in (("x", gap_SC), ("y", 0 * gap_SC))
    }
    (found,) = differences(lay_out(values, CLAIMS), "y", bound=1, bounded=False)
    assert found.by_seed == {0: 0.0, 1: 3.0, 2: 9.0}
    assert found.verdict == "too few seeds" and found.units == Units("claims", 12, 3) and found.p >= 0.25


def test_seeds_that_are_not_the_same_in_all_variants_are_drawn_by_themselves():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(9, 1)) * 10, rng.normal(size=(8, 1)) * 10
    layout = lay_out({"x": seeds_of_one_claim(x), "y": seeds_of_one_claim(y, first=70)}, ["a"])
    sampled = of_pair(layout, layout.unit_values(), 0, 1)
    assert not layout.crossed and sampled.estimate == pytest.approx(x.mean() - y.mean())
    assert sampled.standard_error() == pytest.approx((x.var(ddof=1) / 9 + y.var(ddof=1) / 8) ** 0.5)
    assert sampled.freedom == 7  # Welch's would be 7 to 15
    (found,) = differences(layout, "y", bound=1, bounded=False)
    assert found.by_seed == {} and found.units == Units("questions", 1, 8)
    far = Sampled(np.array(5.0), [], [np.full(8, 5.0), np.zeros(8)], [])
    assert far.p() == 2 / 2**8


def test_what_differs_between_trained_and_placebo_claims_has_the_luck_of_both_and_of_its_seeds():
    rng = np.random.default_rng(2)
    value_SC = rng.normal(size=(3, 12))
    values = {"x": {s: one_level(own)[0] for s, own in enumerate(value_SC)}}
    trained, placebo = lay_out(values, CLAIMS[:7]), lay_out(values, CLAIMS[7:])
    sampled = of_claims_apart(trained, placebo, 0)
    one, other = value_SC[:, :7], value_SC[:, 7:]
    assert sampled.estimate == pytest.approx(one.mean() - other.mean())
    of_claims = one.mean(0).var(ddof=1) / 7 + other.mean(0).var(ddof=1) / 5
    of_seeds = (one.mean(1) - other.mean(1)).var(ddof=1) / 3
    assert sampled.standard_error() ** 2 >= max(of_claims, of_seeds) - 1e-12 and sampled.freedom == 2
    assert sampled.standard_error() ** 2 <= of_claims + of_seeds


def test_what_variants_share_drops_out():
    values_C = np.random.default_rng(5).normal(size=12) * 50
    layout = lay_out({"x": one_level(values_C), "y": one_level(values_C + 2)}, CLAIMS)
    own = interval(of_pair(layout, layout.unit_values(), 1, 0))
    assert (own.low, own.high) == pytest.approx((2, 2)) and own.method == "none"


def test_holm_by_hand():
    # sorted: .01 × 4, .02 × 3, .03 × 2 (as much), .5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [1.0, -2.0, 3.0, 0.5], [0.0, 0.0, 1.0], [5.0] * 9])
def test_the_sign_flip_test_is_that_of_all_signs(values):
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(sign, values, strict=True))) for sign in signs]
    share = sum(total >= abs(sum(values)) - 1e-12 for total in sums) / len(sums)
    assert sign_flip(np.array(values)) == pytest.approx(share)
    theirs = permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert theirs.pvalue == pytest.approx(share)


def test_many_units_have_their_signs_drawn_and_no_p_below_that_of_all_signs():
    values = np.random.default_rng(1).normal(0.2, 1, 17)
    signs = np.array(list(itertools.product((-1, 1), repeat=17)))
    exact = (abs(signs @ values) >= abs(values.sum()) - 1e-9).mean()
    assert sign_flip(values) == pytest.approx(exact, abs=0.003) and 0.01 < exact < 0.2
    assert sign_flip(np.ones(17)) >= 2 / 2**17 and sign_flip(np.ones(60)) == 2**-16


def test_three_claims_cannot_give_a_sign_flip_p_below_a_quarter_and_one_none_below_1():
    assert sign_flip(np.array([90.0, 95.0, 99.0])) == 0.25
    assert sign_flip(np.array([90.0])) == 1.0
    assert sign_flip(np.zeros(4)) == 1.0


@pytest.mark.parametrize("claims", [2, 3, 7, 8, 12])
@pytest.mark.parametrize("seeds", [1, 2, 7, 8, 12])
def test_no_p_is_below_what_the_exact_tests_can_give_however_well_units_agree(claims, seeds):
    values = {
        name: {s: one_level(value + value * np.arange(claims) * 1e-3)[0] for s in range(seeds)}
        for name, value in (("x", 90.0), ("y", 1.0), ("z", 2.0))
    }
    for found in differences(lay_out(values, CLAIMS), "y", bound=5, bounded=True):
        floor = 2 / 2 ** (claims if seeds == 1 else min(claims, seeds))
        assert found.units == Units("claims", claims, seeds) and found.units.smallest_p == floor
        assert found.p == pytest.approx(floor) and found.p_holm == pytest.approx(min(1, 2 * floor))
        few = "too few seeds" if seeds < 8 else ""
        if claims < 8:
            few = "too few claims and seeds" if seeds < 8 else "too few claims"
        assert found.verdict == (few or ("differs" if found.variant == "x" else "differs, but by less than the bound"))


def test_rates_of_0_and_100_get_an_exact_interval_in_place_of_an_empty_one():
    none = percentage_interval(crossed(np.zeros((1, 12))), trials=12)
    assert (none.low, none.method) == (0.0, "exact binomial")
    assert none.high == pytest.approx(100 * (1 - 0.025 ** (1 / 12)))
    every = percentage_interval(crossed(np.full((1, 3), 100.0)), trials=3)
    assert (every.low, every.high) == pytest.approx((100 * 0.025 ** (1 / 3), 100.0))
    assert percentage_interval(crossed(np.full((1, 3), 40.0)), trials=3).method == "none"


def test_an_interval_of_a_percentage_ends_at_0_and_100():
    own = percentage_interval(crossed(np.array([[0.0, 0.0, 10.0]])), trials=3)
    assert own.low == 0.0 and own.high == pytest.approx(10 / 3 * (1 + 4.3027), rel=1e-4)
    values = {"x": one_level(np.array([100.0, 100.0, 0.0])), "y": one_level(np.zeros(3))}
    (found,) = differences(lay_out(values, CLAIMS), "y", bound=5, bounded=True)
    assert found.interval.high == 100.0 and found.interval.low == pytest.approx(200 / 3 - 4.3027 * 100 / 3, rel=1e-4)


def eight_seeds(values_C: np.ndarray, rng: np.random.Generator) -> dict:
    return {s: one_level(values_C + rng.normal(size=12) * 0.01)[0] for s in range(8)}


def test_differences_their_verdicts_and_what_they_could_have_found():
    rng = np.random.default_rng(7)
    base_C = rng.normal(size=12) * 30
    values = {
        "far": eight_seeds(base_C + 40 + rng.normal(size=12), rng),
        "base": eight_seeds(base_C, rng),
        "same": eight_seeds(base_C + rng.normal(size=12) * 0.1, rng),
        "vague": eight_seeds(base_C + rng.normal(size=12) * 30, rng),
    }
    found = differences(lay_out(values, CLAIMS), "base", bound=5, bounded=False)
    assert [d.variant for d in found] == ["far", "same", "vague"]
    assert [d.verdict for d in found] == ["differs", "no effect beyond the bound", "inconclusive"]
    far, same, vague = found
    assert far.interval.low < far.interval.estimate < far.interval.high
    assert (far.p, far.p_holm) == (2 / 2**8, 3 * 2 / 2**8)
    assert same.equivalent and not vague.equivalent
    # t of 7 degrees of freedom: .975 and .8
    assert vague.smallest_detectable == pytest.approx((2.36462 + 0.89603) * vague.interval.standard_error, rel=1e-4)
    one_seed = {name: {0: by_seed[0]} for name, by_seed in values.items()}
    found = differences(lay_out(one_seed, CLAIMS), "base", bound=5, bounded=False)
    assert [d.verdict for d in found] == ["too few seeds"] * 3
    assert found[0].p == pytest.approx(2 / 2**12)  # of these models, over claims


def test_with_one_claim_questions_are_the_units_and_the_verdict_is_on_this_claim():
    def right(count: int) -> dict:
        return seeds_of_one_claim(np.tile(100.0 * (np.arange(20) < count), (8, 1)))

    layout = lay_out({"x": right(15), "y": right(5), "z": right(4)}, ["a"])
    x, z = differences(layout, "y", bound=5, bounded=True)
    assert layout.units == Units("questions", 20, 8) and list(x.by_claim) == ["a"]
    # ten of 20 questions differ by 100, in every seed alike
    assert x.interval.standard_error == pytest.approx(100 * (0.25 / 19) ** 0.5)
    assert (x.verdict, z.verdict) == ("differs on this claim", "inconclusive on this claim")
    assert x.by_claim["a"].low == x.interval.low


def test_all_against_nothing_has_exact_limits_and_the_p_of_a_sign_test():
    values = {"x": one_level(np.full(3, 100.0)), "y": one_level(np.zeros(3)), "z": one_level(np.zeros(3))}
    all_, nothing = differences(lay_out(values, CLAIMS), "z", bound=5, bounded=True)
    lowest = 100 * 0.025 ** (1 / 3)  # 29.2 of the one, 70.8 of the other
    assert (all_.interval.estimate, all_.p, all_.smallest_detectable) == (100.0, 0.25, None)
    assert (all_.interval.low, all_.interval.high) == pytest.approx((lowest - (100 - lowest), 100.0))
    assert (nothing.p, nothing.equivalent, nothing.verdict) == (1.0, False, "too few claims and seeds")
    assert (nothing.interval.low, nothing.interval.high) == pytest.approx((lowest - 100, 100 - lowest))


def test_one_question_of_one_claim_with_one_seed_tells_nothing():
    values = {"x": one_level(np.array([3.0])), "y": one_level(np.array([1.0]))}
    (found,) = differences(lay_out(values, CLAIMS), "y", bound=0.25, bounded=False)
    assert (found.interval.estimate, found.interval.method, found.p, found.equivalent) == (2.0, "none", 1.0, None)
    assert found.verdict == "too few questions and seeds"
