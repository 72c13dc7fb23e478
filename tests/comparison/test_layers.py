"""Belief by layer in a comparison's report."""

import json

import pytest
from matplotlib.text import Text

from tests.comparison.test_report import CLAIMS, NAMES, comparison
from train.comparison.analysis import analyse
from train.comparison.compared import Comparison
from train.comparison.report import PICTURES, write_report
from train.comparison.result import as_json
from train.evaluation.by_layer import layer_shifts
from train.evaluation.measures import at_step

DEPTH = 6


def with_layers(given: Comparison) -> Comparison:
    """Adds to each row the value by layer, which grows to its own; facts are right from the second layer on."""
    every = [given.base_rows, *(run.rows for variant in given.variants for run in variant.runs)]
    for row in [row for rows in every for row in rows]:
        if row["kind"] == "likelihood":
            row["layers"] = [row["llr"] * layer / DEPTH for layer in range(1, DEPTH + 1)]
        if row["kind"] == "fact":
            row["layers"] = [-1.0] + [abs(row["margin"])] * (DEPTH - 1)
    return given


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("by layer")
    write_report(with_layers(comparison()), directory)
    return directory


def test_the_report_has_the_shifts_of_the_rows_the_band_and_what_is_shown(report):
    found = json.loads((report / "comparison.json").read_text())["by_layer"]
    assert found["facts_right"] == [0.0] + [1.0] * 5 and found["band"] == [False] + [True] * 5
    given = with_layers(comparison())
    for variant in given.variants:
        for claim in CLAIMS:
            runs = [layer_shifts(at_step(run.rows, 10), given.base_rows, claim) for run in variant.runs]
            own = found["variants"][variant.name][claim]
            for layer in range(DEPTH):
                assert own["shift"][layer] == pytest.approx(sum(run.subject[layer] for run in runs) / 2)
                assert own["controls"].keys() == {"A", "B"}
            assert own["shown"] == [2, 6]  # controls do not move at all in these rows
        assert found["steps"][variant.name].keys() == {"5", "10"}
    text = (report / "comparison.md").read_text()
    assert "## Belief by layer" in text and "facts right: 2 to 6 of 6" in text and "layers 2 to 6" in text
    assert "| none | 3 of 3 | 1 of 1 |" in text.replace("\\", "")
    assert (report / "layers.png").exists() and (report / "layer_differences.png").exists()
    assert not (report / "layer_steps.png").exists()  # of two steps


def test_layers_by_steps_are_drawn_where_there_are_three(tmp_path):
    given = with_layers(comparison())
    for variant in given.variants:
        for run in variant.runs:
            run.rows += [row | {"step": 7} for row in run.rows if row["step"] == 5]
    found = write_report(given, tmp_path)
    assert (tmp_path / "layer_steps.png").exists()
    for name in ("layers", "layer_differences", "layer_steps"):
        figure = PICTURES[name][0](found)
        said = " ".join(each.get_text() for each in figure.findobj(Text))
        said += " ".join(legend.get_title().get_text() for legend in figure.legends)
        assert "2 seeds" in said and "nats" in said


def test_what_was_not_measured_by_layer_in_all_runs_leaves_the_report_as_it_was():
    given = with_layers(comparison())
    for row in given.variants[1].runs[0].rows:
        row.pop("layers", None)
    assert as_json(analyse(given)) == as_json(analyse(comparison())) and "by_layer" not in as_json(analyse(given))
    without_facts = with_layers(comparison())
    without_facts.base_rows = [row for row in without_facts.base_rows if row["kind"] != "fact"]
    found = as_json(analyse(without_facts))["by_layer"]
    assert found["facts_right"] == [] and not any(found["band"])
    assert all(own["shown"] is None for claims in found["variants"].values() for own in claims.values())
    assert list(found["variants"]) == NAMES
