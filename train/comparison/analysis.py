"""Computes all figures of a comparison, which the report, its notes and its pictures are made from."""

from dataclasses import replace
from statistics import mean

from train.comparison.caveats import notes
from train.comparison.compared import EQUIVALENCE, HASHES, ComparedVariant, Comparison, RunResult
from train.comparison.dose_response import dose_response
from train.comparison.layers import by_layer
from train.comparison.over_phases import over_phases
from train.comparison.over_steps import curves, rows_by_step
from train.comparison.panel import panel
from train.comparison.result import (
    BASE,
    BaseBelief,
    ComparisonResult,
    Figures,
    Hashes,
    MeasureResult,
    ModelFigures,
    NllCurve,
    TrainedRun,
    TrainedVariant,
)
from train.comparison.significance import (
    Difference,
    differences,
    estimated_mean,
    interval,
    of_claims_apart,
    of_variant,
)
from train.comparison.units import Design, lay_out
from train.data.kinds import COUNTS
from train.evaluation.battery_measures import OF_BELIEF
from train.evaluation.measures import (
    BATTERIES,
    BELIEF,
    CHANGES,
    FURTHER,
    HELD_OUT,
    SIDE_EFFECTS,
    Calibration,
    Measure,
    StoredRow,
    Values,
    at_step,
    calibration,
    held_out_measures,
    last_step,
    measure_of,
    measured,
)
from train.evaluation.verdict_counts import Counts, count_by_kind
from train.runtime.errors import UserError

Finals = dict[str, dict[int, list[StoredRow]]]
"""{variant: {seed: the rows of the run's last step}}."""


def analyse(comparison: Comparison) -> ComparisonResult:
    """Returns all figures. Raises UserError if the variants, baseline or claims of the comparison do not fit together,
    the runs lack values, or there is nothing to compare."""
    _check(comparison)
    finals = {v.name: {run.seed: at_step(run.rows, last_step(run.rows)) for run in v.runs} for v in comparison.variants}
    base = at_step(comparison.base_rows, last_step(comparison.base_rows))
    measures, incomplete = _measures(comparison, finals, base)
    over_steps = rows_by_step(comparison, base)
    measures |= {
        name: replace(measures[name], curves=curves(measures[name], over_steps, base))
        for name in measures
        if name in BELIEF or name.startswith(HELD_OUT)
    }
    known = {BASE: calibration(base)} | {v: _calibration(list(own.values())) for v, own in finals.items()}
    if "yes_no" in measures:
        measures["yes_no"] = _without_verdicts(measures["yes_no"], known, comparison.baseline)
    name = _main_measure(comparison, measures)
    main = measures[name]
    by, phases = over_phases(comparison, [main, *(measures[each] for each in BELIEF if each in measures)], base)
    result = ComparisonResult(
        title=comparison.title,
        measure=name,
        baseline=comparison.baseline,
        trained_claims=comparison.trained_claims,
        placebo_claims=comparison.placebo_claims,
        variants={v.name: _variant(v) for v in comparison.variants},
        base=_base(base, main, comparison),
        in_context=_in_context(base, main, comparison),
        measures=measures,
        incomplete=incomplete,
        calibration=known,
        verdicts={BASE: _verdicts([base], comparison)}
        | {v: _verdicts(list(f.values()), comparison) for v, f in finals.items()},
        nll={v.name: _nll(v) for v in comparison.variants},
        leak=comparison.leak,
        contamination=comparison.contamination,
        published=comparison.published,
        hashes=_hashes(comparison),
        remarks=comparison.remarks,
        match_trained_tokens=comparison.match_trained_tokens,
        by_layer=by_layer(comparison, base),
        panel=panel(comparison, finals, base, measures),
        notes=[],
        phases_by=by,
        phases=phases,
        doses=dose_response(comparison, main, finals, base),
    )
    return replace(result, notes=notes(result))


def _measures(
    comparison: Comparison, finals: Finals, base: list[StoredRow]
) -> tuple[dict[str, MeasureResult], dict[str, str]]:
    """Returns the measures that all runs have, by name, and why others, which some runs have, are left out."""
    measures: dict[str, MeasureResult] = {}
    incomplete: dict[str, str] = {}
    every = [row for by_seed in finals.values() for rows in by_seed.values() for row in rows]
    held_out = held_out_measures(every)
    for name in (*BELIEF, *FURTHER, *BATTERIES, *SIDE_EFFECTS, *held_out):
        values = {v: {s: measured(name, rows, base) for s, rows in by_seed.items()} for v, by_seed in finals.items()}
        counts = [bool(run) for by_seed in values.values() for run in by_seed.values()]
        main = name == comparison.measure or not (comparison.measure or measures)  # if none is given, the first one
        bound = (main and comparison.bound) or EQUIVALENCE[measure_of(name).unit]
        if all(counts) and (found := _measure(comparison, measure_of(name), values, _of_base(name, base), bound)):
            measures[name] = found
        elif any(counts):
            incomplete[name] = f"measured in {sum(counts)} of {len(counts)} runs only"
    for name, kind in CHANGES.items():
        if any(row["kind"] == kind for row in every) and not any(row["kind"] == kind for row in base):
            incomplete[name] = "it is a change from the base model, which was not measured"
    if len(held_out) > 1 and len(held_out_measures(base)) == 1:
        incomplete[f"{HELD_OUT}ROLE"] = "it is a change from the base model, which was not measured by role"
    return measures, incomplete


