"""Adapters with random LoRA weights, and merges of them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from train import merge as command
from train.checkpoints.adapter import peft_config, places
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.text_model import architecture, skeleton, text_config

LORA = LoRASettings(rank=4, alpha=6.0, expert_rank=2, seed=0, lm_head=True)


def write_adapter(
    directory: Path, model: Path, size: float = 0.05, lora: LoRASettings = LORA, seed: int = 1, broken: bool = False
) -> Path:
    """Random LoRA weights for every weight that has any; broken: one of them has a NaN."""
    checkpoint = Checkpoint(model)
    bare = skeleton(text_config(checkpoint), ExpertGroup())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        place.key(architecture(checkpoint), f): torch.randn(place.shape(lora, f), generator=generator) * size**0.5
        for place in places(bare, lora)
        for f in "AB"
    }
    if broken:
        tensors[sorted(tensors)[3]][1, 2] = float("nan")
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    peft_config(list(places(bare, lora)), lora, architecture(checkpoint), str(model)).save_pretrained(directory)
    return directory


def merge(base: Path, adapter: Path | None, output: Path, *flags: str) -> int:
    """The exit code of train/merge.py."""
    given = ["--adapter", str(adapter)] if adapter else []
    return command.main(["--model", str(base), *given, "--output", str(output), *flags])
