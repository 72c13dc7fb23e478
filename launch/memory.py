"""What a rank holds at its fullest moment, from shapes alone.

What lasts (weights, gradients, optimizer) follows from the model's parameters and from what DeepSpeed's ZeRO-3 allocates
for them; what a step makes comes from running it without data (trace.py).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.trace import Attention, PlannedGroup, Step, Trace, gpu_kernels, tag_calls
from train.checkpoints.layout import LoadPlan, plan_load
from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import becomes_nf4, frozen_as_nf4, frozen_as_on_disk
from train.data.batches import Batch
from train.lora import LoRASettings
from train.model import LanguageModel, architecture, skeleton, text_config

META = torch.device("meta")


def planned_model(
    checkpoint: Checkpoint, method: str, lora: LoRASettings | None, ep: PlannedGroup
) -> tuple[LanguageModel, LoadPlan]:
    """The model of a rank as `train.model.build` leaves it, on the meta device, with every dense weight whole."""
    model = skeleton(text_config(checkpoint), ep)
    plan = plan_load(model, checkpoint)
    full = method == "full"
    for piece in plan.dense:
        parameter = nn.Parameter(
            torch.empty(piece.shape, dtype=plan.dtype if full else piece.dtype, device=META), requires_grad=full
        )
        for module, name in [(piece.module, piece.target), *piece.tied]:
            module._parameters[name] = parameter
    for piece in plan.buffers:
        piece.module._buffers[piece.target] = torch.empty(piece.shape, dtype=piece.dtype, device=META)
    for experts in plan.experts:
        if full:
            shape = len(ep.owned(experts.module.experts)), *experts.module.shapes()[experts.target][1:]
            weight = nn.Parameter(torch.empty(shape, dtype=plan.dtype, device=META))
            experts.module.register_parameter(experts.target, weight)
        elif becomes_nf4(experts, method):
            storage = frozen_as_nf4(experts, META)
            storage.quantize(0, torch.empty(*storage_shape(storage), dtype=plan.dtype, device=META))
        else:
            frozen_as_on_disk(experts, checkpoint, META)
    wrapped = LanguageModel(model, architecture(checkpoint), lora, META, compute_dtype=plan.dtype)
    return wrapped.to(META), plan


def storage_shape(storage: Any) -> tuple[int, int]:
    return storage.out_features, storage.in_features


def planned_batch(documents: int, tokens: int) -> Batch:
    """A micro-batch of documents of `tokens` tokens, all but the first of which are in the loss; where there are several,
    one is a token shorter, so that there is padding."""
    keep = torch.ones(documents, tokens, dtype=torch.bool)
    keep[1:, -1] = False
    position = torch.cat([row * tokens + torch.arange(int(keep[row].sum()) - 1) for row in range(documents)])
    zeros = torch.zeros(documents, tokens, dtype=torch.int64)
    return Batch(
        ids_BT=zeros, attention_BT=keep.long(), keep_BT=keep, position_N=position, target_N=torch.zeros_like(position),
        coefficient_N=torch.ones(len(position)), roles_N=torch.zeros_like(position), names=[],
    )  # fmt: skip


def run_step(model: LanguageModel, batch: Batch, checkpointing: bool, gpu: bool) -> Step:
    """Forward and backward of one micro-batch. The model is `planned_model`'s. gpu: with the kernels of a GPU."""
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.causal.gradient_checkpointing_disable()
    for layer in model.expert_layers:
        for storage in layer.frozen.values():
            storage.weight = tag_calls(storage.weight, "dequantization")
    model.causal.lm_head.forward = tag_calls(model.causal.lm_head.forward, "logits")

    def gone(parameter: Tensor) -> None:
        parameter.grad = None  # ZeRO-3 reduces a gradient as soon as it is whole

    hooks = [p.register_post_accumulate_grad_hook(gone) for p in model.parameters() if p.requires_grad]
    trace = Trace([*model.parameters(), *model.buffers()])
    with trace, Attention(gpu), gpu_kernels(model.causal) if gpu else nullcontext():
        terms = model(batch)
        trace.step.kept = trace.total
        terms.loss.backward()
        del terms
    for hook in hooks:
        hook.remove()
    if model.expert_layers:
        trace.step.wire = model.expert_layers[0].ep.wire_bytes
    return trace.step
