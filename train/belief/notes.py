"""What a reader must know before believing a comparison's figures, as sentences."""

from typing import Any

from train.belief.inference import FEW_CLAIMS
from train.belief.values import LEAST_AUC

MUCH_FROM_SEEDS = 0.25
"""Share of a difference's variance from which few seeds make its interval noticeably too narrow."""
FEW_SEEDS = 5


def number(value: float | None, unit: str, signed: bool = False) -> str:
    """With as many digits as mean anything: one for percentages, two for nats and scores."""
    if value is None:
        return "–"
    digits = 1 if unit == "%" else 2
    value = round(value, digits) + 0.0  # no −0.0
    return f"{value:+.{digits}f}".replace("-", "−") if signed and value else f"{value:.{digits}f}".replace("-", "−")


def span(interval: list[float] | None, unit: str, signed: bool = False) -> str:
    """[low, high]."""
    return "" if interval is None else "[" + ", ".join(number(value, unit, signed) for value in interval) + "]"


def in_context(documents: str) -> str:
    """The base model with documents in context, as reports name it."""
    return f"base model with {documents} document{'s' * (documents != '1')} in context"


def notes(result: dict[str, Any]) -> list[str]:
    """In the order of their weight; `result` is the content of comparison.json."""
    main = result["measures"][result["measure"]]
    found = [*_claims(main), *_seeds(main), *_placebo(result, main), *_answers(result, main), *_calibration(result)]
    return [*found, *_contamination(result), *_runs(result), *result["remarks"]]


def _claims(main: dict[str, Any]) -> list[str]:
    count = len(main["claims"])
    if count == 1:
        return [
            f"One claim ({main['claims'][0]}): intervals and p are over its {main['questions']} questions only, and "
            "say nothing of other claims."
        ]
    if count < FEW_CLAIMS:
        return [
            f"{count} claims are few to generalize from: in simulations, 95 % intervals from three claims hold the "
            "truth in 70 to 88 of 100 cases. Go by each claim's own difference and by the exact sign-flip test, whose "
            f"p cannot be below {2 / 2**count:.3g} with {count} claims."
        ]
    return []


def _seeds(main: dict[str, Any]) -> list[str]:
    if not main["same_seeds"]:
        return [
            "The variants' seeds are not the same ones: each variant's are drawn by themselves, and differences hold "
            "the luck of both."
        ]
    if main["seeds"] == 1:
        return ["One seed: the intervals say nothing of what another seed would give."]
    much = [v for v, own in main["differences"].items() if (own["seed_share"] or 0) > MUCH_FROM_SEEDS]
    if main["seeds"] < FEW_SEEDS and much:
        return [
            f"{main['seeds']} seeds, and they make more than {MUCH_FROM_SEEDS:.0%} of the variance of the difference "
            f"of {', '.join(much)}: such intervals are too narrow (in simulations where three seeds make nearly all of "
            "it, they hold the truth in 68 to 85 of 100 cases). Look at each seed's difference, or train more seeds."
        ]
    return []


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
            f"Where every answer is the same, resampling can give no interval: the exact binomial one stands there "
            f"(marked ‡), for {main['questions']} independent questions."
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
    """A variant's steps, and for each seed by how much its targets in the loss miss the baseline's."""
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
