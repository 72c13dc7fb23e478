"""Finds the phases before a run: the runs that it continues (--after), and what was measured of the base model."""

import hashlib
import os
from pathlib import Path
from typing import Any

from train.checkpoints.present import adapter_files
from train.config.provenance import held_settings
from train.evaluation.imported import IMPORTED
from train.evaluation.measures import at_step
from train.evaluation.store import StoredRow, read_measured
from train.runtime.errors import UserError
from train.runtime.outside import opened, read_json


def phases_before(run: Path) -> list[Path]:
    """Returns the directories of the runs that a run continues, the first phase first; [] if it continues none.

    Each is looked for beside the run, and then where it was when the run began. Raises UserError if it is not there,
    if it is not the one whose weights the run began with, or if runs continue each other in a circle.
    """
    found: list[Path] = []
    while settings := _of_phase(found[0] if found else run):
        here = found[0] if found else run
        place = _before(here, settings)
        if place.resolve() in [each.resolve() for each in (run, *found)]:
            raise UserError(
                f"{here}/settings.yaml: after {settings['after']}: a run cannot continue itself; restore it."
            )
        found.insert(0, place)
    return found


def _of_phase(run: Path) -> dict[str, Any]:
    """Returns the settings of a run that continues another; {} for one that does not."""
    if os.path.isfile(run / IMPORTED) or not os.path.isfile(run / "settings.yaml"):
        return {}
    settings = held_settings(run / "settings.yaml")["settings"]
    return settings if settings.get("after") else {}


def _before(run: Path, settings: dict[str, Any]) -> Path:
    """Returns the directory of the run that a run continues."""
    after = Path(settings["after"])
    places = [run / "phases" / after.name, run.parent / "phases" / after.name, run.parent / after.name, after]
    there = [each for each in places if os.path.isfile(each / "settings.yaml")]
    if not there:
        raise UserError(
            f"{run}: continues the run in {after}, which is not there, nor beside it. Restore it: its steps are the "
            "first ones of this run's."
        )
    same = {each: _began_with(run, each, settings) for each in there}
    for wanted in (True, None):  # its weights may have been removed since
        if fitting := [each for each, own in same.items() if own is wanted]:
            return fitting[0]
    raise UserError(
        f"{run}: continues the run in {after}, but began with other weights than {there[0]} has: that was trained "
        "again since. Restore it, or train this one again."
    )


def _began_with(run: Path, before: Path, settings: dict[str, Any]) -> bool | None:
    """Returns whether a run began with the weights that another has; None if that cannot be seen."""
    summary = run / "summary.json"
    adapter = Path(settings.get("adapter") or "adapter")
    weights = before / "saves" / adapter.name if settings.get("carry_optimizer") else before / "adapter"
    if not os.path.isfile(summary):
        return None
    known = (read_json(summary).get("hashes") or {}).get("initial_weights")
    try:
        with opened(adapter_files(weights)[1]) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == known if known else None
    except UserError:
        return None


def base_rows_of(run: Path) -> list[StoredRow]:
    """Returns what was measured of the base model: before a run's first step or, if it continues others, before that of
    the first of them. Raises UserError as phases_before does, or if a file is damaged."""
    return at_step(read_measured((phases_before(run) or [run])[0] / "evaluation.jsonl"), 0)
