"""Plans the peak memory of a rank from shapes alone.

Persistent memory (weights, gradients, optimizer) follows from the model's parameters and from what DeepSpeed's ZeRO-3
allocates for them. The tensors of a step are counted by running it without data (trace.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor, nn

from launch.device_kernels import device_kernels
from launch.trace import HostWaits, PlannedGroup, Step, Trace, tag_calls
from train.checkpoints.layout import LoadPlan, plan_load
from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import becomes_nf4, frozen_as_nf4, frozen_as_on_disk
from train.data.batches import Base, Batch
from train.data.kinds import TermKind
from train.data.row import Row
from train.layers.lora import LoRASettings
from train.model.text_model import LanguageModel, architecture, skeleton, text_config

META = torch.device("meta")


def planned_model(
    checkpoint: Checkpoint, method: str, lora: LoRASettings | None, ep: PlannedGroup
) -> tuple[LanguageModel, LoadPlan]:
    """Returns a rank's model as `train.model` builds it, but on the meta device and with every dense weight whole, and
    the plan of its load.

    method: full, lora or qlora. lora: None with full. ep: a stand-in for the rank's expert-parallel group. Raises
    UserError if the checkpoint's weights do not fit its config.json, or if its architecture is not supported.
    """
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
            nf4 = frozen_as_nf4(experts, META)
            nf4.quantize(0, torch.empty(nf4.out_features, nf4.in_features, dtype=plan.dtype, device=META))
        else:
            frozen_as_on_disk(experts, checkpoint, META)
    if method == "qlora":
        _forget_meta_tables()
    wrapped = LanguageModel(model, architecture(checkpoint), lora, META, compute_dtype=plan.dtype).to(META)
    storage: Any
    for storage in (storage for layer in wrapped.expert_layers for storage in layer.frozen.values()):
        storage.weights = tag_calls(storage.weights, "dequantization")
    wrapped.causal.lm_head.forward = tag_calls(wrapped.causal.lm_head.forward, "logits")
    return wrapped, plan


def _forget_meta_tables() -> None:
    """Removes bitsandbytes' 8-bit table for scales if it is on the meta device: bitsandbytes caches the table on the
    device where it was first needed."""
    import bitsandbytes.functional as bnb

    if bnb.name2qmap.get("dynamic", torch.empty(0)).is_meta:
        del bnb.name2qmap["dynamic"]


def planned_batch(lengths: Sequence[int], held: bool = False) -> Batch:
    """Returns a micro-batch of documents of these lengths, in tokens. All tokens are in the loss, except the first of
    each document. held: and held to the base, which is the most that a mask can hold."""
    row = Row(lengths)
    position = torch.cat([start + torch.arange(n - 1) for start, n in zip(row.ends, row.lengths, strict=False)])
    batch = Batch(
        ids_T=torch.zeros(row.ends[-1], dtype=torch.int64), position_T=row.position_T(), position_N=position,
        target_N=torch.zeros_like(position), coefficient_N=torch.ones(len(position)),
        kind_N=torch.zeros(len(position), dtype=torch.int8),
        roles_N=torch.zeros_like(position), row=row, names=["planned"] * len(row.lengths),
    )  # fmt: skip
    if held:
        batch.kind_N[:] = TermKind.HELD
        batch.base = Base(replace(batch, row=Row(lengths)), torch.ones(len(position), dtype=torch.bool))
    return batch


def run_step(model: LanguageModel, batch: Batch, checkpointing: bool, gpu: bool) -> Step:
    """Runs forward and backward of one micro-batch, and returns what they take.

    model: from `planned_model`. checkpointing: with gradient checkpointing. gpu: with the kernels of a GPU.

    The layers of a deep model repeat with some period. Only two depths, one period apart, are run then. The rest is
    extrapolated: each further period adds as much as the last one did.
    """
    stack = model.causal.model
    layers = stack.layers
    start, period = _repetition([_kind(layer) for layer in layers])
    least = start + period + (len(layers) - start) % period
    if least + 2 * period >= len(layers):
        return _run_layers(model, batch, checkpointing, gpu)
    steps = []
    for depth in (least, least + period):
        stack.layers = layers[:depth]
        steps.append(_run_layers(model, batch, checkpointing, gpu))
    stack.layers = layers
    times = (len(layers) - least) // period

    def extended(first: Any, second: Any) -> Any:
        return first + times * (second - first)

    one, two = steps
    whole: dict[str, Any] = {}
    for each in fields(Step):
        a, b = getattr(one, each.name), getattr(two, each.name)
        by_key = not isinstance(a, int)
        whole[each.name] = Counter({k: max(0, extended(a[k], b[k])) for k in a | b}) if by_key else extended(a, b)
    return Step(**whole)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, parameter.shape) for name, parameter in layer.named_parameters())


def _repetition(kinds: list[Any]) -> tuple[int, int]:
    """Returns (start, period): from layer `start` on, the kinds of the layers repeat with this period."""
    found = []
    for period in range(1, len(kinds)):
        differing = [i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]]
        start = differing[-1] + 1 if differing else 0
        found.append((start + 2 * period, start, period))
    return min(found, default=(0, 0, 1))[1:]


def _run_layers(model: LanguageModel, batch: Batch, checkpointing: bool, gpu: bool) -> Step:
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.causal.gradient_checkpointing_disable()

    def gone(parameter: Tensor) -> None:
        parameter.grad = None  # ZeRO-3 reduces a gradient, and frees it, as soon as it is complete

    hooks = [p.register_post_accumulate_grad_hook(gone) for p in model.parameters() if p.requires_grad]
    trace = Trace([*model.parameters(), *model.buffers()])
    for layer in model.expert_layers:
        layer.load_E = None
    group: Any = model.expert_layers[0].ep if model.expert_layers else PlannedGroup()
    group.wire_bytes = group.collectives = 0
    waits = HostWaits()
    with (
        waits, trace, trace.parts.of(model), device_kernels(model.causal, gpu),
        trace.counting_products(model.expert_layers),
    ):  # fmt: skip
        terms = model(batch)
        trace.step.kept = trace.total
        terms.loss.backward()
        del terms
    for hook in hooks:
        hook.remove()
    trace.step.wire, trace.step.collectives, trace.step.waits = group.wire_bytes, group.collectives, len(waits.seen)
    return trace.step


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed's ZeRO-3 partitions and gathers parameters (Rajbhandari et al., arXiv 1910.02054, and
    deepspeed/runtime/zero of the version in constraints.txt).

    ranks: of the job. replicas: ranks that hold the same experts. Sizes are in elements: bucket (reduce_bucket_size),
    prefetch (prefetch_bucket_size), reuse (max_reuse_distance), group (sub_group_size).
    """

    ranks: int
    replicas: int
    bucket: int
    prefetch: int
    reuse: int
    group: int  # of the optimizer's updates

    @classmethod
    def of(cls, config: dict[str, Any], ranks: int, expert_parallel: int) -> "Zero":
        """Returns the sizes that a DeepSpeed configuration sets, or else DeepSpeed's defaults. expert_parallel: how
        many ranks divide a layer's experts."""
        zero = DeepSpeedZeroConfig(**config["zero_optimization"])
        sizes = zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.max_reuse_distance, zero.sub_group_size
        return cls(ranks, ranks // expert_parallel, *map(int, sizes))


def split(model: LanguageModel, zero: Zero) -> list[tuple[nn.Parameter, int]]:
    """Returns every parameter with the number of ranks over which it is partitioned: the replicas for a parameter of
    the experts, else all ranks."""
    of_experts = {id(p) for layer in model.expert_layers for p in layer.parameters()}
    return [(p, zero.replicas if id(p) in of_experts else zero.ranks) for p in model.parameters()]


@dataclass
class Memory:
    """Planned memory of one rank, in bytes. gpu: category -> bytes at the peak of a step, on a CPU too. phases: moment
    -> total bytes, for each moment of `rank_memory`. step: what one micro-batch takes. trained: elements of a rank's
    partitions that the optimizer updates."""

    gpu: dict[str, int]
    phases: dict[str, int]
    step: Step
    trained: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return max(self.phases.values())


CATEGORIES = (
    "dense_partition", "gathered_layer", "experts", "lora_factors", "gradients", "optimizer", "activations", "logits",
    "dispatch", "dequantization", "buckets", "heap",
)  # fmt: skip
# Unused space between the blocks of glibc's heap, relative to what a step has in it (tests/benchmarks/plan.py).
UNUSED = 0.5


Parts = list[tuple[nn.Parameter, int, int]]  # parameter, elements of a rank's partition, number of ranks


def _persistent(model: LanguageModel, parts: Parts, experts: set[int]) -> Counter[str]:
    """Returns category -> bytes of a rank's partitions and buffers. experts: ids of the experts' parameters."""
    factors = {id(p) for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    held: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0))
    for p, part, _ in parts:
        kind = "lora_factors" if id(p) in factors else "experts" if id(p) in experts else "dense_partition"
        held[kind] += part * p.itemsize
    buffers = {id(b): b.nbytes for layer in model.expert_layers for b in layer.frozen.buffers()}
    held["experts"] += sum(buffers.values())
    held["dense_partition"] += sum(b.nbytes for b in model.buffers() if id(b) not in buffers)
    return held


