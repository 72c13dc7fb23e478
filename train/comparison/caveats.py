"""Writes the caveats of a comparison: what a reader must know before believing its figures, as sentences."""

from train.comparison.result import ComparisonResult, MeasureResult, TrainedVariant
from train.comparison.significance import LEVEL
from train.comparison.units import LEAST_UNITS
from train.comparison.wording import counted, number, rests_on, span
from train.evaluation.measures import LEAST_AUC


def notes(result: ComparisonResult) -> list[str]:
    """Returns the notes, the most important first."""
    main = result.main
    found = [
        *_claims(main),
        *_seeds(main),
        *_many(main),
        *_placebo(result, main),
        *_answers(result, main),
        *_calibration(result),
    ]
    return [*found, *_contamination(result), *_runs(result), *result.remarks]


def _claims(main: MeasureResult) -> list[str]:
    """Says what the units are if there is only one claim, and what too few units mean."""
    units, found = main.units, []
    if len(main.claims) == 1:
        found.append(
            f"One claim ({main.claims[0]}): intervals and p are computed over its {main.all_questions} questions only. "
            "They do not apply to other claims."
        )
    if units.number < LEAST_UNITS:
        found.append(
            f"{counted(units.number, units.of)}: fewer than {LEAST_UNITS}, so there are no verdicts. "
            + _floor(units.number, units.of)
        )
    return found


def _floor(number: int, what: str) -> str:
    if number == 1:
        return f"The variation between {what} cannot be estimated from one."
    return (
        f"An exact sign-flip test over {number} {what} cannot give a p below {2 / 2**number:.3g}. Use the "
        "intervals, which are t intervals over so few units, and the difference of each unit."
    )


def _seeds(main: MeasureResult) -> list[str]:
    found, seeds = [], main.units.seeds
    if not main.same_seeds:
        found.append(
            "The variants have different seeds. So the seeds of each variant are separate units, and differences "
            "include the random variation of both."
        )
    if seeds == 1:
        found.append(
            "One seed: intervals and p hold only for these trained models, not for other seeds. Verdicts need at least "
            f"{LEAST_UNITS} seeds."
        )
    elif seeds < LEAST_UNITS:
        found.append(f"{seeds} seeds: fewer than {LEAST_UNITS}, so there are no verdicts. {_floor(seeds, 'seeds')}")
    return found


def _many(main: MeasureResult) -> list[str]:
    """Warns of so many variants that no adjusted p can be below 1 − LEVEL."""
    units, variants = main.units, len(main.differences)
    if min(units.number, units.seeds) < LEAST_UNITS or variants * units.smallest_p < 1 - LEVEL:
        return []
    return [
        f"{variants} variants besides the baseline are too many for {rests_on(units)}: p, adjusted for all variants, "
        f"cannot be below {min(1.0, variants * units.smallest_p):.2g}, so no variant can get the verdict “differs”."
    ]


def _placebo(result: ComparisonResult, main: MeasureResult) -> list[str]:
    if not main.placebo_claims:
        return [
            "No placebo claim was measured: drift, the change in claims that no document is about, cannot be "
            "distinguished from belief in the trained claims."
        ]
    before, unit = result.base.placebo, main.measure.unit
    if before is None:
        return []
    moved = []
    for variant, row in main.variants.items():
        own = row.placebo and row.placebo.interval
        if own and not own.low <= before <= own.high:
            moved.append(f"{variant} to {number(own.estimate, unit)} {span(own, unit)}")
    if not moved:
        return []
    return [
        f"Placebo claims, which no document is about, also changed, from {number(before, unit)} {unit}: "
        f"{'; '.join(moved)}. This much of the belief in the trained claims may be drift."
    ]


