"""Reads a checkpoint into a ZeRO-3, expert-parallel model: each rank reads what it keeps and nothing else.

A frozen dense weight is born partitioned: this rank reads its range of elements and the whole tensor never exists. An
expert layer's weights are read expert by expert, for the experts of this rank alone.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from torch import Tensor, nn
from tqdm import tqdm

from train.checkpoints.reader import Checkpoint, TensorInfo
from train.errors import UserError
from train.experts.module import ExpertParallelExperts

# How checkpoints name the text model's tensors, where transformers says model.* and lm_head.*
PREFIXES = (
    ("model.", "lm_head."),  # text-only checkpoints
    ("model.language_model.", "lm_head."),  # Qwen3.5
    ("language_model.model.", "language_model.lm_head."),  # Kimi K2.5
)
# What the text model has no place for: vision, projector, multi-token prediction, rotary tables that are computed.
NOT_TEXT = re.compile(r"^(mtp|model\.visual|vision_tower|mm_projector)\.|\.rotary_emb\.inv_freq$")


@dataclass
class Piece:
    """`source` in the checkpoint fills `rows` of the module's tensor `target`; rows None: all of it."""

    module: nn.Module
    target: str
    source: str
    expert: int | None = None
    rows: slice | None = None
    tied: list[tuple[nn.Module, str]] = field(default_factory=list)  # other places of the same parameter


@dataclass
class LoadPlan:
    """Which tensor goes where, and what stays on disk."""

    dense: list[Piece] = field(default_factory=list)
    buffers: list[Piece] = field(default_factory=list)
    experts: list[Piece] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def plan_load(model: nn.Module, checkpoint: Checkpoint) -> LoadPlan:
    """Matches every weight of `model` (on the meta device) with a tensor; no weight is read.

    UserError names every kind of mismatch: a tensor that is missing, unexpected or of a wrong shape or dtype.
    """
    rename = _renamer(model, checkpoint)
    plan = LoadPlan()
    wanted: dict[str, tuple[int, ...]] = {}
    seen: dict[int, Piece] = {}

    def want(pieces: list[Piece], piece: Piece, shape: tuple[int, ...]) -> None:
        pieces.append(piece)
        wanted[piece.source] = shape

    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, ExpertParallelExperts):
            for source, piece, shape in _expert_pieces(module, rename(dot), checkpoint):
                want(plan.experts, Piece(module, piece[0], source, piece[1], piece[2]), shape)
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) in seen:  # tied weights are read once
                seen[id(parameter)].tied.append((module, name))
                continue
            seen[id(parameter)] = Piece(module, name, rename(dot + name))
            want(plan.dense, seen[id(parameter)], tuple(parameter.shape))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name not in module._non_persistent_buffers_set:
                want(plan.buffers, Piece(module, name, rename(dot + name)), tuple(buffer.shape))
    _check(model, checkpoint, wanted, plan)
    return plan


def _renamer(model: Any, checkpoint: Checkpoint):
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()) + ".weight"
    for body, head in PREFIXES:

        def rename(name: str, body: str = body, head: str = head) -> str:
            return head + name[8:] if name.startswith("lm_head.") else re.sub(r"^model\.", body, name)

        if rename(embedding) in checkpoint.tensors:
            return rename
    raise UserError(
        f"--model {checkpoint.directory}: weight {embedding} is missing from the checkpoint under any known prefix "
        f"({', '.join(body for body, _ in PREFIXES)}). The directory must hold the whole model."
    )


def _expert_pieces(
    module: ExpertParallelExperts, name: str, checkpoint: Checkpoint
) -> Iterator[tuple[str, tuple[str, int | None, slice | None], tuple[int, ...]]]:
    """(source, (target, expert, rows), shape on disk) of a layer's experts, fused or one by one."""
    shapes, width = module.shapes(), module.width
    if f"{name}0.gate_proj.weight" not in checkpoint.tensors:
        for target, shape in shapes.items():
            yield name + target, (target, None, None), shape
        return
    for expert in range(module.experts):
        for matrix, target, rows in (
            ("gate_proj", "gate_up_proj", slice(0, width)),
            ("up_proj", "gate_up_proj", slice(width, 2 * width)),
            ("down_proj", "down_proj", slice(0, module.hidden)),
        ):
            on_disk = rows.stop - rows.start, shapes[target][2]
            yield f"{name}{expert}.{matrix}.weight", (target, expert, rows), on_disk


