"""Writes an adapter in the form that a server loads: vLLM, SGLang, or stock peft.

How each server treats an adapter was determined from, and tested with, the loaders of the versions in SERVERS:

- vLLM (vllm/lora) loads PEFT's own form, with ranks and scales from `rank_pattern` and `use_rslora`. Its class for
  Qwen3.5-MoE as published has fused expert weights. For other MoE models, fused expert weights in an adapter need the
  flag --enable-mixed-moe-lora-format, and "is_3d_lora_weight" with the adapter. It silently drops kv_b_proj of
  DeepSeek-V3 (vllm#48974), and does not support adapters for Kimi K2.5 (vllm#43840).
- SGLang (sglang/srt/lora) reads one rank and one scale, lora_alpha / r, for everything. So all ranks are padded to the
  largest with zeros, and B of the experts is multiplied by the ratio of the scales. Experts are A [E, r, I] and B
  [E, O, r] of `experts.gate_up_proj` and `experts.down_proj`. For Qwen3.5, in_proj_qkv is split into in_proj_q, _k and
  _v, which share A; in_proj_a and in_proj_b cannot be served.

Shapes: E experts, r LoRA rank, I and O input and output features.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.checkpoints.adapter import Place, as_peft, peft_config, places, plain_values, stock_name
from train.checkpoints.adapter_files import AdapterFile, training_of, weights_hash
from train.checkpoints.present import BASE_MODEL, BASE_NAME, CONFIG, PROOF, SERVE, WEIGHTS, adapter_name
from train.checkpoints.reader import Checkpoint
from train.checkpoints.writer import SafetensorsWriter, publish_directory
from train.layers.lora import LoRASettings
from train.runtime.errors import UserError
from train.runtime.outputs import write_whole
from train.runtime.outside import read_text

SERVERS = {"vllm": "0.33.0", "sglang": "0.5.23", "peft": "0.21.2"}
"""The versions for which the forms were checked."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank may have."""
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class Family:
    """How a server serves adapters of an architecture.

    dropped: last names of modules whose LoRA weights it does not apply. mixed: vLLM's class has separate weights per
    expert, so fused ones in an adapter must be declared. refused: why it does not support adapters.
    """

    dropped: tuple[str, ...] = ()
    mixed: bool = False
    refused: str = ""


FAMILIES: dict[str, dict[str, Family]] = {
    "vllm": {
        "Qwen3_5MoeForConditionalGeneration": Family(dropped=("lm_head",)),
        "Qwen3_5MoeForCausalLM": Family(mixed=True),
        "Qwen3MoeForCausalLM": Family(mixed=True),
        "DeepseekV3ForCausalLM": Family(dropped=("kv_b_proj", "lm_head"), mixed=True),
        "KimiK25ForConditionalGeneration": Family(
            refused="its class of this model supports no adapters (vllm#43840). Serve it with SGLang (--to sglang), or "
            "merge the adapter (train/merge.py)"
        ),
        "LlamaForCausalLM": Family(),
    },
    "sglang": {
        "Qwen3_5MoeForConditionalGeneration": Family(dropped=("in_proj_a", "in_proj_b")),
        "DeepseekV3ForCausalLM": Family(),
        "KimiK25ForConditionalGeneration": Family(),
        "LlamaForCausalLM": Family(),
    },
}


def family(server: str, architecture: str) -> Family:
    """Returns how `server` serves adapters of an architecture. Raises UserError if it does not, or if that is unknown.

    architecture: the model class that the base's config.json names.
    """
    if server == "peft":
        return Family()
    known = FAMILIES[server]
    if architecture not in known:
        raise UserError(
            f"--to {server}: which adapters {server} {SERVERS[server]} supports for {architecture or 'this model'} "
            f"was not checked; known are {', '.join(known)}. Merge the adapter (train/merge.py), and serve the result."
        )
    if known[architecture].refused:
        raise UserError(f"--to {server}: {server} {SERVERS[server]}: {known[architecture].refused}.")
    return known[architecture]


