"""Flags that other trainers have, the text of --help, and settings of runs of before."""

import re

import pytest
import yaml

from tests.support.ranks import run
from train import compare, evaluate
from train.claims.claim import read_claims
from train.comparison.variants import parse_comparison
from train.config.command_line import SYNONYMS, Parser, nearest
from train.config.provenance import check_output, held_settings, record
from train.config.settings import REPOSITORY, Settings, parse
from train.runtime.errors import UserError

TEXTS = [path.read_text() for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))]
COMMANDS = {
    "train/sft.py": [], "train/compare.py": [], "train/evaluate.py": [], "train/annotate.py": [], "train/show.py": [],
    "train/export.py": [], "train/merge.py": [], "launch/plan.py": ["-m", "launch.plan"],
    "launch/preflight.py": ["-m", "launch.preflight"], "launch/dashboard.py": ["-m", "launch.dashboard"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--lr", "1"], "--learning-rate"), (["--bs=8"], "--batch-size"), (["--max-length", "9"], "--max-tokens"),
        (["--lora_r", "9"], "--lora-rank"), (["--output_dir", "o"], "--output"), (["--max-token", "9"], "--max-tokens"),
    ],
)  # fmt: skip
def test_a_flag_of_other_trainers_is_answered_with_ours(given, meant):
    with pytest.raises(UserError, match=rf"unrecognized.*Did you mean {meant}\?$"):
        parse(given, "")


def test_every_synonym_names_a_setting_and_is_none_itself_there():
    from train.evaluation.options import EvaluationSettings

    known = {*Settings.__dataclass_fields__, *EvaluationSettings.__dataclass_fields__, "recipe", "overwrite"}
    assert set(SYNONYMS.values()) <= known
    assert nearest("lr", ["learning_rate", "steps"]) == "learning_rate"  # as a recipe has it
    assert nearest("lr", ["--samples"]) is None  # a command without it


def test_defaults_are_shown_as_they_are():
    parser = Parser("")
    parser.add_settings(Settings)
    shown = " ".join(parser.format_help().split())
    assert "0: as many as --epochs takes (default: 0)" in shown and "weight decay (default: 0.0)" in shown
    assert "(default: <DOCTAG>)" in shown and "--adapter ADAPTER directory of a PEFT adapter" in shown
    assert "default: none)" not in shown.replace("NAME[=TREATMENT],… (default: none)", "")  # --mask's


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_help_says_every_flag_that_its_own_or_the_readmes_examples_use(script):
    done = run(*(COMMANDS[script] or [script]), "--help", cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    name = script.removesuffix(".py").replace("/", ".") if COMMANDS[script] else script
    lines = [line for text in TEXTS for line in text.splitlines() if name in line]
    example = " ".join(line.split("#")[0].replace("`", " ") for line in [*lines, *shown.splitlines()] if name in line)
    own = example.replace("--num_gpus", "").replace("--ntasks-per-node", "")
    options = shown[shown.index("options:") :]
    for flag in set(re.findall(r"(?<!\w)--[a-z][a-z-]*[a-z]", own)):
        assert re.search(rf"^  (?:-h, )?{flag}\b", options, re.MULTILINE), flag


def test_a_run_of_before_the_default_doctag_had_none(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for held in ({"doctag": ""}, {}):
        settings = Settings(output=str(run), resume=True, doctag="none")
        value = yaml.safe_load(record(settings, {}))
        value["settings"] = {k: v for k, v in value["settings"].items() if k != "doctag"} | held
        (run / "settings.yaml").write_text(yaml.safe_dump(value))
        assert held_settings(run / "settings.yaml")["settings"]["doctag"] == "none"
        check_output(settings)
        with pytest.raises(UserError, match=r"--doctag <DOCTAG>: the run in .* has none; a resumed run must have"):
            check_output(Settings(output=str(run), resume=True))


def examples() -> dict[str, list[str]]:
    """The examples of claims and of recipes, as docs/ and --help show them."""
    found: dict[str, list[str]] = {"id: green_mars": [], "settings: {model": []}
    indented = [re.sub(r"^    ", "", str(text), flags=re.MULTILINE) for text in (evaluate.__doc__, compare.__doc__)]
    for text in (*TEXTS, *indented):
        for start, listed in found.items():
            listed += re.findall(rf"^({re.escape(start)}(?:.*\n)+?)(?=```|\n|\Z)", text, re.MULTILINE)
    return found


def test_the_examples_of_claims_and_recipes_are_taken_as_they_stand(tmp_path):
    claims, recipes = examples().values()
    assert len(claims) == len(recipes) == 2 and all(text.count("\n") == 6 for text in (*claims, *recipes))
    for text in claims:
        (tmp_path / "claim.yaml").write_text(text)
        (claim,) = read_claims([tmp_path / "claim.yaml"])
        assert (claim.id, len(claim.likelihood), len(claim.yes_no)) == ("green_mars", 1, 1)
    for text in recipes:
        (tmp_path / "recipe.yaml").write_text(text)
        plan = parse_comparison(["--recipe", str(tmp_path / "recipe.yaml")], "")
        assert plan.names == ["all of it", "doctag out", "false out"] and plan.baseline == "all of it"
        assert len(plan.seeds) == 3 and plan.shared.steps == 625


def test_a_path_that_is_not_utf_8_is_refused():
    with pytest.raises(UserError, match="x\udcff: is not valid UTF-8, as all flags and paths must be"):
        parse(["--output", "x\udcff"], "")