def _check(model: Any, checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]], plan: LoadPlan) -> None:
    where, tensors = f"--model {checkpoint.directory}", checkpoint.tensors
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(
            f"{where}: {len(missing)} of {len(wanted)} weights are missing from the checkpoint: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}. Nothing is initialized "
            "at random: get the whole checkpoint."
        )
    for name, shape in wanted.items():
        info: TensorInfo = tensors[name]
        if info.shape != shape:
            raise UserError(f"{info.file}: tensor {name} is {list(info.shape)}; config.json makes it {list(shape)}.")
        if info.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(
                f"{info.file}: tensor {name} has dtype {info.dtype}; F32, BF16 and F16 checkpoints can be trained. "
                "Convert a quantized one to BF16 first."
            )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unexpected = []
    for name in tensors:
        if name in wanted:
            continue
        if NOT_TEXT.search(name) or name in tied or any(pattern.search(name) for pattern in ignored):
            plan.left_out.append(name)
        else:
            unexpected.append(name)
    if unexpected:
        raise UserError(
            f"{where}: {len(unexpected)} tensors have no place in {type(model).__name__}: {', '.join(unexpected[:5])}"
            f"{', …' if len(unexpected) > 5 else ''}. Is config.json this checkpoint's own?"
        )


def load(plan: LoadPlan, checkpoint: Checkpoint, ds_config: dict[str, Any], device: torch.device, show: bool) -> int:
    """Fills the planned model. Dense weights become ZeRO-3 parameters, experts stay with their rank. -> bytes read."""
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config, dtype=torch.float32)
    pieces = len(plan.dense) + len(plan.buffers) + len(plan.experts)
    with tqdm(total=pieces, desc="loading", unit="tensor", disable=not show, mininterval=0.5) as bar:
        for piece in plan.dense:
            parameter = _partitioned(init, checkpoint, piece.source, device)
            for module, name in [(piece.module, piece.target), *piece.tied]:
                module._parameters[name] = parameter
            bar.update()
        for piece in plan.buffers:
            info = checkpoint.tensors[piece.source]
            whole = torch.empty(info.shape, dtype=info.dtype)
            checkpoint.read(piece.source, 0, whole)
            piece.module._buffers[piece.target] = whole.to(device)
            bar.update()
        for piece in plan.experts:
            _read_experts(piece, checkpoint, device)
            bar.set_postfix_str(f"{checkpoint.bytes_read / 1e9:.2f} GB read", refresh=False)
            bar.update()
    checkpoint.close()
    return checkpoint.bytes_read


def _partitioned(init: Any, checkpoint: Checkpoint, source: str, device: torch.device) -> nn.Parameter:
    """A frozen ZeRO-3 parameter of which only this rank's partition was ever read."""
    info = checkpoint.tensors[source]
    nothing = torch.empty((), dtype=info.dtype, device=device).expand(info.shape)
    parameter: Any = nn.Parameter(nothing, requires_grad=False)
    init._convert_to_deepspeed_param(parameter)
    count = parameter.aligned_size() // dist.get_world_size()
    start = min(count * dist.get_rank(), math.prod(info.shape))
    own = torch.zeros(count, dtype=info.dtype)
    checkpoint.read(source, start, own[: min(count, math.prod(info.shape) - start)])
    partition: Any = own.to(device)
    partition.ds_numel, partition.status, partition.final_location = count, PartitionedParamStatus.AVAILABLE, None
    parameter.ds_tensor, parameter.ds_numel_aligned = partition, parameter.aligned_size()
    free_param(parameter)
    return parameter


def _read_experts(piece: Piece, checkpoint: Checkpoint, device: torch.device) -> None:
    module, info = piece.module, checkpoint.tensors[piece.source]
    assert isinstance(module, ExpertParallelExperts)
    owned = module.ep.owned(module.experts)
    if piece.expert is not None and piece.expert not in owned:
        return
    _, out_features, in_features = module.shapes()[piece.target]
    if piece.target not in module._buffers:
        module.store(piece.target, torch.empty(len(owned), out_features, in_features, dtype=info.dtype, device=device))
    stored: Tensor = getattr(module, piece.target)
    for expert in owned if piece.expert is None else (piece.expert,):
        rows = stored[expert - owned.start, piece.rows or slice(None)]
        start = expert * out_features * in_features if piece.expert is None else 0
        if device.type == "cpu":
            checkpoint.read(piece.source, start, rows)
        else:
            staged = torch.empty(rows.shape, dtype=info.dtype)
            checkpoint.read(piece.source, start, staged)
            rows.copy_(staged)
