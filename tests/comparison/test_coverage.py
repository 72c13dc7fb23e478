"""By simulation: how often 95 % intervals hold the truth, and how often a difference of 0 is said to differ."""

import itertools

import numpy as np
import pytest

from tests.comparison.coverage import MIXTURES, QUESTIONS, TAILS, cell, gaps
from train.comparison.significance import crossed, differences
from train.comparison.units import lay_out

MANY = (8, 10, 12)


def verdicts(table_SU: np.ndarray, one_claim: bool = False) -> tuple[str, float]:
    """Of a report on these differences: verdict and p."""
    seeds, units = table_SU.shape
    keys = [("a", f"{u:02}", 0) if one_claim else (f"{u:02}", "q", 0) for u in range(units)]
    shared_U = np.random.default_rng(0).normal(0, 100, units)  # of both variants: drops out
    values = {
        name: {s: dict(zip(keys, (sign * table_SU[s] + shared_U).tolist(), strict=True)) for s in range(seeds)}
        for name, sign in (("x", 1.0), ("y", 0.0))
    }
    claims = ["a"] if one_claim else [key[0] for key in keys]
    (found,) = differences(lay_out(values, claims), "y", bound=1e-6, bounded=False)
    return found.verdict, found.p


@pytest.mark.slow
@pytest.mark.parametrize("of", ["claims", "questions of one claim"])
def test_at_5_percent_no_more_than_6_of_100_differences_of_0_are_said_to_differ(of):
    one_claim = of != "claims"
    rows = []
    for seeds, units in itertools.product(MANY, MANY):
        claims, questions = (1, units) if one_claim else (units, QUESTIONS)
        own = cell(seeds, claims, questions, 600, bootstrap=False)
        rows += own
        assert np.mean([row["differs"] for row in own]) <= 0.06
    for shape in itertools.product(TAILS, MIXTURES):
        own = [row for row in rows if (row["tails"], row["mixture"]) == shape]
        assert len(own) == 9 and np.mean([row["differs"] for row in own]) <= 0.06, shape
    assert max(row["differs"] for row in rows) > 0  # some are


@pytest.mark.slow
@pytest.mark.parametrize(("units", "seeds"), [(8, 1), (12, 1), (1, 8), (1, 12), (8, 8), (8, 12), (12, 8), (12, 12)])
def test_from_8_units_on_95_of_100_intervals_hold_the_truth_and_p_is_below_05_in_no_more_than_6(units, seeds):
    rows = cell(seeds, units, QUESTIONS if units > 1 else 1, 1500)
    held = [row["held"] for row in rows]
    assert np.mean(held) >= 0.94 and min(held) >= 0.92
    assert np.mean([row["p"] for row in rows]) <= 0.05 and max(row["p"] for row in rows) <= 0.065  # of 20 shapes
    assert np.nanmean([row["bootstrap_held"] for row in rows]) < 0.93


@pytest.mark.parametrize(("units", "seeds"), [(2, 1), (3, 1), (5, 1), (7, 1), (1, 3), (3, 3), (12, 3), (5, 7)])
def test_below_8_units_intervals_by_t_hold_the_truth_too_where_percentiles_of_a_bootstrap_do_not(units, seeds):
    rows = [row for row in cell(seeds, units, QUESTIONS if units > 1 else 1, 500) if row["tails"] == "normal"]
    assert min(row["held"] for row in rows) >= 0.93
    assert min(row["bootstrap_held"] for row in rows) < 0.89
    assert max(row["p"] for row in rows) <= 0.065 and all(row["differs"] == 0 for row in rows)


def test_below_8_units_there_is_no_verdict_whatever_the_difference():
    for seeds, units in itertools.product(range(1, 13), range(1, 13)):
        table_SU = 90 + np.random.default_rng([seeds, units]).normal(size=(seeds, units))
        for one_claim in (False, True):
            of = "questions" if one_claim or units == 1 else "claims"
            here = " on this claim" if of == "questions" else ""
            lacking = [*[of] * (units < 8), *["seeds"] * (seeds < 8)]
            few = f"too few {' and '.join(lacking)}" if lacking else f"differs{here}"
            verdict, p = verdicts(table_SU, one_claim)
            assert verdict == few
            assert p >= max(
                min(1.0, 2 / 2**n) for n in ((units, seeds) if min(units, seeds) > 1 else (max(units, seeds),))
            )


def test_what_is_simulated_is_what_reports_say():
    said = []
    for number, (tails, mixture) in enumerate(itertools.product(TAILS, MIXTURES)):
        (table_SU,) = gaps(np.random.default_rng(number), tails, mixture, 1, 8, 9, QUESTIONS)
        for shift in (0.0, 1.0):
            verdict, p = verdicts(table_SU + shift)
            assert p == pytest.approx(float(crossed(table_SU + shift).p()))
            assert (verdict == "differs") == (p < 0.05)
            said.append(verdict)
    assert {*said} == {"differs", "inconclusive"}


def test_a_difference_of_twice_what_claims_and_seeds_vary_by_is_found():
    table_NSU = gaps(np.random.default_rng(1), "normal", "answers", 500, 8, 8, 1)
    seeds_NS1 = np.random.default_rng(2).normal(size=(500, 8, 1))
    assert (crossed(2 + table_NSU + seeds_NS1).p() < 0.05).mean() >= 0.95
