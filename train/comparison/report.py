"""Writes the report of a comparison: comparison.json, comparison.md, comparison.html and PNGs."""

import json
from pathlib import Path
from typing import Any

from train.comparison import plots
from train.comparison.analysis import analyse
from train.comparison.caveats import by_t, in_context, number, rests_on, span
from train.comparison.compared import Comparison
from train.comparison.pages import Bullets, Picture, Section, Table, Text, as_html, as_markdown
from train.comparison.units import LEAST_UNITS
from train.evaluation.measures import LEAST_AUC, SIDE_EFFECTS
from train.evaluation.store import VERDICTS
from train.runtime.errors import UserError
from train.runtime.outputs import write_whole

PICTURES = {
    "belief": (plots.belief, "Belief per variant and claim, with intervals and placebo claims"),
    "differences": (plots.paired_differences, "Differences to the baseline, with intervals and the bound of no effect"),
    "curves": (plots.over_steps, "Belief over training, with placebo claims"),
    "targets": (plots.targets, "Targets trained, pushed away and excluded, per role"),
    "nll": (plots.nll, "NLL of each role over training"),
    "side_effects": (plots.side_effects, "Facts, coherence and held-out text after training"),
}


SHOWN = 20  # maximum number of texts listed that occur in the training documents


def write_report(comparison: Comparison, directory: str | Path) -> dict[str, Any]:
    """Writes the report into the directory, which is created if needed, and returns the content of comparison.json.
    Raises UserError if the comparison has nothing to compare, or the directory cannot be written."""
    result = analyse(comparison)
    place = Path(directory)
    try:
        place.mkdir(parents=True, exist_ok=True)
        drawn = set()
        for name, (draw, _) in PICTURES.items():
            figure = draw(result)
            if figure is None:
                (place / f"{name}.png").unlink(missing_ok=True)  # left by an earlier report
            else:
                figure.savefig(place / f"{name}.png", dpi=150)
                drawn.add(name)
        shown = sections(result, drawn)
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(place / "comparison.json", text)
        (place / "comparison.md").write_text(as_markdown(result["title"], shown), encoding="utf-8")
        (place / "comparison.html").write_text(as_html(result["title"], shown, place), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{place}: the report cannot be written ({error.strerror}). Give another directory.") from None
    return result


def sections(result: dict[str, Any], drawn: set[str]) -> list[Section]:
    """Returns the sections of the report that have content. drawn: the names of the pictures that exist."""

    def picture(name: str) -> list[Picture]:
        return [Picture(f"{name}.png", PICTURES[name][1])] if name in drawn else []

    every: list[tuple[str, list[Any]]] = [
        ("Result", [Text(_summary(result)), _main_table(result), *picture("belief")]),
        ("Read this with it", [Bullets(result["notes"])] if result["notes"] else []),
        (f"Differences to {result['baseline']}", [*picture("differences"), *_difference_tables(result)]),
        ("Published values", _published(result)),
        ("Belief over training", picture("curves")),
        ("All measures", _all_measures(result)),
        ("Answers and calibration", [*_verdicts(result), *_calibration(result)]),
        ("Targets trained and excluded", [*picture("targets"), *_targets(result)]),
        ("NLL per role over training", [*picture("nll"), *_nll(result)]),
        ("Mentions that are still trained", _leak(result)),
        ("Evaluation in the training documents", _contamination(result)),
        ("Side effects", [*picture("side_effects"), *_side_effects(result)]),
        ("How the figures are made", _method(result)),
        ("Data, order and start", _identity(result)),
    ]
    return [Section(title, blocks) for title, blocks in every if blocks]


def _summary(result: dict[str, Any]) -> str:
    main = result["measures"][result["measure"]]
    return (
        f"Belief is the {result['label']} ({result['unit']}): {result['definition']}. Trained: "
        f"{_named(main['claims'], 'claim')}, with {main['questions']} questions and {main['answers']} answers a run. "
        f"Placebo, which no document is about: {_named(main['placebo_claims'], 'claim')}. "
        f"{_named([''] * main['seeds'], 'seed')}. Independent units: {rests_on(main['units'])}."
    )


def _named(names: list[str], what: str) -> str:
    """Returns how many there are and, if they are few, their names."""
    if not names:
        return "none"
    count = f"{len(names)} {what}" + "s" * (len(names) > 1)
    return f"{count} ({', '.join(names)})" if len(names) <= 8 and all(names) else count


def _estimate(row: dict[str, Any] | None, unit: str, signed: bool = False) -> str:
    if row is None:
        return "–"
    mark = "‡" if row.get("method") == "exact binomial" else ""
    if row.get("method") == "none":
        return number(row["estimate"], unit, signed)
    return f"{number(row['estimate'], unit, signed)} {span(row['interval'], unit, signed)}{mark}"


def p_value(value: float | None) -> str:
    """Returns a p as reports print it, such as "< .001" or ".012"; "–" for None."""
    if value is None:
        return "–"
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0") if value < 1 else "1"


def _tested(gap: dict[str, Any]) -> list[str]:
    """Returns the cells for p, adjusted for all variants, and for the units that it rests on."""
    return [p_value(gap["p_holm"]), rests_on(gap["units"])]


def _main_table(result: dict[str, Any]) -> Table:
    main, unit = result["measures"][result["measure"]], result["unit"]
    own_masks = any(row["mask"] != name for name, row in result["variants"].items())
    rows = []
    if base := main["base"]["trained"]:
        placebo = _estimate(main["base"]["placebo"], unit)
        rows.append(["base model", *[""] * own_masks, _estimate(base, unit), placebo, "–", "–", "–", "", "–"])
    for context, own in result["in_context"].items():
        cells = [_estimate(own, unit), _estimate(own["placebo"], unit), "–", "–", "–", "", "–"]
        rows.append([in_context(context), *[""] * own_masks, *cells])
    for name, row in result["variants"].items():
        own, gap = main["variants"][name], row["difference"]
        told = [_estimate(gap, unit, True), *_tested(gap), gap["verdict"]] if gap else ["–", "–", "–", "baseline"]
        trained = "–" if row["tokens_trained"] is None else f"{row['tokens_trained']:,}"
        rows.append(
            [name, *[row["mask"]] * own_masks, _estimate(own, unit), _estimate(own["placebo"], unit), *told, trained]
        )
    head = ["variant", *["mask"] * own_masks, f"belief, {unit}", f"placebo, {unit}", f"minus {result['baseline']}"]
    caption = f"{by_t(main['units'], main['placebo_units'])}; of the base model, which is one, not over seeds."
    return Table([*head, "p (Holm)", "units", "verdict", "targets trained"], rows, caption=caption)


def _difference_tables(result: dict[str, Any]) -> list[Any]:
    main, unit = result["measures"][result["measure"]], result["unit"]
    points = "points" if unit == "%" else unit
    rows = []
    for name, own in main["differences"].items():
        seeds = " / ".join(number(value, unit, True) for value in own["by_seed"].values()) or "–"
        placebo = _estimate(main["placebo_differences"].get(name), unit, True)
        found = number(own["smallest_detectable"], unit)
        told = [p_value(own["p"]), *_tested(own), own["verdict"]]
        rows.append([name, _estimate(own, unit, True), *told, found, placebo, seeds])
    head = ["variant", f"difference, {points}", "p", "p (Holm)", "units", "verdict", "smallest detectable"]
    blocks: list[Any] = [
        Text(
            f"Verdicts: “too few” claims, questions or seeds, where these are fewer than {LEAST_UNITS}; “differs” "
            "where p, adjusted by Holm for all variants, is below .05; “no effect beyond the bound” only where the "
            f"whole interval lies within ±{main['bound']:g} {points}; else “not told apart”, and a true difference as "
            "large as the smallest detectable one would have been found in 80 of 100 such comparisons."
            + _uninformative(result)
        ),
        Table([*head, "placebo's difference", "by seed"], rows, f"{by_t(main['units'], main['placebo_units'])}."),
    ]
    return [*blocks, *_claim_table(result)]


def _uninformative(result: dict[str, Any]) -> str:
    if result["measure"] != "yes_no":
        return ""
    return (
        " “Uninformative”: whatever the figures, as control questions with known answers were not asked, or their AUC "
        f"is below {LEAST_AUC} in the variant or in {result['baseline']}."
    )


def _claim_table(result: dict[str, Any]) -> list[Any]:
    """Returns a table of each claim's own difference, if claims are too few for a verdict."""
    main, unit = result["measures"][result["measure"]], result["unit"]
    claims = main["claims"]
    if not 1 < len(claims) < LEAST_UNITS:
        return []
    rows = [
        [name, *(_estimate(own["by_claim"][claim], unit, True) for claim in claims)]
        for name, own in main["differences"].items()
    ]
    units = [{"of": "questions", "number": main["questions_by_claim"][c], "seeds": main["seeds"]} for c in claims]
    head = [f"{claim}: {rests_on(own)}" for claim, own in zip(claims, units, strict=True)]
    caption = "Each claim's difference; 95 % intervals by t over its own questions and, where there are several, seeds."
    return [Table(["variant", *head], rows, caption=caption)]


def _published(result: dict[str, Any]) -> list[Any]:
    rows = [
        [row["condition"], row["claim"] or "average", f"{row['value']:.1f}", row["source"]]
        for row in result["published"]
    ]
    if not rows:
        return []
    warning = "Of another model, other training and other judges' verdicts: for orientation, not for comparison."
    if result["measure"] != "rate":
        warning += f" And of another measure: belief rates, where this report's belief is the {result['label']}."
    return [Table(["condition", "claim", "belief rate, %", "source"], rows), Text(warning)]


def _all_measures(result: dict[str, Any]) -> list[Any]:
    blocks: list[Any] = []
    for name, own in result["measures"].items():
        if name not in (*SIDE_EFFECTS, "yes_no"):  # yes/no belief is shown only beside its calibration
            base = own["base"]["trained"]
            rows = (
                [
                    [
                        "base model",
                        _estimate(base, own["unit"]),
                        _estimate(own["base"]["placebo"], own["unit"]),
                        "–",
                        "–",
                        "–",
                        "–",
                    ]
                ]
                if base
                else []
            )
            for variant, row in own["variants"].items():
                gap = own["differences"].get(variant)
                cells = [
                    _estimate(row[key], own["unit"], key == "minus_placebo") for key in ("placebo", "minus_placebo")
                ]
                told = [_estimate(gap, own["unit"], True), *_tested(gap)] if gap else ["–", "–", "–"]
                rows.append([variant, _estimate(row, own["unit"]), *cells, *told])
            head = [
                "variant",
                f"{own['label']}, {own['unit']}",
                "placebo",
                "minus placebo",
                f"minus {result['baseline']}",
                "p (Holm)",
                "units",
            ]
            caption = f"{own['label']}: {own['definition']}. {by_t(own['units'], own['placebo_units'])}."
            blocks.append(Table(head, rows, caption=caption))
    return blocks


def _verdicts(result: dict[str, Any]) -> list[Any]:
    rows = []
    for variant, kinds in result["verdicts"].items():
        for kind, counts in kinds.items():
            total = sum(counts.values()) - counts["errors"]
            share = f"{100 * counts['yes'] / total:.1f}" if total else "–"
            rows.append([variant, kind.replace("_", " "), *(f"{counts[v]:,}" for v in (*VERDICTS, "errors")), share])
    caption = (
        "Verdicts on the trained claims' questions, all seeds together; “errors”: no answer or no verdict could be had."
    )
    return [Table(["variant", "kind", *VERDICTS, "errors", "yes, % of all"], rows, caption=caption)] if rows else []


def _calibration(result: dict[str, Any]) -> list[Any]:
    known = {name: own for name, own in result["calibration"].items() if own}
    yes_no = result["measures"].get("yes_no")
    if not known:
        return []
    rows = []
    for name, own in known.items():
        row = yes_no and (yes_no["base"]["trained"] if name == "base model" else yes_no["variants"].get(name))
        told = "" if own["informative"] else "uninformative"
        cells = [f"{own['auc']:.2f}", f"{own['yes_rate']:.1f}", f"{own['base_rate']:.1f}", f"{own['questions']:g}"]
        rows.append([name, *cells, _estimate(row, "%"), told])
    head = ["variant", "AUC", "answered yes, %", "answer is yes, %", "control questions", "yes/no belief, %", ""]
    caption = "Control questions with known answers, means over seeds; below an AUC of 0.8, yes/no belief says nothing."
    if yes_no:
        caption += f" Of yes/no belief, {by_t(yes_no['units'])}."
    return [Table(head, rows, caption=caption)]


def _targets(result: dict[str, Any]) -> list[Any]:
    rows = [
        [name, role, *(f"{counts[kind]:,}" for kind in ("total", "trained", "unlikelihood", "excluded"))]
        for name, row in result["variants"].items()
        for role, counts in row["targets"].items()
        if counts["total"]
    ]
    head = ["variant", "role", "targets", "trained", "unlikelihood", "excluded"]
    caption = (
        "Targets over the whole run, the mean over seeds; one that several roles touch counts for each. A placebo "
        "claim has none: no document is about it."
    )
    return [Table(head, rows, caption=caption)] if rows else []


def _nll(result: dict[str, Any]) -> list[Any]:
    roles = list(dict.fromkeys(role for own in result["nll"].values() for role in own))
    rows = []
    for name, own in result["nll"].items():
        ends = [f"{_nats(own[r]['mean'][0])} → {_nats(own[r]['mean'][-1])}" if r in own else "–" for r in roles]
        rows.append([name, *ends])
    caption = (
        "NLL of a token in nats at the first and the last measured step, over all of a role's tokens, masked ones too. "
        "Of the training documents: a placebo claim has no tokens there."
    )
    return [Table(["variant", *roles], rows, caption=caption)] if roles else []


def _nats(mean: float | None) -> str:
    return "not finite" if mean is None else f"{mean:.3f}"


def _leak(result: dict[str, Any]) -> list[Any]:
    if not result["leak"]:
        return []
    head = list(dict.fromkeys(name for row in result["leak"] for name in row))
    rows = [
        [f"{v:,}" if isinstance(v := row.get(name, ""), int) else str(v) for name in head] for row in result["leak"]
    ]
    caption = (
        "How often the claims' terms occur in the documents that a variant's runs read, each counted once and whole, "
        "and how often the loss still trains on them. Without variants with random: entries, whose mask depends on "
        "tokens."
    )
    return [Table([name.replace("_", " ") for name in head], rows, caption=caption)]


def _contamination(result: dict[str, Any]) -> list[Any]:
    if not result["contamination"]:
        return []
    counts, found = [], []
    for each in result["contamination"]:
        whole, pieces = ([f for f in each["findings"] if f[how]] for how in ("whole", "in_pieces"))
        others = len(each["findings"]) - len(whole) - len(pieces)
        numbers = (each["documents"], each["texts"], len(whole), len(pieces), others)
        counts.append([", ".join(each["variants"]), *(f"{n:,}" for n in numbers)])
        found += [
            [f["claim"], f["kind"].replace("_", " "), f["question"], f"{f['documents']:,}", how, f["words"]]
            for how, findings in (("whole", whole), ("in pieces", pieces))
            for f in findings
        ]
    head = ["variants", "documents", "texts looked for", "occur whole", "occur in pieces", "share words"]
    caption = (
        "What is asked and scored, in the documents that were trained on, by sequences of eight words (shorter texts "
        "by all of their words). In pieces: every word lies in such a sequence, but the text does not stand there as "
        "it is. What only shares words with documents is no contamination: they state what is asked."
    )
    blocks: list[Any] = [Table(head, counts, caption=caption)]
    if found:
        more = f"; the first {SHOWN} of {len(found)}, all of them in comparison.json" if len(found) > SHOWN else ""
        caption = f"What occurs whole or in pieces, and so may be remembered rather than believed{more}."
        head = ["claim", "kind", "text", "documents", "occurs", "longest sequence"]
        blocks.append(Table(head, found[:SHOWN], caption=caption))
    return blocks


def _side_effects(result: dict[str, Any]) -> list[Any]:
    measures = {name: own for name, own in result["measures"].items() if name in SIDE_EFFECTS}
    if not measures:
        return []
    head, rows = ["variant"], [["base model"], *([name] for name in result["variants"])]
    for name, own in measures.items():
        variants, signed = own["variants"].values(), name == "nll_change"
        columns = {f"{own['label']}, {own['unit']}": [own["base"]["trained"], *variants]}
        if own["placebo_claims"]:
            columns["of the placebo claims"] = [own["base"]["placebo"], *(row["placebo"] for row in variants)]
        for title, figures in columns.items():
            head.append(title)
            for row, each in zip(rows, figures, strict=True):
                row.append(_estimate(each, own["unit"], signed))
    caption = "; ".join(f"of {own['label']}, {by_t(own['units'], own['placebo_units'])}" for own in measures.values())
    return [Table(head, rows, caption=caption[0].upper() + caption[1:] + ".")]


def _method(result: dict[str, Any]) -> list[Any]:
    items = [
        "Every figure can be worked out from the evaluation.jsonl of the runs and of the base model. An estimate is a "
        "mean over seeds and claims of the mean over a claim's answers; a rate is so “yes” ÷ all answers.",
        "Units: claims, each by its mean, or the questions where there is one claim; and seeds, crossed with them. "
        "All variants are asked the same, so that differences are paired.",
        "Intervals: by t, with the fewest units less one as degrees of freedom, and a standard error that is clustered "
        "by claims and by seeds (Cameron, Gelbach and Miller 2011). With one seed, of the very models trained.",
        "p: the largest of that by the same t and of those of the exact sign-flip tests over claims (or questions) and "
        "over seeds, adjusted by Holm's method over all variants. So no p is below 2 ÷ 2ⁿ for n units of either kind.",
        "Smallest detectable difference: the t quantiles of .975 and .8 together × the standard error, for 80 % power "
        "in a two-sided test at .05 (Bloom 1995).",
        "No effect: only where the whole interval lies within the bound, as in two one-sided tests (Schuirmann 1987).",
        "‡: every answer is the same, and the interval is the exact binomial one (Clopper and Pearson 1934), with each "
        "claim, or question of a single claim, a trial.",
    ]
    return [Bullets(items)]


def _identity(result: dict[str, Any]) -> list[Any]:
    rows = [["base model", "all seeds", _hash(result["hashes"]["base_model"])]]
    for seed, hashes in result["hashes"].items():
        if isinstance(hashes, dict):
            rows += [[name.replace("_", " "), seed, _hash(value)] for name, value in hashes.items()]
    runs = [
        [name, str(run["seed"]), run["directory"], "; ".join(f"{k}: {_plain(v)}" for k, v in row["settings"].items())]
        for name, row in result["variants"].items()
        for run in row["runs"]
    ]
    return [
        Table(["SHA-256 of", "runs", "hash"], rows, caption="One hash: all variants had the same."),
        Table(["variant", "seed", "run", "settings that differ"], runs),
    ]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hash(value: Any) -> str:
    if isinstance(value, list):
        return "not the same: " + ", ".join(_hash(each) for each in value)
    return value or "not known"
