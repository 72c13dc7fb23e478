"""Checks whether runs can be compared: that they differ in nothing but what their variants are to differ in."""

import dataclasses
from collections.abc import Collection
from typing import Any

from train.comparison.compared import RunResult
from train.config.recipe import MAY_DIFFER
from train.config.settings import FREE_ON_RESUME, Settings
from train.evaluation.measures import at_step, identity, last_step
from train.runtime.errors import UserError


def check_comparable(
    runs: list[RunResult], match_trained_tokens: bool = False, declared: Collection[str] = (),
    in_phases: Collection[str] = (),
) -> None:  # fmt: skip
    """Raises UserError if the runs differ in more than mask, loss norm, learning rate and seed, naming every difference
    with both values; also for fewer than two runs, and for a run that did not finish or was not evaluated at its end.

    match_trained_tokens: steps may differ too. declared: settings in which a recipe lets them differ; if data is one,
    tokens and order may differ too. in_phases: settings in which a recipe's phases differ, which runs of several phases
    may have otherwise.
    """
    if len(runs) < 2:
        names = "".join(f" {run.directory}" for run in runs) or " none"
        raise UserError(f"--runs{names}: a comparison needs at least two runs. Give more.")
    for run in runs:
        _check_evaluated(run)
    first = runs[0].parts[0]
    free = {*declared, *in_phases}
    problems = [p for part in runs[0].parts[1:] for p in _settings_unlike(first, part, free, phased=True)]
    for first, run in _pairs(runs):
        phased = bool(first.phases or run.phases)
        free = {*declared, *(in_phases if phased else ())}
        problems += [p for part in run.parts for p in _settings_unlike(first.parts[0], part, free, phased)]
        problems += _unlike(first, run, match_trained_tokens or "steps" in free or (phased and bool(in_phases)))
    for seed in dict.fromkeys(run.seed for run in runs):
        for first, run in _pairs([run for run in runs if run.seed == seed]):
            if first.phases or run.phases:
                problems += _parts_unlike(first, run, "data" in {*declared, *in_phases})
            else:
                problems += _unlike_at_one_seed(first, run, match_trained_tokens, "data" in declared)
    if each := "\n  ".join(dict.fromkeys(problems)):
        raise UserError(
            "runs that cannot be compared, as they differ in more than mask, loss norm, learning rate and seed:\n  "
            + each
            + "\nLeave out the run that differs, or train or evaluate it again like the others"
            + (", or give --match-trained-tokens, if they were trained so" if ": steps trained: " in each else "")
            + (
                ". A run that continues another contains it; runs of other numbers of phases are compared by the "
                "--recipe whose variants they are."
                if any(run.phases for run in runs) and not in_phases
                else "."
            )
        )


def _pairs(runs: list[RunResult]) -> list[tuple[RunResult, RunResult]]:
    """Returns which runs are compared with which: each with the first one and, if that has phases but this one does
    not, with the first that has none."""
    plain = next((run for run in runs if not run.phases), runs[0])
    return [(runs[0], run) for run in runs[1:]] + [
        (plain, run) for run in runs if runs[0].phases and not run.phases and run is not plain
    ]


def _check_evaluated(run: RunResult) -> None:
    if not run.summary:
        raise UserError(f"{run.directory}: has no summary: the run did not finish. Resume it with --resume.")
    measured, trained = last_step(run.rows), run.summary.get("steps")
    if measured < 0:
        raise UserError(f"{run.directory}: has no evaluation. Evaluate it: python train/evaluate.py.")
    if trained is not None and measured != trained:
        raise UserError(
            f"{run.directory}: was trained for {trained} steps and last evaluated at step {measured}. Evaluate it at "
            "its end: python train/evaluate.py."
        )


OF_PHASES = ("after", "adapter", "other_base", "carry_optimizer", "schedule_from", "schedule_to")
"""Settings that follow from the phases of a variant."""


