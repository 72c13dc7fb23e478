"""Draws the pictures of a comparison from what it found. Each drawing function returns a Figure, or
None if there is nothing to show. Whatever colors distinguish, markers or line styles distinguish too."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from train.comparison.forest_plot import (
    COLORS,
    GRID,
    INK,
    MARKERS,
    PLACEBO,
    SOFT,
    WIDTH,
    Line,
    Mark,
    PlotGroup,
    forest,
    plain,
    wrapped,
)
from train.comparison.result import BASE, ComparisonResult, Figures, MeasureResult
from train.comparison.significance import Difference
from train.comparison.wording import by_t, counted, in_context, number, rests_on, span
from train.data.kinds import counts_shown
from train.evaluation.measures import SIDE_EFFECTS

FEW = 6
"""With more claims than this, each is a dot without an interval."""


def belief(result: ComparisonResult) -> Figure:
    """Draws belief with intervals, for each variant and claim, for the placebo claims, for the base model and as
    published."""
    main, unit = result.main, result.unit
    groups = []
    if main.base:
        groups.append(_group(BASE, main.base, main.placebo_base, unit))
    rows = {in_context(context): own for context, own in result.in_context.items()} | main.variants
    groups += [_group(name, row.trained, row.placebo, unit) for name, row in rows.items()]
    published = [
        PlotGroup(
            f"published: {row.claim + ', ' if row.claim else ''}{row.condition}",
            [Line(Mark(row.value, None, INK, "*", hollow=True, bold=True))],
            number(row.value, unit),
        )
        for row in (result.published if result.measure == "rate" else ())  # other measures have another scale
    ]
    bounded = unit == "%"
    title = f"{main.measure.label}, {unit}" if bounded else f"{main.measure.label}, {unit}; the base model is 0"
    title += f"\n{by_t(main.units, main.placebo_units)}"
    figure, axes = forest([*groups, *published], title, _claim_legend(main, published=bool(published)))
    if bounded:
        axes.set_xlim(-2, 102)
    _mark_base(axes, main)
    return figure


def _mark_base(axes: Axes, own: MeasureResult) -> None:
    """Draws a dashed line at the base model's figure, which is 0 in a change from it."""
    at = own.base.interval.estimate if own.base else 0.0
    axes.axvline(at, color=SOFT, linestyle=(0, (4, 3)), linewidth=1, zorder=1.5)


def paired_differences(result: ComparisonResult) -> Figure | None:
    """Draws each variant minus the baseline with intervals, the bound of "no effect", and the same differences on the
    placebo claims. None without other variants."""
    main, unit = result.main, result.unit
    groups = []
    for name, row in main.differences.items():
        groups.append(_group(name, row, main.placebo_differences.get(name), unit, signed=True))
    if not groups:
        return None
    minus, points = f"minus that of {plain(result.baseline)}", "percentage points" if unit == "%" else unit
    title = f"{main.measure.label} {minus}, {points}"
    title += f"\n{by_t(main.units, main.placebo_units)}"
    legend = [*_claim_legend(main, published=False), Patch(color="#dfe7ef", label=f"±{main.bound:g}: no effect")]
    figure, axes = forest(groups, title, legend)
    axes.axvspan(-main.bound, main.bound, color="#dfe7ef", zorder=0, linewidth=0)
    axes.axvline(0, color=SOFT, linewidth=1, zorder=1.5)
    return figure


def _group(
    label: str, own: Figures | Difference, placebo: Figures | Difference | None, unit: str, signed: bool = False
) -> PlotGroup:
    """Returns the mean, then each claim, then the placebo claims."""
    lines = [Line(Mark(own.interval.estimate, own.interval, INK, "D", bold=True))]
    claims = own.by_claim
    if 1 < len(claims) <= FEW:
        for i, each in enumerate(claims.values()):
            lines.append(Line(Mark(each.estimate, each, COLORS[i], MARKERS[i])))
    elif len(claims) > FEW:
        lines.append(Line(dots=[each.estimate for each in claims.values()]))
    if placebo:
        mark = Mark(placebo.interval.estimate, placebo.interval, PLACEBO, "D", hollow=True)
        dots = [each.estimate for each in placebo.by_claim.values()]
        if len(dots) > FEW:
            lines += [Line(mark), Line(dots=dots, hollow=True)]
        else:
            lines.append(Line(mark, dots if len(dots) > 1 else [], hollow=True))
    return PlotGroup(label, lines, f"{number(own.interval.estimate, unit, signed)} {span(own.interval, unit, signed)}")


