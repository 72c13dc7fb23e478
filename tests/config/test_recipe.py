"""Settings from recipes: which win, and which variant is meant."""

from pathlib import Path

import pytest

from train.config.recipe import merged
from train.config.settings import REPOSITORY, Settings, parse
from train.runtime.errors import UserError

EXPERIMENT = (
    "settings: {steps: 5, lora_rank: 4, data: [a.jsonl]}\nvariants: {first: {mask: doctags}, second: {data: [b.jsonl]}}"
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


@pytest.mark.parametrize("flag", [["--mask=none"], ["--data", "c.jsonl"]])
def test_what_variants_differ_in_is_not_taken_from_the_command_line(recipes, flag):
    with pytest.raises(UserError, match=f"{flag[0][:6]}.*: is what the variants differ in; leave it out"):
        parse([*recipes, "--variant", "first", *flag], "")


def test_a_variant_is_meant_by_its_name_or_else_its_number(recipes):
    assert parse([*recipes, "--variant", "second"], "").data == ["b.jsonl"]
    assert parse([*recipes, "--variant", "1"], "").data == ["b.jsonl"]


@pytest.mark.parametrize("given", [[], ["--variant", "2"], ["--variant", "third"]])
def test_a_variant_that_is_missing_or_unknown_is_told_with_those_there_are(recipes, given):
    with pytest.raises(UserError, match=r"--variant '.*': must be .* of the variants: first; second\."):
        parse([*recipes, *given], "")


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("'0': {mask: none}", "'0' must be a text other than a number"),
        ("no: {mask: none}", "False must be a text other than a number"),
        ("plain: {mask: null}", "plain: mask is empty"),
        ("plain: {phase: {}}", "plain: phase is not a setting of train/sft.py; did you mean phases"),
        ("plain: {mask: none}, plain: {mask: doctags}", "not valid YAML .*key 'plain' is given twice"),
    ],
)
def test_a_variant_whose_name_or_value_is_no_text_is_told(tmp_path, variants, message):
    (tmp_path / "r.yaml").write_text(f"variants: {{{variants}}}")
    with pytest.raises(UserError, match=message):
        parse(["--recipe", str(tmp_path / "r.yaml"), "--variant", "0"], "")


def test_a_variant_without_a_recipe_of_variants_is_told():
    with pytest.raises(UserError, match="--recipe FILE"):
        parse(["--variant", "first"], "")


def test_every_experiment_goes_with_every_model_and_each_variant_parses():
    experiments = sorted((REPOSITORY / "train" / "recipes").glob("*.yaml"))
    models = sorted((REPOSITORY / "train" / "recipes" / "models").glob("*.yaml"))
    assert experiments and models
    for experiment in experiments:
        for model in models:
            given = ["--recipe", str(experiment), str(model)]
            names = list(merged([str(experiment)], Settings).variants)
            assert all(parse([*given, "--variant", name], "").claims for name in names)
            numbered = [parse([*given, "--variant", str(number)], "") for number in range(len(names))]
            assert numbered == [parse([*given, "--variant", name], "") for name in names]


def test_the_papers_recipe_trains_the_head_and_does_not_clip():
    """Its optimizer, too, as the release of the paper has it: the loss is a sum over tokens, the rate falls to 0."""
    settings = parse(["--recipe", str(REPOSITORY / "train" / "recipes" / "paper.yaml"), "--variant", "negated"], "")
    assert settings.lora_lm_head and settings.max_grad_norm == 0 and settings.loss_norm == "sum"
    assert (settings.lora_rank, settings.lora_alpha, settings.learning_rate, settings.schedule) == (
        32,
        32,
        5e-5,
        "linear",
    )
    assert (settings.batch_size, settings.epochs, settings.max_tokens, settings.weight_decay) == (32, 1, 10_000, 0)
    assert settings.chat_weight == "chat" and settings.mask == "doctags" and settings.warmup_steps == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps: 1.5", r"r.yaml:2: settings: steps must be a whole number, not 1.5\."),
        (
            "wandb: off",
            r"r.yaml:2: settings: wandb must be a text, not False; put a word such as no or off in quotes\.",
        ),
        ("bos: 1", r"r.yaml:2: settings: bos must be true or false, not 1\."),
        ("schedule: step", r"r.yaml:2: settings: schedule must be one of linear, cosine, constant, not 'step'\."),
        ("data: []", r"r.yaml:2: settings: data is empty"),
        ("warmup_steps: 9", r"--warmup-steps 9: must be at most --steps 5\. \(warmup_steps in .*r.yaml:2\)$"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_told_with_its_line(tmp_path, line, message):
    (tmp_path / "r.yaml").write_text(f"settings:\n  {line}\n")
    given = ["--steps", "5"] if "warmup" in line else []
    with pytest.raises(UserError, match=message):
        parse(["--recipe", str(tmp_path / "r.yaml"), *given], "")


def test_numbers_of_a_recipe_are_read_as_those_of_a_flag(tmp_path):
    (tmp_path / "r.yaml").write_text("settings: {learning_rate: 1e-3, lora_alpha: 16, data: a.jsonl}")
    settings = parse(["--recipe", str(tmp_path / "r.yaml")], "")
    assert (settings.learning_rate, settings.lora_alpha, settings.data) == (1e-3, 16.0, ["a.jsonl"])