@dataclass(frozen=True)
class Written:
    """A tensor of the served adapter: its name and shape, and how it is made of A or B (`factor`) of a place."""

    name: str
    shape: tuple[int, ...]
    place: Place
    factor: str
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Served:
    """An adapter in the form of a server, before it is written.

    rank: the largest rank in it. ranks: of linear layers and of experts. config: its adapter_config.json. dropped: the
    modules that are left out.
    """

    server: str
    family: Family
    rank: int
    ranks: tuple[int, ...]
    config: dict[str, Any]
    tensors: list[Written]
    found: list[Place]
    dropped: tuple[str, ...]


def served(
    server: str, model: nn.Module, lora: LoRASettings, architecture: str, base: Checkpoint, drop: Collection[str] = ()
) -> Served:
    """Returns the form of an adapter for a server. Reads no weights.

    model: the skeleton of the base. lora: as `adapter_settings` returns it. drop: last names of modules whose LoRA
    weights may be left out. Raises UserError if the server would drop LoRA weights that `drop` does not name, if `drop`
    names none of this adapter's modules, or as `family` does.
    """
    of, every = family(server, architecture), list(places(model, lora))
    names = sorted({place.name.rpartition(".")[2] for place in every})
    if lost := [name for name in names if name in of.dropped and name not in drop]:
        raise UserError(
            f"--to {server}: {server} {SERVERS[server]} would not apply the LoRA weights of {', '.join(lost)}, which "
            f"this adapter has, so the served model would differ from the trained one. Give --drop {' '.join(lost)} "
            "to leave them out on purpose, or merge the adapter (train/merge.py)."
        )
    if unknown := sorted(set(drop) - set(names)):
        raise UserError(f"--drop {unknown[0]}: this adapter has no such module; it has {', '.join(names)}.")
    found = [place for place in every if place.name.rpartition(".")[2] not in drop]
    if not found:
        raise UserError(f"--drop {' '.join(drop)}: no LoRA weights would be left. Drop fewer modules.")
    make = _for_sglang if server == "sglang" else _for_peft
    rank, config, tensors = make(found, lora, architecture, base)
    ranks = tuple(sorted({lora.expert_rank if place.weight else lora.rank for place in found}))
    return Served(server, of, rank, ranks, config, tensors, found, tuple(sorted(drop)))


def _for_peft(
    found: list[Place], lora: LoRASettings, architecture: str, base: Checkpoint
) -> tuple[int, dict[str, Any], list[Written]]:
    """Returns the largest rank, the configuration and the tensors in PEFT's own form, which vLLM loads as well."""

    def written(place: Place, factor: str) -> Written:
        name, shape = place.key(architecture, factor), place.shape(lora, factor)
        return Written(name, shape, place, factor, lambda value: as_peft(place, factor, value, lora))

    config = plain_values(peft_config(found, lora, architecture, str(base.directory)).to_dict())
    rank = max(lora.expert_rank if place.weight else lora.rank for place in found)
    return rank, config, [written(place, factor) for place in found for factor in "AB"]


def _for_sglang(
    found: list[Place], lora: LoRASettings, architecture: str, base: Checkpoint
) -> tuple[int, dict[str, Any], list[Written]]:
    """Returns the rank, the configuration and the tensors for SGLang."""
    rank = max(lora.expert_rank if place.weight else lora.rank for place in found)
    tensors = [written for place in found for written in _sglang_tensors(place, lora, rank, architecture, base)]
    modules = {written.name.split(".lora_")[0].rpartition(".")[2] for written in tensors}
    if "in_proj_q" in modules:  # SGLang looks names up by the longest part that matches
        modules = modules - {"in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"} | {"in_proj_qkvz"}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.directory), "r": rank,
        "lora_alpha": lora.scale * rank, "use_rslora": False, "target_modules": sorted(modules), "bias": "none",
        "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    return rank, config, tensors


