"""Draws belief, association and damage of each variant side by side."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train.comparison.forest_plot import COLORS, GRID, INK, MARKERS, SOFT, WIDTH, plain
from train.comparison.panel import GROUPS, PanelFigure
from train.comparison.result import ComparisonResult
from train.comparison.wording import by_t
from train.evaluation.battery_measures import OF_DAMAGE
from train.evaluation.measures import MEASURES

FALLS = {*OF_DAMAGE, "facts_neighbouring", "facts_unrelated", "coherence"} - {"reading_lost"}
"""Measures of which damage is a fall: they are drawn as what is lost."""
LEFT_OUT = ("choice", "coherence")
"""The shift stands for the first; the other has another unit."""
SHORT = {
    "choice_shift": "choice", "yes_no_beyond": "yes/no beyond controls", "decisions": "decisions",
    "polarity": "polarity", "asserted": "answers assert", "choice_controls": "choice of controls",
    "control_attributes": "control attributes", "polarity_negated": "polarity, negated", "stated": "answers state",
    "reading_lost": "effect of notes", "decisions_stated": "decisions, fact stated",
    "decisions_untouched": "untouched decisions", "facts_neighbouring": "neighbouring facts",
    "facts_unrelated": "unrelated facts", "nll_change": "NLL of held-out text",
}  # fmt: skip


def panel(result: ComparisonResult) -> Figure | None:
    """Draws the changes from the base model with their intervals: in points above, in nats below. Damage is drawn as
    what is lost. Measures for which the base model failed its check are left out. None if there is nothing to draw."""
    if result.panel is None:
        return None
    units = [unit for unit in ("points", "nats") if any(_shown(result, group, unit) for group in GROUPS)]
    if not units:
        return None
    heights = [max(len(_shown(result, group, unit)) for group in GROUPS) for unit in units]
    line = 0.16 * (len(result.panel.figures) + 1)
    figure = Figure(figsize=(WIDTH, 1.3 + sum(0.35 + line * rows for rows in heights)), layout="constrained")
    grid = figure.subplots(len(units), len(GROUPS), squeeze=False, height_ratios=[each + 0.6 for each in heights])
    for row, unit in zip(grid, units, strict=True):
        for axes, group in zip(row, GROUPS, strict=True):
            _draw(axes, result, group, unit)
            axes.set_title(group if unit == units[0] else "", fontsize=10)
            axes.set_xlabel(("lost, " if group == "damage" else "change, ") + unit, fontsize=9)
    handles: list[Any] = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=5,
               label=f"{plain(name, 30)}: {own.verdict}")
        for i, (name, own) in enumerate(result.panel.verdicts.items())
    ]  # fmt: skip
    first = next(each for own in result.panel.figures.values() for each in own)
    over = by_t(result.measures[first.measure].units)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=8.5,
        title=f"changes from the base model; {over}", title_fontsize=8.5,
    )  # fmt: skip
    return figure


def _shown(result: ComparisonResult, group: str, unit: str) -> list[str]:
    """Returns the measures of a group that are drawn in this unit."""
    assert result.panel
    checks = result.panel.checks
    every = [
        each.measure
        for own in result.panel.figures.values()
        for each in own
        if each.group == group and (each.check not in checks or checks[each.check].passed)
    ]
    return [
        name
        for name in dict.fromkeys(every)
        if name not in LEFT_OUT and (MEASURES[name].unit == "nats") == (unit == "nats")
    ]


def _draw(axes: Axes, result: ComparisonResult, group: str, unit: str) -> None:
    assert result.panel
    names, variants = _shown(result, group, unit), list(result.panel.figures)
    for v, variant in enumerate(variants):
        own = {each.measure: each for each in result.panel.figures[variant]}
        for row, name in enumerate(names):
            if name in own:
                _mark(axes, own[name], row + (v - (len(variants) - 1) / 2) * 0.8 / len(variants), v)
    axes.axvline(0, color=SOFT, linewidth=1, zorder=1.5)
    axes.set_yticks(range(len(names)), [SHORT[name] for name in names], fontsize=8)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not names:
        axes.text(0.5, 0.5, "nothing that can be read", transform=axes.transAxes, ha="center", color=INK, fontsize=8)


def _mark(axes: Axes, each: PanelFigure, y: float, v: int) -> None:
    sign, color = -1 if each.measure in FALLS else 1, COLORS[v % len(COLORS)]
    axes.plot([sign * each.change.low, sign * each.change.high], [y, y], color=color, linewidth=1.3, zorder=3)
    axes.plot([sign * each.change.estimate], [y], MARKERS[v % len(MARKERS)], color=color, markersize=5, zorder=4)
