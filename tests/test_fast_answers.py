"""Every command answers a mistyped flag, an unknown value, a wrong path and --help before an import that takes
seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train.config.settings import DEMO, REPOSITORY

HEAVY = ("torch", "deepspeed", "transformers", "pandas", "matplotlib", "scipy", "wandb_workspaces", "peft")
# Runs a command as its own script would, then prints which of HEAVY were imported.
COUNTED = f"""
import atexit, os, runpy, sys
def tell():
    print("\\nimported:", *({HEAVY!r} & sys.modules.keys()), file=sys.stderr, flush=True)
def left(code):
    tell()
    leave(code)
leave, os._exit = os._exit, left
atexit.register(tell)
path, sys.argv = sys.argv[1], sys.argv[1:]
if path.endswith(".py"):
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    runpy.run_path(path, run_name="__main__")
else:
    runpy.run_module(path, run_name="__main__", alter_sys=True)
""".replace(f"{HEAVY!r}", f"{set(HEAVY)!r}")

MODEL, DENSE, CLAIMS = str(DEMO / "model"), str(DEMO / "data" / "dense.jsonl"), str(DEMO / "claims.yaml")
TRAINING = {"model": ["--model"], "data": ["--data"], "recipe": ["--recipe"], "adapter": ["--adapter"],
            "claims": ["--claims"], "held-out": ["--held-out"], "ds-config": ["--ds-config"]}  # fmt: skip
EVALUATED = ["--model", MODEL, "--claims", CLAIMS, "--output", "out"]
# Command -> (words without which it would complain of those, flags before a path, by what they name).
COMMANDS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "train/sft.py": ([], TRAINING | {"output": ["--output"]}),
    "train/compare.py": (["--masks", "none", "all", "--claims", CLAIMS], {
        **{name: flag for name, flag in TRAINING.items() if name != "recipe"}, "output": ["--output"],
    }),
    "train/evaluate.py": (EVALUATED, {
        "model": ["--model"], "adapter": ["--step", "1", "--adapter"], "claims": ["--claims"],
        "held-out": ["--held-out"], "training data": ["--training-data"], "output": ["--output"],
    }),
    "train/annotate.py": (["--data", DENSE, "--markup", "a=b", "--role", "r", "--output", "o"], {
        "data": ["--data"], "patterns": ["--patterns"], "spans": ["--spans"],
    }),
    "train/show.py": (["--data", DENSE, "--model", MODEL, "--mask", "none"], {
        "data": ["--data"], "model": ["--model"],
    }),
    "train/merge.py": (["--model", MODEL, "--output", "o"], {
        "model": ["--model"], "adapter": ["--adapter"], "output": ["--output"],
    }),
    "train/export.py": (["--data", DENSE, "--output", "o"], {"data": ["--data"]}),
    "launch.plan": (["--model", MODEL], {
        "model": ["--model"], "recipe": ["--recipe"], "ds-config": ["--ds-config"],
    }),
    "launch.preflight": ([], TRAINING | {"output": ["--output"]}),
    "launch.serve": (["--output", "o", "--model", MODEL, "--adapters", "absent"], {
        "model": ["--model"], "adapter": [], "output": ["--output"],
    }),
    "launch.evaluate_runs": (["--output", "o", "--judge", "same", "--claims", CLAIMS, "--runs", "absent"], {
        "run": [], "claims": ["--claims"],
    }),
    "launch.dashboard": (["--entity", "e", "absent"], {"run": []}),
    "train.demo.belief": ([], {"adapter": ["--adapter"]}),
    "train.demo.excerpts": ([str(DEMO), MODEL, "o"], {}),
    "train.demo.figures": ([], {}),
    "train.demo.make": ([], {}),
    "train.demo.smollm2": (["o"], {"adapter": []}),
}  # fmt: skip
VALUES = {
    "train/sft.py": ["--schedule", "step"], "train/compare.py": ["--mask=fales", "--loss-norm", "al"],
    "train/evaluate.py": ["--kinds", "opne"], "train/annotate.py": ["--require", "x"],
    "train/show.py": ["--bad-rows", "x"], "train/merge.py": ["--to", "fp4"], "train/export.py": ["--bad-rows", "x"],
    "launch.plan": ["--gpu-memory", "H900"], "launch.preflight": ["--method", "x"],
}  # fmt: skip


def answer(cwd: Path, command: str, *given: str) -> tuple[int, str, list[str]]:
    """The exit code of a command, what it says, and what it has imported of HEAVY."""
    script = str(REPOSITORY / command) if command.endswith(".py") else command
    words = [sys.executable, "-c", COUNTED, script, *given]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    said, _, imported = done.stderr.rpartition("\nimported:")
    return done.returncode, done.stdout + said, imported.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_is_answered_before_a_heavy_import(tmp_path, command):
    code, said, imported = answer(tmp_path, command, *COMMANDS[command][0], "--nonsense")
    assert code == 2 and "error: " in said and "--nonsense" in said, said
    assert not imported


@pytest.mark.parametrize("command", VALUES)
def test_an_unknown_value_is_answered_before_a_heavy_import(tmp_path, command):
    code, said, imported = answer(tmp_path, command, *COMMANDS[command][0], *VALUES[command])
    assert code == 2 and "error: " in said and VALUES[command][-1] in said, said
    assert not imported


@pytest.mark.parametrize(("command", "what"), [(name, what) for name, (_, paths) in COMMANDS.items() for what in paths])
def test_a_wrong_path_is_answered_before_a_heavy_import(tmp_path, command, what):
    needed, paths = COMMANDS[command]
    (tmp_path / "file").write_text("")
    wrong = "file/absent" if what == "output" else "absent"
    code, said, imported = answer(tmp_path, command, *needed, *paths[what], wrong)
    assert code == 2 and "error: " in said and "absent" in said, said
    assert not imported


@pytest.mark.parametrize("given", [["--runs", "absent"], ["--recipe", "absent"]])
def test_compare_answers_wrong_runs_and_recipes_before_a_heavy_import(tmp_path, given):
    code, said, imported = answer(tmp_path, "train/compare.py", *given)
    assert code == 2 and f"error: {given[0]} absent" in said and not imported


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_before_a_heavy_import(tmp_path, command):
    code, said, imported = answer(tmp_path, command, "--help")
    assert code == 0 and said.startswith("usage: ") and not imported


def test_a_value_of_a_recipe_is_answered_before_a_heavy_import_and_with_its_line(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"settings": {"batch_size": 4, "steps": -1}}))
    code, said, imported = answer(tmp_path, "train/sft.py", "--recipe", "r.yaml")
    assert (code, said) == (2, "error: --steps -1: must be between 0 and 100000000. (steps in r.yaml:3)\n")
    assert not imported
