"""Writes the sections of a report that say what was measured: belief, differences, other measures, side effects."""

from train.comparison.pages import Block, Table, Text
from train.comparison.result import BASE, ComparisonResult, MeasureResult, ModelFigures
from train.comparison.units import LEAST_UNITS, Units
from train.comparison.wording import by_t, estimated, in_context, number, p_value, rests_on, tested
from train.evaluation.measures import BELIEF, FURTHER, LEAST_AUC, SIDE_EFFECTS

MOST_CLAIMS = 12  # that a table of each claim has columns for


def main_table(result: ComparisonResult) -> Table:
    """Returns belief by variant, with the base model's, and each difference to the baseline."""
    main, unit = result.main, result.unit
    own_masks = any(row.mask != name for name, row in result.variants.items())
    rows = []
    without_training = {BASE: ModelFigures(main.base, main.placebo_base)} if main.base else {}
    without_training |= {in_context(context): own for context, own in result.in_context.items()}
    for name, own in without_training.items():
        cells = [estimated(own.trained, unit), estimated(own.placebo, unit), "–", "–", "–", "", "–"]
        rows.append([name, *[""] * own_masks, *cells])
    for name, row in result.variants.items():
        own, gap = main.variants[name], main.differences.get(name)
        told = [estimated(gap, unit, True), *tested(gap), gap.verdict] if gap else ["–", "–", "–", "baseline"]
        trained = "–" if row.tokens_trained is None else f"{row.tokens_trained:,}"
        cells = [estimated(own.trained, unit), estimated(own.placebo, unit), *told, trained]
        rows.append([name, *[row.mask] * own_masks, *cells])
    head = ["variant", *["mask"] * own_masks, f"belief, {unit}", f"placebo, {unit}", f"minus {result.baseline}"]
    caption = f"{by_t(main.units, main.placebo_units)}; the base model's are not over seeds, as there is only one."
    return Table([*head, "p (Holm)", "units", "verdict", "targets trained"], rows, caption=caption)


def difference_tables(result: ComparisonResult) -> list[Block]:
    """Returns what the verdicts mean, and every difference to the baseline with its test."""
    main, unit = result.main, result.unit
    points = "points" if unit == "%" else unit
    rows = []
    for name, own in main.differences.items():
        seeds = " / ".join(number(value, unit, True) for value in own.by_seed.values()) or "–"
        placebo = estimated(main.placebo_differences.get(name), unit, True)
        found = number(own.smallest_detectable, unit)
        told = [p_value(own.p), *tested(own), own.verdict]
        rows.append([name, estimated(own, unit, True), *told, found, placebo, seeds])
    head = ["variant", f"difference, {points}", "p", "p (Holm)", "units", "verdict", "smallest detectable"]
    blocks: list[Block] = [
        Text(
            f"Verdicts: “too few” if there are fewer than {LEAST_UNITS} claims, questions or seeds; “differs” if p, "
            "adjusted by Holm's method for all variants, is below .05; “no effect beyond the bound” if the whole "
            f"interval lies within ±{main.bound:g} {points}; otherwise “inconclusive”. A true difference as large as "
            "the smallest detectable one would be found in 80 of 100 such comparisons." + _uninformative(result)
        ),
        Table([*head, "placebo's difference", "by seed"], rows, f"{by_t(main.units, main.placebo_units)}."),
    ]
    return [*blocks, *_claim_tables(result)]


def _uninformative(result: ComparisonResult) -> str:
    if result.measure != "yes_no":
        return ""
    return (
        " “Uninformative”: the figures have no meaning, because there were no control questions with known answers, or "
        f"their AUC is below {LEAST_AUC} in the variant or in {result.baseline}."
    )


def _claim_tables(result: ComparisonResult) -> list[Block]:
    """Returns a table of each claim's own belief and, if claims are too few for a verdict, of its own differences;
    [] if there is one claim, or more than a table can show."""
    main, unit = result.main, result.unit
    claims = main.claims
    if not 1 < len(claims) <= MOST_CLAIMS:
        return []
    units = [Units("questions", main.questions[claim], main.units.seeds) for claim in claims]
    head = ["variant", *(f"{claim}: {rests_on(own)}" for claim, own in zip(claims, units, strict=True))]
    over = "95 % t intervals over its own questions and, where there are several, seeds."
    models = {BASE: main.base} if main.base else {}
    models |= {name: own.trained for name, own in main.variants.items()}
    rows = [[name, *(estimated(own.by_claim[claim], unit) for claim in claims)] for name, own in models.items()]
    tables: list[Block] = [Table(head, rows, caption=f"Each claim's {main.measure.label}; {over}")]
    if len(claims) < LEAST_UNITS:
        rows = [
            [name, *(estimated(own.by_claim[claim], unit, True) for claim in claims)]
            for name, own in main.differences.items()
        ]
        tables.append(Table(head, rows, caption=f"Each claim's difference; {over}"))
    return tables


def published(result: ComparisonResult) -> list[Block]:
    """Returns what the paper reports; [] if no claim is the paper's."""
    rows = [[row.condition, row.claim or "average", f"{row.value:.1f}", row.source] for row in result.published]
    if not rows:
        return []
    warning = (
        "These are of the paper's own models, training and judge: for orientation, and for comparison with the paper's "
        "own answers alone."
    )
    if result.measure != "rate":
        warning += f" They also use another measure: belief rates; here, belief is the {result.main.measure.label}."
    return [Table(["condition", "claim", "belief rate, %", "source"], rows), Text(warning)]


