"""Finds the earlier phases of a run, and puts the results of all of its phases on one axis of steps."""

import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config.provenance import held_settings
from train.data.kinds import COUNTS
from train.evaluation.imported import IMPORTED
from train.evaluation.store import StoredRow
from train.runtime.errors import UserError

if TYPE_CHECKING:  # which imports this module
    from train.comparison.compared import RunResult


def phases_before(run: Path) -> list[Path]:
    """Returns the directories of the runs that a run continues (--after), the first phase first; [] if it continues
    none. Raises UserError if one of them is missing, or they continue each other in a circle."""
    found: list[Path] = []
    while after := _after(found[0] if found else run):
        here = found[0] if found else run
        name = Path(after).name
        places = [Path(after), here / "phases" / name, here.parent / "phases" / name, here.parent / name]
        place = next((each for each in places if os.path.isfile(each / "settings.yaml")), None)
        if place is None:
            raise UserError(
                f"{here}: continues the run in {after}, which is not there, nor beside it. Restore it: its steps are "
                "the first ones of this run's."
            )
        if place.resolve() in [each.resolve() for each in (run, *found)]:
            raise UserError(f"{here}/settings.yaml: after {after}: a run cannot continue itself; restore the file.")
        found.insert(0, place)
    return found


def _after(run: Path) -> str:
    if os.path.isfile(run / IMPORTED) or not os.path.isfile(run / "settings.yaml"):
        return ""
    return held_settings(run / "settings.yaml")["settings"].get("after") or ""


def joined(phases: "list[RunResult]") -> "RunResult":
    """Returns the phases of a run, each read by itself, as one result: the steps of each come after those of the phase
    before. What a phase measured before its first step is the end of the phase before, so it is left out; what
    train/evaluate.py measured of the base model stays."""
    last, before = phases[-1], 0
    rows: list[StoredRow] = []
    metrics: list[dict[str, Any]] = []
    boundaries: list[int] = []
    for phase in phases:
        own = [row for row in phase.rows if row["step"] > 0 or not boundaries or row.keys() & {"verdict", "model"}]
        rows += [row | {"step": row["step"] + before if row["step"] else 0} for row in own]
        metrics += [values | {"step": values["step"] + before} for values in phase.metrics]
        before += phase.summary["steps"]
        boundaries.append(before)
    hashes = last.hashes | {"initial_weights": phases[0].hashes.get("initial_weights", "")}
    for name in ("tokens", "order"):
        each = [phase.hashes.get(name, "") for phase in phases]
        hashes[name] = each[0] if len({*each}) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()
    summary = last.summary | {"steps": before, "tokens": _summed(phases)}
    summary["random_shortfall"] = sum(phase.summary.get("random_shortfall") or 0 for phase in phases)
    return replace(
        last, rows=rows, metrics=metrics, summary=summary, hashes=hashes, phases=phases, boundaries=boundaries[:-1]
    )


def _summed(phases: "list[RunResult]") -> dict[str, dict[str, int]]:
    """Returns the number of targets by role and treatment over all phases."""
    sums: Counter[tuple[str, str]] = Counter()
    roles = dict.fromkeys(role for phase in phases for role in phase.summary.get("tokens") or {})
    for phase in phases:
        for role, counts in (phase.summary.get("tokens") or {}).items():
            sums.update({(role, kind): counts[kind] for kind in COUNTS})
    return {role: {kind: sums[role, kind] for kind in COUNTS} for role in roles}