def _settings_unlike(first: RunResult, other: RunResult, declared: set[str], phased: bool) -> list[str]:
    """Returns what differs in the settings of two runs, or phases, and should not."""
    elsewhere = first.imported or other.imported
    free = {
        *(first.settings.keys() | other.settings.keys() if elsewhere else ()),  # nothing else is known of imported ones
        *MAY_DIFFER,
        *declared,
        *(OF_PHASES if phased else ()),
        *FREE_ON_RESUME,
        "seed",
        "steps",
        "epochs",
    }  # the number of steps trained is compared below
    if all(first.hashes.get(name) and other.hashes.get(name) for name in ("tokens", "base_model")):
        free |= {"data", "model"}  # the same content may be at two paths
    one, two = (dataclasses.asdict(Settings()) | run.settings for run in (first, other))  # added since: the default
    pairs: dict[str, tuple[Any, Any]] = {
        "--" + name.replace("_", "-"): (one.get(name), two.get(name))
        for name in sorted(first.settings.keys() | other.settings.keys())
        if name not in free
    }
    pairs["base model"] = _both(first, other, "base_model")
    pairs["hash of what was asked"] = _both(first, other, "questions")
    return [_says(first, other, name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def _unlike(first: RunResult, other: RunResult, other_steps: bool) -> list[str]:
    """Returns what differs between two runs besides their settings and should not, whatever their seeds."""
    problems = []
    steps = first.summary.get("steps"), other.summary.get("steps")
    if not (other_steps or first.imported or other.imported) and steps[0] != steps[1]:
        problems.append(_says(first, other, "steps trained", *steps))
    asked, theirs = (
        {identity(row)[:-1]: row for row in at_step(run.rows, last_step(run.rows))} for run in (first, other)
    )
    if missing := [(asked | theirs)[key] for key in sorted(asked.keys() ^ theirs.keys())]:
        named = "; ".join(" ".join(str(row.get(k) or "") for k in ("claim", "kind", "question")) for row in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"{first.directory} and {other.directory}: evaluated on other questions: {named}{more}")
    return problems


def _parts_unlike(first: RunResult, other: RunResult, other_data: bool) -> list[str]:
    """Returns what differs at one seed between two runs, of which one has phases at least, and should not: the initial
    weights, and the tokens and their order where both read the same. other_data: phases may read other files."""
    problems = _unlike_at_one_seed(first, other, match_trained_tokens=True, other_data=True)
    same = ("data", "steps", "epochs", "batch_size")
    for number, one in enumerate(first.parts):
        for place, part in enumerate(other.parts):
            alike = all(one.settings.get(name) == part.settings.get(name) for name in same)
            names = ("tokens", "order") if alike else ("tokens",) if number == place and not other_data else ()
            pairs = {name: _both(one, part, name) for name in names}
            problems += [_says(one, part, f"hash of the {k}", *pair) for k, pair in pairs.items() if pair[0] != pair[1]]
    return problems


def _unlike_at_one_seed(first: RunResult, other: RunResult, match_trained_tokens: bool, other_data: bool) -> list[str]:
    names = ["initial_weights"] if other_data else ["tokens", "initial_weights"]
    if not other_data and not match_trained_tokens and first.summary.get("steps") == other.summary.get("steps"):
        names.append("order")  # the longer of two runs has seen more, which is reported, or allowed, elsewhere
    pairs = {name: _both(first, other, name) for name in names}
    words = {
        "tokens": "hash of the tokens",
        "order": "hash of their order",
        "initial_weights": "hash of the initial weights",
    }
    return [_says(first, other, words[name], *pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def _both(first: RunResult, other: RunResult, name: str) -> tuple[str, str]:
    """Returns two hashes, or two equal texts if one hash is not known."""
    one, two = first.hashes.get(name), other.hashes.get(name)
    return (str(one), str(two)) if one and two else ("", "")


def _says(first: RunResult, other: RunResult, what: str, one: Any, two: Any) -> str:
    short = [value[:12] if what.startswith(("hash", "base model")) else value for value in (one, two)]
    return f"{first.directory} and {other.directory}: {what}: {short[0]} and {short[1]}"
