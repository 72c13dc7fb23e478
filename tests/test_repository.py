"""What holds the repository together: pinned versions, shipped configurations, commands that the texts name."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from train.config.settings import ds_config, parse

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
TEXTS = [
    *(path for name in ("README.md", "CONTRIBUTING.md", ".ci/run") if (path := REPOSITORY / name).exists()),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def constraints() -> dict[str, str]:
    """Package -> the one version that constraints.txt allows."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): number for name, number in pinned}


def requirements(extra: str | None = None) -> list[Requirement]:
    given = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [Requirement(line) for line in given]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout, so what belongs to the project cannot be told from the rest")
    return [path for name in listed.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize("requirement", [*requirements(), *requirements("dev")], ids=lambda r: r.name)
def test_each_dependency_is_constrained_to_a_version_that_pyproject_allows_and_that_is_installed(requirement):
    pinned = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True)
    # 2.13.0+cpu and 2.13.0+cu130 are builds of the same version
    assert version(requirement.name).partition("+")[0] == pinned, "run make setup"


def test_every_deepspeed_configuration_loads_with_the_runs_clipping():
    files = sorted((REPOSITORY / "ds_configs").glob("*.json"))
    assert files
    for path in files:
        config = ds_config(parse(["--ds-config", str(path), "--max-grad-norm", "0.5"], ""), ranks=2)
        assert config["zero_optimization"]["stage"] == 3
        assert config["train_batch_size"] == 2 and config["gradient_clipping"] == 0.5
        assert config.items() >= json.loads(path.read_text()).items()


def test_every_make_target_that_a_text_names_exists_and_is_in_help():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for text in TEXTS:
        # in code alone: "make sure" is no target
        code = "\n".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`|^    .*$", text.read_text(), re.MULTILINE))
        named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", code))
        assert named <= targets, f"{text.name}: {sorted(named - targets)}"
    # under `make test` this make is a nested one, which would say which directory it enters
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets - {"documents"}


def test_continuous_integration_lints_and_tests():
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text() and "in lint test;" in script.read_text()


def test_the_dockerfile_agrees_with_pyproject_and_constraints():
    """It cannot be built here. What it installs is what `make setup` does, and the extra, held to the same versions."""
    text = re.sub(r"\\\n\s*", "", (REPOSITORY / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    runs = [rest for step, rest in steps if step == "RUN"]
    (python,) = set(re.findall(r"python(3\.\d+)", " ".join(runs)))
    assert f"on Python {python}:" in (REPOSITORY / "constraints.txt").read_text()
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    assert f"make setup PYTHON=python{python}" in runs
    (pip,) = [command for command in runs if "pip" in command]
    assert "--constraint constraints.txt" in pip and "--no-build-isolation" in pip  # built against the torch of setup
    (extras,) = re.findall(r'"\.\[(.*)\]"', pip)
    assert set(extras.split(",")) == {"gpu"} <= PROJECT["optional-dependencies"].keys()
    assert not re.search(r"==|torch\b(?!\.)", " ".join(runs).lower())  # versions are in constraints.txt alone

    base = next(rest for step, rest in steps if step == "FROM")
    cuda = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-\w+", base)
    assert cuda and torch.version.cuda in (None, cuda[1])  # None: a CPU build
    steps_before = [step for step, _ in steps[: steps.index(["RUN", f"make setup PYTHON=python{python}"])]]
    assert "USER" in steps_before and [rest for step, rest in steps if step == "USER"] == ["1000"]
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[1:-1]]
    assert all((REPOSITORY / word).exists() for word in copied) and PROJECT["readme"] in copied
    assert "make test" in text and {".venv", ".git"} <= set((REPOSITORY / ".dockerignore").read_text().split())


def test_starting_the_ranks_compiles_nothing(tmp_path):
    # DeepSpeed would compile an all-reduce that training never calls; its link command breaks on a path with a space.
    code = "from train.runtime.distributed import start_distributed; start_distributed()"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, check=True)
    assert not list(tmp_path.iterdir())


def test_no_file_names_the_host_of_a_package_registry_or_a_path_of_the_machine_it_was_made_on():
    registry = re.compile(r"\b(?:pypi|pythonhosted|anaconda|npmjs|download\.pytorch)\.(?:org|com|io)\b|index-url")
    machine = re.compile(r"(?<![\w.{/])/(?:work|root)/\w")
    allowed = {"tests/test_repository.py"}  # this file's patterns
    for path in tracked_files():
        name = path.relative_to(REPOSITORY).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        if name not in allowed:
            assert not (found := registry.search(text)), f"{name}: {found[0] if found else ''}"
            assert not (found := machine.search(text)), f"{name}: {found[0] if found else ''}"


def test_no_module_beside_sft_py_hides_one_of_python_or_of_an_installed_package():
    # `deepspeed train/sft.py` puts train/ itself first on sys.path. transformers imports Hugging Face's `kernels`.
    beside = {path.stem for path in (REPOSITORY / "train").iterdir() if path.suffix == ".py" or path.is_dir()}
    taken = sys.stdlib_module_names | set(packages_distributions()) | {"kernels"}
    assert not (beside - {"__init__", "__pycache__"}) & (taken - {"train", "launch"})


def test_no_type_has_the_name_of_another():
    found = [
        name
        for path in (*Path(REPOSITORY / "train").rglob("*.py"), *Path(REPOSITORY / "launch").rglob("*.py"))
        for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(), re.MULTILINE)
    ]
    assert sorted(found) == sorted(set(found))
