"""Puts the results of all phases of a run on one axis of steps."""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from train.data.kinds import COUNTS
from train.evaluation.store import StoredRow

if TYPE_CHECKING:  # which imports this module
    from train.comparison.compared import RunResult


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
