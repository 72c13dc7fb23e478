"""Writes the notes on what a reader must know before believing a comparison's figures, as sentences."""

from typing import Any

from train.comparison.significance import LEVEL
from train.comparison.units import LEAST_UNITS
from train.evaluation.measures import LEAST_AUC


def number(value: float | None, unit: str, signed: bool = False) -> str:
    """Returns a number as text with as many digits as are meaningful: one decimal for percentages, two for nats and
    scores; "–" for None. signed: with a plus sign if it is positive."""
    if value is None:
        return "–"
    digits = 1 if unit == "%" else 2
    value = round(value, digits) + 0.0  # never −0.0
    return f"{value:+.{digits}f}".replace("-", "−") if signed and value else f"{value:.{digits}f}".replace("-", "−")


def span(interval: list[float] | None, unit: str, signed: bool = False) -> str:
    """Returns an interval as the text "[low, high]", with numbers as `number` writes them; "" for None."""
    return "" if interval is None else "[" + ", ".join(number(value, unit, signed) for value in interval) + "]"


def counted(number: int, what: str) -> str:
    """Returns a count with its noun, such as "1 seed" or "3 seeds". what: the noun in the plural."""
    return f"{number:,} {what if number != 1 else what.removesuffix('s')}"


def rests_on(units: dict[str, Any]) -> str:
    """Returns the independent units of a figure as text, such as "24 claims, 3 seeds"."""
    return f"{counted(units['number'], units['of'])}, {counted(units['seeds'], 'seeds')}"


def by_t(units: dict[str, Any], placebo: dict[str, Any] | None = None) -> str:
    """Returns a text that says how intervals are made and over how many units."""
    return f"95 % intervals by t over {rests_on(units)}" + (f" (placebo: {rests_on(placebo)})" if placebo else "")


def in_context(documents: str) -> str:
    """Returns how reports name the base model with documents in context."""
    return f"base model with {documents} document{'s' * (documents != '1')} in context"


def notes(result: dict[str, Any]) -> list[str]:
    """Returns the notes, the most important first. result: the content of comparison.json."""
    main = result["measures"][result["measure"]]
    found = [
        *_claims(main),
        *_seeds(main),
        *_many(main),
        *_placebo(result, main),
        *_answers(result, main),
        *_calibration(result),
    ]
    return [*found, *_contamination(result), *_runs(result), *result["remarks"]]


def _claims(main: dict[str, Any]) -> list[str]:
    """Says what the units are if there is only one claim, and what too few units mean."""
    units, found = main["units"], []
    if len(main["claims"]) == 1:
        found.append(
            f"One claim ({main['claims'][0]}): intervals and p are over its {main['questions']} questions only, and "
            "say nothing of other claims."
        )
    if units["number"] < LEAST_UNITS:
        found.append(
            f"{counted(units['number'], units['of'])}: fewer than {LEAST_UNITS}, so there are no verdicts. "
            + _floor(units["number"], units["of"])
        )
    return found


def _floor(number: int, what: str) -> str:
    if number == 1:
        return f"How much {what} differ is not known from one."
    return (
        f"An exact sign-flip test over {number} {what} cannot give a p below {2 / 2**number:.3g}; go by the intervals, "
        "which are by t over so few, and by each one's own difference."
    )


def _seeds(main: dict[str, Any]) -> list[str]:
    found, seeds = [], main["seeds"]
    if not main["same_seeds"]:
        found.append(
            "The variants' seeds are not the same ones: each variant's are units by themselves, and differences hold "
            "the luck of both."
        )
    if seeds == 1:
        found.append(
            "One seed: intervals and p are those of the very models that were trained, and say nothing of what another "
            f"seed would give. From {LEAST_UNITS} seeds on there are verdicts."
        )
    elif seeds < LEAST_UNITS:
        found.append(f"{seeds} seeds: fewer than {LEAST_UNITS}, so there are no verdicts. {_floor(seeds, 'seeds')}")
    return found


def _many(main: dict[str, Any]) -> list[str]:
    """Warns of so many variants that no adjusted p can be below 1 − LEVEL."""
    units, variants = main["units"], len(main["differences"])
    if min(units["number"], units["seeds"]) < LEAST_UNITS or variants * units["smallest_p"] < 1 - LEVEL:
        return []
    return [
        f"{variants} variants beside the baseline are too many for {rests_on(units)}: p, adjusted for all, cannot be "
        f"below {min(1.0, variants * units['smallest_p']):.2g}, so that none can be said to differ."
    ]


def _placebo(result: dict[str, Any], main: dict[str, Any]) -> list[str]:
    if not main["placebo_claims"]:
        return [
            "No placebo claim was measured: what training does to claims that no document is about cannot be told from "
            "belief in those that were trained."
        ]
    before, unit = result["base"]["placebo"], main["unit"]
    if before is None:
        return []
    moved = []
    for variant, row in main["variants"].items():
        own = row["placebo"]
        if not own["interval"][0] <= before <= own["interval"][1]:
            moved.append(f"{variant} to {number(own['estimate'], unit)} {span(own['interval'], unit)}")
    if not moved:
        return []
    return [
        f"Claims that no document is about moved as well, from {number(before, unit)} {unit}: {'; '.join(moved)}. So "
        "much of the belief in the trained claims may be drift."
    ]


