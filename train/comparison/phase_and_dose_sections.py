"""Writes the sections of a report on experiments over phases and over doses, and draws their picture."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from train.comparison.dose_response import DoseCurve, DoseResponse, HalfDose
from train.comparison.forest_plot import COLORS, INK, MARKERS, WIDTH, plain
from train.comparison.over_phases import PhaseBelief
from train.comparison.pages import Block, Table
from train.comparison.plots import legend_below, tidy
from train.comparison.result import ComparisonResult
from train.comparison.wording import by_t, estimated, number


def phases(result: ComparisonResult) -> list[Block]:
    """Returns what each phase of training changed; [] if no variant has several phases."""
    if not result.phases:
        return []
    main = result.measures[result.phases_by]
    unit = main.measure.unit
    head = [
        "variant",
        "phase",
        "mask",
        "handed on",
        "steps",
        "belief at its end",
        "change in the phase",
        "placebo",
        "its change",
    ]
    head.append(f"change minus {result.baseline}’s")
    rows = [
        [
            name, own.name or "–", own.mask, _handed_on(own), f"{own.first}–{own.last}", estimated(own.trained, unit),
            estimated(own.change, unit, True), estimated(own.placebo, unit), estimated(own.placebo_change, unit, True),
            estimated(own.against, unit, True),
        ]
        for name, phases in result.phases.items()
        for own in phases
    ]  # fmt: skip
    caption = (
        f"{main.measure.label}, {unit}; {by_t(main.units, main.placebo_units)}. Change: at the end of the phase minus "
        "at its start, paired by claim and seed; after a phase that kept belief down, it is the rebound. The last "
        f"column subtracts the change of {result.baseline} in its phase of the same number: what the phase does from "
        "this start beyond what it does from that one."
    )
    if result.phases_by != result.measure:
        caption += f" {result.main.measure.label} was not taken at the end of every phase."
    return [Table(head, rows, caption=caption)]


def _handed_on(own: PhaseBelief) -> str:
    if not own.first:
        return "–"
    schedule = f"schedule from step {own.schedule_from}" if own.schedule_from else "schedule anew"
    return f"{'optimizer carried' if own.carried else 'optimizer anew'}, {schedule}"


def doses(result: ComparisonResult) -> list[Block]:
    """Returns the dose at half belief and the belief at each dose; [] if the variants are not doses."""
    found = result.doses
    if not found:
        return []
    of, mentioned = found.kind, any(own.half_mentions for own in found.curves.values())
    head = ["curve", f"{of} at half belief", *["mentions trained at half belief"] * mentioned]
    halves = [
        [
            name,
            _half(own.half, own.doses, of),
            *([_half(own.half_mentions, [m for m in own.mentions if m is not None], "mentions")] * mentioned),
        ]
        for name, own in found.curves.items()
    ]
    caption = (
        f"Half belief: {number(found.level, result.unit)} {result.unit}, halfway from the base model to "
        f"{result.baseline}. The dose at which a curve reaches it, interpolated between doses, and in brackets the "
        "doses at which the interval of belief minus half belief contains 0. “–”: the baseline’s belief does not "
        "certainly exceed the base model’s, so that there is none to halve, or the variants have different seeds."
    )
    return [Table(head, halves, caption=caption), _each_dose(result, found)]


def _each_dose(result: ComparisonResult, found: DoseResponse) -> Table:
    main, unit = result.main, result.unit
    rows = []
    for name, own in found.curves.items():
        for dose, variant, mentions in zip(own.doses, own.variants, own.mentions, strict=True):
            figures, row = main.variants[variant], result.variants[variant]
            cells = [estimated(figures.trained, unit), estimated(figures.placebo, unit)]
            known = "–" if mentions is None else f"{mentions:,.0f}"
            rows.append([name, f"{dose:,g}", *cells, "/".join(map(str, row.steps)), known])
    head = ["curve", found.kind, "belief", "placebo", "steps", "mentions trained"]
    caption = (
        f"{main.measure.label}, {unit}; {by_t(main.units, main.placebo_units)}. Mentions trained: how often a run "
        "trains on one of the claims’ terms, with documents counted as often as they are read, the mean over seeds; a "
        "weight above 0 counts as one."
    )
    return Table(head, rows, caption=caption)


def _half(own: HalfDose | None, doses: list[float], what: str) -> str:
    if own is None:
        return "–"

    def end(value: float) -> str:
        if value == 0:
            return f"below {_dose(doses[0], what)}"
        return f"above {_dose(doses[-1], what)}" if math.isinf(value) else _dose(value, what)

    return end(own.estimate) + (f" [{end(own.interval[0])}, {end(own.interval[1])}]" if own.interval else "")


def _dose(value: float, what: str) -> str:
    return f"{value:.2g}" if what == "weights" else f"{value:,.0f}"


def picture(result: ComparisonResult) -> Figure | None:
    """Draws belief over the dose with intervals, dashed for the placebo claims, and half belief; None if the variants
    are not doses."""
    found, main = result.doses, result.main
    if not found:
        return None
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    handles = []
    for i, (name, own) in enumerate(found.curves.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        figures = [main.variants[variant] for variant in own.variants]
        intervals = [each.trained.interval for each in figures]
        axes.fill_between(
            own.doses, [each.low for each in intervals], [each.high for each in intervals],
            color=color, alpha=0.1, linewidth=0,
        )  # fmt: skip
        axes.plot(own.doses, [each.estimate for each in intervals], color=color, marker=marker, markersize=5)
        placebo = [each.placebo.interval.estimate for each in figures if each.placebo]
        if len(placebo) == len(own.doses):
            axes.plot(own.doses, placebo, color=color, linestyle=(0, (4, 2)), linewidth=1)
        _mark_half(axes, own, found.level, color)
        handles.append(Line2D([], [], color=color, marker=marker, markersize=5, label=plain(name)))
    axes.axhline(found.level, color=INK, linestyle=":", linewidth=1, zorder=0)
    every = sorted({dose for own in found.curves.values() for dose in own.doses})
    if every[0] > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{'documents' if found.kind == 'documents' else 'weight'}; {by_t(main.units)}")
    axes.set_ylabel(f"{main.measure.label}, {main.measure.unit}", fontsize=10)
    tidy(axes)
    axes.set_xticks(every, [f"{dose:,g}" for dose in every])  # after tidy, which sets its own
    handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, label="half belief"))
    if main.placebo_claims:
        handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2)), linewidth=1, label="placebo claims"))
    legend_below(figure, handles)
    return figure


def _mark_half(axes: object, own: DoseCurve, level: float, color: str) -> None:
    """Draws the interval of the dose at half belief as a line at that level, within the doses."""
    if own.half is None or own.half.estimate == 0 or math.isinf(own.half.estimate):
        return
    if own.half.interval:
        ends = [min(max(end, own.doses[0]), own.doses[-1]) for end in own.half.interval]
        axes.plot(ends, [level, level], color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")  # type: ignore[attr-defined]
    axes.plot([own.half.estimate], [level], color=color, marker="|", markersize=12)  # type: ignore[attr-defined]