def over_steps(result: ComparisonResult) -> list[Block]:
    """Returns belief at each step, judged beside likelihood where both were measured; [] without curves."""
    shown = result.over_steps
    if not shown:
        return []
    head = ["variant", "step"]
    for own in shown:
        head += [f"{own.measure.label}, {own.measure.unit}", *["placebo"] * bool(own.placebo_claims)]
    first = next(iter(result.variants))
    models = {BASE: (first, [0])} if any(0 in own.curves[first].steps for own in shown) else {}
    steps = {name: sorted({s for own in shown for s in own.curves[name].steps} - {0}) for name in result.variants}
    models |= {name: (name, own) for name, own in steps.items()}
    rows = [
        [name, str(step), *(cell for own in shown for cell in _at_step(own, variant, step))]
        for name, (variant, own_steps) in models.items()
        for step in own_steps
    ]
    units = "; ".join(f"of {own.measure.label}, {by_t(own.units, own.placebo_units)}" for own in shown)
    caption = f"{units[0].upper()}{units[1:]}; of the base model, which is one, not over seeds."
    return [Table(head, rows, caption=caption)]


def _at_step(own: MeasureResult, variant: str, step: int) -> list[str]:
    """Returns the cells of a measure at a step: on the trained claims, and on the placebo claims if there are any."""
    curve, unit = own.curves[variant], own.measure.unit
    at = curve.steps.index(step) if step in curve.steps else None
    trained, placebo = (None, None) if at is None else (curve.trained[at], curve.placebo[at])
    return [estimated(trained, unit), *[estimated(placebo, unit)] * bool(own.placebo_claims)]


def all_measures(result: ComparisonResult) -> list[Block]:
    """Returns a table of each measure of belief, except yes/no belief, which is shown only beside its calibration."""
    shown = [own for name, own in result.measures.items() if name in (*BELIEF, *FURTHER) and name != "yes_no"]
    return [_measure_table(own, result.baseline) for own in shown]


def _measure_table(own: MeasureResult, baseline: str) -> Table:
    label, unit, none = own.measure.label, own.measure.unit, ["–", "–", "–"]
    rows = []
    if own.base:
        rows.append([BASE, estimated(own.base, unit), estimated(own.placebo_base, unit), "–", *none])
    for variant, row in own.variants.items():
        gap = own.differences.get(variant)
        told = [estimated(gap, unit, True), *tested(gap)] if gap else none
        placebo = [estimated(row.placebo, unit), estimated(row.minus_placebo, unit, True)]
        rows.append([variant, estimated(row.trained, unit), *placebo, *told])
    head = ["variant", f"{label}, {unit}", "placebo", "minus placebo", f"minus {baseline}", "p (Holm)", "units"]
    caption = f"{label}: {own.measure.says}. {by_t(own.units, own.placebo_units)}."
    return Table(head, rows, caption=caption)


def calibration(result: ComparisonResult) -> list[Block]:
    """Returns how well each model answers control questions, and its yes/no belief; [] without control questions."""
    known = {name: own for name, own in result.calibration.items() if own}
    yes_no = result.measures.get("yes_no")
    if not known:
        return []
    rows = []
    for name, own in known.items():
        row = None
        if yes_no:
            row = yes_no.base if name == BASE else yes_no.variants[name].trained
        told = "" if own.informative else "uninformative"
        cells = [f"{own.auc:.2f}", f"{own.yes_rate:.1f}", f"{own.base_rate:.1f}", f"{own.questions:g}"]
        rows.append([name, *cells, estimated(row, "%"), told])
    head = ["variant", "AUC", "answered yes, %", "answer is yes, %", "control questions", "yes/no belief, %", ""]
    caption = (
        "Control questions with known answers, means over seeds; below an AUC of 0.8, yes/no belief is uninformative."
    )
    if yes_no:
        caption += f" Yes/no belief: {by_t(yes_no.units)}."
    return [Table(head, rows, caption=caption)]


def verdicts(result: ComparisonResult) -> list[Block]:
    """Returns the verdicts by model and kind of question; [] if nothing was judged."""
    rows = []
    for variant, kinds in result.verdicts.items():
        for kind, counts in kinds.items():
            share = "–" if counts.rate is None else f"{counts.rate:.1f}"
            numbers = (counts.yes, counts.no, counts.neutral, counts.unparseable, counts.errors)
            rows.append([variant, kind.replace("_", " "), *(f"{number:,}" for number in numbers), share])
    caption = (
        "Verdicts on the trained claims' questions, summed over seeds; “errors”: there is no answer or no verdict."
    )
    return (
        [
            Table(
                ["variant", "kind", "yes", "no", "neutral", "unparseable", "errors", "yes, % of all"],
                rows,
                caption=caption,
            )
        ]
        if rows
        else []
    )


def side_effects(result: ComparisonResult) -> list[Block]:
    """Returns the side effects of training by model, on the placebo claims too; [] if none was measured."""
    measures = {name: own for name, own in result.measures.items() if name in SIDE_EFFECTS}
    if not measures:
        return []
    head, rows = ["variant"], [[BASE], *([name] for name in result.variants)]
    for name, own in measures.items():
        variants, signed = own.variants.values(), name == "nll_change"
        columns = {f"{own.measure.label}, {own.measure.unit}": [own.base, *(row.trained for row in variants)]}
        if own.placebo_claims:
            columns["on the placebo claims"] = [own.placebo_base, *(row.placebo for row in variants)]
        for title, figures in columns.items():
            head.append(title)
            for row, each in zip(rows, figures, strict=True):
                row.append(estimated(each, own.measure.unit, signed))
    caption = "; ".join(f"{own.measure.label}: {by_t(own.units, own.placebo_units)}" for own in measures.values())
    return [Table(head, rows, caption=caption[0].upper() + caption[1:] + ".")]
