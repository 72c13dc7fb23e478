"""Training checkpoints to resume from, on any number of ranks and with any expert parallelism.

One safetensors file holds every trained tensor in full, LoRA weights without their padding, and its AdamW moments. Each
rank writes and reads only its own partitions, so that no rank needs memory for more. A training checkpoint is either
complete or absent: it is written under a temporary name, flushed to disk and then renamed.

Shapes: E experts of one rank, N elements of a flattened ZeRO-3 partition.
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

from train.checkpoints.adapter_files import MOMENTS, adapter_values, weights_hash
from train.checkpoints.reader import TensorFile
from train.checkpoints.writer import SafetensorsWriter, flush, publish_directory, remove
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.layers.lora import LoRASettings
from train.runtime.errors import UserError
from train.runtime.outside import checked, read_json
from train.runtime.watchdog import progress

SUFFIXES = ("", *(f".{moment}" for moment in MOMENTS))
NAME = re.compile(r"^step-(\d+)$")


def trainable(model: nn.Module) -> dict[str, Any]:
    """Returns the trained parameters by name, in the same order on every rank."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def expert_group(model: nn.Module, name: str) -> ExpertGroup | None:
    """Returns the group whose ranks divide a parameter's experts among them, or None for other parameters."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.ep if isinstance(owner, ExpertParallelExperts) else None


def gather_experts(experts: Tensor, ep: ExpertGroup | None) -> Tensor | None:
    """Gathers each rank's experts [E, ...] on dim 0.

    Returns the experts of all ranks on rank 0 and None elsewhere. A tensor that is not divided (no group) is returned
    unchanged on rank 0. All ranks must call this.
    """
    rank = dist.get_rank()
    if ep is None or ep.group is None:
        return None if rank else experts
    if dist.get_process_group_ranks(ep.group)[0]:  # rank 0's group already holds all experts
        return None
    parts = None if rank else [torch.empty_like(experts) for _ in range(ep.size)]
    dist.gather(experts.contiguous(), parts, dst=0, group=ep.group)
    return torch.cat(parts) if parts else None


def full_factors(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yields (name, full tensor) of every trained parameter: in fp32 on the CPU on rank 0, None on other ranks.

    The full tensor of an expert parameter [E, ...] has the experts of all ranks on dim 0. Each tensor is gathered only
    when it is requested, so that no rank holds more than one. All ranks must iterate to the end.
    """
    for name, parameter in trainable(model).items():
        progress("gathering the LoRA weights")
        value = gather_experts(safe_get_full_fp32_param(parameter), expert_group(model, name))
        yield name, None if value is None else value.cpu()


@dataclass
class Part:
    """This rank's ZeRO-3 partition of a trained parameter.

    It consists of elements start to start + count of the full parameter, [all experts, ...] or [...], flattened and
    including its padding. shape: of the full parameter without padding, as in a training checkpoint.

    The flattened parameter is a sequence of blocks of `block` elements, of which the first `real` ones are not padding.
    So the elements of a partition that are not padding are contiguous in a training checkpoint.
    """

    name: str
    parameter: Any
    shape: tuple[int, ...]
    start: int
    count: int
    block: int = 1
    real: int = 1

    def place(self, element: int) -> int:
        """Returns how many elements before `element` are not padding."""
        return element // self.block * self.real + min(element % self.block, self.real)

    def write(self, writer: SafetensorsWriter, name: str, partition: Tensor) -> None:
        """Writes this part of the training checkpoint's tensor `name` from `partition` [N], N ≥ count."""
        writer.write(name, partition[: self.count][self._kept(partition.device)], self.place(self.start))

    def read(self, saved: TensorFile, name: str, size: int) -> Tensor:
        """Returns this part of the training checkpoint's tensor `name` as a partition [N], with zeros as padding.

        size: N. Raises UserError if the file cannot be read.
        """
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
    """Returns the shape in a training checkpoint of a parameter that has `shape` on one rank.

    It includes all experts, and the padding only if `padded`.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, ExpertParallelExperts):
        return shape
    whole = shape[0] * owner.ep.size, *shape[1:]
    return whole if padded else owner.without_padding(name, whole)


def _own_parts(model: nn.Module, padded: bool = False) -> Iterator[Part]:
    """Yields this rank's part of every trained parameter. padded: for a training checkpoint that includes padding."""
    for name, parameter in trainable(model).items():
        ep, own = expert_group(model, name), tuple(parameter.ds_shape)
        shape, whole = (saved_shape(model, name, own, with_padding) for with_padding in (padded, True))
        dimension = next((i for i, sizes in enumerate(zip(shape, whole, strict=True)) if len({*sizes}) > 1), 0)
        first = math.prod(own) * ep.rank if ep else 0  # elements of the experts of preceding ranks
        part = parameter.ds_tensor.ds_numel
        start = min(part * dist.get_rank(parameter.ds_process_group), math.prod(own))
        count = min(part, math.prod(own) - start)
        block, real = (math.prod(sizes[dimension:]) for sizes in (whole, shape))
        yield Part(name, parameter, shape, first + start, count, block, real)


