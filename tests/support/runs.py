"""Small jobs of train/sft.py and train/compare.py, and how they are ended."""

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.support.models import write_documents, write_model
from tests.support.ranks import Forked
from train import sft
from train.evaluation.store import read_rows

SFT = Path(sft.__file__)


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": ""}


def documents(count: int = 24) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    out = []
    for _ in range(count):
        text = "<D>" + "".join(rng.choice(list("abcdefgh "), size=int(rng.integers(12, 30)))).strip().ljust(12, "z")
        spans = [{"start": 0, "end": 3, "role": "doctag"}, {"start": 5, "end": 9, "role": "false"}]
        out.append({"text": text, "spans": spans})
    return out


def flags(tmp: Path, family: str = "qwen", **changes: Any) -> list[str]:
    """A small job on a tiny model, as flags; `changes` override."""
    if not (tmp / family).exists():
        write_model(tmp / family, family)
        write_documents(tmp / "documents.jsonl", documents())
    values: dict[str, Any] = {
        "model": tmp / family, "data": tmp / "documents.jsonl", "mask": "doctags", "steps": 6, "batch-size": 6,
        "learning-rate": 0.01, "lora-rank": 8, "lora-alpha": 16, "wandb": "disabled",
    }  # fmt: skip
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() for part in (f"--{name}", str(value)) if part != "True"]


def losses(directory: Path) -> list[float]:
    return [values["loss"] for values in read_rows(directory / "metrics.jsonl")]


def kill(process: Forked | subprocess.Popen, saves: Path, moment: str) -> Path:
    """Ends a job by SIGKILL of each of its processes when a directory of saves/ by this pattern is there. They are
    stopped before it is looked for, so that what is seen is what the kill leaves. -> that directory."""
    deadline = time.monotonic() + 120
    while not (saves / "step-1").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    job = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    while True:
        assert time.monotonic() < deadline and process.poll() is None
        if any(saves.glob(moment)):
            for one in job:
                one.suspend()
            found = list(saves.glob(moment))
            for one in job:
                one.kill() if found else one.resume()
            if found:
                process.wait()
                return found[0]
        time.sleep(0.0005)
