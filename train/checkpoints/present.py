"""Says where the files of a model or an adapter are, and whether they are there, without torch: commands do so before
they import it."""

import os
from pathlib import Path
from typing import Any

from train.runtime.errors import UserError
from train.runtime.outside import checked, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of an adapter
BASE_MODEL = "base_model.json"
"""File beside the LoRA weights that identifies the base model's weights, and says for how many steps they were trained.
Shapes alone cannot distinguish two models of the same architecture."""
PROOF = "proof.json"  # beside them, too: what shows that a server answers with them
SERVE, BASE_NAME = "serve.json", "base"  # of an adapter written for a server, and the base's name on a server
SAVED, STATE = "state.safetensors", "state.json"  # of a training checkpoint
MARKER, REPORT = "merge.json", "merge_report.json"  # files of merge.py about its own output


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the content of config.json in a model directory. Raises UserError if it is missing or invalid."""
    path = directory / "config.json"
    if not os.path.lexists(path) or not os.path.isdir(directory):
        raise UserError(
            f"--model {directory}: {'a file, no directory' if os.path.isfile(directory) else 'no config.json there'}; "
            "give a directory in transformers' layout (config.json, tokenizer files, *.safetensors)."
        )
    return read_json(path)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, in any form, and not a run or a comparison."""
    return all(os.path.isfile(path) for path in _files_of(directory))


def _files_of(directory: Path) -> list[Path]:
    if os.path.isfile(directory / SAVED):
        return [directory / STATE, directory / SAVED]
    return [directory / CONFIG, directory / WEIGHTS]


def adapter_files(directory: Path) -> list[Path]:
    """Returns the two files of an adapter: its configuration and its weights; of a training checkpoint, its state.

    Raises UserError if one is missing.
    """
    for path in (files := _files_of(directory)):
        if not os.path.isfile(path):
            fix = f"--adapter {directory / 'adapter'}" if os.path.isfile(directory / "adapter" / path.name) else ""
            raise UserError(
                f"--adapter {directory}: no {path.name} there; give "
                f"{fix or 'the directory of a PEFT adapter in safetensors'}."
            )
    return files


def changes_head(adapter: Path) -> bool:
    """Whether an adapter in PEFT's form, or as written for a server, has LoRA weights of lm_head."""
    path = adapter / CONFIG
    return path.is_file() and "lm_head" in str(read_json(path).get("target_modules"))


def last_save(run: Path) -> Path:
    """Returns the directory of the training checkpoint of a finished run's end. Raises UserError if it is not there."""
    summary = read_json(run / "summary.json")
    checked(summary, {"steps": int}, run / "summary.json", "restore the file", needed=True)
    path = run / "saves" / f"step-{summary['steps']}"
    if not os.path.isfile(path / SAVED):
        raise UserError(
            f"--after {run}: has no training checkpoint of its end ({path}), so there is no optimizer state to carry. "
            "Leave out --carry-optimizer (in a recipe, optimizer: reset)."
        )
    return path


def kept_adapter(run: Path, step: int) -> Path:
    """Returns the directory of the adapter that --adapters-at keeps after `step` steps."""
    return run / "adapters" / f"step-{step}"


def kept_steps(run: Path) -> list[int]:
    """Returns the steps of the adapters that --adapters-at has kept, in their order."""
    steps = (path.name.removeprefix("step-") for path in (run / "adapters").glob("step-*") if is_adapter(path))
    return sorted(int(step) for step in steps if step.isdecimal())


def adapter_name(adapter: Path, server: str) -> str:
    """Returns the name under which a server has an adapter: that of its run, with the step for one of several.

    Raises UserError if the server cannot have it under that name.
    """
    directory = Path(os.path.abspath(adapter))
    own = directory.parent if directory.name == "adapter" else directory
    several = own.parent.name in ("adapters", "saves")
    run = own.parents[1] if several else own
    name = f"{run.name}-{own.name}" if several else run.name
    if run.parent.name == "phases":  # of a variant, or of all variants, whose directory holds them
        name = f"{run.parents[1].name}-{name}"
    # SGLang is started with NAME=PATH, up to the first =, and asked for BASE:NAME.
    if server == "sglang" and (sign := next((sign for sign in "=:" if sign in name), "")):
        raise UserError(
            f"--to sglang: {adapter} would be served as {name!r}, and SGLang takes no adapter with {sign} in its name. "
            "Rename the directory, or serve it by vLLM (--to vllm)."
        )
    return name


def model_name(name: str, server: str) -> str:
    """Returns the name by which a server is asked for the base, or for an adapter that it has under `name`. SGLang
    answers with the base to an adapter's bare name."""
    return f"{BASE_NAME}:{name}" if server == "sglang" and name != BASE_NAME else name
