"""Writes the report of a comparison: comparison.json, comparison.md, comparison.html and PNGs."""

import json
from pathlib import Path

from train.comparison import (
    belief_sections,
    held_out_sections,
    layer_sections,
    panel_plot,
    panel_sections,
    phase_and_dose_sections,
    plots,
    training_sections,
)
from train.comparison.analysis import analyse
from train.comparison.compared import Comparison
from train.comparison.pages import Block, Bullets, Picture, Section, Text, as_html, as_markdown
from train.comparison.result import ComparisonResult, as_json
from train.comparison.wording import rests_on
from train.runtime.errors import UserError
from train.runtime.outputs import write_whole

PICTURES = {
    "belief": (plots.belief, "Belief per variant and claim, with intervals and placebo claims"),
    "differences": (plots.paired_differences, "Differences to the baseline, with intervals and the bound of no effect"),
    "panel": (panel_plot.panel, "Belief, association and damage per variant, with intervals"),
    "curves": (plots.over_steps, "Belief over training, with intervals and placebo claims"),
    "doses": (phase_and_dose_sections.picture, "Belief over the dose, with intervals, placebo claims and half belief"),
    "targets": (plots.targets, "Targets trained, with unlikelihood and excluded, per role"),
    "nll": (plots.nll, "NLL of each role over training"),
    "layers": (
        lambda result: layer_sections.lines(result.by_layer),
        "Shift by layer, with the readable layers and controls",
    ),
    "layer_differences": (
        lambda result: layer_sections.differences(result.by_layer, result.baseline),
        "Shift by layer, minus the baseline's",
    ),
    "layer_steps": (lambda result: layer_sections.over_steps(result.by_layer), "Shift by layer over training"),
    "side_effects": (plots.side_effects, "Facts, coherence and held-out text after training"),
    "held_out": (held_out_sections.picture, "Belief against the change of the NLL of held-out text, per role"),
}


def write_report(comparison: Comparison, directory: str | Path) -> ComparisonResult:
    """Writes the report into the directory, which is created if needed, and returns what the comparison found. Raises
    UserError if the comparison has nothing to compare, or the directory cannot be written."""
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
        text = json.dumps(as_json(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(place / "comparison.json", text)
        (place / "comparison.md").write_text(as_markdown(result.title, shown), encoding="utf-8")
        (place / "comparison.html").write_text(as_html(result.title, shown, place), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{place}: the report cannot be written ({error.strerror}). Give another directory.") from None
    return result


def sections(result: ComparisonResult, drawn: set[str]) -> list[Section]:
    """Returns the sections of the report that have content. drawn: the names of the pictures that exist."""

    def picture(name: str) -> list[Block]:
        return [Picture(f"{name}.png", PICTURES[name][1])] if name in drawn else []

    every: list[tuple[str, list[Block]]] = [
        ("Result", [Text(_summary(result)), belief_sections.main_table(result), *picture("belief")]),
        ("Caveats", [Bullets(result.notes)] if result.notes else []),
        ("Belief, association or damage", [*picture("panel"), *panel_sections.section(result)]),
        (f"Differences to {result.baseline}", [*picture("differences"), *belief_sections.difference_tables(result)]),
        ("Published values", belief_sections.published(result)),
        ("Dose and response", [*picture("doses"), *phase_and_dose_sections.doses(result)]),
        ("Phases", phase_and_dose_sections.phases(result)),
        ("Belief over training", [*picture("curves"), *belief_sections.over_steps(result)]),
        (
            "Belief by layer",
            [
                *layer_sections.section(result.by_layer),
                *picture("layers"),
                *picture("layer_differences"),
                *picture("layer_steps"),
            ],
        ),
        ("All measures", belief_sections.all_measures(result)),
        ("Answers and calibration", [*belief_sections.verdicts(result), *belief_sections.calibration(result)]),
        ("Targets trained and excluded", [*picture("targets"), *training_sections.targets(result)]),
        ("NLL per role over training", [*picture("nll"), *training_sections.nll(result)]),
        ("Mentions that are still trained", training_sections.leak(result)),
        ("Evaluation in the training documents", training_sections.contamination(result)),
        ("Side effects", [*picture("side_effects"), *belief_sections.side_effects(result)]),
        ("Belief against held-out text", [*picture("held_out"), *held_out_sections.section(result)]),
        ("How the figures are computed", training_sections.method()),
        ("Data, order and initial weights", training_sections.identity(result)),
    ]
    return [Section(title, blocks) for title, blocks in every if blocks]


def _summary(result: ComparisonResult) -> str:
    main = result.main
    return (
        f"Belief is the {main.measure.label} ({result.unit}): {main.measure.says}. Trained: "
        f"{_named(main.claims, 'claim')}, with {main.all_questions} questions and {main.answers} answers per run. "
        f"Placebo, which no document is about: {_named(main.placebo_claims, 'claim')}. "
        f"{_named([''] * main.units.seeds, 'seed')}. Independent units: {rests_on(main.units)}."
    )


def _named(names: list[str], what: str) -> str:
    """Returns how many there are and, if they are few, their names."""
    if not names:
        return "none"
    count = f"{len(names)} {what}" + "s" * (len(names) > 1)
    return f"{count} ({', '.join(names)})" if len(names) <= 8 and all(names) else count
