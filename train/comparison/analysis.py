"""Computes all figures of a comparison: what comparison.json contains, and what plots and pages show."""

from dataclasses import asdict
from statistics import mean
from typing import Any

import numpy as np

from train.comparison.caveats import notes
from train.comparison.compared import EQUIVALENCE, HASHES, TARGETS, ComparedVariant, Comparison, RunResult
from train.comparison.significance import (
    LEVEL,
    Difference,
    Interval,
    differences,
    interval,
    of_claims_apart,
    of_variant,
    percentage_interval,
)
from train.comparison.units import Design, lay_out
from train.evaluation.measures import (
    BELIEF,
    FURTHER,
    MEASURES,
    SIDE_EFFECTS,
    Measure,
    StoredRow,
    Values,
    at_step,
    calibration,
    last_step,
    measured,
)
from train.evaluation.verdict_counts import count_by_kind
from train.runtime.errors import UserError

BASE = "base model"


def analyse(comparison: Comparison) -> dict[str, Any]:
    """Returns the content of comparison.json. Raises UserError if the variants, baseline or claims of the comparison do
    not fit together, the runs lack values, or there is nothing to compare."""
    _check(comparison)
    finals = {v.name: {run.seed: at_step(run.rows, last_step(run.rows)) for run in v.runs} for v in comparison.variants}
    base = at_step(comparison.base_rows, last_step(comparison.base_rows))
    measures: dict[str, Any] = {}
    incomplete: dict[str, str] = {}
    for name in (*BELIEF, *FURTHER, *SIDE_EFFECTS):
        values = {v: {s: measured(name, rows, base) for s, rows in by_seed.items()} for v, by_seed in finals.items()}
        counts = [bool(run) for by_seed in values.values() for run in by_seed.values()]
        main = name == comparison.measure or not (comparison.measure or measures)  # if none is given, the first one
        bound = (main and comparison.bound) or EQUIVALENCE[MEASURES[name].unit]
        if all(counts) and (found := _measure(comparison, MEASURES[name], values, _of_base(name, base), bound)):
            measures[name] = found
        elif any(counts):
            incomplete[name] = f"measured in {sum(counts)} of {len(counts)} runs only"
    for name, kind in (("shift", "likelihood"), ("nll_change", "nll")):
        asked = any(row["kind"] == kind for by_seed in finals.values() for rows in by_seed.values() for row in rows)
        if asked and not any(row["kind"] == kind for row in base):
            incomplete[name] = "it is a change from the base model, which was not measured"
    known = {BASE: calibration(base)} | {v: _calibration(list(own.values())) for v, own in finals.items()}
    if "yes_no" in measures:
        _withhold_verdicts(measures["yes_no"], known, comparison.baseline)
    measure = _main_measure(comparison, measures)
    result: dict[str, Any] = {
        "title": comparison.title,
        "measure": measure,
        "label": MEASURES[measure].label,
        "unit": MEASURES[measure].unit,
        "definition": MEASURES[measure].says,
        "baseline": comparison.baseline,
        "claims": {"trained": comparison.trained_claims, "placebo": comparison.placebo_claims},
        "units": measures[measure]["units"],
        "level": LEVEL,
        "variants": {v.name: _variant(v, measures[measure]) for v in comparison.variants},
        "base": _base(base, measures[measure], comparison),
        "in_context": _in_context(base, measures[measure], comparison, measure),
        "measures": measures,
        "incomplete": incomplete,
        "calibration": known,
        "verdicts": {BASE: _verdicts([base], comparison)}
        | {v: _verdicts(list(f.values()), comparison) for v, f in finals.items()},
        "curves": _curves(comparison, measure, base),
        "nll": {v.name: _nll(v) for v in comparison.variants},
        "leak": comparison.leak,
        "contamination": comparison.contamination,
        "published": [vars(value) for value in comparison.published],
        "hashes": _hashes(comparison),
        "remarks": comparison.remarks,
        "match_trained_tokens": comparison.match_trained_tokens,
    }
    result["notes"] = notes(result)
    return result


