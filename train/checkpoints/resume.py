"""Saves to resume from, on any number of ranks and any expert parallelism: every trained tensor whole, factors without
their padding, with its AdamW moments, in one safetensors file. Each rank writes its own partitions into it and reads
its own out of it, so that nobody holds more. A save is complete or absent: it is written under another name, flushed to
disk and then renamed.
"""

import hashlib
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
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from launch.watchdog import progress
from train.checkpoints.reader import TensorFile
from train.checkpoints.writer import SafetensorsWriter, flush, publish_directory, remove
from train.errors import UserError
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.outside import checked, read_json

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
        progress("gathering the factors")
        value = gather_experts(safe_get_full_fp32_param(parameter), expert_group(model, name))
        yield name, None if value is None else value.cpu()


@dataclass
class Part:
    """This rank's partition of a trained parameter: elements start to start + count of the whole one [all experts, ...]
    or [...], flattened, with its padding. shape: of the whole without padding, as a save has it. Of each `block`
    elements, one block after another, the first `real` ones are no padding: those of a partition lie together in a
    save."""

    name: str
    parameter: Any
    shape: tuple[int, ...]
    start: int
    count: int
    block: int = 1
    real: int = 1

    def place(self, element: int) -> int:
        """How many elements before this one are no padding."""
        return element // self.block * self.real + min(element % self.block, self.real)

    def write(self, writer: SafetensorsWriter, name: str, partition: Tensor) -> None:
        """Its part of a save's tensor, out of a partition [≥ count]."""
        writer.write(name, partition[: self.count][self._kept(partition.device)], self.place(self.start))

    def read(self, saved: TensorFile, name: str, size: int) -> Tensor:
        """Its part of a save's tensor as a partition [size], with zeros for padding."""
        start, end = self.place(self.start), self.place(self.start + self.count)
        values, partition = torch.empty(end - start), torch.zeros(size)
        saved.read(name, start, values)
        partition[: self.count][self._kept(partition.device)] = values
        return partition

    def _kept(self, device: torch.device) -> Any:
        if self.block == self.real:
            return slice(None)
        return torch.arange(self.start, self.start + self.count, device=device) % self.block < self.real


