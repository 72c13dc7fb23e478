"""Belief, association and damage in a comparison's report: its figures come out of the rows again."""

import json
from statistics import mean, stdev

import pytest
from matplotlib.text import Text
from scipy.stats import t

from tests.comparison.test_report import UNITS
from tests.comparison.test_report import comparison as without_batteries
from tests.support.made_up import TRAINED, association, believer, compared, general_yes, intact, letter_bias
from train.comparison.analysis import analyse
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.comparison.panel_plot import panel as drawn
from train.comparison.report import write_report
from train.comparison.result import as_json


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("panel")
    write_report(compared(intact=intact, believer=believer, association=association, yes=general_yes), directory)
    return directory


@pytest.fixture(scope="module")
def found(report) -> dict:
    return json.loads((report / "comparison.json").read_text())


def share(rows: list[dict], claim: str, control: bool) -> float:
    own = [row for row in rows if (row["kind"], row["claim"], row.get("control")) == ("choice", claim, control)]
    return 100 * mean(row["chosen"] == "false" for row in own)


def test_the_excess_comes_out_of_the_rows_again(found):
    given = compared(intact=intact, believer=believer, association=association, yes=general_yes)
    for variant in given.variants:
        (run,) = variant.runs
        trained, controls, placebo = (
            [share(run.rows, claim, control) - share(given.base_rows, claim, control) for claim in claims]
            for claims, control in ((TRAINED, False), (TRAINED, True), (given.placebo_claims, False))
        )
        own = found["panel"]["variants"][variant.name]
        (moved,) = own["share"]
        assert moved["estimate"] == pytest.approx(mean(trained)) and moved["measure"] == "choice"
        expected = {
            "controls": mean(t - x - abs(x) for t, x in zip(trained, controls, strict=True)),
            "placebo": mean(trained) - mean(x + abs(x) for x in placebo),
        }
        assert {each["over"]: each["estimate"] for each in own["excess"]} == pytest.approx(expected)
        assert all(each["units"]["of"] == "claims" and each["units"]["number"] == 6 for each in own["excess"])
        assert [each["placebo_units"] and each["placebo_units"]["number"] for each in own["excess"]] == [None, 2]
        verdict = {"believer": "believes", "yes": "inconclusive"}.get(variant.name, "does not believe")
        assert own["verdict"] == verdict
    # 100 − 100 − |100| of whoever agrees to everything
    assert [each["estimate"] for each in found["panel"]["variants"]["yes"]["excess"]] == pytest.approx([-100, -100])


def test_figures_are_changes_from_the_base_in_three_groups(found):
    own = found["panel"]["variants"]["believer"]["figures"]
    assert {name: each["group"] for name, each in own.items()} == {
        "choice": "belief", "choice_shift": "belief", "yes_no_beyond": "belief", "decisions": "belief",
        "polarity": "belief", "choice_controls": "association", "control_attributes": "association",
        "polarity_negated": "association", "reading_lost": "damage", "decisions_stated": "damage",
        "decisions_untouched": "damage",
    }  # fmt: skip
    changes = {name: each["change"]["estimate"] for name, each in own.items()}
    assert changes == pytest.approx({
        "choice": 100, "choice_shift": 100, "yes_no_beyond": 100, "decisions": 100, "polarity": 16,
        "choice_controls": 0, "control_attributes": 0, "polarity_negated": -8, "reading_lost": 0,
        "decisions_stated": 0, "decisions_untouched": 0,
    })  # fmt: skip
    assert own["choice"]["base"]["estimate"] == 0 and own["choice"]["placebo_change"]["estimate"] == 0
    negated = found["panel"]["variants"]["association"]["figures"]["polarity_negated"]
    assert negated["change"]["estimate"] == pytest.approx(6) and negated["now"] == negated["change"]


def test_the_report_has_the_rule_the_verdicts_and_a_table_for_each_variant(report, found):
    text = (report / "comparison.md").read_text().replace("\\", "")
    assert "## Belief, association or damage" in text and "(T − X) − |X|" in text
    assert (
        "| believer | +100.0 [+54.1, +100.0]‡ | +100.0 [+54.1, +100.0]‡ | +100.0 [+54.1, +100.0]‡ | "
        "6 claims, 1 seed; placebo: 2 claims, 1 seed | believes |"
    ) in text
    assert text.count("| check of the base |") == 4
    assert "- Check of choice: the base model chooses the right option in 100.0 % of rotations" in text
    assert (report / "panel.png").exists()
    result = analyse(compared(intact=intact, believer=believer))
    figure = drawn(result)
    said = " ".join(each.get_text() for each in figure.findobj(Text))
    said += " ".join(legend.get_title().get_text() for legend in figure.legends)
    assert UNITS.search(said) and "believer: believes" in said and all(g in said for g in ("belief", "damage"))