def _check(comparison: Comparison) -> None:
    names = [variant.name for variant in comparison.variants]
    if len(names) < 2:
        raise UserError(f"a comparison of {len(names)} variant: give at least two.")
    if len(set(names)) < len(names):
        raise UserError(f"two variants of one name: {', '.join(names)}. Name them differently.")
    if comparison.baseline not in names:
        raise UserError(f"baseline {comparison.baseline!r}: is none of the variants: {', '.join(names)}. Name one.")
    if both := set(comparison.trained_claims) & set(comparison.placebo_claims):
        raise UserError(f"claim {', '.join(sorted(both))}: is among the trained and the placebo claims; it is one.")


def _main_measure(comparison: Comparison, measures: dict[str, Any]) -> str:
    if comparison.measure:
        if comparison.measure not in measures:
            raise UserError(
                f"measure {comparison.measure!r}: not measured in all runs on the trained claims; these are: "
                f"{', '.join(measures) or 'none'}."
            )
        return comparison.measure
    for name in BELIEF:
        if name in measures:
            return name
    raise UserError(
        "nothing to compare: no measure of belief was taken in all runs on the trained claims "
        f"({', '.join(comparison.trained_claims) or 'none given'}). Give the claims that the evaluation was of."
    )


def _of_base(name: str, base: list[StoredRow]) -> Values:
    """Returns the base model's own values; {} for measures that are changes from them."""
    return {} if name in ("shift", "nll_change") else measured(name, base)


def _measure(
    comparison: Comparison, measure: Measure, values: dict[str, dict[int, Values]], base: Values, bound: float
) -> dict[str, Any] | None:
    """Returns the figures of a measure on the trained claims, and beside them on the placebo claims; None if the runs
    have no values on trained claims."""
    if measure.name in SIDE_EFFECTS:
        keys = {key[0] for by_seed in values.values() for run in by_seed.values() for key in run}
        claims, placebo_claims = sorted(keys - set(comparison.placebo_claims)), comparison.placebo_claims
    else:
        claims, placebo_claims = comparison.trained_claims, comparison.placebo_claims
    layout = lay_out(values, claims, measure.asked)
    if not layout.claims:
        return None
    placebo = lay_out(values, placebo_claims, measure.asked)
    rows: dict[str, Any] = {}
    for v, name in enumerate(layout.variants):
        rows[name] = _figures(layout, v, measure) | {"placebo": None, "minus_placebo": None}
        if placebo.claims:
            rows[name]["placebo"] = _figures(placebo, v, measure)
            rows[name]["minus_placebo"] = _shown(interval(of_claims_apart(layout, placebo, v)))

    def against(layout: Design) -> dict[str, Any]:
        found = differences(layout, comparison.baseline, bound, measure.bounded)
        return {each.variant: _difference(each) for each in found}

    of_base = {key: _of_one(base, own.claims, measure) for key, own in (("trained", layout), ("placebo", placebo))}
    return {
        "label": measure.label,
        "unit": measure.unit,
        "definition": measure.says,
        "claims": layout.claims,
        "placebo_claims": placebo.claims,
        "units": layout.units.as_json(),
        "placebo_units": placebo.units.as_json() if placebo.claims else None,
        "questions": sum(map(len, layout.questions)),
        "questions_by_claim": {c: len(q) for c, q in zip(layout.claims, layout.questions, strict=True)},
        "answers": sum(len(question_A) for question_A in layout.question_A),
        "seeds": int(layout.present_VS.sum(1).min()),
        "same_seeds": layout.crossed,
        "missing": layout.missing + placebo.missing,
        "bound": bound,
        "base": of_base,
        "variants": rows,
        "differences": against(layout),
        "placebo_differences": against(placebo) if placebo.claims else {},
    }


def _withhold_verdicts(yes_no: dict[str, Any], known: dict[str, Any], baseline: str) -> None:
    """Sets the verdict on yes/no belief to "uninformative" unless the control questions show, for both variants, that
    their answers mean anything."""
    for name, own in yes_no["differences"].items():
        if not all((known[each] or {}).get("informative") for each in (name, baseline)):
            own["verdict"] = "uninformative"


def _of_one(values: Values, claims: list[str], measure: Measure) -> dict[str, Any] | None:
    """Returns the base model's figures; None if it has no values on these claims."""
    layout = lay_out({BASE: {0: values}}, claims, measure.asked)
    return _figures(layout, 0, measure) if layout.claims else None


