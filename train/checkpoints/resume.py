"""Saves to resume from, on any number of ranks and any expert parallelism: every trained tensor whole, with its AdamW
moments, in one safetensors file. Each rank writes its own partitions into it and reads its own out of it, so that
nobody holds more. A save is complete or absent: it is written under another name, flushed to disk and then renamed.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from train.checkpoints.reader import TensorFile, read_json
from train.checkpoints.writer import SafetensorsWriter, flush, publish_directory, remove
from train.errors import UserError
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts

MOMENTS = ("exp_avg", "exp_avg_sq")
SUFFIXES = ("", *(f".{moment}" for moment in MOMENTS))
NAME = re.compile(r"^step-(\d+)$")


def trainable(model: nn.Module) -> dict[str, Any]:
    """The trained parameters by name, in the same order on every rank."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def expert_group(model: nn.Module, name: str) -> ExpertGroup | None:
    """The group over which a parameter's experts are divided; None for a parameter that every rank has alike."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.ep if isinstance(owner, ExpertParallelExperts) else None


def gather_experts(experts: Tensor, ep: ExpertGroup | None) -> Tensor | None:
    """This rank's experts [E, ...] -> those of all ranks on dim 0, on rank 0; None elsewhere."""
    rank = dist.get_rank()
    if ep is None or ep.group is None:
        return None if rank else experts
    if dist.get_process_group_ranks(ep.group)[0]:  # the experts of rank 0's group are all there are
        return None
    parts = None if rank else [torch.empty_like(experts) for _ in range(ep.size)]
    dist.gather(experts.contiguous(), parts, dst=0, group=ep.group)
    return torch.cat(parts) if parts else None


def full_factors(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Every trained parameter in turn, whole, in fp32 on the CPU, on rank 0 (elsewhere None), so that nobody holds more
    than one. All ranks must take all of them."""
    for name, parameter in trainable(model).items():
        value = gather_experts(safe_get_full_fp32_param(parameter), expert_group(model, name))
        yield name, None if value is None else value.cpu()


@dataclass
class _Own:
    """A trained parameter, whole [all experts, ...] or [...], and which of its elements are this rank's partition."""

    name: str
    parameter: Any
    shape: tuple[int, ...]
    start: int
    count: int


def _own_parts(model: nn.Module) -> Iterator[_Own]:
    for name, parameter in trainable(model).items():
        ep, shape = expert_group(model, name), tuple(parameter.ds_shape)
        first = math.prod(shape) * ep.rank if ep else 0  # elements of other ranks' experts before this rank's
        if ep:
            shape = shape[0] * ep.size, *shape[1:]
        part = parameter.ds_tensor.ds_numel
        start = min(part * dist.get_rank(parameter.ds_process_group), math.prod(parameter.ds_shape))
        yield _Own(name, parameter, shape, first + start, min(part, math.prod(parameter.ds_shape) - start))


def save(directory: Path, model: nn.Module, step: int, keep: int) -> None:
    """Writes directory/step-N and removes older saves but the last `keep`. All ranks must call it, and share the file
    system."""
    own = list(_own_parts(model))
    layout = {f"{p.name}{suffix}": (torch.float32, p.shape) for p in own for suffix in SUFFIXES}
    partial, final = directory / f"partial-{step}", directory / f"step-{step}"
    if dist.get_rank() == 0:
        for abandoned in directory.glob("partial-*"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
        SafetensorsWriter(partial / "state.safetensors", layout).close()
    dist.barrier()
    writer = SafetensorsWriter(partial / "state.safetensors", layout, create=False)
    for p in own:
        writer.write(p.name, safe_get_local_fp32_param(p.parameter)[: p.count], p.start)
        for moment in MOMENTS:
            value = safe_get_local_optimizer_state(p.parameter, moment)[: p.count]
            writer.write(f"{p.name}.{moment}", value, p.start)
    writer.close()
    dist.barrier()
    if dist.get_rank() == 0:
        writer.publish()
        (partial / "state.json").write_text(json.dumps({"step": step}))
        flush(partial / "state.json")
        publish_directory(partial, final)
        for old in saves(directory)[:-keep]:
            remove(old)
    dist.barrier()


def saves(directory: Path) -> list[Path]:
    """The complete saves, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def check(directory: Path) -> None:
    """UserError if the last save is not whole: something else than this trainer has changed it."""
    for path in saves(directory)[-1:]:
        try:
            step = read_json(path / "state.json").get("step")
            TensorFile(path / "state.safetensors")
            if step != int(path.name.removeprefix("step-")):
                raise UserError(f"state.json says step {step}")
        except UserError as error:
            raise UserError(f"{path}: is damaged ({error}) Remove it: --resume goes on from the save before.") from None


def restore(path: Path, model: nn.Module, optimizer: Any) -> int:
    """Puts a save into the engine's model and its ZeRO-3 optimizer, each rank its own part. -> the step it was made
    after."""
    step = read_json(path / "state.json")["step"]
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    own = list(_own_parts(model))
    saved = TensorFile(path / "state.safetensors")
    expected = {f"{p.name}{suffix}": p.shape for p in own for suffix in SUFFIXES}
    found = {name: info.shape for name, info in saved.tensors.items()}
    if differing := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise UserError(f"{path}: holds other parameters than this run trains, among them {min(differing)}.")
    for p in own:

        def part(name: str, p: _Own = p) -> Tensor:
            values = torch.zeros(p.parameter.ds_tensor.ds_numel)
            saved.read(name, p.start, values[: p.count])
            return values.to(p.parameter.ds_tensor.device)

        weight = part(p.name)
        safe_set_local_fp32_param(p.parameter, weight)
        p.parameter.ds_tensor.data.copy_(weight)
        for moment in MOMENTS:
            safe_set_local_optimizer_state(p.parameter, part(f"{p.name}.{moment}"), moment)
    saved.close()
    return step
