"""Records what a run reads, and checks on --resume that this is still what the run started with."""

import hashlib
from pathlib import Path
from typing import Any

from train.checkpoints.present import adapter_files
from train.checkpoints.reader import Checkpoint
from train.claims.claim_files import claim_paths
from train.config.provenance import held_settings, other_versions
from train.config.settings import Settings
from train.data.tokenizer import TOKENIZER
from train.runtime import gpu
from train.runtime.errors import UserError
from train.runtime.outside import opened


def inputs(settings: Settings, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the SHA-256 of every file that a run reads, and a fingerprint of its weights: a resumed run must read the
    same. Raises UserError if a file cannot be read."""
    model = Path(settings.model)
    paths = [*(Path(source.path) for source in settings.sources()), model / "config.json", Path(settings.ds_config)]
    paths += sorted(path for pattern in TOKENIZER for path in model.glob(pattern))
    claims = [each for path in settings.claims for each in claim_paths(Path(path))]
    for path in [*claims, *([Path(settings.held_out)] if settings.held_out else [])]:
        paths += sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if settings.adapter:
        paths += adapter_files(Path(settings.adapter))
    return {str(path): _sha256(path) for path in paths} | {f"weights of {model}": checkpoint.fingerprint()}


def _sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(settings: Settings, resolved: dict[str, Any]) -> None:
    """With --resume, raises UserError if a file, or what is made from the files, has changed since the run started."""
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
    hashes = resolved_then.get("hashes") or {}  # runs of earlier versions stored none
    words = {"tokens": "the tokens of the documents", "order": "their order", "questions": "what is asked of the model"}
    if other := [words[name] for name in words if name in hashes and hashes[name] != resolved["hashes"][name]]:
        raise UserError(
            f"--resume: {', '.join(other)} changed since the run in {settings.output} began, though files and settings "
            f"are the same; the losses would be another run's. {other_versions(held)} Restore what the run began "
            "with, or start a new run."
        )


def otherwise_notes(settings: Settings, resolved: dict[str, Any]) -> list[str]:
    """With --resume, returns a note if the number of ranks, the expert parallelism or the GPU has changed."""
    if not (settings.resume and settings.output):
        return []
    held = held_settings(Path(settings.output) / "settings.yaml")
    before = (held.get("resolved") or {}) | {"GPU": held.get("gpu")}
    now = {name: resolved[name] for name in ("ranks", "expert_parallel")} | {"GPU": gpu.name()}
    names = [name for name in now if (before.get(name) or now[name]) != now[name]]
    told = ", ".join(f"{name} was {before[name]} and is {now[name]}" for name in names)
    return [f"note: --resume: {told}; losses differ only by rounding."] if told else []