def _sglang_tensors(
    place: Place, lora: LoRASettings, rank: int, architecture: str, base: Checkpoint
) -> Iterator[Written]:
    """Yields the tensors that SGLang loads for a place."""
    experts, out_features, in_features = place.sizes
    name = f"base_model.model.{stock_name(place.name, architecture)}"
    if place.weight:
        ratio = lora.expert_scale / lora.scale  # SGLang has one scale: that of the linear layers
        for factor, shape in ("A", (experts, rank, in_features)), ("B", (experts, out_features, rank)):

            def padded(value: Tensor, factor: str = factor) -> Tensor:
                return _padded(value if factor == "A" else value * ratio, rank, factor)

            yield Written(f"{name}.{place.weight}.lora_{factor}.weight", shape, place, factor, padded)
        return
    for part, rows in _parts(name, out_features, base).items():

        def cut(B: Tensor, rows: slice = rows) -> Tensor:
            return _padded(B[rows], rank, "B")

        height = rows.stop - rows.start
        yield Written(f"{part}.lora_A.weight", (rank, in_features), place, "A", lambda A: _padded(A, rank, "A"))
        yield Written(f"{part}.lora_B.weight", (height, rank), place, "B", cut)


def _padded(value: Tensor, rank: int, factor: str) -> Tensor:
    """Returns A [..., r, I] or B [..., O, r] with zeros up to `rank`."""
    missing = rank - value.shape[-2 if factor == "A" else -1]
    return nn.functional.pad(value, (0, 0, 0, missing) if factor == "A" else (0, missing))


def _parts(name: str, out_features: int, base: Checkpoint) -> dict[str, slice]:
    """Returns the layers that SGLang has for a linear layer, and the rows of its output that each has.

    Only in_proj_qkv of the gated delta rule becomes several layers: its rows are queries, keys (as many) and values.
    """
    stem = name.removesuffix("qkv")
    if not name.endswith(".in_proj_qkv"):
        return {name: slice(0, out_features)}
    text = base.config.get("text_config") or base.config
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    bounds = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, out_features)}
    return {f"{stem}{part}": slice(*ends) for part, ends in bounds.items()}


def write_served(
    form: Served, adapter: Path, lora: LoRASettings, architecture: str, base: Checkpoint, output: Path,
    dtype: torch.dtype, other_base: bool = False,
) -> None:  # fmt: skip
    """Writes adapter_model.safetensors and adapter_config.json, and for a server serve.json, into a new directory.

    The adapter's record of its training and its proof.json are copied. other_base: whether `base` is not what
    it was trained on. The directory has a temporary name until all files are complete, and one lora_A or lora_B is in
    memory at a time.
    """
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(partial / WEIGHTS, {each.name: (dtype, each.shape) for each in form.tensors})
    with closing(AdapterFile(adapter, architecture, lora)) as file:
        for each in tqdm(form.tensors, desc="adapter", unit="tensor", disable=None):
            writer.write(each.name, each.make(file.read(each.place, each.factor).float()))
    writer.check_whole()
    writer.close()
    writer.publish()
    write_whole(partial / CONFIG, json.dumps(form.config, indent=2, sort_keys=True) + "\n")
    if form.server != "peft":
        serve = _serve(form, adapter, lora, base, output, dtype) | {"other_base": other_base}
        write_whole(partial / SERVE, json.dumps(serve, indent=2) + "\n")
    if trained := training_of(adapter):
        write_whole(partial / BASE_MODEL, json.dumps(trained, indent=2) + "\n")
    if (proof := adapter / PROOF).is_file():
        write_whole(partial / PROOF, read_text(proof))
    publish_directory(partial, output)