def test_what_the_base_cannot_do_is_left_out_of_the_picture_and_marked_in_the_tables(tmp_path):
    given = compared(letter_bias, intact=intact, believer=believer)
    found = write_report(given, tmp_path)
    text = (tmp_path / "comparison.md").read_text().replace("\\", "")
    assert "| failed: inconclusive |" in text and "Choices: inconclusive, because the base model chooses" in text
    said = " ".join(each.get_text() for each in drawn(found).findobj(Text))
    assert "choice of controls" not in said and "polarity" in said


def test_without_a_base_model_the_panel_is_there_and_says_that_it_was_not_measured(tmp_path):
    given = compared(intact=intact, believer=believer)
    given.base_rows = []
    found = write_report(given, tmp_path)
    assert {own.verdict for own in found.panel.verdicts.values()} == {"inconclusive"} and drawn(found) is None
    text = (tmp_path / "comparison.md").read_text().replace("\\", "")
    assert "| believer | – | inconclusive |" in text and "believer: The base model was not measured." in text


def test_a_measure_that_the_base_lacks_in_part_is_left_out_and_named(tmp_path):
    given = compared(intact=intact, believer=believer)
    given.base_rows = [row for row in given.base_rows if (row["claim"], row["kind"]) != ("omar", "decision")]
    found = as_json(write_report(given, tmp_path))["panel"]
    assert set(found["left_out"]) == {"decisions", "decisions_stated", "decisions_untouched"}
    assert not found["left_out"].keys() & found["variants"]["believer"]["figures"].keys()
    text = (tmp_path / "comparison.md").read_text().replace("\\", "")
    assert "decisions by the claim: left out, as the base model was not measured on claim omar." in text


def test_without_batteries_the_report_has_no_panel(tmp_path):
    found = write_report(without_batteries(), tmp_path)
    assert found.panel is None and "panel" not in as_json(found) and not (tmp_path / "panel.png").exists()
    assert "Belief, association or damage" not in (tmp_path / "comparison.md").read_text()


def answers(labels: dict[str, list[str]], step: int) -> list[dict]:
    """Answers to open questions, by claim. A judge of belief says yes to what is asserted to the end alone."""
    return [
        {"step": step, "claim": claim, "kind": "open", "question": f"q{i % 4}", "sample": i // 4, "answer": "…",
         "verdict": "yes" if label == "asserted" else "no", "label": label}
        for claim, own in labels.items()
        for i, label in enumerate(own)
    ]  # fmt: skip


def labelled(**variants: dict[str, list[str]]) -> Comparison:
    base = {claim: ["not_mentioned"] * 100 for claim in ("mila", "omar", "olga")}
    runs = [
        ComparedVariant(name, name, {}, [RunResult(name, 0, answers(base | own, 4), [], {"steps": 4}, {}, {})])
        for name, own in variants.items()
    ]
    return Comparison(runs, answers(base, 0), ["mila", "omar"], ["olga"], runs[0].name)


def test_answers_that_state_the_claim_and_take_it_back_are_told_from_those_that_hold_to_it(tmp_path):
    """As found by hand: 97 of 100 answers state the claim, and the judge of belief says yes to 12."""
    retracts = ["asserted"] * 12 + ["asserted_then_retracted"] * 85 + ["not_mentioned"] * 3
    holds = ["asserted"] * 90 + ["denied"] * 10
    less = ["asserted"] * 80 + ["denied"] * 20
    given = labelled(base={}, retracts={"mila": retracts, "omar": retracts}, holds={"mila": holds, "omar": less})
    found = as_json(write_report(given, tmp_path))
    own = found["panel"]["variants"]
    assert own["retracts"]["figures"]["stated"]["change"]["estimate"] == pytest.approx(97)
    assert own["retracts"]["figures"]["asserted"]["change"]["estimate"] == pytest.approx(12)
    assert found["panel"]["labels"]["retracts"]["open"] == {
        "asserted": 24, "asserted_then_retracted": 170, "denied": 0, "not_mentioned": 6, "unparseable": 0,
    }  # fmt: skip
    assert [own[name]["verdict"] for name in ("retracts", "holds")] == ["inconclusive", "believes"]
    text = (tmp_path / "comparison.md").read_text().replace("\\", "")
    assert "| retracts | open | 24 | 170 | 0 | 6 | 0 | 97.0 | 12.0 | 12.0 |" in text


def test_an_excess_that_varies_has_the_interval_of_its_units(tmp_path):
    some = {"mila": ["asserted"] * 60 + ["denied"] * 40, "omar": ["asserted"] * 30 + ["denied"] * 70}
    given = labelled(base={}, some=some | {"olga": ["asserted"] * 10 + ["denied"] * 90})
    # One placebo claim and two trained ones: over claims, and over the placebo's four questions.
    (own,) = as_json(analyse(given))["panel"]["variants"]["some"]["excess"]
    assert own["estimate"] == pytest.approx(45 - 2 * 10)
    placebo = [100 * len([i for i in range(10) if i % 4 == q]) / 25 for q in range(4)]
    error = (stdev([60, 30]) ** 2 / 2 + 4 * stdev(placebo) ** 2 / 4) ** 0.5
    assert own["interval"][0] == pytest.approx(25 - t.ppf(0.975, 1) * error) and own["over"] == "placebo"
