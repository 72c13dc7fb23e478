"""Runs one training step without data, to count what it allocates, computes and sends.

The model's own forward, loss and backward run on torch's meta device, where tensors have shapes but no values. Integers
that decide shapes (tokens, routing) are real. So the step's actual tensors are counted, not those that a formula
predicts. The router's choice of experts would need values. It is replaced by experts drawn uniformly at random.

Shapes: B documents, T tokens, H heads, K and V head sizes of keys and values, C tokens of a chunk, N chunks of all
heads; D documents of a group, L tokens of the longest one; P rows, E experts of a grouped product; S rows sent.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launch.parts import Parts
from train.checkpoints.streaming import HEAP_BLOCK
from train.data.row import Row
from train.experts import products
from train.experts.dispatch import ExpertGroup
from train.fused import IN_ONE_LAUNCH
from train.layers import mixing

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


@dataclass
class Step:
    """What one micro-batch takes on one rank. Tensors do not include weights, gradients and optimizer.

    peak: category -> bytes of all tensors, at the moment when their sum is largest.
    each: category -> the most bytes of this category at any moment.
    kept: bytes of the tensors alive between forward and backward.
    flops: of matrix products, convolution and attention; a multiplication and its addition count as two.
    moved: bytes that the operations read and write.
    wire: bytes that the rank sends to the other ranks of its expert-parallel group.
    heap: the most bytes at any moment of tensors that are in the heap on a CPU.
    operations: all except views; each is at least one launch.
    expert_operations: those of the experts' products, including dequantization.
    collectives: exchanges between the ranks of the expert-parallel group.
    waits: how often the host synchronizes with the device.
    traffic: `moved`, by part of the model and operation.
    groups: of all grouped products; each is a launch of its own if the hardware has no grouped products.
    """

    peak: Counter[str] = field(default_factory=Counter)
    each: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    flops: int = 0
    moved: int = 0
    wire: int = 0
    heap: int = 0
    operations: int = 0
    expert_operations: int = 0
    collectives: int = 0
    waits: int = 0
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter)
    groups: int = 0


class PlannedGroup(ExpertGroup):
    """An expert-parallel group whose other ranks are not there. They are taken to send this rank as much as it sends
    them."""

    collectives = 0

    def exchange(self, rows: Tensor, received_D: list[int], sent_D: list[int]) -> Tensor:
        """Counts the bytes of rows [S, ...] for other ranks, and returns a copy of the rows as those received."""
        self.collectives += 1
        self.wire_bytes += (sum(sent_D) - sent_D[self.rank]) * rows[:1].numel() * rows.element_size()
        with tagged("dispatch"):
            return rows.clone()


_tags = ["activations"]


@contextmanager
def tagged(name: str) -> Iterator[None]:
    """Inside the context, allocations count as category `name`."""
    _tags.append(name)
    try:
        yield
    finally:
        _tags.pop()


def tag_calls(function: Callable, name: str) -> Callable:
    """Returns the function so wrapped that its allocations count as category `name`."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with tagged(name):
            return function(*args, **kwargs)

    return call


@lru_cache(maxsize=8)
def drawn(rows: int, experts: int, k: int) -> Tensor:
    """Returns [rows, k]: k different experts for each row, uniformly at random, the same in every call (seed 0)."""
    return torch.rand(rows, experts, generator=torch.Generator().manual_seed(0)).topk(k, sorted=False).indices


