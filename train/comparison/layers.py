"""Works out belief by layer in a comparison, from runs that were measured with --by-layer."""

from dataclasses import dataclass
from typing import Any

from train.comparison.compared import Comparison
from train.evaluation.by_layer import LEAST_RIGHT, LayerShifts, facts_right, layer_shifts, mean_shifts
from train.evaluation.measures import at_step, last_step
from train.evaluation.store import StoredRow


@dataclass(frozen=True)
class ByLayer:
    """Belief by layer, of D decoder layers; means over seeds.

    seeds: of the variant with the fewest.
    right: share of facts that the base has right after each layer; [] if no facts were measured.
    claims: variant -> claim -> its shifts at the end of training. trained: those that are no placebo.
    steps: variant -> step -> [D] shift of the subject, the mean over trained claims; only steps at which all runs of
    the variant were measured.
    """

    depth: int
    seeds: int
    right: list[float]
    trained: list[str]
    claims: dict[str, dict[str, LayerShifts]]
    steps: dict[str, dict[int, list[float]]]

    @property
    def band(self) -> list[bool]:
        """[D] whether a layer can be read: the base has at least LEAST_RIGHT of the facts right after it."""
        return [share >= LEAST_RIGHT for share in self.right] or [False] * self.depth

    def as_json(self) -> dict[str, Any]:
        """Returns what comparison.json keeps."""
        return {
            "facts_right": self.right, "band": self.band,
            "variants": {
                name: {
                    claim: {
                        "shift": own.subject, "controls": own.controls, "yardstick": own.yardstick,
                        "shown": own.shown(self.band),
                    }
                    for claim, own in claims.items()
                }
                for name, claims in self.claims.items()
            },
            "steps": {name: {str(step): shift for step, shift in own.items()} for name, own in self.steps.items()},
        }  # fmt: skip


def by_layer(comparison: Comparison, base: list[StoredRow]) -> ByLayer | None:
    """Returns belief by layer; None unless all runs and the base were measured by layer. base: the base model's rows.
    Raises UserError for invalid values."""
    asked = [*comparison.trained_claims, *comparison.placebo_claims]
    claims: dict[str, dict[str, LayerShifts]] = {}
    steps: dict[str, dict[int, list[float]]] = {}
    for variant in comparison.variants:
        claims[variant.name] = {}
        for claim in asked:
            found = [layer_shifts(at_step(run.rows, last_step(run.rows)), base, claim) for run in variant.runs]
            if all(found):
                claims[variant.name][claim] = mean_shifts([each for each in found if each])
    shared = [claim for claim in asked if all(claim in own for own in claims.values())]
    if not shared:
        return None
    trained = [claim for claim in shared if claim in comparison.trained_claims]
    for variant in comparison.variants:
        steps[variant.name] = {}
        for step in sorted({row["step"] for run in variant.runs for row in run.rows}):
            rows = [at_step(run.rows, step) for run in variant.runs]
            shifts = [layer_shifts(own, base, claim) for own in rows for claim in trained]
            if shifts and all(shifts):
                steps[variant.name][step] = mean_shifts([each for each in shifts if each]).subject
    claims = {name: {claim: own[claim] for claim in shared} for name, own in claims.items()}
    depth = len(next(iter(claims.values()))[shared[0]].subject)
    seeds = min(len(variant.runs) for variant in comparison.variants)
    return ByLayer(depth, seeds, facts_right(base), trained, claims, steps)