def _answers(result: dict[str, Any], main: dict[str, Any]) -> list[str]:
    found, failed = [], []
    for variant, kinds in result["verdicts"].items():
        errors = sum(counts["errors"] for counts in kinds.values())
        total = sum(sum(counts.values()) for counts in kinds.values())
        if errors:
            yes = sum(counts["yes"] for counts in kinds.values())
            low, high = 100 * yes / total, 100 * (yes + errors) / total
            failed.append(f"{variant} {errors} of {total} ({low:.1f} to {high:.1f} %)")
    if failed:
        found.append(
            "Answers without a verdict, for an error, are left out (in brackets: the share of yes, whatever they "
            "were): " + "; ".join(failed) + "."
        )
    if main["missing"]:
        found.append(
            f"{main['missing']} values are missing that other runs have: a run's figures are over the answers that it "
            "has."
        )
    if absent := [claim for claim in result["claims"]["trained"] if claim not in main["claims"]]:
        found.append(f"Not measured in any run, and so not in the mean: {', '.join(absent)}.")
    measures = result["measures"]
    if {"shift", "preference"} <= measures.keys():
        without = measures["preference"]["questions"] - measures["shift"]["questions"]
        if without:
            found.append(f"{without} templates have no control entity, and so no shift of the log-likelihood ratio.")
    found += [f"{name} is left out: {why}." for name, why in result["incomplete"].items()]
    if any(row["method"] == "exact binomial" for row in main["variants"].values()):
        found.append(
            "Where every answer is the same, t can give no interval: the exact binomial one stands there (marked ‡), "
            f"for {counted(main['units']['number'], main['units']['of'])}, each a trial."
        )
    return found


def _calibration(result: dict[str, Any]) -> list[str]:
    if "yes_no" not in result["measures"]:
        return []
    if not any(result["calibration"].values()):
        return [
            "Yes/no questions were asked without control questions, so their answers cannot be told from a yes-bias."
        ]
    low = [name for name, own in result["calibration"].items() if own and not own["informative"]]
    if not low:
        return []
    return [
        f"Yes/no questions are uninformative for {', '.join(low)}: on control questions with known answers the AUC is "
        f"below {LEAST_AUC} in some seed."
    ]


def _contamination(result: dict[str, Any]) -> list[str]:
    whole = {
        (f["claim"], f["kind"], f["question"]) for c in result["contamination"] for f in c["findings"] if f["whole"]
    }
    if not whole:
        return []
    return [
        f"{len(whole)} of the questions and scored texts occur word for word in the training documents: what is asked "
        "by them may be remembered rather than believed. See the section on it."
    ]


def _matched(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Returns a variant's steps as text and, for each seed, by how much its targets in the loss miss the baseline's."""
    wanted = {run["seed"]: run["targets_in_loss"] for run in baseline["runs"]}
    missed = []
    for run in row["runs"] if row is not baseline else []:
        had, aim = run["targets_in_loss"], wanted.get(run["seed"])
        missed.append(
            f"{had - aim:+,} ({100 * (had / aim - 1):+.2f} %)".replace("-", "−") if had and aim else "unknown"
        )
    steps = f"{' or '.join(map(str, row['steps']))} steps"
    return f"{steps}, targets {', '.join(missed)}" if missed else steps


def _runs(result: dict[str, Any]) -> list[str]:
    found = []
    rows = result["variants"]
    if result["match_trained_tokens"]:
        told = "; ".join(f"{name} {_matched(row, rows[result['baseline']])}" for name, row in rows.items())
        found.append(
            "The variants have as many targets in the loss as the baseline, as nearly as whole steps allow, and so "
            f"different numbers of steps: {told}."
        )
    trained = {name: row["tokens_trained"] for name, row in rows.items() if row["tokens_trained"]}
    if trained and not result["match_trained_tokens"] and max(trained.values()) > 1.01 * min(trained.values()):
        found.append(
            f"In the same steps, variants train on different numbers of targets, from {min(trained.values()):,} to "
            f"{max(trained.values()):,}: compare a mask with its random: control, or match the trained tokens."
        )
    for name, row in rows.items():
        if row["random_shortfall"]:
            found.append(
                f"{name}: random: found no place for {row['random_shortfall']:,} targets, so it is no control of equal "
                "size."
            )
    unknown = [
        f"{seed}, {name}" if isinstance(value, dict) else seed
        for seed, value in result["hashes"].items()
        for name, each in (value.items() if isinstance(value, dict) else [(seed, value)])
        if not isinstance(each, str)
    ]
    if unknown and not result["match_trained_tokens"]:
        found.append(f"Not every run has the same known hash ({'; '.join(unknown)}): see the last section.")
    return found
