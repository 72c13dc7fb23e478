"""What a comparison found, from which the report, its notes and its pictures are made, and its form in comparison.json.

Estimates and bounds are in the unit of their measure: %, nats or points of 10. Dictionaries by variant are in the order
in which variants are shown; "base model" stands for the model before training.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from train.comparison.compared import Mentions, Published, SearchedDocuments
from train.comparison.dose_response import DoseResponse
from train.comparison.layers import ByLayer
from train.comparison.over_phases import PhaseBelief
from train.comparison.significance import LEVEL, Difference, Interval
from train.comparison.units import Units
from train.evaluation.measures import BELIEF, HELD_OUT, Calibration, Measure
from train.evaluation.verdict_counts import Counts

if TYPE_CHECKING:  # it imports these classes
    from train.comparison.panel import Panel

BASE = "base model"


@dataclass(frozen=True)
class Figures:
    """One model's estimate of a measure on a set of claims.

    interval: the mean over claims and seeds, with its interval.
    by_claim: the same of each claim alone, over its questions.
    by_seed: the mean of each seed, in the order of the seeds.
    """

    interval: Interval
    by_claim: dict[str, Interval]
    by_seed: list[float]


@dataclass(frozen=True)
class ModelFigures:
    """One model's figures on the trained claims and, beside them, on the placebo claims.

    placebo: None if no placebo claim was measured.
    minus_placebo: the trained claims minus the placebo claims; None without these, and for models in context.
    """

    trained: Figures
    placebo: Figures | None
    minus_placebo: Interval | None = None


@dataclass(frozen=True)
class BeliefCurve:
    """A measure at each step at which all runs have it, with intervals; step 0 is the base model.

    placebo: None at steps at which not every placebo claim was measured.
    missing: how many values earlier steps lack that the last one has.
    """

    steps: list[int]
    trained: list[Interval]
    placebo: list[Interval | None]
    missing: int


@dataclass(frozen=True)
class MeasureResult:
    """A measure in all runs.

    claims, placebo_claims: those that have values. Side effects are on all claims that are no placebo.
    units: what the figures rest on; placebo_units: what those on placebo claims do, None if there are none.
    questions: the number of questions by claim; answers: how many a run has, over all claims.
    same_seeds: whether all variants have the same seeds, so that differences are paired by seed.
    missing: how many values some runs lack and others have.
    bound: the largest difference that is "no effect".
    base, placebo_base: of the base model; None if it was not measured, or the measure is a change from it.
    differences: each other variant minus the baseline; placebo_differences: on the placebo claims, {} without these.
    curves: over training, by variant; {} if it was taken at two steps or fewer, or is a measure neither of belief nor
        of held-out text by role.
    """

    measure: Measure
    claims: list[str]
    placebo_claims: list[str]
    units: Units
    placebo_units: Units | None
    questions: dict[str, int]
    answers: int
    same_seeds: bool
    missing: int
    bound: float
    base: Figures | None
    placebo_base: Figures | None
    variants: dict[str, ModelFigures]
    differences: dict[str, Difference]
    placebo_differences: dict[str, Difference]
    curves: dict[str, BeliefCurve] = field(default_factory=dict)

    @property
    def all_questions(self) -> int:
        """The number of questions over all claims."""
        return sum(self.questions.values())


@dataclass(frozen=True)
class BaseBelief:
    """The base model in the main measure: 0, without an interval, if the measure is a change from it; None if it was
    not measured. placebo: also None if there is no placebo claim."""

    belief: float | None
    interval: Interval | None
    placebo: float | None


@dataclass(frozen=True)
class TrainedRun:
    """One run. before: the directories of its phases but the last. targets_in_loss: whatever their term, None if its
    summary does not say. hashes: SHA-256 by name, None where not known."""

    directory: str
    before: list[str]
    seed: int
    targets_in_loss: int | None
    hashes: dict[str, str | None]


@dataclass(frozen=True)
class TrainedVariant:
    """What a variant was trained on.

    settings: those in which variants differ, with its values.
    steps: the numbers of optimizer steps of its runs, each once; None for a run whose summary does not say.
    targets: role -> treatment -> number of targets over the whole run, the mean over runs; {} if not known.
    random_shortfall: targets, over all runs, for which random: found no place.
    boundaries: the steps at which its phases but the last end; [] if it is trained in one.
    """

    mask: str
    settings: dict[str, Any]
    runs: list[TrainedRun]
    steps: list[int | None]
    targets: dict[str, dict[str, int]]
    random_shortfall: int
    boundaries: list[int] = field(default_factory=list)

    @property
    def tokens_trained(self) -> int | None:
        """The number of targets trained, the mean over runs; None if not known."""
        return self.targets.get("all", {}).get("trained")


@dataclass(frozen=True)
class NllCurve:
    """A role's NLL in nats per token at each step: that of each seed (one list per step), and their mean. None where a
    value is not finite."""

    steps: list[int]
    mean: list[float | None]
    seeds: list[list[float | None]]


@dataclass(frozen=True)
class Hashes:
    """The distinct values of each hash among the runs, None for a run that does not know it: of a single value, all
    runs have it. base_model: over all runs; by_seed: seed -> name -> values, over the runs with that seed."""

    base_model: list[str | None]
    by_seed: dict[int, dict[str, list[str | None]]]


@dataclass(frozen=True)
class ComparisonResult:
    """All that a report says.

    measure: the name of the main measure, which "belief" stands for. trained_claims, placebo_claims: as given.
    in_context: the base model's figures in the main measure, by the number of documents in context.
    measures: by name, the measures that all runs have; incomplete: by name, why others are left out.
    calibration: on the control questions, the mean over seeds, by model; None if a model was not asked any.
    verdicts: model -> kind of question -> counts, on the trained claims, over all seeds.
    nll: variant -> role -> curve.
    leak, contamination, published, remarks, match_trained_tokens: as given in the Comparison.
    by_layer: belief by decoder layer; None if not all runs were measured so.
    panel: belief, association and damage by the batteries; None if none was measured.
    phases: variant -> what each of its phases changed in the measure phases_by, which is the main one if that was taken
        at the end of each; {} if no variant has several.
    doses: dose–response curves in the main measure; None if the variants are not doses.
    notes: the caveats, which a reader must know before believing the figures, the most important first.
    """

    title: str
    measure: str
    baseline: str
    trained_claims: list[str]
    placebo_claims: list[str]
    variants: dict[str, TrainedVariant]
    base: BaseBelief
    in_context: dict[int, ModelFigures]
    measures: dict[str, MeasureResult]
    incomplete: dict[str, str]
    calibration: dict[str, Calibration | None]
    verdicts: dict[str, dict[str, Counts]]
    nll: dict[str, dict[str, NllCurve]]
    leak: list[Mentions]
    contamination: list[SearchedDocuments]
    published: list[Published]
    hashes: Hashes
    remarks: list[str]
    match_trained_tokens: bool
    by_layer: ByLayer | None
    panel: "Panel | None"
    notes: list[str]
    phases_by: str = ""
    phases: dict[str, list[PhaseBelief]] = field(default_factory=dict)
    doses: DoseResponse | None = None

    @property
    def main(self) -> MeasureResult:
        """The main measure."""
        return self.measures[self.measure]

    @property
    def over_steps(self) -> list[MeasureResult]:
        """The measures that are shown over training: the main one and, beside judged belief, the first that is scored
        by likelihood; those of them that have curves."""
        scored = [name for name in BELIEF if name in self.measures and name != "rate"]
        shown = [self.measure, *scored[:1]] if self.measure == "rate" else [self.measure]
        return [self.measures[name] for name in shown if self.measures[name].curves]

    @property
    def held_out(self) -> dict[str, MeasureResult]:
        """Role -> the change of its NLL in held-out text, also of all and of unspanned tokens, as far as measured."""
        return {name.removeprefix(HELD_OUT): own for name, own in self.measures.items() if name.startswith(HELD_OUT)}

    @property
    def unit(self) -> str:
        """The unit of the main measure."""
        return self.main.measure.unit


def as_json(result: ComparisonResult) -> dict[str, Any]:
    """Returns the content of comparison.json."""
    main, base = result.main, result.base
    return {
        "title": result.title,
        "measure": result.measure,
        "label": main.measure.label,
        "unit": main.measure.unit,
        "definition": main.measure.says,
        "baseline": result.baseline,
        "claims": {"trained": result.trained_claims, "placebo": result.placebo_claims},
        "units": main.units.as_json(),
        "level": LEVEL,
        "variants": {name: _variant(own, main, name) for name, own in result.variants.items()},
        "base": {"belief": base.belief, "belief_interval": _bounds(base.interval), "placebo": base.placebo},
        "in_context": {
            str(context): _figures(own.trained) | {"placebo": own.placebo and _figures(own.placebo)}
            for context, own in result.in_context.items()
        },
        "measures": {name: _measure(own) for name, own in result.measures.items()},
        "incomplete": result.incomplete,
        "calibration": {name: own and asdict(own) for name, own in result.calibration.items()},
        "verdicts": {
            name: {kind: asdict(counts) for kind, counts in kinds.items()} for name, kinds in result.verdicts.items()
        },
        "curves": {name: _curve(own) for name, own in main.curves.items()},
        "nll": {name: {role: asdict(curve) for role, curve in own.items()} for name, own in result.nll.items()},
        "leak": [asdict(row) for row in result.leak],
        "contamination": [
            {"variants": own.variants, "documents": own.documents} | own.found.as_json() for own in result.contamination
        ],
        "published": [asdict(value) for value in result.published],
        "hashes": {"base_model": _one(result.hashes.base_model)}
        | {
            f"seed {seed}": {name: _one(values) for name, values in own.items()}
            for seed, own in result.hashes.by_seed.items()
        },
        "remarks": result.remarks,
        "match_trained_tokens": result.match_trained_tokens,
        "notes": result.notes,
    } | _further(result)


def _further(result: ComparisonResult) -> dict[str, Any]:
    """Returns what only some comparisons have."""
    shown = (("by_layer", result.by_layer), ("panel", result.panel), ("doses", result.doses))
    found: dict[str, Any] = {name: each.as_json() for name, each in shown if each}
    if result.phases:
        found["phases_by"] = result.phases_by
        found["phases"] = {name: [_phase(each) for each in own] for name, own in result.phases.items()}
    return found


def _phase(own: PhaseBelief) -> dict[str, Any]:
    named = ("trained", "placebo", "change", "placebo_change", "against")
    intervals = {name: getattr(own, name) and _interval(getattr(own, name)) for name in named}
    handed_on = {"carry_optimizer": own.carried, "schedule_from": own.schedule_from}
    return {"name": own.name, "mask": own.mask, "first": own.first, "last": own.last} | handed_on | intervals


def _variant(own: TrainedVariant, main: MeasureResult, name: str) -> dict[str, Any]:
    found, difference = main.variants[name], main.differences.get(name)
    belief, placebo = found.trained.interval, found.placebo.interval if found.placebo else None
    return {
        "mask": own.mask,
        "settings": own.settings,
        "seeds": [run.seed for run in own.runs],
        "steps": own.steps,
        "belief": belief.estimate,
        "belief_interval": _bounds(belief),
        "interval_method": belief.method,
        "placebo": placebo.estimate if placebo else None,
        "placebo_interval": _bounds(placebo),
        "difference": difference and _difference(difference),
        "tokens_trained": own.tokens_trained,
        "targets": own.targets,
        "random_shortfall": own.random_shortfall,
        "runs": [asdict(run) for run in own.runs],
    }


def _measure(own: MeasureResult) -> dict[str, Any]:
    return {
        "label": own.measure.label,
        "unit": own.measure.unit,
        "definition": own.measure.says,
        "claims": own.claims,
        "placebo_claims": own.placebo_claims,
        "units": own.units.as_json(),
        "placebo_units": own.placebo_units and own.placebo_units.as_json(),
        "questions": own.all_questions,
        "questions_by_claim": own.questions,
        "answers": own.answers,
        "seeds": own.units.seeds,
        "same_seeds": own.same_seeds,
        "missing": own.missing,
        "bound": own.bound,
        "base": {
            "trained": own.base and _figures(own.base),
            "placebo": own.placebo_base and _figures(own.placebo_base),
        },
        "variants": {
            name: _figures(each.trained)
            | {
                "placebo": each.placebo and _figures(each.placebo),
                "minus_placebo": each.minus_placebo and _interval(each.minus_placebo),
            }
            for name, each in own.variants.items()
        },
        "differences": {name: _difference(each) for name, each in own.differences.items()},
        "placebo_differences": {name: _difference(each) for name, each in own.placebo_differences.items()},
        "curves": {name: _curve(each) for name, each in own.curves.items()},
    }


def _curve(own: BeliefCurve) -> dict[str, Any]:
    return {
        "steps": own.steps,
        "belief": [each.estimate for each in own.trained],
        "belief_intervals": [_bounds(each) for each in own.trained],
        "placebo": [each and each.estimate for each in own.placebo],
        "placebo_intervals": [_bounds(each) for each in own.placebo],
        "missing": own.missing,
    }


def _figures(own: Figures) -> dict[str, Any]:
    by_claim = {claim: _interval(each) for claim, each in own.by_claim.items()}
    return _interval(own.interval) | {"by_claim": by_claim, "by_seed": own.by_seed}


def _difference(own: Difference) -> dict[str, Any]:
    return _interval(own.interval) | {
        "units": own.units.as_json(),
        "p": own.p,
        "p_holm": own.p_holm,
        "verdict": own.verdict,
        "smallest_detectable": own.smallest_detectable,
        "bound": own.bound,
        "equivalent": own.equivalent,
        "by_claim": {claim: _interval(each) for claim, each in own.by_claim.items()},
        "by_seed": own.by_seed,
    }


def _interval(own: Interval) -> dict[str, Any]:
    return {
        "estimate": own.estimate,
        "interval": _bounds(own),
        "standard_error": own.standard_error,
        "method": own.method,
    }


def _bounds(own: Interval | None) -> list[float] | None:
    return [own.low, own.high] if own else None


def _one(values: list[str | None]) -> Any:
    """Returns the value that all runs have, or the list of the distinct values."""
    return values[0] if len(values) == 1 else values
