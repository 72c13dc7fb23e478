"""Runs one training step without data, to count what it allocates, computes and sends.

The model's own forward, loss and backward run on torch's meta device, where tensors have shapes but no values. Integers
that decide shapes (tokens, routing) are real. So the step's actual tensors are counted, not those that a formula
predicts. The router's choice of experts would need values. It is replaced by experts drawn uniformly at random.

Shapes: P rows, E experts of a grouped product; S rows sent.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from launch.parts import Parts
from train.checkpoints.streaming import HEAP_BLOCK
from train.experts.dispatch import ExpertGroup

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
    groups: of all grouped products; each is a separate launch if the hardware has no grouped products.
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
    """An expert-parallel group whose other ranks do not exist. They are assumed to send this rank as much as it sends
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
            raise NotImplementedError("the computation depends on a value of a tensor, so it cannot be planned")
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
