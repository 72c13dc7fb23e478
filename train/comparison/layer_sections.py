"""Writes the report's section on belief by layer, and draws its pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from train.comparison.forest_plot import COLORS, GRID, INK, MARKERS, WIDTH, plain
from train.comparison.layers import ByLayer
from train.comparison.pages import Block, Table, Text
from train.comparison.wording import counted
from train.evaluation.by_layer import LEAST_RIGHT, LEAST_RUN, LayerShifts

MOST_PANELS, MOST_CLAIMS = 6, 12  # that are drawn, and that are listed one by one
BAND = "#eef1f6"


def section(found: ByLayer | None) -> list[Block]:
    """Returns where each variant shows each claim; [] if nothing was measured by layer."""
    if found is None:
        return []
    inside = [layer for layer, is_inside in enumerate(found.band) if is_inside]
    shown, rows = [], []
    for name, claims in found.claims.items():
        own_claims = {claim: own for claim, own in claims.items() if claim in found.trained}
        placebo = {claim: own for claim, own in claims.items() if claim not in found.trained}
        shown.append([name, _how_many_shown(own_claims, found.band), _how_many_shown(placebo, found.band)])
        for claim, own in claims.items() if len(claims) <= MOST_CLAIMS else ():
            place, yardstick = own.shown(found.band), own.yardstick
            most = max(inside, key=own.subject.__getitem__) if inside else None
            rows.append([
                name, claim, f"{own.subject[-1]:+.2f}",
                "–" if most is None else f"{own.subject[most]:+.2f} ({most + 1})",
                "–" if most is None or not yardstick else f"{yardstick[most]:+.2f}",
                f"layers {place[0]} to {place[1]}" if place else "not shown",
            ])  # fmt: skip
    ranges = _ranges(inside)
    band = (
        f"Readable layers, after which the base has at least {LEAST_RIGHT:.0%} of the facts right: {ranges or 'none'} "
        f"of {found.depth}."
        if found.right
        else "No facts were measured, so that no layer can be read: give the claims facts."
    )
    counts = Table(["variant", "claims shown", "placebo claims shown"], shown)
    head = ["variant", "claim", "last layer", "most, at layer", "yardstick there", "shown in"]
    caption = (
        "Shifts in nats, as those of the log-likelihood ratio, with each layer's state in the place of the last one's. "
        "The yardstick is the largest shift of a control entity that takes the subject's place. Shown: in at least "
        f"{LEAST_RUN} consecutive readable layers the shift is above 0 and above the yardstick."
    )
    limits = (
        "A lens sees what a layer's state says in the words of the last layer. What an early layer holds in another "
        "form, it does not see; and a shift at a layer does not say that the belief is stored there."
    )
    if not rows:
        return [Text(f"{band} {caption} The shifts of every claim are in comparison.json."), counts, Text(limits)]
    return [Text(band), counts, Table(head, rows, caption=caption), Text(limits)]


def _how_many_shown(claims: Mapping[str, LayerShifts], band: Sequence[bool]) -> str:
    return f"{sum(own.shown(band) is not None for own in claims.values())} of {len(claims)}" if claims else "–"


def _ranges(layers: list[int]) -> str:
    """Returns layers, given from 0, as text with numbers from 1: 5 to 9, 11."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0] + 1} to {run[-1] + 1}" if len(run) > 1 else str(run[0] + 1) for run in runs)


def lines(found: ByLayer | None) -> Figure | None:
    """Draws the shift of each trained claim by layer, for each variant, with the band and the yardstick."""
    return _panels(found, "") if found else None


def differences(found: ByLayer | None, baseline: str) -> Figure | None:
    """Draws the same minus the baseline's."""
    return _panels(found, baseline) if found else None


def _panels(found: ByLayer, baseline: str) -> Figure | None:
    claims = found.trained[:MOST_PANELS]
    if not claims:
        return None
    columns = min(3, len(claims))
    rows = -(-len(claims) // columns)
    figure = Figure(figsize=(WIDTH, 2.6 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel().tolist()
    layers = np.arange(1, found.depth + 1)
    for axes in grid[len(claims) :]:
        axes.remove()
    for axes, claim in zip(grid, claims, strict=False):
        for layer, readable in zip(layers, found.band, strict=True):
            if readable:
                axes.axvspan(layer - 0.5, layer + 0.5, color=BAND, linewidth=0)
        own = {name: by_claim[claim] for name, by_claim in found.claims.items()}
        controls = [values for each in own.values() for values in each.controls.values()]
        if controls and not baseline:
            axes.fill_between(
                layers, np.min(controls, axis=0), np.max(controls, axis=0), color=INK, alpha=0.15, linewidth=0
            )
        for i, (name, shifts) in enumerate(own.items()):
            if name != baseline:
                from_it = np.array(own[baseline].subject) if baseline else 0
                axes.plot(
                    layers, np.array(shifts.subject) - from_it, color=COLORS[i % len(COLORS)],
                    marker=MARKERS[i % len(MARKERS)], markersize=3.5, linewidth=1.5,
                )  # fmt: skip
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(plain(claim, 34), fontsize=10)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_xlabel("decoder layer", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=4, label=plain(name))
        for i, name in enumerate(found.claims)
        if name != baseline
    ]
    handles.append(Patch(color=BAND, label="readable layers"))
    if not baseline:
        handles.append(Patch(color=INK, alpha=0.15, label="control entities in the subject's place"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5,
        title=f"mean over {counted(found.seeds, 'seeds')}", title_fontsize=8.5,
    )  # fmt: skip
    figure.supylabel("shift, nats" + (f", minus {plain(baseline)}" if baseline else ""), fontsize=10)
    return figure


def over_steps(found: ByLayer | None) -> Figure | None:
    """Draws the shift by layer and step, the mean over trained claims, for each variant. None with fewer than three
    steps."""
    measured = {name: own for name, own in found.steps.items() if own} if found else {}
    if found is None or max(map(len, measured.values()), default=0) < 3:
        return None
    columns = min(3, len(measured))
    rows = -(-len(measured) // columns)
    figure = Figure(figsize=(WIDTH, 2.6 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[len(measured) :]:
        axes.remove()
    most = max(abs(value) for own in measured.values() for shift in own.values() for value in shift) or 1.0
    for axes, (name, own) in zip(grid, measured.items(), strict=False):
        values = np.array([*own.values()]).T
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
        some = np.unique(np.linspace(0, values.shape[1] - 1, min(5, values.shape[1])).round().astype(int))
        axes.set_xticks(some, [f"{[*own][i]:,}" for i in some], fontsize=8)
        some = np.unique(np.linspace(0, found.depth - 1, min(6, found.depth)).round().astype(int))
        axes.set_yticks(some, some + 1, fontsize=8)
        axes.set_title(plain(name, 34), fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
    over = f"{counted(len(found.trained), 'claims')}, {counted(found.seeds, 'seeds')}"
    figure.colorbar(image, ax=grid[: len(measured)], label=f"shift, nats; mean over {over}")
    figure.supylabel("decoder layer", fontsize=10)
    return figure
