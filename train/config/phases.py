"""Resolves the phases of a variant into runs, of which each continues the one before it (--after)."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.config.experiment import Defaults, VariantDefaults
from train.config.settings import Settings, check_numbers, merge, read_command, slug
from train.runtime.errors import UserError

Phases = dict[str, Settings]
"""The settings of each phase by its name, in the order of training; for a variant without phases, of "" alone. They do
not say yet where the phases' runs are."""


def phases_of(shared: Defaults, variant: VariantDefaults, own: dict[str, Any]) -> Phases:
    """Returns the phases of a variant. shared: the recipe's settings for all variants. own: the settings that the
    command line gives. Raises UserError for a wrong value, or a schedule that continues without --steps."""
    if not variant.phases:
        settings = merge(shared | variant, own)
        if variant.dose and variant.dose.kind == "documents" and not settings.steps and "steps" not in variant.values:
            raise UserError("dose: steps: fixed: how many is not said; give steps in settings, or --steps.")
        return {"": settings}
    defaults = {name: shared | variant | phase.own for name, phase in variant.phases.items()}
    for name, piece in _pieces(variant, {name: (each.values | own).get("steps", 0) for name, each in defaults.items()}):
        defaults[name] |= piece
    made = {}
    for name, each in defaults.items():
        merged = merge(each, own)
        if merged.stop_after:
            raise UserError("--stop-after: of which phase is not said; leave it out, or give phases fewer steps.")
        end = 0 if merged.schedule == "constant" else merged.schedule_to  # of a constant one it plays no part
        made[name] = dataclasses.replace(merged, schedule_to=end, carry_optimizer=variant.phases[name].carry)
    return made


def _pieces(variant: VariantDefaults, steps: dict[str, int]) -> Iterator[tuple[str, Defaults]]:
    """Yields the phases whose learning rates are pieces of one schedule, and where in it each lies. steps: of each
    phase, 0 where they are not given."""
    schedules: list[list[str]] = []
    for name, phase in variant.phases.items():
        schedules = [*schedules[:-1], [*schedules[-1], name]] if phase.go_on else [*schedules, [name]]
    for names in schedules:
        if len(names) == 1:
            continue
        if endless := [name for name in names if not steps[name]]:
            raise UserError(
                f"phases: {endless[0]}: schedule: continue makes {' and '.join(names)} pieces of one schedule, whose "
                "length must be known; give steps for each of them."
            )
        before = 0
        for name in names:
            yield name, Defaults({"schedule_from": before, "schedule_to": sum(steps[each] for each in names)})
            before += steps[name]


def placed(phases: Phases, last: Path, earlier: Callable[[tuple[str, ...]], Path]) -> list[Settings]:
    """Returns the runs of the phases, in the order of training.

    last: the directory of the last phase. earlier: returns that of another, by its name and those of the phases before.
    Raises UserError for a wrong value.
    """
    runs: list[Settings] = []
    names = tuple(phases)
    for number, (name, settings) in enumerate(phases.items(), 1):
        output = last if number == len(names) else earlier(names[:number])
        continues: dict[str, Any] = {"after": runs[-1].output, "adapter": "", "other_base": False} if runs else {}
        runs.append(dataclasses.replace(settings, output=str(output), **continues))
        with phase_named(name):
            check_numbers(runs[-1])
    return runs


@contextmanager
def phase_named(name: str) -> Iterator[None]:
    """Inside the context, puts a phase's name before the message of a UserError; "" puts nothing there."""
    try:
        yield
    except UserError as error:
        error.args = (f"phase {name!r}: {error}" if name else str(error),)
        raise


def phase_directory(within: Path, names: tuple[str, ...], seed: int) -> Path:
    """Returns the directory of a phase that is not its variant's last, from its name and those of the phases before."""
    name = "+".join(map(slug, names))  # no slug has a +
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return within / "phases" / f"{name}-seed{seed}"


LONGEST = 120  # characters of a directory's name, of the 255 bytes that file systems allow


def runs_in_order(phases: Phases) -> list[Settings]:
    """Returns the runs of the phases of one variant: of the last one in --output, of the others in its phases/. Without
    --output, which is then not known yet, the settings as they are. --resume holds for the runs that have begun, and
    for the first one if none has. Raises UserError for a wrong value, or if two phases have the same directory."""
    first = next(iter(phases.values()))
    if len(phases) == 1 or not first.output:
        return [*phases.values()]
    output = Path(first.output)
    runs = placed(phases, output, lambda names: phase_directory(output, names, first.seed))
    if len({each.output for each in runs}) < len(runs):
        raise UserError(f"phases {', '.join(phases)}: two have the same directory; rename one.")
    begun = [os.path.exists(Path(each.output) / "settings.yaml") for each in runs]
    resumed = [first.resume and (own or not (number or any(begun))) for number, own in enumerate(begun)]
    return [
        dataclasses.replace(each, resume=own, wandb_group=first.group())
        for each, own in zip(runs, resumed, strict=True)
    ]


def parse_phases(argv: list[str], usage: str) -> tuple[str, Phases]:
    """Returns the chosen variant's name, "" for none, and its phases, from a command line of train/sft.py and its
    recipes. usage: the text of --help. Raises UserError as `parse` does."""
    own, shared, name, variant = read_command(argv, usage)
    return name, phases_of(shared, variant, own)
