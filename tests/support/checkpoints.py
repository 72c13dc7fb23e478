"""Checkpoints as stock transformers loads them, and changed ones."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
)


def stock_model(directory: Path) -> Any:
    """transformers' own loading, quantized weights made BF16, then in fp32 with the F32 tensors that it rounded."""
    config = json.loads((directory / "config.json").read_text())
    quantization = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    options: dict[str, Any] = {}
    if quantization:
        kind = FineGrainedFP8Config if quantization["quant_method"] == "fp8" else CompressedTensorsConfig
        options["quantization_config"] = kind(dequantize=True)
    if config["model_type"] == "kimi_k2":  # which transformers does not know by itself
        directory = Path(
            shutil.copytree(directory, directory.with_name(f"{directory.name}-as-deepseek"), dirs_exist_ok=True)
        )
        (directory / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.bfloat16, **options).float()
    state = model.state_dict()
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.dtype == torch.float32 and name in state:
                state[name].copy_(tensor)
    return model


def shard_of(directory: Path, tensor: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a file's header and leaves its data."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def rename(directory: Path, old: str, new: str) -> str:
    """Gives a tensor another name, in its shard and in the index. -> the shard's name."""
    path = shard_of(directory, old)
    edit_header(path, lambda header: header.update({new: header.pop(old)}))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][new] = index["weight_map"].pop(old)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return path.name
