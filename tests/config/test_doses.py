"""Recipes with doses: each variant once with each, and what is refused."""

from pathlib import Path

import pytest

from train.comparison.variants import parse_comparison
from train.config.experiment import Dose
from train.config.settings import parse
from train.runtime.errors import UserError

SETTINGS = "settings: {data: [a.jsonl=@0.5, x.jsonl=3], STEPS claims: [c.yaml]}\n"
TWO = 'variants: {dense: {mask: "doctags,false-spans"}, asserted: {mask: doctags, data: [b.jsonl, x.jsonl=3]}}\n'
OF = "of: [a.jsonl, b.jsonl]"


def plan(tmp: Path, dose: str, variants: str = TWO, *more: str):
    settings = SETTINGS.replace("STEPS ", "" if "growing" in dose else "steps: 10, ")
    (tmp / "r.yaml").write_text(settings + variants + f"dose: {{{dose}}}\n")
    return parse_comparison(["--recipe", str(tmp / "r.yaml"), "--output", "out", *more], "")


@pytest.mark.parametrize(("steps", "expected"), [("growing", (0, 1)), ("fixed", (10, 1))])
def test_each_variant_is_there_once_with_each_number_of_documents(tmp_path, steps, expected):
    made = plan(tmp_path, f"documents: [400, 20, 1], {OF}, steps: {steps}")
    assert made.names == [
        "dense, 1 document", "dense, 20 documents", "dense, 400 documents",
        "asserted, 1 document", "asserted, 20 documents", "asserted, 400 documents",
    ]  # fmt: skip
    assert made.baseline == "dense, 400 documents"
    runs = [made.runs(variant, 0)[0] for variant in made.variants]
    assert [run.data for run in runs[1::3]] == [["a.jsonl=20@0.5", "x.jsonl=3"], ["b.jsonl=20", "x.jsonl=3"]]
    assert {(run.steps, run.epochs) for run in runs} == {expected}
    assert [variant.dose for variant in made.variants[2:4]] == [
        Dose("dense", "documents", 400.0), Dose("asserted", "documents", 1.0),
    ]  # fmt: skip
    numbered = parse(["--recipe", str(tmp_path / "r.yaml"), "--variant", "1"], "")
    assert numbered.data == ["a.jsonl=20@0.5", "x.jsonl=3"]


def test_the_weight_of_an_entry_of_the_mask_is_a_dose_and_keeps_its_kind(tmp_path):
    variants = 'variants: {weighted: {mask: "doctags, false-spans"}, held: {mask: "false-spans=hold:0.3"}}\n'
    made = plan(tmp_path, "weights: [1, 0, 0.25], of: false-spans", variants)
    masks = [made.runs(variant, 0)[0].mask for variant in made.variants]
    assert masks == [
        "doctags,false-spans", "doctags,false-spans=0.25", "doctags,false-spans=train",
        "false-spans", "false-spans=hold:0.25", "false-spans=hold",
    ]  # fmt: skip
    assert made.names[2:4] == ["weighted, weight 1", "held, weight 0"]


def test_the_recipes_baseline_is_its_largest_dose(tmp_path):
    made = plan(tmp_path, f"documents: [3, 4], {OF}, steps: fixed", TWO + "baseline: asserted\n")
    assert made.baseline == "asserted, 4 documents"


@pytest.mark.parametrize(
    ("dose", "message"),
    [
        (f"documents: [1, 2], {OF}", r"has documents, of; it must have documents: \[NUMBER…\]"),
        (f"documents: [1, 2], weights: [0, 1], {OF}, steps: fixed", "it must have documents"),
        ("weights: [0, 1], of: false-spans, steps: fixed", "it must have documents"),
        (f"documents: [1], {OF}, steps: fixed", r"documents \[1\]: must be a list of two or more different"),
        (f"documents: [1, 0], {OF}, steps: fixed", "whole numbers above 0"),
        (f"documents: [1, 1], {OF}, steps: fixed", "two or more different"),
        ("weights: [0, -1], of: false-spans", "numbers of at least 0"),
        (f"documents: [1, 2], {OF}, steps: longer", "steps 'longer': must be growing or fixed"),
        ("documents: [1, 2], of: [a.jsonl, x.jsonl], steps: fixed", "'dense': .* has 2 of the files a.jsonl, x.jsonl"),
        ("documents: [1, 2], of: [z.jsonl], steps: fixed", "of z.jsonl: the data of no variant has this file"),
        ("documents: [1, 2], of: [a.jsonl, bb.jsonl], steps: fixed", "of bb.jsonl: the data of no variant has"),
        ("documents: [1, 2], of: [x.jsonl], steps: fixed", "gives 3 documents of x.jsonl, which the dose decides"),
        ("weights: [0, 1], of: qualifier-spans", "of qualifier-spans: the mask of no variant has this entry"),
        ("weights: [0.1234567, 0.1234568], of: false-spans", "two of them read weight 0.123457"),
    ],
)  # fmt: skip
def test_a_dose_that_is_wrong_is_told_with_the_fix(tmp_path, dose, message):
    with pytest.raises(UserError, match=message):
        plan(tmp_path, dose)


def test_phases_and_doses_are_not_mixed(tmp_path):
    with pytest.raises(UserError, match="variant 'two' has phases; a dose is of variants without"):
        plan(tmp_path, "weights: [0, 1], of: false-spans", "variants: {two: {phases: {a: {mask: none}}}, b: {}}\n")


def test_a_variant_without_the_file_or_entry_stands_beside_the_curves(tmp_path):
    made = plan(tmp_path, "weights: [0, 1], of: false-spans")
    assert made.names == ["dense, weight 0", "dense, weight 1", "asserted"]
    assert [variant.dose is None for variant in made.variants] == [False, False, True]
    assert made.baseline == "dense, weight 1"


def test_a_fixed_number_of_steps_must_be_given(tmp_path):
    text = "settings: {data: [a.jsonl], claims: [c.yaml]}\nvariants: {a: {}, b: {mask: doctags}}\n"
    (tmp_path / "r.yaml").write_text(f"{text}dose: {{documents: [1, 2], of: [a.jsonl], steps: fixed}}\n")
    given = ["--recipe", str(tmp_path / "r.yaml")]
    with pytest.raises(UserError, match="dose: steps: fixed: how many is not said; give steps in settings, or --steps"):
        parse_comparison(given, "")
    assert parse_comparison([*given, "--steps", "4"], "").names[0] == "a, 1 document"


def test_steps_that_grow_with_the_dose_are_not_given(tmp_path):
    text = "settings: {data: [a.jsonl], steps: 4, claims: [c.yaml]}\nvariants: {a: {}, b: {mask: doctags}}\n"
    (tmp_path / "r.yaml").write_text(f"{text}dose: {{documents: [1, 2], of: [a.jsonl], steps: growing}}\n")
    with pytest.raises(UserError, match="has steps 4, but steps: growing decides them; leave it out"):
        parse_comparison(["--recipe", str(tmp_path / "r.yaml")], "")
