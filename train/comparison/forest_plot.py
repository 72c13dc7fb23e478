"""Draws rows of points with intervals, one row per variant: the form of the plots of belief and of differences."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.comparison.significance import Interval
from train.runtime.shown import shown

COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#6b6b6b"]
"""Color-blind readers can distinguish them (Okabe & Ito 2008, without its yellow and black)."""
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<"]
INK, SOFT, GRID, PLACEBO = "#1c2430", "#667085", "#e3e6eb", "#7d838d"
WIDTH = 9.2
LINE = 0.165
"""Inches: WIDTH of a figure, and LINE from one line of a row to the next."""
CHARACTERS = 30
"""Of a line of a variant's name, at most."""


@dataclass
class Mark:
    """One point of a row, with its interval."""

    estimate: float
    interval: Interval | None
    color: str
    marker: str
    hollow: bool = False
    bold: bool = False


@dataclass
class Line:
    """What is drawn at one height: a mark, a cloud of dots with one per claim, or both."""

    mark: Mark | None = None
    dots: list[float] = field(default_factory=list)
    hollow: bool = False


@dataclass
class PlotGroup:
    """A row with its label on the left and its figures, as text, on the right."""

    label: str
    lines: list[Line]
    text: str = ""


def forest(groups: list[PlotGroup], title: str, legend: list[Any]) -> tuple[Figure, Axes]:
    """Draws groups one below another, each with its lines; returns the figure, whose height grows with them, and its
    axes. title: the label of the x axis. legend: matplotlib handles."""
    labels = [wrapped(group.label) for group in groups]
    heights = [
        max(LINE * (len(g.lines) + 0.7), 0.16 * (label.count("\n") + 1.7))
        for g, label in zip(groups, labels, strict=True)
    ]
    rows = -(-sum(len(handle.get_label()) + 6 for handle in legend) // 95)
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.0 + 0.25 * rows), layout="constrained")
    axes = figure.subplots()
    top, centers = 0.0, []
    for i, (group, height) in enumerate(zip(groups, heights, strict=True)):
        if i % 2:
            axes.axhspan(top, top + height, color="#f5f6f8", zorder=-1, linewidth=0)
        centers.append(top + height / 2)
        first = top + height / 2 - LINE * (len(group.lines) - 1) / 2
        for k, line in enumerate(group.lines):
            _draw(axes, line, first + k * LINE)
        axes.text(
            1.015, centers[-1], group.text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=INK
        )
        top += height
    axes.set_ylim(top, 0)
    axes.set_yticks(centers, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(title)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=max(1, -(-len(legend) // rows)), frameon=False, fontsize=9
    )
    return figure, axes


def _draw(axes: Axes, line: Line, y: float) -> None:
    if line.dots:
        color, face = (PLACEBO, "white") if line.hollow else (COLORS[0], COLORS[0])
        axes.plot(
            line.dots, [y + offset for offset in spread(line.dots)], "o", color=color, markerfacecolor=face,
            markersize=3.2, alpha=0.75, markeredgewidth=0.8, zorder=3.2,
        )  # fmt: skip
    if line.mark:
        mark = line.mark
        if mark.interval:
            ends = [mark.interval.low, mark.interval.high]
            axes.plot(ends, [y, y], color=mark.color, linewidth=2 if mark.bold else 1.1, zorder=3)
        axes.plot(
            [mark.estimate], [y], mark.marker, color=mark.color, markerfacecolor="white" if mark.hollow else mark.color,
            markersize={"*": 10}.get(mark.marker, 6.5 if mark.bold else 5), zorder=4,
        )  # fmt: skip


def spread(values: list[float]) -> list[float]:
    """Returns a vertical offset for each value, of at most 0.4 LINE up or down, that keeps equal and close values
    apart."""
    width = (max(values) - min(values)) / 60 or 1.0
    seen: dict[int, int] = {}
    offsets = []
    for value in values:
        bin_ = round(value / width)
        count = seen[bin_] = seen.get(bin_, 0) + 1
        step = (count // 2) * (1 if count % 2 else -1)
        offsets.append(step)
    most = max(map(abs, offsets)) or 1
    return [offset * min(0.03, LINE * 0.4 / most) for offset in offsets]


def plain(text: str, most: int = 44) -> str:
    """Returns a name as matplotlib shows it literally: $ starts no formula, and what is longer than `most` characters
    is cut."""
    text = shown(text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # legends leave out labels that begin with an underscore


def wrapped(label: str) -> str:
    """Returns a variant's name wrapped after commas and spaces, in at most three lines."""
    spaced = label.replace(",", ", ").replace(",  ", ", ")
    pieces = textwrap.wrap(spaced, CHARACTERS, break_on_hyphens=False, max_lines=3, placeholder=" …")
    return "\n".join(plain(piece) for piece in pieces).replace(", ", ",") or plain(label)