def _serve(
    form: Served, adapter: Path, lora: LoRASettings, base: Checkpoint, output: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the content of serve.json, which docs/checkpoints.md lists."""
    rank, name = largest_rank(form), adapter_name(adapter, form.server)
    slots = {
        f"TP {tp}{how}": slot_bytes(form, rank, tp, bool("EP" in how), bool("sharded" in how), dtype)
        for tp in (1, 8)
        for how in ("", ", EP", ", fully sharded")
        if (tp > 1 or not how) and (form.server == "vllm" or "sharded" not in how)
        if "sharded" not in how or not any(each % tp for each in form.ranks)
    }
    return {
        "server": form.server, "version": SERVERS[form.server], "name": name,
        "command": command(form.server, str(base.directory), {name: str(output.resolve())}, rank, form.family, 1),
        "max_lora_rank": rank, "ranks": {"linear": lora.rank, "experts": lora.expert_rank},
        "dtype": str(dtype).removeprefix("torch."), "bytes_of_a_slot_per_gpu": slots, "not_served": list(form.dropped),
        "base": {"directory": str(base.directory), "fingerprint": base.fingerprint()},
        "adapter": {"directory": str(adapter), "sha256": weights_hash(adapter)},
    }  # fmt: skip


def largest_rank(form: Served) -> int:
    """Returns the smallest value of the server's max_lora_rank that holds the adapter.

    Raises UserError if none does.
    """
    if form.server != "vllm":
        return form.rank
    if form.rank > VLLM_RANKS[-1]:
        raise UserError(
            f"--to vllm: the adapter has rank {form.rank}; vLLM supports at most {VLLM_RANKS[-1]}. Merge the adapter."
        )
    return next(rank for rank in VLLM_RANKS if rank >= form.rank)


PROGRAMS = {
    "vllm": ["python", "-m", "vllm.entrypoints.openai.api_server"],
    "sglang": ["python", "-m", "sglang.launch_server"],
}


def command(server: str, base: str, adapters: dict[str, str], rank: int, of: Family, slots: int) -> list[str]:
    """Returns the command that serves a base model with adapters. adapters: name -> directory, as exported. rank: the
    largest, as `largest_rank` returns it. slots: how many adapters are in GPU memory at once."""
    if server == "sglang":
        return [
            *PROGRAMS[server], "--model-path", base, "--served-model-name", BASE_NAME, "--enable-lora",
            "--max-lora-rank", str(rank), "--max-loras-per-batch", str(slots + 1),
            "--lora-paths", *(f"{name}={path}" for name, path in adapters.items()),
        ]  # fmt: skip
    fused = {"is_3d_lora_weight": True} if of.mixed else {}
    return [
        *PROGRAMS[server], "--model", base, "--served-model-name", BASE_NAME, "--enable-lora",
        "--max-lora-rank", str(rank), "--max-loras", str(slots),
        *(["--enable-mixed-moe-lora-format"] if of.mixed else []),
        "--lora-modules",
        *(json.dumps({"name": name, "path": path} | fused) for name, path in adapters.items()),
    ]  # fmt: skip


def slot_bytes(
    form: Served, rank: int, tensor_parallel: int, expert_parallel: bool, fully_sharded: bool, dtype: torch.dtype
) -> int:
    """Returns the bytes of GPU memory that a server reserves for one adapter on each GPU.

    Every LoRA weight has space for `rank`. Without `fully_sharded`, tensor parallelism divides only B of
    column-parallel layers (and of an expert's gate and up projection) and A of row-parallel ones (and of its down
    projection). expert_parallel: the experts are divided over the same GPUs instead.
    """
    elements = 0
    for place in form.found:
        experts, out_features, in_features = place.sizes
        name, tp = place.name.rpartition(".")[2], tensor_parallel
        row = name in ROW_PARALLEL or place.weight == "down_proj"
        if place.weight and expert_parallel:
            experts, tp = math.ceil(experts / tp), 1
        elif name in REPLICATED:
            tp = 1
        whole, divided = (out_features, in_features) if row else (in_features, out_features)
        if form.family.mixed and place.weight == "gate_up_proj":
            whole *= 2  # A of gate and up by themselves
        whole = math.ceil(whole / tp) if fully_sharded else whole
        elements += experts * rank * (whole + math.ceil(divided / tp))
    return elements * dtype.itemsize