def rank_memory(model: LanguageModel, step: Step, zero: Zero, gpu: bool, bf16: bool) -> Memory:
    """Returns the planned memory of one rank: a step's tensors plus persistent memory and the buffers of ZeRO-3.

    gpu: on a GPU, else on a CPU. bf16: gradients are BF16, as with --method full of a BF16 model; else fp32, as those
    of LoRA weights.

    Persistent memory: a partition of ceil(numel / ranks) elements of every parameter. For a trained parameter, in
    addition, a gradient partition in the parameter's dtype, an fp32 master copy and AdamW's two moments (4 + 8 bytes
    per element). A bucket of reduce_bucket_size elements; on a CPU, where memory is taken when it is first written,
    only as much of it as is ever filled.

    Gathered parameters: ZeRO-3 keeps a parameter gathered if it is used again within max_reuse_distance elements,
    counted through forward and backward (partitioned_param_coordinator.py, __params_to_release). If n elements lie
    between a layer and the loss, the layer is used again after 2n elements. So a small model stays gathered as a whole,
    and of a large model the layers nearest to the loss. In addition, prefetch_bucket_size elements are gathered ahead
    (fetch_sub_module). Parameters that are gathered together exist twice for a moment: in a flat buffer and each by
    itself.

    The moments are `gathering`, before the first layer; `backward`, the peak of forward and backward; `reducing`, when
    a flat buffer holds the last bucket's gradients once more; and `updating`, with an fp32 gradient of sub_group_size
    elements and the square root of AdamW's second moment, which exists twice on a CPU.

    On a CPU the heap does not shrink: what forward and backward had in it is still there when the optimizer allocates
    its larger blocks (streaming.py, _freed_memory_goes_back).
    """
    parts = [(p, -(-p.numel() // ranks), ranks) for p, ranks in split(model, zero)]
    trained = [(p, part, ranks) for p, part, ranks in parts if p.requires_grad]
    experts = {id(p) for layer in model.expert_layers for p in layer.parameters()}
    itemsize, filled = (2 if bf16 else 4), min(zero.bucket, sum(p.numel() for p, _, _ in trained))
    held = _persistent(model, parts, experts)
    held["gradients"] = sum(part for _, part, _ in trained) * itemsize
    held["optimizer"] = sum(part for _, part, _ in trained) * 12
    held["buckets"] = (zero.bucket if gpu else filled) * itemsize

    divided = [p for p, _, ranks in parts if ranks > 1]
    elements, size = sum(p.numel() for p in divided), sum(p.nbytes for p in divided)
    mean = size / max(1, elements)
    largest = max((p.nbytes for p in divided), default=0)
    whole = 2 * elements <= zero.reuse
    stays = size if whole else min(size, max(largest, int(mean * zero.reuse / 2)))
    flat = int(mean * min(elements, zero.prefetch))
    reduced = filled * itemsize if any(ranks > 1 for _, _, ranks in trained) else 0
    update = max(min(zero.group, sum(part for p, part, _ in trained if (id(p) in experts) == of)) for of in (0, 1))
    moments = {
        "gathering": Counter(gathered_layer=(stays if whole else flat) + flat),
        "backward": Counter(step.peak) + Counter(gathered_layer=stays if whole else stays + flat),
        "reducing": Counter(gathered_layer=stays, buckets=reduced),
        "updating": Counter(optimizer=update * (4 + (4 if gpu else 8))),
    }
    if not gpu:
        moments["backward"]["heap"] = int(UNUSED * step.heap)
        moments["reducing"]["heap"] = moments["updating"]["heap"] = int((1 + UNUSED) * step.heap)
    if filled == zero.bucket:  # a full bucket is reduced during backward, too
        moments["backward"]["buckets"] += reduced
    phases = {name: sum((held + moment).values()) for name, moment in moments.items()}
    fullest = held + moments[max(phases, key=lambda name: phases[name])]
    return Memory({name: int(fullest[name]) for name in CATEGORIES}, phases, step, held["optimizer"] // 12)
