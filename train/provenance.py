"""What a run was made of, kept in its settings.yaml and compared by --resume: settings, versions, revision, and what it
read."""

import dataclasses
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from train import gpu
from train.belief.claim_files import claim_paths
from train.checkpoints.reader import Checkpoint
from train.command_line import REPOSITORY, flag_of
from train.data.documents import NO_DOCTAG
from train.data.tokenizer import TOKENIZER
from train.errors import UserError
from train.gpu import KERNELS, installed
from train.locks import TRAINING
from train.outside import checked, opened, read_text, read_yaml
from train.settings import FREE_ON_RESUME, Settings

TRIAL = ".can-be-written-"  # of a file that comes and goes; other ranks may see it


BEFORE_A_RUN = ("logs", TRIAL, TRAINING, "settings.yaml.partial")  # what a run killed at its very start leaves


def check_output(settings: Settings) -> None:
    """--output must be free, or with --resume hold a run of the same settings."""
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
            raise UserError(f"--output {directory}: is not empty, and what it holds is no run. Give another directory.")
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
            f"--output {directory}: holds another run. Give another directory, or --resume to go on with that run."
        )
    before = (
        dataclasses.asdict(Settings()) | held_settings(held)["settings"]
    )  # a setting that came later had its default
    now = yaml.safe_load(record(settings, {}))["settings"]
    for name in now.keys() - FREE_ON_RESUME:
        if before.get(name) != now[name]:
            raise UserError(
                f"{flag_of(name)} {now[name]}: the run in {directory} has {before.get(name)}; a resumed run "
                "must have the same settings. Give the same, or another --output without --resume."
            )
    if settings.wandb != "disabled":
        held_wandb_id(directory)


WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # W&B takes more, but names files by it


def held_wandb_id(directory: Path) -> str:
    """The id of a directory's run on W&B; "" where it has none yet."""
    path, fix = directory / "wandb_id", "remove it, and W&B gets a new run"
    if not os.path.lexists(path):
        return ""
    text = read_text(path, fix=fix, most=2**10)
    if not WANDB_ID.fullmatch(text):
        raise UserError(f"{path}: {text[:80]!r} must be 1 to 64 letters, digits, - and _; {fix}.")
    return text


def of_any_age(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as they are called today: --doctag was empty, or absent, before it had a default."""
    return settings | {"doctag": settings.get("doctag") or NO_DOCTAG}


def held_settings(path: Path) -> dict[str, Any]:
    """The settings.yaml of a run to go on with."""
    value = read_yaml(path, fix="start a new run", most=MOST_HELD)
    names = ("settings", "resolved", "versions")
    parts: list[Any] = [value.get(name, {}) for name in names] if isinstance(value, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "settings" not in value:
        raise UserError(f"{path}: is not what a run writes; a run cannot be gone on with without it. Start a new one.")
    kinds: dict[str, Any] = {
        field.name: list if field.metadata["many"] else field.type for field in dataclasses.fields(Settings)
    }
    checked(parts[0], kinds, path, "restore the file")
    checked(parts[1], {"hashes": dict, "inputs": dict}, path, "restore the file")
    if nothing := [name for name in kinds if name in parts[0] and parts[0][name] is None]:
        raise UserError(f"{path}: {nothing[0]} is empty; restore the file.")
    return value | {"settings": of_any_age(parts[0])}


MOST_HELD = 2**24  # bytes of a run's settings.yaml, with a hash of every file


def inputs(settings: Settings, checkpoint: Checkpoint) -> dict[str, str]:
    """The SHA-256 of what a run reads, of its weights a sample: a resumed run must read the same."""
    model = Path(settings.model)
    paths = [*(Path(source.path) for source in settings.sources()), model / "config.json", Path(settings.ds_config)]
    paths += sorted(path for pattern in TOKENIZER for path in model.glob(pattern))
    claims = [each for path in settings.claims for each in claim_paths(Path(path))]
    for path in [*claims, *([Path(settings.held_out)] if settings.held_out else [])]:
        paths += sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if settings.adapter:
        paths += [Path(settings.adapter) / f"adapter_{name}" for name in ("config.json", "model.safetensors")]
    return {str(path): _sha256(path) for path in paths} | {f"weights of {model}": checkpoint.fingerprint()}


def _sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(settings: Settings, resolved: dict[str, Any]) -> None:
    """With --resume: UserError where a file, or what is made of the files, is not what the run began with."""
    if not (settings.resume and settings.output):
        return
    held = held_settings(Path(settings.output) / "settings.yaml")
    resolved_then = held.get("resolved") or {}
    before, now = resolved_then.get("inputs") or {}, resolved["inputs"]
    if changed := sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)):
        raise UserError(
            f"--resume: {', '.join(changed)} changed since the run in {settings.output} began; the losses would be "
            "another run's. Restore the file, or start a new run."
        )
    hashes = resolved_then.get("hashes") or {}  # earlier runs kept none
    words = {"tokens": "the tokens of the documents", "order": "their order", "questions": "what is asked of the model"}
    if other := [words[name] for name in words if name in hashes and hashes[name] != resolved["hashes"][name]]:
        raise UserError(
            f"--resume: {', '.join(other)} changed since the run in {settings.output} began, though files and settings "
            f"are the same; the losses would be another run's. {_other_versions(held)} Go on with what the run began "
            "with, or start a new run."
        )


def otherwise_notes(settings: Settings, resolved: dict[str, Any]) -> list[str]:
    """With --resume: on how many ranks, by how many for its experts and on which GPU the run goes on, where these are
    others."""
    if not (settings.resume and settings.output):
        return []
    held = held_settings(Path(settings.output) / "settings.yaml")
    before = (held.get("resolved") or {}) | {"GPU": held.get("gpu")}
    now = {name: resolved[name] for name in ("ranks", "expert_parallel")} | {"GPU": gpu.name()}
    names = [name for name in now if (before.get(name) or now[name]) != now[name]]
    told = ", ".join(f"{name} was {before[name]} and is {now[name]}" for name in names)
    return [f"note: --resume: {told}; losses differ by rounding alone."] if told else []


def _other_versions(held: dict[str, Any]) -> str:
    """What a run's settings.yaml says of packages and the checked-out commit that is otherwise now."""
    before = (held.get("versions") or {}) | {"git revision": held.get("git_revision")}
    now = versions() | {"git revision": git_revision()}
    other = [name for name in before if before[name] != now.get(name)]
    told = ", ".join(f"{name} was {before[name]} and is {now.get(name, 'not installed')}" for name in other)
    return f"Since then, {told}." if told else "No package and no commit of this project is another."


PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "wandb", "safetensors", "tokenizers", "numpy",
            "tiktoken", "jinja2")  # fmt: skip


def versions() -> dict[str, str]:
    """Of those that are installed: a run without W&B needs no wandb, and a CPU no kernels."""
    return installed((*PACKAGES, *KERNELS))


def record(settings: Settings, resolved: dict[str, Any]) -> str:
    """The text of settings.yaml: settings, what was resolved from them, versions, GPU and git revision."""
    values = dataclasses.asdict(settings) | {"data": [str(source) for source in settings.sources()]}
    return yaml.safe_dump(
        {
            "settings": values,
            "resolved": resolved,
            "versions": versions(),
            "gpu": gpu.name(),
            "git_revision": git_revision(),
        },
        sort_keys=False,
        allow_unicode=True,
    )


def git_revision() -> str | None:
    """The checked-out commit, "+changes" appended where files differ from it; None outside a checkout."""

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