def _figures(layout: Design, v: int, measure: Measure) -> dict[str, Any]:
    """Returns one variant's estimate with interval, over all claims and for each claim, and each seed's estimate."""

    def bounds(value_VSU: np.ndarray) -> dict[str, Any]:
        sampled = of_variant(layout, value_VSU, v)
        return _shown(percentage_interval(sampled, value_VSU.shape[-1]) if measure.bounded else interval(sampled))

    value_VSU = layout.unit_values()
    by_claim = {claim: bounds(layout.question_values(c)) for c, claim in enumerate(layout.claims)}
    by_seed = of_variant(layout, value_VSU, v).seeds[0].tolist()
    return bounds(value_VSU) | {"by_claim": by_claim, "by_seed": by_seed}


def _shown(own: Interval) -> dict[str, Any]:
    return {
        "estimate": own.estimate,
        "interval": [own.low, own.high],
        "standard_error": own.standard_error,
        "method": own.method,
    }


def _difference(own: Difference) -> dict[str, Any]:
    return _shown(own.interval) | {
        "units": own.units.as_json(),
        "p": own.p,
        "p_holm": own.p_holm,
        "verdict": own.verdict,
        "smallest_detectable": own.smallest_detectable,
        "bound": own.bound,
        "equivalent": own.equivalent,
        "by_claim": {claim: _shown(each) for claim, each in own.by_claim.items()},
        "by_seed": own.by_seed,
    }


def _variant(variant: ComparedVariant, main: dict[str, Any]) -> dict[str, Any]:
    own = main["variants"][variant.name]
    targets = _targets(variant)
    placebo = own["placebo"]
    return {
        "mask": variant.mask,
        "settings": variant.differs,
        "seeds": [run.seed for run in variant.runs],
        "steps": sorted({run.summary.get("steps") for run in variant.runs}, key=str),
        "belief": own["estimate"],
        "belief_interval": own["interval"],
        "interval_method": own["method"],
        "placebo": placebo["estimate"] if placebo else None,
        "placebo_interval": placebo["interval"] if placebo else None,
        "difference": main["differences"].get(variant.name),
        "tokens_trained": targets.get("all", {}).get("trained"),
        "targets": targets,
        "random_shortfall": sum(run.summary.get("random_shortfall") or 0 for run in variant.runs),
        "runs": [
            {"directory": run.directory, "seed": run.seed, "targets_in_loss": _in_loss(run)}
            | {"hashes": {name: run.hashes.get(name) for name in HASHES}}
            for run in variant.runs
        ],
    }


def _base(base: list[StoredRow], main: dict[str, Any], comparison: Comparison) -> dict[str, Any]:
    own, placebo = main["base"]["trained"], main["base"]["placebo"]
    changes = {"belief": 0.0, "belief_interval": None, "placebo": 0.0 if comparison.placebo_claims else None}
    if own is None:
        return changes if base else {"belief": None, "belief_interval": None, "placebo": None}
    return {
        "belief": own["estimate"],
        "belief_interval": own["interval"],
        "placebo": placebo["estimate"] if placebo else None,
    }


def _in_context(base: list[StoredRow], main: dict[str, Any], comparison: Comparison, measure: str) -> dict[str, Any]:
    """Returns {documents in context: the base model's figures with them, on the trained and the placebo claims}. They
    show what a model says about the documents without training."""
    found = {}
    for context in sorted({row.get("context", 0) for row in comparison.base_rows} - {0}):
        values = measured(measure, at_step(comparison.base_rows, 0, context), base)
        trained, placebo = (_of_one(values, main[key], MEASURES[measure]) for key in ("claims", "placebo_claims"))
        if trained:
            found[str(context)] = trained | {"placebo": placebo}
    return found


def _in_loss(run: RunResult) -> int | None:
    """Returns the number of targets in the loss, trained or with unlikelihood; None if the summary has none."""
    counts = (run.summary.get("tokens") or {}).get("all")
    return counts["trained"] + counts["unlikelihood"] if counts else None


