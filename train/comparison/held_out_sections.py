"""Writes the section of a report, and draws its picture, that set belief beside the NLL of held-out text by role."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train.comparison.forest_plot import COLORS, GRID, INK, MARKERS, SOFT, WIDTH, plain
from train.comparison.pages import Block, Table
from train.comparison.result import BASE, ComparisonResult, MeasureResult
from train.comparison.significance import Interval
from train.comparison.wording import by_t, estimated, number, rests_on, tested

AT_THE_END = "end"


@dataclass(frozen=True)
class VariantPoint:
    """Where a variant is after a step. changes: role -> the change of its NLL, of the roles that were measured then."""

    step: str
    belief: Interval
    changes: dict[str, Interval]


def places(result: ComparisonResult, variant: str) -> list[VariantPoint]:
    """Returns where a variant is after each step at which belief and held-out text were measured, and at the end, which
    is called AT_THE_END if its runs have different numbers of steps."""
    steps = result.variants[variant].steps
    last = str(steps[0]) if len(steps) == 1 and steps[0] is not None else AT_THE_END
    belief = result.main.curves.get(variant)
    found = []
    for step, at in zip(belief.steps, belief.trained, strict=True) if belief else ():
        changes = {
            role: curve.trained[curve.steps.index(step)]
            for role, own in result.held_out.items()
            if (curve := own.curves.get(variant)) and step in curve.steps
        }
        if changes and step > 0 and str(step) != last:
            found.append(VariantPoint(str(step), at, changes))
    changes = {role: own.variants[variant].trained.interval for role, own in result.held_out.items()}
    return [*found, VariantPoint(last, result.main.variants[variant].trained.interval, changes)]


def section(result: ComparisonResult) -> list[Block]:
    """Returns belief and the change of each role's NLL by variant and step, and the differences of the changes to the
    baseline; [] without held-out text."""
    held_out, unit = result.held_out, result.unit
    if not held_out:
        return []
    base = result.base
    own = estimated(base.interval, unit) if base.interval else number(base.belief, unit)
    rows = [[BASE, "0", own, *[number(0.0, "nats")] * len(held_out)]] if base.belief is not None else []
    for name in result.variants:
        for place in places(result, name):
            changes = [estimated(place.changes.get(role), "nats", True) for role in held_out]
            rows.append([name, place.step, estimated(place.belief, unit), *changes])
    caption = (
        "Change of the NLL of a token of held-out text from the base model, in nats; every token counts alike, and one "
        "that several roles touch counts for each. (Under “Side effects”, every text counts alike.) Belief: "
        f"{by_t(result.main.units)}; held-out text: {_units(held_out)}."
    )
    tables: list[Block] = [Table(["variant", "step", f"belief, {unit}", *held_out], rows, caption)]
    gaps = [
        [name, role, estimated(gap, "nats", True), *tested(gap)]
        for name in result.variants
        for role, measure in held_out.items()
        if (gap := measure.differences.get(name))
    ]
    head = ["variant", "role", f"change minus that of {result.baseline}, nats", "p (Holm)", "units"]
    return [*tables, Table(head, gaps, f"The same changes minus the baseline's at the end: {_units(held_out)}.")]


def _units(held_out: dict[str, MeasureResult]) -> str:
    """Returns how the intervals are made and over how many units, which are fewer for a role that some texts lack."""
    whole = held_out["all"].units if "all" in held_out else None
    fewer = [f"{role}: {rests_on(own.units)}" for role, own in held_out.items() if own.units != whole]
    told = [by_t(whole)] if whole else ["95 % t intervals over the texts with the role"]
    return "; ".join([*told, *fewer])


def picture(result: ComparisonResult) -> Figure | None:
    """Draws belief against the change of the NLL of held-out text, a panel for all tokens, for unspanned ones and for
    each role. A variant is a point with intervals, and a line leads there through the steps that were measured. None
    without held-out text."""
    roles = list(result.held_out)
    if not roles:
        return None
    columns = min(3, len(roles))
    rows = -(-len(roles) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[len(roles) :]:
        axes.remove()
    ways = {name: places(result, name) for name in result.variants}
    for axes, role in zip(grid, roles, strict=False):
        for i, way in enumerate(ways.values()):
            _draw(axes, [(p.changes[role], p.belief) for p in way if role in p.changes], result.base.belief, i)
        if result.base.belief is not None:
            axes.plot([0], [result.base.belief], "s", color=INK, markerfacecolor="white", markersize=5.5, zorder=4)
        axes.axvline(0, color=SOFT, linewidth=1, zorder=1)
        axes.set_xlabel("change of the NLL of a token, nats", fontsize=9)
        axes.set_title(f"{plain(role, 34)}\n{rests_on(result.held_out[role].units)}", fontsize=9)
        axes.grid(color=GRID, linewidth=0.8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=5, label=plain(name))
        for i, name in enumerate(ways)
    ]
    if result.base.belief is not None:
        handles.append(Line2D([], [], linestyle="", marker="s", color=INK, markerfacecolor="white", label=BASE))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5,
        title=f"belief: {by_t(result.main.units)}", title_fontsize=8.5,
    )  # fmt: skip
    figure.supylabel(f"{result.main.measure.label}, {result.unit}", fontsize=10)
    return figure


def _draw(axes: Axes, way: Sequence[tuple[Interval, Interval]], base: float | None, i: int) -> None:
    """Draws the i-th variant. way: the change and the belief at each step, of which the last one is the end."""
    color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
    start = [] if base is None or len(way) == 1 else [(0.0, base)]
    points = [*start, *((change.estimate, belief.estimate) for change, belief in way)]
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, marker=marker, markersize=2.5, zorder=2)
    change, belief = way[-1]
    axes.plot([change.low, change.high], [belief.estimate] * 2, color=color, linewidth=1, zorder=2)
    axes.plot([change.estimate] * 2, [belief.low, belief.high], color=color, linewidth=1, zorder=2)
    axes.plot([change.estimate], [belief.estimate], marker, color=color, markersize=6, zorder=3)
