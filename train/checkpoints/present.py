"""Checks that the files of a model or an adapter are there, without torch: commands do so before they import it."""

import os
from pathlib import Path
from typing import Any

from train.runtime.errors import UserError
from train.runtime.outside import read_json

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


def adapter_files(directory: Path) -> tuple[Path, Path]:
    """Returns the paths of an adapter's configuration and weights. Raises UserError if one is missing."""
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for path in (config, weights):
        if not os.path.isfile(path):
            fix = f"--adapter {directory / 'adapter'}" if os.path.isfile(directory / "adapter" / path.name) else ""
            raise UserError(
                f"--adapter {directory}: no {path.name} there; give "
                f"{fix or 'the directory of a PEFT adapter in safetensors'}."
            )
    return config, weights