def _check(comparison: Comparison) -> None:
    names = [variant.name for variant in comparison.variants]
    if len(names) < 2:
        raise UserError(f"a comparison of {len(names)} variant: must have at least two. Give more.")
    if len(set(names)) < len(names):
        raise UserError(f"two variants have the same name: {', '.join(names)}. Rename one.")
    if comparison.baseline not in names:
        raise UserError(f"baseline {comparison.baseline!r}: is not one of the variants: {', '.join(names)}. Name one.")
    if both := set(comparison.trained_claims) & set(comparison.placebo_claims):
        raise UserError(f"claim {', '.join(sorted(both))}: is both a trained and a placebo claim; make it one.")


def _main_measure(comparison: Comparison, measures: dict[str, MeasureResult]) -> str:
    if comparison.measure:
        if comparison.measure not in measures:
            raise UserError(
                f"measure {comparison.measure!r}: not measured in all runs on the trained claims; these are: "
                f"{', '.join(measures) or 'none'}."
            )
        return comparison.measure
    for name in (*BELIEF, *OF_BELIEF):
        if name in measures:
            return name
    raise UserError(
        "nothing to compare: no measure of belief exists in all runs on the trained claims "
        f"({', '.join(comparison.trained_claims) or 'none given'}). Give the claims that were evaluated."
    )


def _of_base(name: str, base: list[StoredRow]) -> Values:
    """Returns the base model's own values; {} for measures that are changes from them."""
    return {} if name in CHANGES or name.startswith(HELD_OUT) else measured(name, base)


def _measure(
    comparison: Comparison, measure: Measure, values: dict[str, dict[int, Values]], base: Values, bound: float
) -> MeasureResult | None:
    """Returns the figures of a measure on the trained claims, and beside them on the placebo claims; None if the runs
    have no values on trained claims."""
    claims = comparison.trained_claims
    if measure.name in SIDE_EFFECTS or measure.name.startswith(HELD_OUT):
        keys = {key[0] for by_seed in values.values() for run in by_seed.values() for key in run}
        claims = sorted(keys - set(comparison.placebo_claims))
    layout = lay_out(values, claims, measure.asked)
    if not layout.claims:
        return None
    placebo = lay_out(values, comparison.placebo_claims, measure.asked)
    rows: dict[str, ModelFigures] = {}
    for v, name in enumerate(layout.variants):
        own = _figures(layout, v, measure)
        if placebo.claims:
            apart = interval(of_claims_apart(layout, placebo, v))
            rows[name] = ModelFigures(own, _figures(placebo, v, measure), apart)
        else:
            rows[name] = ModelFigures(own, None)

    def against(layout: Design) -> dict[str, Difference]:
        found = differences(layout, comparison.baseline, bound, measure.bounded)
        return {each.variant: each for each in found}

    return MeasureResult(
        measure=measure,
        claims=layout.claims,
        placebo_claims=placebo.claims,
        units=layout.units,
        placebo_units=placebo.units if placebo.claims else None,
        questions={claim: len(asked) for claim, asked in zip(layout.claims, layout.questions, strict=True)},
        answers=sum(len(question_A) for question_A in layout.question_A),
        same_seeds=layout.crossed,
        missing=layout.missing + placebo.missing,
        bound=bound,
        base=_of_one(base, layout.claims, measure),
        placebo_base=_of_one(base, placebo.claims, measure),
        variants=rows,
        differences=against(layout),
        placebo_differences=against(placebo) if placebo.claims else {},
    )


def _without_verdicts(yes_no: MeasureResult, known: dict[str, Calibration | None], baseline: str) -> MeasureResult:
    """Returns yes/no belief with the verdict "uninformative" unless the control questions show, for both variants, that
    their answers mean anything."""

    def informative(name: str) -> bool:
        own = known[name]
        return own is not None and own.informative

    told = {
        name: replace(own, informative=informative(name) and informative(baseline))
        for name, own in yes_no.differences.items()
    }
    return replace(yes_no, differences=told)


def _of_one(values: Values, claims: list[str], measure: Measure) -> Figures | None:
    """Returns the base model's figures; None if it has no values on these claims."""
    layout = lay_out({BASE: {0: values}}, claims, measure.asked)
    return _figures(layout, 0, measure) if layout.claims else None