def _answers(result: ComparisonResult, main: MeasureResult) -> list[str]:
    found, failed, measures = [], [], result.measures
    for variant, kinds in result.verdicts.items():
        errors = sum(counts.errors for counts in kinds.values())
        total = sum(counts.answers + counts.errors for counts in kinds.values())
        if errors:
            yes = sum(counts.yes for counts in kinds.values())
            low, high = 100 * yes / total, 100 * (yes + errors) / total
            failed.append(f"{variant} {errors} of {total} ({low:.1f} to {high:.1f} %)")
    if failed:
        found.append(
            "Answers without a verdict because of an error are left out (in brackets: the range of the share of yes "
            "if they had verdicts): " + "; ".join(failed) + "."
        )
    if main.missing:
        found.append(
            f"{main.missing} values are missing in some runs: the figures of a run are computed over its own answers."
        )
    for own in measures.values():
        if lacking := sum(curve.missing for curve in own.curves.values()):
            found.append(
                f"Over training, earlier steps lack {counted(lacking, 'values')} of the {own.measure.label} that the "
                "last one has: a step's figures are over what it has, and a step that lacks a whole claim is left out."
            )
    if absent := [claim for claim in result.trained_claims if claim not in main.claims]:
        found.append(f"Not measured in any run, and so not in the mean: {', '.join(absent)}.")
    if {"shift", "preference"} <= measures.keys():
        without = measures["preference"].all_questions - measures["shift"].all_questions
        if without:
            found.append(f"{without} templates have no control entity, and so no shift of the log-likelihood ratio.")
    found += [f"{name} is left out: {why}." for name, why in result.incomplete.items()]
    if any(row.trained.interval.method == "exact binomial" for row in main.variants.values()):
        found.append(
            "If all answers are the same, there is no t interval. The exact binomial interval is shown instead (marked "
            f"‡), with {counted(main.units.number, main.units.of)} as trials."
        )
    return found


def _calibration(result: ComparisonResult) -> list[str]:
    if "yes_no" not in result.measures:
        return []
    if not any(result.calibration.values()):
        return [
            "Yes/no questions were asked without control questions, so belief cannot be distinguished from a yes-bias."
        ]
    low = [name for name, own in result.calibration.items() if own and not own.informative]
    if not low:
        return []
    return [
        f"Yes/no questions are uninformative for {', '.join(low)}: on control questions with known answers the AUC is "
        f"below {LEAST_AUC} in some seed."
    ]


def _contamination(result: ComparisonResult) -> list[str]:
    whole = {(found.claim, found.kind, found.question) for own in result.contamination for found in own.found.whole}
    if not whole:
        return []
    return [
        f"{len(whole)} of the questions and scored texts occur verbatim in the training documents: their answers "
        "may be memorized rather than believed. See “Evaluation in the training documents”."
    ]


def _matched(row: TrainedVariant, baseline: TrainedVariant) -> str:
    """Returns a variant's steps as text and, for each seed, by how much its targets in the loss miss the baseline's."""
    wanted = {run.seed: run.targets_in_loss for run in baseline.runs}
    missed = []
    for run in row.runs if row is not baseline else []:
        had, aim = run.targets_in_loss, wanted.get(run.seed)
        missed.append(
            f"{had - aim:+,} ({100 * (had / aim - 1):+.2f} %)".replace("-", "−") if had and aim else "unknown"
        )
    steps = f"{' or '.join(map(str, row.steps))} steps"
    return f"{steps}, targets {', '.join(missed)}" if missed else steps


def _runs(result: ComparisonResult) -> list[str]:
    found = []
    rows = result.variants
    if result.match_trained_tokens:
        told = "; ".join(f"{name} {_matched(row, rows[result.baseline])}" for name, row in rows.items())
        found.append(
            "Each variant trains on as many targets as the baseline, up to whole steps, and therefore for a different "
            f"number of steps: {told}."
        )
    trained = {name: row.tokens_trained for name, row in rows.items() if row.tokens_trained}
    steps = {name: " or ".join(map(str, row.steps)) for name, row in rows.items() if row.tokens_trained is not None}
    if len({*steps.values()}) > 1 and not result.match_trained_tokens:
        told = "; ".join(f"{name} {own}" for name, own in steps.items())
        found.append(f"Variants train for different numbers of steps: {told}.")
    elif trained and not result.match_trained_tokens and max(trained.values()) > 1.01 * min(trained.values()):
        found.append(
            f"In the same number of steps, variants train on different numbers of targets, from "
            f"{min(trained.values()):,} to {max(trained.values()):,}. Compare a mask with its random: control, or use "
            "--match-trained-tokens."
        )
    for name, row in rows.items():
        if row.random_shortfall:
            found.append(
                f"{name}: random: found no place for {row.random_shortfall:,} targets, so the control is smaller than "
                "what it controls for."
            )
    hashes = {"base_model": result.hashes.base_model}
    hashes |= {f"seed {seed}, {name}": v for seed, own in result.hashes.by_seed.items() for name, v in own.items()}
    unknown = [name for name, values in hashes.items() if len(values) != 1 or values[0] is None]
    if unknown and not result.match_trained_tokens:
        found.append(f"Hashes differ between runs, or are unknown ({'; '.join(unknown)}): see the last section.")
    return found