def saved_shape(model: nn.Module, name: str, shape: tuple[int, ...], padded: bool = False) -> tuple[int, ...]:
    """The shape in a save, of all experts and without padding, of a parameter that has `shape` on a rank."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, ExpertParallelExperts):
        return shape
    whole = shape[0] * owner.ep.size, *shape[1:]
    return whole if padded else owner.without_padding(name, whole)


def _own_parts(model: nn.Module, padded: bool = False) -> Iterator[Part]:
    """padded: for a save that has the padding, too."""
    for name, parameter in trainable(model).items():
        ep, own = expert_group(model, name), tuple(parameter.ds_shape)
        shape, whole = (saved_shape(model, name, own, with_padding) for with_padding in (padded, True))
        dimension = next((i for i, sizes in enumerate(zip(shape, whole, strict=True)) if len({*sizes}) > 1), 0)
        first = math.prod(own) * ep.rank if ep else 0  # elements of other ranks' experts before this rank's
        part = parameter.ds_tensor.ds_numel
        start = min(part * dist.get_rank(parameter.ds_process_group), math.prod(own))
        count = min(part, math.prod(own) - start)
        block, real = (math.prod(sizes[dimension:]) for sizes in (whole, shape))
        yield Part(name, parameter, shape, first + start, count, block, real)


def save(directory: Path, model: nn.Module, step: int, keep: int, seconds: float) -> None:
    """Writes directory/step-N and removes older saves but the last `keep`. seconds: that the run has taken. All ranks
    must call it, and share the file system."""
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
        progress(f"saving after step {step}")
        p.write(writer, p.name, safe_get_local_fp32_param(p.parameter))
        for moment in MOMENTS:
            p.write(writer, f"{p.name}.{moment}", safe_get_local_optimizer_state(p.parameter, moment))
    writer.close()
    dist.barrier()
    if dist.get_rank() == 0:
        writer.publish()
        (partial / "state.json").write_text(json.dumps({"step": step, "seconds": seconds}))
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
            state, tensors = read_json(path / "state.json"), TensorFile(path / "state.safetensors").tensors
            checked(state, {"step": int, "seconds": float}, "state.json")
            if state.get("step") != int(path.name.removeprefix("step-")):
                raise UserError(f"state.json says step {state.get('step')}.")
            if other := [name for name, info in tensors.items() if info.dtype != torch.float32]:
                raise UserError(f"state.safetensors: {other[0]} is {tensors[other[0]].dtype}, not torch.float32.")
        except UserError as error:
            raise UserError(f"{path}: is damaged ({error}) Remove it: --resume goes on from the save before.") from None


def restore(path: Path, model: nn.Module, optimizer: Any) -> tuple[int, float]:
    """Puts a save into the engine's model and its ZeRO-3 optimizer, each rank its own part. -> the step it was made
    after, and the seconds that the run had taken."""
    state = read_json(path / "state.json")
    step = state["step"]
    _forget(optimizer, step)
    saved = TensorFile(path / "state.safetensors")
    found = {name: info.shape for name, info in saved.tensors.items()}
    for padded in (True, False):  # earlier saves had the padding
        own = list(_own_parts(model, padded))
        expected = {f"{p.name}{suffix}": p.shape for p in own for suffix in SUFFIXES}
        if expected == found:
            break
    if differing := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise UserError(f"{path}: holds other parameters than this run trains, among them {min(differing)}.")
    for p in own:
        progress(f"reading the save of step {step}")
        shard = p.parameter.ds_tensor
        _set_weight(p.parameter, p.read(saved, p.name, shard.ds_numel).to(shard.device))
        for moment in MOMENTS:
            value = p.read(saved, f"{p.name}.{moment}", shard.ds_numel).to(shard.device)
            safe_set_local_optimizer_state(p.parameter, value, moment)
    saved.close()
    return step, state.get("seconds") or 0.0


def _forget(optimizer: Any, step: int) -> None:
    """AdamW's state as after `step` steps, moments zero; and no parameter whole, as ZeRO-3 keeps small ones after the
    first step, since new partitions would not be seen there."""
    gathered = [p for p in optimizer.persistent_parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
    if gathered:
        gathered[0].partition(gathered)
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }


def _set_weight(parameter: Any, partition: Tensor) -> None:
    safe_set_local_fp32_param(parameter, partition)
    parameter.ds_tensor.data.copy_(partition)


def initial_partitions(model: nn.Module, seed: int | None) -> dict[str, Tensor]:
    """This rank's partition of every factor as it is before the first step of a run with this seed; None: as it is
    now."""
    parts = {}
    for name, parameter in trainable(model).items():
        if seed is None:
            parts[name] = safe_get_local_fp32_param(parameter).clone()
            continue
        owner, _, factor = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        size = parameter.ds_tensor.ds_numel
        own = module.initial_factors(seed)[factor].flatten()[size * dist.get_rank(parameter.ds_process_group) :][:size]
        parts[name] = torch.zeros(size)
        parts[name][: len(own)] = own
    return parts


def initial_hash(model: nn.Module, seed: int, adapter: str) -> str:
    """SHA-256 of the factors before the first step, whatever ranks and expert parallelism: of the adapter's file, or of
    every factor A by name, of each expert apart; "" without factors. All ranks must call it."""
    if adapter:
        return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()
    own: dict[str, str] = {}
    for name, module in model.named_modules():
        factors = module.initial_factors(seed) if hasattr(module, "initial_factors") else {}
        for factor, value in factors.items():
            if isinstance(module, ExpertParallelExperts) and factor.endswith("lora_A"):
                for expert, A in zip(module.ep.owned(module.experts), value[:, : module.rank], strict=True):
                    own[f"{name}.{factor}.{expert}"] = hashlib.sha256(A.contiguous().numpy().data).hexdigest()
            elif factor == "lora_A":
                own[f"{name}.{factor}"] = hashlib.sha256(value.numpy().data).hexdigest()
    everywhere: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    every = {name: digest for part in everywhere for name, digest in part.items()}
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest() if every else ""


def start_over(model: nn.Module, optimizer: Any, partitions: dict[str, Tensor]) -> None:
    """Begins another run on the same engine: its factors as in initial_partitions, and an optimizer that has seen
    nothing."""
    _forget(optimizer, 0)
    for name, parameter in trainable(model).items():
        _set_weight(parameter, partitions[name].to(parameter.ds_tensor.device))
