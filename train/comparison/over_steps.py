"""Computes belief over training: a measure at each step at which it was taken, with intervals like those of the end.

Likelihoods are measured in training (--evaluate-every, --evaluate-at); answers are judged at steps whose adapter was
kept (--adapters-at, launch.evaluate_runs --kept-steps). So one measure may have other steps than another.
"""

from train.comparison.compared import ComparedVariant, Comparison
from train.comparison.result import BeliefCurve, MeasureResult
from train.comparison.significance import Interval, estimated_mean
from train.comparison.units import lay_out
from train.evaluation.measures import StoredRow, Values, at_step, measured

RowsByStep = dict[str, dict[int, dict[int, list[StoredRow]]]]
"""{variant: {step: {seed: rows}}}, without documents in context. Step 0 is the base model, whatever the seed."""


def rows_by_step(comparison: Comparison, base: list[StoredRow]) -> RowsByStep:
    """Returns the rows of every variant by step. base: the base model's, of one step."""
    return {variant.name: ({0: {0: base}} if base else {}) | _of_variant(variant) for variant in comparison.variants}


def _of_variant(variant: ComparedVariant) -> dict[int, dict[int, list[StoredRow]]]:
    found: dict[int, dict[int, list[StoredRow]]] = {}
    for run in variant.runs:
        for row in run.rows:
            if row["step"] > 0 and not row.get("context"):
                found.setdefault(row["step"], {}).setdefault(run.seed, []).append(row)
    whole = {step: by_seed for step, by_seed in found.items() if len(by_seed) == len(variant.runs)}
    return {step: {s: at_step(rows, step) for s, rows in whole[step].items()} for step in sorted(whole)}


def curves(own: MeasureResult, rows: RowsByStep, base: list[StoredRow]) -> dict[str, BeliefCurve]:
    """Returns {variant: its curve in a measure}; {} if no variant has more than two steps."""
    found = {name: _curve(own, by_step, base) for name, by_step in rows.items()}
    return found if any(len(curve.steps) > 2 for curve in found.values()) else {}


def _curve(own: MeasureResult, by_step: dict[int, dict[int, list[StoredRow]]], base: list[StoredRow]) -> BeliefCurve:
    """Returns a variant's curve: the steps at which every run has values on every trained claim. A mean over some of
    the seeds or claims would jump where the others join."""
    name, claims = own.measure.name, {*own.claims, *own.placebo_claims}
    taken = {
        step: runs
        for step, by_seed in by_step.items()
        if any((runs := {seed: measured(name, rows, base) for seed, rows in by_seed.items()}).values())
    }
    last = max(taken, default=0)
    wanted = {key for values in taken.get(last, {}).values() for key in values if key[0] in claims}
    earlier = [values for step, runs in taken.items() if step < last for values in runs.values()]
    trained = {step: found for step, runs in taken.items() if (found := _estimate(own, runs, own.claims))}
    placebo = [_estimate(own, taken[step], own.placebo_claims) for step in trained]
    return BeliefCurve(
        list(trained), list(trained.values()), placebo, sum(len(wanted - values.keys()) for values in earlier)
    )


def _estimate(own: MeasureResult, runs: dict[int, Values], claims: list[str]) -> Interval | None:
    """Returns the mean over claims and seeds with its interval; None if a run lacks a claim."""
    if not claims or not all({*claims} <= {claim for claim, *_ in values} for values in runs.values()):
        return None
    layout = lay_out({"": runs}, claims, own.measure.asked)
    return estimated_mean(layout, layout.unit_values(), 0, own.measure.bounded)