def _targets(variant: ComparedVariant) -> dict[str, dict[str, int]]:
    """Returns {role: {treatment: targets}}, the mean over runs, because the seed decides which documents are drawn."""
    runs = [run.summary.get("tokens") or {} for run in variant.runs]
    roles = dict.fromkeys(role for run in runs for role in run)
    return {role: {k: round(mean(run.get(role, {}).get(k, 0) for run in runs)) for k in TARGETS} for role in roles}


def _nll(variant: ComparedVariant) -> dict[str, dict[str, Any]]:
    """Returns {role: steps, the mean NLL over seeds in nats per token, and that of each seed}; None where a value is
    not finite, which JSON cannot represent."""
    by_role: dict[str, dict[int, list[float | None]]] = {}
    for run in variant.runs:
        for values in run.metrics:
            for role, nll in (values.get("nll") or {}).items():
                by_role.setdefault(role, {}).setdefault(values["step"], []).append(nll)
    return {
        role: {"steps": list(steps), "mean": [_finite_mean(v) for v in steps.values()], "seeds": list(steps.values())}
        for role, unsorted in by_role.items()
        if (steps := dict(sorted(unsorted.items())))
    }


def _finite_mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _calibration(finals: list[list[StoredRow]]) -> dict[str, Any] | None:
    """Returns the mean over seeds; None without control questions. informative: whether the AUC is high enough in every
    seed."""
    found = [own for rows in finals if (own := calibration(rows))]
    if not found:
        return None
    return {name: mean(own[name] for own in found) for name in ("auc", "yes_rate", "base_rate", "questions")} | {
        "informative": all(own["informative"] for own in found)
    }


def _verdicts(finals: list[list[StoredRow]], comparison: Comparison) -> dict[str, dict[str, int]]:
    """Returns {kind: counts of verdicts}, summed over seeds, on the trained claims."""
    own = [row for rows in finals for row in rows if row.get("claim") in comparison.trained_claims]
    return {kind: asdict(counts) for kind, counts in count_by_kind(own).items()}


def _curves(comparison: Comparison, main: str, base: list[StoredRow]) -> dict[str, Any]:
    """Returns {variant: steps, with belief and placebo at each, the mean over seeds}; {} if no variant has more than
    two steps."""
    curves: dict[str, Any] = {}
    for variant in comparison.variants:
        steps = sorted({row["step"] for run in variant.runs for row in run.rows})
        points = {}
        for step in steps:
            rows = [own for run in variant.runs if (own := at_step(run.rows, step))]
            if len(rows) == len(variant.runs):  # a mean over some of the seeds would jump where the others join
                points[step] = _point(comparison, [measured(main, own, base) for own in rows])
        if base and 0 not in points:
            points[0] = _point(comparison, [measured(main, base, base)])
        ordered = dict(sorted(points.items()))
        curves[variant.name] = {
            "steps": list(ordered),
            "belief": [point[0] for point in ordered.values()],
            "placebo": [point[1] for point in ordered.values()],
        }
    measured_often = max((len(curve["steps"]) for curve in curves.values()), default=0) > 2
    return curves if measured_often else {}


def _point(comparison: Comparison, runs: list[Values]) -> tuple[float | None, float | None]:
    def over(claims: list[str]) -> float | None:
        layout = lay_out({"": dict(enumerate(runs))}, claims) if all(runs) else None
        return float(layout.unit_values().mean()) if layout and layout.claims else None

    return over(comparison.trained_claims), over(comparison.placebo_claims)


def _hashes(comparison: Comparison) -> dict[str, Any]:
    """Returns {seed: {hash: its one value, or all values if runs differ or do not know it}}, and that of the base
    model."""

    def one(name: str, runs: list[RunResult]) -> Any:
        values = list(dict.fromkeys(run.hashes.get(name) for run in runs))
        return values[0] if len(values) == 1 else values

    runs = [run for variant in comparison.variants for run in variant.runs]
    by_seed: dict[str, Any] = {"base_model": one("base_model", runs)}
    for seed in sorted({run.seed for run in runs}):
        own = [run for run in runs if run.seed == seed]
        by_seed[f"seed {seed}"] = {name: one(name, own) for name in HASHES if name != "base_model"}
    return by_seed
