"""Writes and checks the settings.yaml of a run: its settings, the values resolved from them, package versions and git
revision. --resume compares it with the new settings."""

import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from train.config.command_line import REPOSITORY, flag_of
from train.config.settings import FREE_ON_RESUME, Settings
from train.data.documents import NO_DOCTAG
from train.runtime import gpu
from train.runtime.errors import UserError
from train.runtime.gpu import KERNELS, installed
from train.runtime.locks import TRAINING
from train.runtime.outside import checked, read_text, read_yaml

TRIAL = ".can-be-written-"  # prefix of a temporary file, which other ranks may see


BEFORE_A_RUN = ("logs", "phases", TRIAL, TRAINING, "settings.yaml.partial")  # what may be there before a run is


def check_output(settings: Settings) -> None:
    """Checks the directory --output, if given, and creates a new one unless --dry-run is set. Raises UserError if it is
    not free or cannot be written. With --resume, raises UserError if it does not hold a run with the same settings;
    only those in FREE_ON_RESUME may differ."""
    if not settings.output:
        return
    directory = Path(settings.output)
    held = directory / "settings.yaml"
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise UserError(f"--output {directory}: is a file; give a directory.")
    if not os.path.lexists(held):
        if settings.resume:
            raise UserError(
                f"--resume: --output {directory} holds no run (no settings.yaml). Leave out --resume to start."
            )
        if os.path.exists(directory) and any(not path.name.startswith(BEFORE_A_RUN) for path in directory.iterdir()):
            raise UserError(f"--output {directory}: is not empty and does not hold a run. Give another directory.")
        if not settings.dry_run:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory, prefix=TRIAL):
                    pass
            except OSError as error:
                raise UserError(f"--output {directory}: cannot be written ({error.strerror}). Give another.") from None
        return
    if not settings.resume:
        raise UserError(
            f"--output {directory}: holds another run. Give another directory, or --resume to continue that run."
        )
    before = (
        dataclasses.asdict(Settings()) | held_settings(held)["settings"]
    )  # a setting that was added since then had its default
    now = yaml.safe_load(yaml.safe_dump(_values(settings)))
    for name in now.keys() - FREE_ON_RESUME:
        if before.get(name) != now[name] and not (name in PLACES and _one_place(before.get(name), now[name])):
            raise UserError(
                f"{flag_of(name)} {now[name]}: the run in {directory} has {before.get(name)}; a resumed run "
                "must have the same settings. Give the same, or another --output without --resume."
            )
    if settings.wandb != "disabled":
        held_wandb_id(directory)


PLACES = ("after", "adapter")  # settings that are paths, of which several may mean one place


def _one_place(one: Any, other: Any) -> bool:
    """Whether two paths, relative or not, mean the same place."""
    return bool(one) and bool(other) and os.path.realpath(one) == os.path.realpath(other)


WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # W&B accepts more characters, but uses the id in file names


def held_wandb_id(directory: Path) -> str:
    """Returns the W&B id of the run in a directory; "" if it has none yet. Raises UserError if the file with the id
    cannot be read or is not a valid id."""
    path, fix = directory / "wandb_id", "remove it, and W&B gets a new run"
    if not os.path.lexists(path):
        return ""
    text = read_text(path, fix=fix, most=2**10)
    if not WANDB_ID.fullmatch(text):
        raise UserError(f"{path}: {text[:80]!r} must be 1 to 64 letters, digits, - and _; {fix}.")
    return text


def of_any_age(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of an earlier run in their present form: --doctag was empty or absent before it had a
    default."""
    return settings | {"doctag": settings.get("doctag") or NO_DOCTAG}


def held_settings(path: Path) -> dict[str, Any]:
    """Returns the contents of the settings.yaml of an earlier run, with its settings in their present form. Raises
    UserError if the file cannot be read, or is not what a run writes."""
    value = read_yaml(path, fix="start a new run", most=MOST_HELD)
    names = ("settings", "resolved", "versions")
    parts: list[Any] = [value.get(name, {}) for name in names] if isinstance(value, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "settings" not in value:
        raise UserError(f"{path}: is not what a run writes; a run cannot be resumed without it. Start a new one.")
    kinds: dict[str, Any] = {
        field.name: list if field.metadata["many"] else field.type for field in dataclasses.fields(Settings)
    }
    checked(parts[0], kinds, path, "restore the file")
    checked(parts[1], {"hashes": dict, "inputs": dict}, path, "restore the file")
    if nothing := [name for name in kinds if name in parts[0] and parts[0][name] is None]:
        raise UserError(f"{path}: {nothing[0]} is empty; restore the file.")
    return value | {"settings": of_any_age(parts[0])}


MOST_HELD = 2**24  # most bytes of a settings.yaml, which has a hash of every file


def other_versions(held: dict[str, Any]) -> str:
    """Returns a sentence that lists the packages and the commit that have changed since an earlier run, or says
    that none has. held: the contents of the run's settings.yaml."""
    before = (held.get("versions") or {}) | {"git revision": held.get("git_revision")}
    now = versions() | {"git revision": git_revision()}
    other = [name for name in before if before[name] != now.get(name)]
    told = ", ".join(f"{name} was {before[name]} and is {now.get(name, 'not installed')}" for name in other)
    return f"Since then, {told}." if told else "All packages and the commit of this project are the same."


PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "wandb", "safetensors", "tokenizers", "numpy",
            "tiktoken", "jinja2")  # fmt: skip


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that matter to a run. Some may be absent: a run without W&B needs
    no wandb, and a CPU needs no kernels."""
    return installed((*PACKAGES, *KERNELS))


def record(settings: Settings, resolved: dict[str, Any]) -> str:
    """Returns the text of settings.yaml: settings, the values resolved from them, package versions, GPU and git
    revision. Raises UserError if --data is malformed."""
    return yaml.safe_dump(
        {
            "settings": _values(settings),
            "resolved": resolved,
            "versions": versions(),
            "gpu": gpu.name(),
            "git_revision": git_revision(),
        },
        sort_keys=False,
        allow_unicode=True,
    )


def _values(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings) | {"data": [str(source) for source in settings.sources()]}


def git_revision() -> str | None:
    """Returns the hash of the checked-out commit, with "+changes" appended if files differ from it; None outside a git
    checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and git("status", "--porcelain") else revision