class Trace(TorchDispatchMode):
    """Counts in `step` the tensors that are alive while operations run, and what the operations compute and move.

    An operation that has a meta tensor among its arguments runs on the meta device as a whole. known: weights, which
    are counted elsewhere. Raises NotImplementedError if the model needs a value on the meta device.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[Any, int, str]] = {}
        self.now: Counter[str] = Counter()
        self.total = self.most = self.heap = 0
        self.step, self.parts = Step(), Parts()
        self.in_product = 0

    @contextmanager
    def counting_products(self, layers: list[Any]) -> Iterator[None]:
        """Inside the context, operations of these layers' products are also counted in `expert_operations`."""

        def counted(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*given: Any) -> Tensor:
                self.in_product += 1
                out = product(*given)
                self.in_product -= 1
                return out

            return call

        for layer in layers:
            layer._product = counted(layer._product)
        try:
            yield
        finally:
            for layer in layers:
                del layer._product

    def _of_experts(self) -> bool:
        node = torch._C._current_autograd_node()
        return self.in_product > 0 or (node is not None and node.name().startswith("Grouped"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        meta = any(tensor.is_meta for tensor in tensors)
        if meta and func is aten.topk.default:
            out: Any = self._topk(*args, **kwargs)
        elif meta and func is aten._local_scalar_dense.default:
            raise NotImplementedError("a value of the model decides what it computes: it cannot be planned")
        else:
            if func is aten._to_copy.default and not meta:  # a copy to the device of the model: integers stay real
                kwargs = kwargs | {"device": torch.device("cpu")}
            if meta and func in INDEXING:  # while a mask is real, it is known where it is true
                args = args[0], [_positions(index) for index in args[1]], *args[2:]
            if meta:
                args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
            out = _grouped_mm(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        self.step.groups += len(args[2]) if func is aten._grouped_mm.default else 0
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func.namespace == "spanwise":  # they may also write to arguments
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            results += [given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        for tensor in results:
            self._count(tensor)
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        if func._schema.is_mutable or not all(t.untyped_storage()._cdata in given for t in results):  # not just a view
            moved = sum(tensor.nbytes for tensor in (*tensors, *results))
            self.step.moved += moved
            self.step.traffic[self.parts.now(), func._opname] += moved
            self.step.operations += 1
            self.step.expert_operations += self._of_experts()
        count = FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        self.step.flops += count(*args, **kwargs, out_val=out) if count else 0
        return out

    @staticmethod
    def _topk(values: Tensor, k: int, dim: int = -1, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        assert dim in (-1, values.dim() - 1)
        indices = drawn(values.numel() // values.shape[-1], values.shape[-1], k).view(*values.shape[:-1], k)
        return values.new_empty(indices.shape), indices.clone()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive or not size:
            return
        tag = _tags[-1]
        self.alive[key] = weakref.ref(storage, partial(self._forget, key)), size, tag
        self.now[tag] += size
        self.total += size
        self.heap += size * (size < HEAP_BLOCK)
        self.step.heap = max(self.step.heap, self.heap)
        self.step.each[tag] = max(self.step.each[tag], self.now[tag])
        if self.total > self.most:
            self.most, self.step.peak = self.total, self.now.copy()

    def _forget(self, key: int, _: Any) -> None:
        _, size, tag = self.alive.pop(key)
        self.now[tag] -= size
        self.total -= size
        self.heap -= size * (size < HEAP_BLOCK)


WAITING = {Tensor.tolist, Tensor.item, Tensor.nonzero, torch.nonzero, torch.bincount, Tensor.bincount, torch.unique}
WAITING |= {torch.masked_select, Tensor.masked_select, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__}


class HostWaits(TorchFunctionMode):
    """Records in `seen` the names of calls in which the host synchronizes with the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else ()
        by_mask = any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (indices if isinstance(indices, tuple) else (indices,))
        )
        if func in WAITING or by_mask:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _positions(index: Tensor | None) -> Tensor | None:
    return index.nonzero()[:, 0] if index is not None and index.dtype == torch.bool and not index.is_meta else index


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *rest: Any) -> Tensor:
    """Products of rows grouped by expert: [P, k] @ [E, k, n] -> [P, n], or [m, P] @ [P, n] -> [E, m, n]. torch's own
    meta function takes only BF16."""
    shape = (len(offs), a.shape[0], b.shape[1]) if b.dim() == 2 else (a.shape[0], b.shape[2])
    return a.new_empty(shape)


def _grouped_flops(a: Tensor, b: Tensor, *rest: Any, out_val: Tensor, **more: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _attention_flops(products: int) -> Callable[..., int]:
    """Counts that many products of T x T with the size of a head. The half that the causal mask excludes is counted
    too."""

    def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
        query = next(a for a in args[products // 5 :] if isinstance(a, Tensor))  # backward has the gradient first
        return 2 * products * query.numel() * query.shape[2]

    return count


def _sum_flops(y: Tensor, h: Tensor, right: Tensor, *rest: Any, **more: Any) -> int:
    return 2 * h.numel() * right.shape[-1]


FLOPS: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: _grouped_flops,
    aten.addmm_: _sum_flops,
    torch.ops.spanwise.add_grouped: _sum_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flops(5),
}


def attention(gpu: bool, *given: Any, **more: Any) -> tuple[Tensor, None]:
    """Runs the model's own attention (`mixing.attention`) with the kernel that the planned device would use.

    On a GPU it is the memory-efficient kernel, which keeps what flash attention keeps: queries, keys, values, output
    and a log-sum-exp per row (Dao et al., arXiv 2205.14135). On a CPU it is the one that torch chooses: flash
    attention, or all T x T weights. Returns ([1, T, H, V], None).
    """
    more["kernel"] = partial(_planned_causal, gpu)
    return mixing.attention(*given, **more)


def _planned_causal(
    gpu: bool, q_DLHK: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_DLHK, k, v))
    gqa = q.shape[1] // k.shape[1]
    if gpu:
        if gqa > 1:
            k, v = (x.repeat_interleave(gqa, dim=1) for x in (k, v))
        out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scaling)[0]
    elif _chosen_on_cpu(q, k, v, gqa > 1) == SDPBackend.MATH.value:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa > 1
        )
    else:
        out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2)


def _chosen_on_cpu(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> int:
    """Returns torch's choice of backend on a CPU, which depends on heads, head sizes and dtype."""
    with _disable_current_modes():
        small = [torch.empty(1, x.shape[1], 2, x.shape[3], dtype=x.dtype) for x in (q, k, v)]
        choose: Any = torch._fused_sdp_choice
        return choose(*small, None, 0.0, True, scale=None, enable_gqa=gqa)


for _gpu in (True, False):
    ALL_ATTENTION_FUNCTIONS.register(f"planned_{_gpu}", partial(attention, _gpu))
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"planned_{_gpu}", sdpa_mask)


class DeltaRule(torch.autograd.Function):
    """Stands in for flash-linear-attention's chunk kernel of the gated delta rule (Yang et al., arXiv 2412.06464): it
    keeps the same tensors for backward, creates the same temporary ones and computes the same products. transformers'
    own fallback, for CPUs, takes many times as much memory.

    Kept are q, k, v, beta, the cumulated decay and the [C, C] triangle of each chunk. Backward computes everything
    again, and a gradient of each tensor with twice the products.
    """

    CHUNK = 64

    @staticmethod
    def forward(ctx, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH):
        kept = torch.empty_like(g_BTH), v_BTHV.new_empty(*v_BTHV.shape[:3], DeltaRule.CHUNK)
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, beta_BTH, *kept)
        DeltaRule.products(k_BTHK, v_BTHV)
        return torch.empty_like(v_BTHV)

    @staticmethod
    def products(k_BTHK: Tensor, v_BTHV: Tensor) -> list[Tensor]:
        """Computes for all N chunks of all heads, and returns: triangle [N, C, C], w [N, C, K], u [N, C, V], state
        [N, K, V], new values [N, C, V], output [N, C, V]."""
        B, T, H, _ = v_BTHV.shape  # keys may have fewer heads, each of which is read for several heads of values
        chunks, C = B * H * -(-T // DeltaRule.CHUNK), DeltaRule.CHUNK
        k, v = (x.new_empty(()).expand(chunks, C, x.shape[-1]) for x in (k_BTHK, v_BTHV))
        triangle = k @ k.mT
        w, u, state = triangle @ k, triangle @ v, k.mT @ v
        new = w @ state
        return [triangle, w, u, state, new, (k @ state).add_(triangle @ new)]

    @staticmethod
    def backward(ctx, grad):
        q, k, v, beta, decay, _ = ctx.saved_tensors
        made, gradients = DeltaRule.products(k, v), DeltaRule.products(k, v)
        DeltaRule.products(k, v)
        out = [torch.empty_like(x) for x in (q, k, v, decay, beta)]
        del made, gradients
        return tuple(out)


def _delta_rule(q, k, v, g, beta, packed: Row, **kwargs):
    """Replaces transformers' function of this signature. Like the kernel, it knows where documents end, and takes fewer
    heads of queries and keys than of values."""
    packed.mixed += 1
    return DeltaRule.apply(q, k, v, g, beta), None


class Convolution(torch.autograd.Function):
    """Stands in for flash-linear-attention's kernel of the causal convolution and its activation: one pass, which keeps
    x [1, C, T] for backward."""

    @staticmethod
    def forward(ctx, x_1CT):
        ctx.save_for_backward(x_1CT)
        return torch.empty_like(x_1CT)

    @staticmethod
    def backward(ctx, grad_1CT):
        return grad_1CT + ctx.saved_tensors[0]


def _convolution(x_1CT, *_, **__):
    """Replaces transformers' `causal_conv1d_fn`, with frozen weights."""
    return Convolution.apply(x_1CT)


LINEAR = {"causal_conv1d_fn": _convolution, "torch_chunk_gated_delta_rule": _delta_rule}


@contextmanager
def device_kernels(model: Any, gpu: bool) -> Iterator[None]:
    """Inside the context, the model runs with the attention of the planned device and dequantizes as many experts at a
    time as that device does. For a GPU, stand-ins for its kernels of the convolution and the gated delta rule replace
    the model's fallbacks."""
    usual, kernels = model.config._attn_implementation, LINEAR if gpu else {}
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    fallbacks = [
        (module, name, getattr(module, name)) for module in modules for name in kernels if hasattr(module, name)
    ]
    for module, name, _ in fallbacks:
        setattr(module, name, kernels[name])
    model.config._attn_implementation, together = f"planned_{gpu}", products.WORKSPACE
    if gpu:
        IN_ONE_LAUNCH.add("meta")
    else:
        products.WORKSPACE = 0
    try:
        yield
    finally:
        products.WORKSPACE = together
        IN_ONE_LAUNCH.discard("meta")
        model.config._attn_implementation = usual
        for module, name, fallback in fallbacks:
            setattr(module, name, fallback)