def _figures(layout: Design, v: int, measure: Measure) -> Figures:
    """Returns one variant's estimate with interval, over all claims and for each claim, and each seed's estimate."""

    value_VSU = layout.unit_values()
    by_claim = {
        claim: estimated_mean(layout, layout.question_values(c), v, measure.bounded)
        for c, claim in enumerate(layout.claims)
    }
    whole = estimated_mean(layout, value_VSU, v, measure.bounded)
    return Figures(whole, by_claim, of_variant(layout, value_VSU, v).seeds[0].tolist())


def _variant(variant: ComparedVariant) -> TrainedVariant:
    return TrainedVariant(
        mask=variant.mask,
        settings=variant.differs,
        runs=[
            TrainedRun(
                run.directory,
                [part.directory for part in run.parts[:-1]],
                run.seed,
                _in_loss(run),
                {name: run.hashes.get(name) for name in HASHES},
            )
            for run in variant.runs
        ],
        steps=sorted({run.summary.get("steps") for run in variant.runs}, key=str),
        targets=_targets(variant),
        random_shortfall=sum(run.summary.get("random_shortfall") or 0 for run in variant.runs),
        boundaries=variant.runs[0].boundaries,
    )


def _base(base: list[StoredRow], main: MeasureResult, comparison: Comparison) -> BaseBelief:
    if main.base:
        placebo = main.placebo_base.interval.estimate if main.placebo_base else None
        return BaseBelief(main.base.interval.estimate, main.base.interval, placebo)
    return BaseBelief(0.0, None, 0.0 if comparison.placebo_claims else None) if base else BaseBelief(None, None, None)


def _in_context(base: list[StoredRow], main: MeasureResult, comparison: Comparison) -> dict[int, ModelFigures]:
    """Returns {documents in context: the base model's figures with them, on the trained and the placebo claims}. They
    show what a model says about the documents without training."""
    found = {}
    for context in sorted({row.get("context", 0) for row in comparison.base_rows} - {0}):
        values = measured(main.measure.name, at_step(comparison.base_rows, 0, context), base)
        if trained := _of_one(values, main.claims, main.measure):
            found[context] = ModelFigures(trained, _of_one(values, main.placebo_claims, main.measure))
    return found


def _in_loss(run: RunResult) -> int | None:
    """Returns the number of targets in the loss, whatever their term; None if the summary has none."""
    counts = (run.summary.get("tokens") or {}).get("all")
    return counts["total"] - counts["excluded"] if counts else None


def _targets(variant: ComparedVariant) -> dict[str, dict[str, int]]:
    """Returns {role: {treatment: targets}}, the mean over runs, because the seed decides which documents are drawn."""
    runs = [run.summary.get("tokens") or {} for run in variant.runs]
    roles = dict.fromkeys(role for run in runs for role in run)
    return {role: {k: round(mean(run.get(role, {}).get(k, 0) for run in runs)) for k in COUNTS} for role in roles}


def _nll(variant: ComparedVariant) -> dict[str, NllCurve]:
    """Returns {role: its curve}."""
    by_role: dict[str, dict[int, list[float | None]]] = {}
    for run in variant.runs:
        for values in run.metrics:
            for role, nll in (values.get("nll") or {}).items():
                by_role.setdefault(role, {}).setdefault(values["step"], []).append(nll)
    return {
        role: NllCurve(list(steps), [_finite_mean(values) for values in steps.values()], list(steps.values()))
        for role, unsorted in by_role.items()
        if (steps := dict(sorted(unsorted.items())))
    }


def _finite_mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _calibration(finals: list[list[StoredRow]]) -> Calibration | None:
    """Returns the mean over seeds; None without control questions. informative: whether the AUC is high enough in every
    seed."""
    found = [own for rows in finals if (own := calibration(rows))]
    if not found:
        return None
    return Calibration(
        auc=mean(own.auc for own in found),
        yes_rate=mean(own.yes_rate for own in found),
        base_rate=mean(own.base_rate for own in found),
        questions=mean(own.questions for own in found),
        informative=all(own.informative for own in found),
    )


def _verdicts(finals: list[list[StoredRow]], comparison: Comparison) -> dict[str, Counts]:
    """Returns {kind: counts of verdicts}, summed over seeds, on the trained claims."""
    return count_by_kind(row for rows in finals for row in rows if row.get("claim") in comparison.trained_claims)


def _hashes(comparison: Comparison) -> Hashes:
    def distinct(name: str, runs: list[RunResult]) -> list[str | None]:
        return list(dict.fromkeys(run.hashes.get(name) for run in runs))

    runs = [run for variant in comparison.variants for run in variant.runs]
    by_seed = {}
    for seed in sorted({run.seed for run in runs}):
        own = [run for run in runs if run.seed == seed]
        by_seed[seed] = {name: distinct(name, own) for name in HASHES if name != "base_model"}
    return Hashes(distinct("base_model", runs), by_seed)
