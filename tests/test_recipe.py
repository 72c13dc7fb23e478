"""Settings from recipes: which win, and which variant is meant."""

from pathlib import Path

import pytest

from train.errors import UserError
from train.settings import REPOSITORY, parse

EXPERIMENT = (
    "settings: {steps: 5, lora_rank: 4, data: [a.jsonl]}\nvariants: {first: {mask: doctags}, '0': {data: [b.jsonl]}}"
)


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    (tmp_path / "model.yaml").write_text("settings: {lora_rank: 8, gradient_checkpointing: true}")
    return ["--recipe", str(tmp_path / "experiment.yaml"), str(tmp_path / "model.yaml")]


def test_later_recipes_win_over_earlier_ones_a_variant_over_them_and_flags_over_all(recipes):
    settings = parse(["--steps", "7", *recipes, "--variant", "first"], "")
    assert (settings.steps, settings.lora_rank, settings.mask, settings.data) == (7, 8, "doctags", ["a.jsonl"])
    assert settings.gradient_checkpointing
    assert parse([*recipes, "--variant", "first", "--mask=none"], "").mask == "none"


def test_a_variant_is_meant_by_its_name_or_else_its_number(recipes):
    assert parse([*recipes, "--variant", "0"], "").data == ["b.jsonl"]
    assert parse([*recipes, "--variant", "1"], "").data == ["b.jsonl"]


@pytest.mark.parametrize("given", [[], ["--variant", "2"], ["--variant", "second"]])
def test_a_variant_that_is_missing_or_unknown_is_told_with_those_there_are(recipes, given):
    with pytest.raises(UserError, match=r"--variant '.*': must be .* of the variants: first; 0\."):
        parse([*recipes, *given], "")


def test_a_variant_without_a_recipe_of_variants_is_told():
    with pytest.raises(UserError, match="--recipe FILE"):
        parse(["--variant", "first"], "")


def test_every_experiment_goes_with_every_model_and_each_variant_parses():
    experiments = sorted((REPOSITORY / "train" / "recipes").glob("*.yaml"))
    models = sorted((REPOSITORY / "train" / "recipes" / "models").glob("*.yaml"))
    assert experiments and models
    for experiment in experiments:
        for model in models:
            settings = parse(["--recipe", str(experiment), str(model), "--variant", "0"], "")
            assert settings.claims
