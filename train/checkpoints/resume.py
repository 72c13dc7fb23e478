"""Saves to resume from, on any number of ranks and any expert parallelism: every trained tensor whole, with its AdamW
moments, in one safetensors file written by rank 0. A save is complete or absent: it is written under another name,
flushed to disk and then renamed.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from train.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
NAME = re.compile(r"^step-(\d+)$")


def trainable(model: nn.Module) -> dict[str, Any]:
    """The trained parameters by name, in the same order on every rank."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def expert_group(model: nn.Module, name: str) -> dist.ProcessGroup | None:
    """The ranks over which a parameter's experts are divided; None for a parameter that every rank has alike."""
    owner = model.get_submodule(name.rpartition(".")[0])
    ep = getattr(owner, "ep", None)
    return ep.group if ep is not None else None


def gather_experts(whole_of_group: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's experts [E, ...] -> those of all ranks of the group on dim 0."""
    if group is None:
        return whole_of_group
    parts = [torch.empty_like(whole_of_group) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, whole_of_group.contiguous(), group=group)
    return torch.cat(parts)


def full_factors(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter whole, in fp32 on the CPU. All ranks must call it."""
    return {
        name: gather_experts(safe_get_full_fp32_param(p), expert_group(model, name)).cpu()
        for name, p in trainable(model).items()
    }


def save(directory: Path, model: nn.Module, step: int, keep: int) -> None:
    """Writes directory/step-N and removes older saves but the last `keep`. All ranks must call it."""
    tensors = full_factors(model)
    for name, parameter in trainable(model).items():
        for moment in MOMENTS:
            value = safe_get_full_optimizer_state(parameter, moment)
            whole = gather_experts(value.view(parameter.ds_shape), expert_group(model, name))
            tensors[f"{name}.{moment}"] = whole.cpu()
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"partial-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(tensors, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step}))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        final = directory / f"step-{step}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(directory)
        for old in saves(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saves(directory: Path) -> list[Path]:
    """The complete saves, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def restore(path: Path, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Puts a save into the engine's model and its ZeRO-3 optimizer, each rank its own part. -> the saved state."""
    state = json.loads((path / "state.json").read_text())
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(state["step"])),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    parameters = trainable(model)
    with safe_open(path / "state.safetensors", "pt") as saved:
        expected = {f"{name}{suffix}" for name in parameters for suffix in ("", *(f".{m}" for m in MOMENTS))}
        if differing := expected ^ set(saved.keys()):
            raise UserError(f"{path}: holds other parameters than this run trains, among them {min(differing)}.")
        for name, parameter in parameters.items():
            weight = _own_part(saved.get_tensor(name), model, name, parameter)
            safe_set_local_fp32_param(parameter, weight)
            parameter.ds_tensor.data.copy_(weight)
            for moment in MOMENTS:
                part = _own_part(saved.get_tensor(f"{name}.{moment}"), model, name, parameter)
                safe_set_local_optimizer_state(parameter, part, moment)
    return state


def _own_part(whole: Tensor, model: nn.Module, name: str, parameter: Any) -> Tensor:
    """This rank's experts of `whole`, and of those its zero-padded ZeRO-3 partition, flat."""
    ep = getattr(model.get_submodule(name.rpartition(".")[0]), "ep", None)
    if ep is not None:
        owned = ep.owned(whole.shape[0])
        whole = whole[owned.start : owned.stop]
    flat = whole.flatten()
    count = parameter.ds_tensor.ds_numel
    start = min(count * dist.get_rank(parameter.ds_process_group), len(flat))
    part = torch.zeros(count, dtype=torch.float32)
    piece = flat[start : start + count]
    part[: len(piece)] = piece
    return part.to(parameter.ds_tensor.device)
