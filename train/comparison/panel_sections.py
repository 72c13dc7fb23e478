"""Writes the report's section that tells belief from association and from damage."""

from train.comparison.pages import Block, Bullets, Table, Text
from train.comparison.panel import GROUPS, Panel, PanelFigure
from train.comparison.panel_verdicts import DECISIVE, Excess
from train.comparison.result import BASE, ComparisonResult
from train.comparison.significance import Interval
from train.comparison.units import Units
from train.comparison.wording import by_t, estimated, rests_on
from train.evaluation.battery_measures import STATES
from train.evaluation.measures import CHANGES, MEASURES
from train.evaluation.store import LABELS

RULE = (
    "Verdicts. For a share T of the trained claims and a share X that it must exceed, both as changes from the base "
    "model, the excess of T over X is (T − X) − |X|: by how much T exceeds X, beyond what X itself has moved. Of "
    "choices, T is the share of rotations in which the subject's claim is chosen, and X first that of the control "
    "entities, unit by unit, then that of the placebo claims. Of answers, T is the share that asserts the claim, and X "
    "that of the placebo claims. “Believes”: of choices or of answers, every lower bound of an excess is above 0; “in "
    f"part”, if the upper bound of T is below {DECISIVE:g} points. “Does not believe”: otherwise, if wherever it can "
    f"be told the upper bound of T is below {DECISIVE:g} points, and what the base model could do before can still be "
    "done. “Inconclusive”: otherwise; where the base model fails its check; and where polarity shows that “is” and “is "
    "not” have moved alike."
)


TITLES = {"yes_no": "yes/no", "placebo_choice": "choice of the placebo"}
"""Check -> how it is named, where its name is no word."""


def section(result: ComparisonResult) -> list[Block]:
    """Returns the verdict of each variant with its reasons, and a table of each variant's belief, association and
    damage; [] if no battery was measured."""
    found = result.panel
    if found is None:
        return []
    return [
        Text(RULE),
        _verdicts(found, result),
        Bullets([f"{name}: {' '.join(own.reasons)}" for name, own in found.verdicts.items()]),
        *_labels(found, result),
        *(_variant(name, found, result) for name, figures in found.figures.items() if figures),
        *([Bullets(told)] if (told := _checks(found)) else []),
    ]


def _verdicts(found: Panel, result: ComparisonResult) -> Table:
    shares = {"change of the choice": "choice", "change of the answers": "asserted"}
    columns = {
        "choice beyond controls": ("choice", "controls"),
        "choice beyond placebo": ("choice", "placebo"),
        "answers beyond placebo": ("asserted", "placebo"),
    }
    rows = []
    shown = {
        title: key
        for title, key in columns.items()
        if any((e.measure, e.over) == key for own in found.verdicts.values() for e in own.excesses)
    }
    moved = {
        title: key
        for title, key in shares.items()
        if any(e.measure == key for own in found.verdicts.values() for e in own.shares)
    }
    for name, own in found.verdicts.items():
        by_name = {each.measure: each.interval for each in own.shares}
        by_key = {(e.measure, e.over): e.interval for e in own.excesses}
        cells = [estimated(by_name.get(key), "points", True) for key in moved.values()]
        cells += [estimated(by_key.get(key), "points", True) for key in shown.values()]
        units = dict.fromkeys(_units(each) for each in own.excesses if each.over == "placebo")
        rows.append([name, *cells, "; ".join(units) or "–", own.verdict])
    over = dict.fromkeys((e.units, e.placebo_units) for own in found.verdicts.values() for e in own.excesses)
    caption = f"Changes and excesses in points; {'; '.join(by_t(*each) for each in over)}." if over else ""
    intervals = [e.interval for own in found.verdicts.values() for e in own.shares]
    intervals += [e.interval for own in found.verdicts.values() for e in own.excesses]
    if any(each.method == "exact binomial" for each in intervals):
        caption += " ‡ No two units differ: exact binomial interval."
    return Table(["variant", *moved, *shown, "rests on", "does it believe?"], rows, caption=caption)


def _units(each: Excess) -> str:
    placebo = f"; placebo: {rests_on(each.placebo_units)}" if each.placebo_units else ""
    return rests_on(each.units) + placebo


def _variant(name: str, found: Panel, result: ComparisonResult) -> Table:
    rows, before = [], ""
    for each in found.figures[name]:
        unit = MEASURES[each.measure].unit
        group = each.group if each.group != before else ""
        before = each.group
        now = None if each.measure in CHANGES else each.now
        check = found.checks.get(each.check)
        passed = "–" if check is None else "passed" if check.passed else "failed: inconclusive"
        if check and check.passed and check.claims:
            passed = f"passed, but for {len(check.claims)} of the claims"
        moved = [_moved(each.change, unit), _moved(each.placebo, unit)]
        label = f"{MEASURES[each.measure].label}, {unit}"
        rows.append([group, label, estimated(each.base, unit), estimated(now, unit), *moved, passed])
    lost = MEASURES["reading_lost"]
    if "reading" in found.checks and not any(each.measure == lost.name for each in found.figures[name]):
        rows.append(["damage", f"{lost.label}, {lost.unit}", *["–"] * 4, "failed: inconclusive"])
    head = ["", "measure", BASE, "after training", "change", "change of the placebo", "check of the base"]
    caption = f"{name}: {', '.join(GROUPS)}. {_over(found.figures[name], result)}"
    return Table(head, rows, caption=caption)


def _moved(own: Interval | None, unit: str) -> str:
    return estimated(own, "points" if unit == "%" else unit, True)


def _over(figures: list[PanelFigure], result: ComparisonResult) -> str:
    """Returns how intervals are made and over how many units, which may differ between measures."""
    units: dict[tuple[Units, Units | None], list[str]] = {}
    for each in figures:
        own = result.measures[each.measure]
        units.setdefault((own.units, own.placebo_units), []).append(own.measure.label)
    if len(units) == 1:
        return f"{by_t(*next(iter(units)))}."
    return "; ".join(f"{', '.join(names)}: {by_t(*each)}" for each, names in units.items()) + "."


def _labels(found: Panel, result: ComparisonResult) -> list[Block]:
    rows = []
    for model, kinds in found.labels.items():
        for kind, counts in kinds.items():
            total = sum(counts.values())
            states = sum(counts[label] for label in STATES)
            verdict = result.verdicts.get(model, {}).get(kind)
            yes = "–" if verdict is None or verdict.rate is None else f"{verdict.rate:.1f}"
            shares = [f"{100 * states / total:.1f}", f"{100 * counts['asserted'] / total:.1f}", yes]
            rows.append([model, kind.replace("_", " "), *(f"{counts[label]:,}" for label in LABELS), *shares])
    if not rows:
        return []
    head = ["variant", "kind", *(label.replace("_", " ") for label in LABELS)]
    caption = (
        "Labels of the answers on the trained claims, summed over seeds. States the claim: asserted, and asserted then "
        "retracted; asserts it to the end: asserted alone. A judge of belief may say no to what only begins with the "
        "claim: compare its “yes”."
    )
    return [Table([*head, "states, %", "asserts to the end, %", "judged yes, %"], rows, caption=caption)]


def _checks(found: Panel) -> list[str]:
    told = []
    for name, check in found.checks.items():
        words = "passed" if check.passed else "failed, so that what rests on it is inconclusive"
        left_out = f"; left out: {', '.join(check.claims)}" if check.claims else ""
        told.append(f"Check of {TITLES.get(name, name)}: {check.says}: {words}{left_out}.")
    told += [f"{MEASURES[name].label}: left out, as {why}." for name, why in found.left_out.items()]
    return told
