"""Says after which layers a model prefers a claim's false completion, from the rows that --by-layer has measured.

After each decoder layer, completions are scored as if that layer were the last one: by the model's own final norm and
head on the layer's state (the "logit lens", nostalgebraist 2020). The shift of a claim at a layer is that of
measures.py: the log-likelihood ratio of the subject minus the mean of its control entities, minus the same of the base.

A lens can only be read where the base's own states already answer: in the *band* of layers after which the base has
most ordinary facts right. How large a shift can be without any belief is shown by the *yardstick*: each control entity
in turn takes the subject's place, and the other controls stay controls.

Shapes: D decoder layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from train.evaluation.measures import where
from train.evaluation.store import StoredRow
from train.runtime.errors import UserError

LEAST_RIGHT = 0.8
"""Share of facts that the base must have right after a layer of the band."""
LEAST_RUN = 3
"""How many consecutive layers must show a shift, so that the claim counts as shown."""


@dataclass(frozen=True)
class LayerShifts:
    """The shifts of a claim in one model, in nats, after each of the D layers.

    subject: of the claim's subject. controls: control entity -> the shift with it in the subject's place; {} if there
    are fewer than two controls.
    """

    subject: list[float]
    controls: dict[str, list[float]]

    @property
    def yardstick(self) -> list[float]:
        """The largest shift of any control entity after each layer; [] without controls."""
        return np.max([*self.controls.values()], axis=0).tolist() if self.controls else []

    def shown(self, band: Sequence[bool]) -> tuple[int, int] | None:
        """Returns the first and the last layer, counted from 1, of the longest run of layers within the band at which
        the subject's shift is above 0 and above every control's; None if it is shorter than LEAST_RUN, or if there is
        no yardstick."""
        above = [
            inside and own > max(0.0, most)
            for inside, own, most in zip(band, self.subject, self.yardstick or [np.inf] * len(band), strict=True)
        ]
        longest, start = (0, 0), 0
        for layer, is_above in enumerate([*above, False]):
            if not is_above:
                longest, start = max(longest, (layer - start, -start)), layer + 1
        length, first = longest[0], -longest[1]
        return (first + 1, first + length) if length >= LEAST_RUN else None


def facts_right(base_rows: Iterable[StoredRow]) -> list[float]:
    """Returns, for each of the D layers, the share of facts that the base has right after it; [] if no fact was
    measured by layer. Raises UserError for invalid values."""
    margins = [_layers(row) for row in base_rows if row["kind"] == "fact" and "layers" in row]
    return (_same_depth(margins) > 0).mean(0).tolist() if margins else []


def layer_shifts(rows: Iterable[StoredRow], base_rows: Iterable[StoredRow], claim: str) -> LayerShifts | None:
    """Returns the shifts of a claim, each the mean over its templates. rows and base_rows: each of one step. None if
    either lacks layers, or the claim has no control entities. Raises UserError for invalid values."""
    now, before = _ratios(rows, claim), _ratios(base_rows, claim)
    subject, controls = _in_place(now, before, None), {}
    if subject is None:
        return None
    names = sorted({entity for template in now.values() for entity, control in template if control})
    for name in names if len(names) > 1 else ():
        if (found := _in_place(now, before, name)) is not None:
            controls[name] = found
    return LayerShifts(subject, controls)


def mean_shifts(found: Sequence[LayerShifts]) -> LayerShifts:
    """Returns the mean over runs."""

    def mean(values: list[list[float]]) -> list[float]:
        return np.mean(values, axis=0).tolist()

    shared = [name for name in found[0].controls if all(name in each.controls for each in found)]
    controls = {name: mean([each.controls[name] for each in found]) for name in shared}
    return LayerShifts(mean([each.subject for each in found]), controls)


Ratios = dict[str, dict[tuple[str, bool], np.ndarray]]
"""{template: {(entity, whether it is a control): [D] log-likelihood ratio of false against true}}."""


def _ratios(rows: Iterable[StoredRow], claim: str) -> Ratios:
    found: Ratios = {}
    for row in rows:
        if row["kind"] == "likelihood" and row["claim"] == claim and "layers" in row:
            own = found.setdefault(str(row["question"]), {})
            own[str(row.get("entity") or ""), bool(row["control"])] = np.array(_layers(row))
    return found


def _in_place(now: Ratios, before: Ratios, name: str | None) -> list[float] | None:
    """Returns the shift [D] of an entity: of the control `name`, or of the subject for None."""

    def difference(template: dict[tuple[str, bool], np.ndarray]) -> np.ndarray | None:
        own = [v for (entity, control), v in template.items() if (entity == name if control else name is None)]
        others = [v for (entity, control), v in template.items() if control and entity != name]
        return _same_depth([*own, *others])[0] - np.mean(others, axis=0) if own and others else None

    pairs = [(difference(now[each]), difference(before[each])) for each in now if each in before]
    shifts = [a - b for a, b in pairs if a is not None and b is not None]
    return _same_depth(shifts).mean(0).tolist() if shifts else None


def _same_depth(values: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    if len({len(each) for each in values}) > 1:
        raise UserError("evaluation.jsonl: rows have different numbers of layers. Measure all of them on one model.")
    return np.array(values)


def _layers(row: StoredRow) -> list[float]:
    values = row["layers"]
    good = isinstance(values, list) and values and all(isinstance(v, int | float) and np.isfinite(v) for v in values)
    if not good:
        raise UserError(f"{where(row)}: layers must be finite numbers, one of each decoder layer. Measure it again.")
    return values