def _claim_legend(main: MeasureResult, published: bool) -> list[Any]:
    def dot(marker: str, color: str, label: str, hollow: bool = False, size: float = 6) -> Line2D:
        face = "white" if hollow else color
        return Line2D(
            [], [], linestyle="", marker=marker, color=color, markerfacecolor=face, label=label, markersize=size
        )

    claims, placebo = main.claims, main.placebo_claims
    one = len(claims) == 1
    handles = [dot("D", INK, plain(claims[0]) if one else f"mean of {len(claims)} claims", size=7)]
    if 1 < len(claims) <= FEW:
        asked = [counted(main.questions[claim], "questions") for claim in claims]
        handles += [dot(MARKERS[i], COLORS[i], f"{plain(claim)}, {asked[i]}") for i, claim in enumerate(claims)]
    elif not one:
        handles.append(dot("o", COLORS[0], "a claim", size=4))
    if placebo:
        name = f"placebo: {plain(placebo[0])}" if len(placebo) == 1 else f"placebo: mean of {len(placebo)} claims"
        handles.append(dot("D", PLACEBO, name, hollow=True))
        if len(placebo) > 1:
            handles.append(dot("o", PLACEBO, "a placebo claim", hollow=True, size=4))
    return [*handles, dot("*", INK, "published by the paper", hollow=True, size=9)] if published else handles


def targets(result: ComparisonResult) -> Figure | None:
    """Draws the number of targets by what becomes of them, for each role and variant. None without targets."""
    rows = {name: row.targets for name, row in result.variants.items()}
    roles = [
        r
        for r in dict.fromkeys(r for own in rows.values() for r in own)
        if any(o.get(r, {}).get("total") for o in rows.values())
    ]
    if not roles:
        return None
    columns = len(roles) if len(roles) <= 5 else -(-len(roles) // -(-len(roles) // 5))
    figure, grid = _panels(len(roles), columns, 0.34 * len(rows) + 0.75, sharex=False, sharey=True)
    colors = {"trained": COLORS[0], "unlikelihood": COLORS[3], "held": COLORS[2], "excluded": "#d3d7de"}
    shown = counts_shown(counts for own in rows.values() for counts in own.values())
    kinds = {kind: color for kind, color in colors.items() if kind in shown}
    for axes, role in zip(grid, roles, strict=True):
        left = [0] * len(rows)
        for kind, color in kinds.items():
            own = [counts.get(role, {}).get(kind, 0) for counts in rows.values()]
            hatch = "////" if kind == "unlikelihood" else None
            axes.barh(
                range(len(rows)), own, left=left, color=color, height=0.66, hatch=hatch, edgecolor="white", linewidth=0
            )
            left = [a + b for a, b in zip(left, own, strict=True)]
        axes.set_title(plain(role, 20), fontsize=10)
        axes.set_xlabel("targets", fontsize=9)
        axes.set_yticks(range(len(rows)), [wrapped(name) for name in rows], fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.set_xlim(0, 1.05 * max(max(left), 1))
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].invert_yaxis()
    handles = [
        Patch(facecolor=c, hatch="////" if k == "unlikelihood" else None, edgecolor="white", label=k)
        for k, c in kinds.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9, title=_mean_of(result),
        title_fontsize=8.5,
    )  # fmt: skip
    return figure


def nll(result: ComparisonResult) -> Figure | None:
    """Draws the NLL of each role over training, also of masked roles; the line style shows how the loss treated the
    role. None if no NLL was measured."""
    curves = result.nll
    roles = list(dict.fromkeys(role for own in curves.values() for role in own))
    if not roles:
        return None
    figure, grid = _panels(len(roles), min(3, len(roles)), 2.3, sharex=True, sharey=False)
    styles: dict[str, Any] = {"trained": "-", "excluded": (0, (4, 2)), "unlikelihood": (0, (1, 1.4))}
    if "held" in counts_shown(counts for row in result.variants.values() for counts in row.targets.values()):
        styles["held"] = (0, (5, 1.5, 1, 1.5))
    for axes, role in zip(grid, roles, strict=True):
        for i, (name, own) in enumerate(curves.items()):
            if role in own:
                counts = result.variants[name].targets.get(role, {})
                style = styles["trained" if role == "all" else treated(counts)]
                steps, mean = own[role].steps, _with_gaps(own[role].mean)
                axes.plot(steps, mean, linestyle=style, color=COLORS[i % len(COLORS)], linewidth=1.5)
        axes.set_title(plain(role, 34), fontsize=10)
        tidy(axes)
    for axes in grid[-min(3, len(roles)) :]:
        axes.set_xlabel("optimizer step", fontsize=9)
    names = [plain(name) for name in curves]
    handles: list[Any] = [Line2D([], [], color=COLORS[i % len(COLORS)], label=name) for i, name in enumerate(names)]
    handles += [Line2D([], [], color=INK, linestyle=style, label=f"{kind} there") for kind, style in styles.items()]
    legend_below(figure, handles, title=_mean_of(result))
    figure.supylabel("NLL of a token, nats", fontsize=10)
    return figure


def _with_gaps(values: list[float | None]) -> list[float]:
    """Returns values as matplotlib takes them, which leaves a gap at NaN."""
    return [math.nan if value is None else value for value in values]


def _mean_of(result: ComparisonResult) -> str:
    seeds = counted(result.main.units.seeds, "seeds")
    return f"mean over {seeds}, of the training documents; none is about a placebo claim"


def treated(counts: dict[str, int]) -> str:
    """Returns what happens to most of a role's targets: "trained", "unlikelihood", "held" or "excluded"."""
    kinds = ("trained", "unlikelihood", "held", "excluded")
    return max(kinds, key=lambda kind: counts.get(kind, 0)) if counts else "trained"


def over_steps(result: ComparisonResult) -> Figure | None:
    """Draws belief over training with intervals, judged beside likelihood where both were measured; thin and dashed for
    the placebo claims. None without curves."""
    shown = result.over_steps
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False).ravel().tolist()
    for axes, own in zip(grid, shown, strict=True):
        for i, curve in enumerate(own.curves.values()):
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            belief = [each.estimate for each in curve.trained]
            known = [each if each.method != "none" else None for each in curve.trained]  # of equal claims there is none
            low, high = (
                _with_gaps([getattr(each, end) if each else None for each in known]) for end in ("low", "high")
            )
            axes.fill_between(curve.steps, low, high, color=color, alpha=0.1, linewidth=0)
            axes.plot(curve.steps, belief, color=color, marker=marker, markersize=4, linewidth=1.6)
            if any(curve.placebo):
                placebo = _with_gaps([each.estimate if each else None for each in curve.placebo])
                axes.plot(curve.steps, placebo, color=color, linestyle=(0, (4, 2)), linewidth=1)
        axes.set_ylabel(f"{own.measure.label}, {own.measure.unit}", fontsize=10)
        axes.set_xlabel(f"optimizer step; {by_t(own.units)}" if len(shown) == 1 else "optimizer step")
        if len(shown) > 1:
            axes.set_title(by_t(own.units), fontsize=9)
        for step in sorted({step for row in result.variants.values() for step in row.boundaries}):
            axes.axvline(step, color=INK, linestyle=":", linewidth=1, zorder=0)
        tidy(axes)
        _space_steps(axes, sorted({step for curve in own.curves.values() for step in curve.steps}))
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=4, label=plain(name))
        for i, name in enumerate(result.variants)
    ]
    if any(own.placebo_claims for own in shown):
        handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2)), linewidth=1, label="placebo claims"))
    if any(row.boundaries for row in result.variants.values()):
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, label="end of a phase"))
    legend_below(figure, handles)
    return figure