def save(directory: Path, model: nn.Module, optimizer: Any, step: int, keep: int, seconds: float) -> None:
    """Writes the training checkpoint directory/step-N, then removes all but the last `keep` training checkpoints.

    optimizer: DeepSpeed's, whose number of updates is more than `step` if the run carries an earlier phase's on.
    seconds: the time that the run has taken so far. All ranks must call this and share the file system.
    """
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
        state = {"step": step, "updates": _updates(optimizer, step), "seconds": seconds}
        (partial / "state.json").write_text(json.dumps(state))
        flush(partial / "state.json")
        publish_directory(partial, final)
        for old in saves(directory)[:-keep]:
            remove(old)
    dist.barrier()


def _updates(optimizer: Any, step: int) -> int:
    """Returns AdamW's step count; `step` if it has no state yet."""
    states = list(optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else step


def saves(directory: Path) -> list[Path]:
    """Returns the paths of the complete training checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def check(directory: Path) -> None:
    """Raises UserError if the last training checkpoint is damaged: something other than this trainer has changed it."""
    for path in saves(directory)[-1:]:
        try:
            state, tensors = read_json(path / "state.json"), TensorFile(path / "state.safetensors").tensors
            checked(state, {"step": int, "updates": int, "seconds": float}, "state.json")
            if state.get("step") != int(path.name.removeprefix("step-")):
                raise UserError(f"state.json says step {state.get('step')}.")
            if other := [name for name, info in tensors.items() if info.dtype != torch.float32]:
                raise UserError(f"state.safetensors: {other[0]} is {tensors[other[0]].dtype}, not torch.float32.")
        except UserError as error:
            raise UserError(
                f"{path}: is damaged ({error}) Remove it: --resume then uses the checkpoint before it."
            ) from None


def restore(path: Path, model: nn.Module, optimizer: Any) -> tuple[int, float]:
    """Loads a training checkpoint into the engine's model and its ZeRO-3 optimizer; each rank reads its own part.

    Returns the step after which it was written and the seconds that the run had taken. Raises UserError if it cannot be
    read or holds other parameters than this run trains.
    """
    state = read_json(path / "state.json")
    step = state["step"]
    _forget(optimizer, state.get("updates") or step)  # earlier versions had no phases, and so no other number
    saved = TensorFile(path / "state.safetensors")
    found = {name: info.shape for name, info in saved.tensors.items()}
    for padded in (True, False):  # training checkpoints of earlier versions include the padding
        own = list(_own_parts(model, padded))
        expected = {f"{p.name}{suffix}": p.shape for p in own for suffix in SUFFIXES}
        if expected == found:
            break
    if differing := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise UserError(f"{path}: holds other parameters than this run trains, among them {min(differing)}.")
    for p in own:
        progress(f"reading the training checkpoint of step {step}")
        shard = p.parameter.ds_tensor
        _set_weight(p.parameter, p.read(saved, p.name, shard.ds_numel).to(shard.device))
        for moment in MOMENTS:
            value = p.read(saved, f"{p.name}.{moment}", shard.ds_numel).to(shard.device)
            safe_set_local_optimizer_state(p.parameter, value, moment)
    saved.close()
    return step, state.get("seconds") or 0.0


def _forget(optimizer: Any, step: int) -> None:
    """Resets AdamW to the state after `step` steps with zero moments, and partitions all gathered parameters.

    After the first step, ZeRO-3 keeps small parameters gathered. New values of their partitions would have no effect.
    """
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


def initial_partitions(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Returns this rank's partition [N] in fp32 of every trained parameter before the first step of a run with this
    seed, by name."""
    parts = {}
    for name, parameter in trainable(model).items():
        owner, _, factor = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        parts[name] = _own_partition(parameter, module.initial_factors(seed)[factor])
    return parts


def adapter_partitions(model: nn.Module, directory: Path, lora: LoRASettings) -> dict[str, Tensor]:
    """Returns this rank's partition [N] in fp32 of every trained parameter as a checked adapter has it, by name. model:
    a LanguageModel with LoRA weights of the adapter's ranks."""
    parameters = trainable(model)
    values = adapter_values(directory, model, lora)
    return {f"causal.{name}": _own_partition(parameters[f"causal.{name}"], value.float()) for name, value in values}


def _own_partition(parameter: Any, whole: Tensor) -> Tensor:
    """Returns this rank's partition [N] of a parameter's value, with zeros where the last partition is padded."""
    size = parameter.ds_tensor.ds_numel
    own = whole.flatten()[size * dist.get_rank(parameter.ds_process_group) :][:size]
    return torch.cat([own, own.new_zeros(size - len(own))])


def initial_hash(model: nn.Module, seed: int, adapter: str) -> str:
    """Returns a SHA-256 of the LoRA weights before the first step, independent of ranks and expert parallelism.

    With `adapter`, a directory, it is that of the adapter's weight file. Otherwise it covers every lora_A by name, and
    each expert's separately. It is "" if the model has no LoRA weights. All ranks must call this.
    """
    if adapter:
        return weights_hash(Path(adapter))
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
    """Prepares the engine for another run: resets the optimizer and sets the trained parameters.

    partitions: this rank's partition [N] of each parameter, as from `initial_partitions`.
    """
    _forget(optimizer, 0)
    for name, parameter in trainable(model).items():
        _set_weight(parameter, partitions[name].to(parameter.ds_tensor.device))
