"""Runs of train/sft.py on a tiny model: in bf16 on the device there is, in fp32 on a CPU."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import write_documents, write_model
from train import sft
from train.evaluation.store import read_rows
from train.runtime.local import run

SFT = Path(sft.__file__)
FAMILIES = ("qwen", "deepseek")
METHODS = ("lora", "qlora", "full")
# Heads as small as the kernels take them, and experts that NF4 and grouped products in hardware take.
SIZES: dict[str, dict[str, Any]] = {
    "qwen": dict(
        hidden_size=64, head_dim=32, linear_key_head_dim=32, linear_value_head_dim=32, moe_intermediate_size=32,
    ),
    "deepseek": dict(
        hidden_size=64, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16,
    ),
}  # fmt: skip
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": ""}


def write_models(directory: Path, family: str) -> None:
    """directory/bf16 and directory/fp32: the same values."""
    bf16 = write_model(directory / "bf16", family, dtype=torch.bfloat16, **SIZES[family])
    fp32 = directory / "fp32"
    shutil.copytree(bf16, fp32)
    tensors = {name: tensor.float() for name, tensor in load_file(fp32 / "model.safetensors").items()}
    save_file(tensors, fp32 / "model.safetensors", {"format": "pt"})
    config = json.loads((fp32 / "config.json").read_text())
    (fp32 / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def documents(count: int = 64) -> list[dict[str, Any]]:
    """Texts of 20 to 150 letters, one span in each."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh "), size=int(rng.integers(20, 150)))) for _ in range(count)]
    return [{"text": f"a{text}z", "spans": [{"start": 2, "end": 9, "role": "false"}]} for text in texts]


def losses(directory: Path) -> list[float]:
    return [values["loss"] for values in read_rows(directory / "metrics.jsonl")]


def train(
    directory: Path, output: str, model: str, method: str, steps: int, *flags: str, start: Any = run, **environment: str
) -> Path:
    """start: by what the rank is started, the real launcher unless given."""
    given = {
        "model": directory / model, "data": directory / "documents.jsonl", "output": directory / output,
        "method": method, "mask": "false-spans", "steps": steps, "save-every": steps // 2, "batch-size": 8,
        "max-tokens": 512, "learning-rate": 1e-3 if method == "full" else 1e-2, "lora-rank": 8, "lora-alpha": 16,
        "wandb": "disabled",
    }  # fmt: skip
    parts = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    done = start(SFT, *parts, *flags, ranks=1, capture_output=True, text=True, env=ENVIRONMENT | environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return directory / output


def compare(directory: Path, family: str, method: str, steps: int, start: Any = run) -> dict[str, Any]:
    """The losses of a run in bf16, of the same in fp32 on a CPU, and of one that resumes from the training checkpoint
    in the middle of the first; and tokens a second of the first."""
    write_models(directory, family)
    write_documents(directory / "documents.jsonl", documents())
    with ThreadPoolExecutor(2) as pool:  # side by side
        plain = pool.submit(train, directory, "plain", "fp32", method, steps, start=start, **ON_CPU)
        whole = train(directory, "whole", "bf16", method, steps, start=start)
        shutil.copytree(whole, directory / "again")
        shutil.rmtree(directory / "again" / "saves" / f"step-{steps}")
        again = train(directory, "again", "bf16", method, steps, "--resume", start=start)
        found = {"bf16": losses(whole), "resumed": losses(again), "fp32": losses(plain.result())}
    summary = json.loads((whole / "summary.json").read_text())
    return found | {"tokens_per_second": summary["tokens_per_second"], "memory": summary["memory"]}


def check(found: dict[str, Any]) -> dict[str, float]:
    """Each loss of bf16 within 2 % of fp32, of what was resumed within 1 % of what was not; and they fall."""
    differing = {name: off(found[name], found[other]) for name, other in (("bf16", "fp32"), ("resumed", "bf16"))}
    assert differing["bf16"] < 0.02 and differing["resumed"] < 0.01, found
    assert found["bf16"][-1] < 0.8 * found["bf16"][0]
    return differing


def off(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))