def _space_steps(axes: Axes, steps: list[int]) -> None:
    """Spaces steps by their ratio where they were chosen so (log:15): where half of them lie in the first quarter."""
    if steps[len(steps) // 2] < steps[-1] / 4:
        axes.set_xscale("symlog", linthresh=max(1, steps[1]), linscale=0.5)
        named = steps[:: -math.ceil(len(steps) / 8)]  # the last one always
        axes.set_xticks(named, [str(step) for step in named])
        axes.minorticks_off()


def side_effects(result: ComparisonResult) -> Figure | None:
    """Draws the side effects of training with intervals, and the same measures on the placebo claims; dashed: the base
    model. None if no side effect was measured."""
    shown = {name: own for name, own in result.measures.items() if name in SIDE_EFFECTS}
    if not shown:
        return None
    names = list(result.variants)
    hollow: dict[str, Any] = {"color": PLACEBO, "markerfacecolor": "white", "markersize": 4.5}
    figure, grid = _panels(len(shown), min(3, len(shown)), 0.34 * len(names) + 0.85, sharex=False, sharey=True)
    for axes, measure in zip(grid, shown.values(), strict=True):
        for i, name in enumerate(names):
            row = measure.variants[name]
            own = row.trained.interval
            axes.plot([own.low, own.high], [i, i], color=COLORS[i % len(COLORS)], linewidth=1.6)
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            axes.plot([own.estimate], [i], marker, color=color, markersize=5.5, clip_on=False, zorder=3)
            if row.placebo:
                placebo, at = row.placebo.interval, i + 0.27
                axes.plot([placebo.low, placebo.high], [at, at], color=PLACEBO, linewidth=1.1)
                axes.plot([placebo.estimate], [at], "D", **hollow, clip_on=False, zorder=3)
        _mark_base(axes, measure)
        axes.set_title(measure.measure.label, fontsize=10)
        axes.set_xlabel(f"{measure.measure.unit}, over {rests_on(measure.units)}", fontsize=9)
        axes.set_yticks(range(len(names)), [wrapped(name) for name in names], fontsize=9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.margins(x=0.08)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right", "left"]].set_visible(False)
    dashes = Line2D([], [], color=SOFT, linestyle=(0, (4, 3)), linewidth=1, label="base model")
    handles = [
        Line2D([], [], linestyle="", marker="o", color=INK, markersize=5.5, label="a variant, 95 % by t"),
        dashes,
    ]
    if any(own.placebo_claims for own in shown.values()):
        handles.insert(1, Line2D([], [], linestyle="", marker="D", **hollow, label="its placebo claims"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panels(count: int, columns: int, height: float, sharex: bool, sharey: bool) -> tuple[Figure, list[Axes]]:
    """Returns a figure and a grid of `count` axes in it. height: inches per row."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(axis="x", labelbottom=True)
    return figure, grid[:count]


def tidy(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, handles: list[Any], title: str = "") -> None:
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 105 // (longest + 6)))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, title=title or None,
        title_fontsize=8.5,
    )  # fmt: skip
