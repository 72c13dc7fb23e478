"""Grouped matrix products, which multiply each row by its expert's matrix, with and without LoRA.

Shapes: E experts of this rank, P (token, expert) pairs sorted by expert, `ends` the end of each expert's rows; N
experts whose weights are dequantized together; I and O input and output features, r the LoRA rank as padded.

Quantized matrices are dequantized only while their product is computed, for as many experts at a time as WORKSPACE
holds: in forward and again in backward, and only for experts that have tokens. A CPU with several threads computes
one expert on each, if the products are large enough.
"""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.experts.dispatch import Ends
from train.experts.storage import Storage
from train.fused import IN_ONE_LAUNCH, operations

WORKSPACE = 3 * 2**29  # bytes of BF16 weights that are dequantized together: 27 experts of Kimi K2.5
MOST_VALUES = 2**31 - 1  # bitsandbytes counts values in 32 bits
WORTH_THREADS = 2**24  # multiplications of a grouped product (about 0.2 ms) from which one expert per thread pays off


def on_threads(x_PI: Tensor, columns: int) -> bool:
    """Returns whether the grouped product of x [P, I] with matrices of `columns` outputs computes each expert on a
    single CPU thread.

    A product of few rows gains little from several threads, and is slower with them where waiting threads do not spin
    (OMP_WAIT_POLICY=PASSIVE).
    """
    several = x_PI.device.type == "cpu" and "cpu" not in IN_ONE_LAUNCH and torch.get_num_threads() > 1
    return several and x_PI.numel() * columns >= WORTH_THREADS


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Returns a pool of `count` threads, on each of which torch computes with one thread."""
    all_started = threading.Barrier(count, timeout=60)

    def start(_: int) -> None:
        torch.get_num_threads()  # in a new thread, torch's thread count cannot be set before it has been read
        torch.set_num_threads(1)
        all_started.wait()

    threads = ThreadPoolExecutor(count)
    list(threads.map(start, range(count)))
    torch.set_num_threads(count)  # threads that start later inherit the count that was set last
    return threads


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of its parent's threads


def each_expert(ends: Ends, work: Callable[..., Any], *given: Tensor | Iterable[Any]) -> None:
    """Calls work(*arguments) for each expert that has rows, on this CPU's threads and without gradients.

    given: what the arguments are taken from: the expert's rows of each tensor [P, ...], and the expert's item of each
    other iterable.
    """
    counts = [end - start for start, end in itertools.pairwise([0, *ends.host])]
    items = zip(counts, *(x.split(counts) if isinstance(x, Tensor) else x for x in given), strict=True)
    left = iter([each for count, *each in items if count])

    def share(_: int) -> None:
        with torch.no_grad():
            for each in left:  # all threads share this iterator
                work(*each)

    threads = torch.get_num_threads()
    list(_threads(threads).map(share, range(threads)))


def runs(ends: Ends, storage: Storage, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yields [first, last) of the experts whose weights are dequantized together: as many as the workspace holds.

    The first and the last expert of each run have tokens. On a CPU, where a launch costs nothing, and for storage that
    is not divisible, a run is one expert.
    """
    count = storage.out_features * storage.in_features
    most = 1 if device.type == "cpu" or not storage.divisible else max(1, min(WORKSPACE // 2, MOST_VALUES) // count)
    starts = [0, *ends.host[:-1]]
    occupied = [expert for expert, (start, end) in enumerate(zip(starts, ends.host, strict=True)) if end > start]
    while occupied:
        own = [expert for expert in occupied if expert < occupied[0] + most]
        yield own[0], own[-1] + 1
        occupied = occupied[len(own) :]


def frozen_product(x_PI: Tensor, storage: Storage, ends: Ends, transposed: bool = False) -> Tensor:
    """Returns x @ W^T [P, O] for x [P, I] or, with `transposed`, x @ W [P, I] for x [P, O], each row with its expert's
    weight W [O, I]. Not tracked by autograd."""
    weight_EOI = storage.plain
    if weight_EOI is not None:
        return F.grouped_mm(x_PI, weight_EOI if transposed else weight_EOI.transpose(1, 2), offs=ends.device)

    def product(x: Tensor, first: int, last: int, start: int = 0, out: Tensor | None = None) -> Tensor:
        weight_NOI = storage.weights(first, last, x.dtype)
        right = weight_NOI if transposed else weight_NOI.transpose(1, 2)
        if last - first == 1:
            return torch.mm(x, right[0], out=out)
        ends_N = ends.device[first:last]
        return F.grouped_mm(x, right, offs=ends_N - start if start else ends_N)

    own = list(runs(ends, storage, x_PI.device))
    if len(own) == 1:
        return product(x_PI, *own[0])
    y_PO = x_PI.new_empty(len(x_PI), storage.in_features if transposed else storage.out_features)
    for first, last in own:
        start = ends.host[first - 1] if first else 0
        rows = slice(start, ends.host[last - 1])
        if last - first == 1:
            product(x_PI[rows], first, last, start, out=y_PO[rows])
        else:
            y_PO[rows] = product(x_PI[rows], first, last, start)
    return y_PO


def add_grouped_(y_PO: Tensor, h_Pr: Tensor, right_ErO: Tensor, ends: Ends, scale: float = 1.0) -> None:
    """Adds scale * h @ right[e] to y [P, O] in place, where e is the expert of each row, without another tensor of the
    size of y. Not tracked by autograd."""
    if y_PO.device.type in IN_ONE_LAUNCH:
        operations.add_grouped_(y_PO, h_Pr, right_ErO, ends.device, scale)
        return
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.host])):
        if end > start:
            y_PO[start:end].addmm_(h_Pr[start:end], right_ErO[expert], alpha=scale)


def _nan(x_PI: Tensor, columns: int) -> Tensor:
    """Returns [P, columns] of NaN that takes no memory."""
    return torch.full((1, 1), math.nan, dtype=x_PI.dtype, device=x_PI.device).expand(len(x_PI), columns)


def zero_without_rows(ends: Ends, *gradients: Tensor) -> None:
    """Zeroes the gradients [E, ...] of experts without rows: on some GPUs grouped_mm leaves uninitialized memory there
    (pytorch#172439). The host knows these experts, so this does not synchronize with the device."""
    starts = [0, *ends.host[:-1]]
    empty = [start == end for start, end in zip(starts, ends.host, strict=True)]
    for without, run in itertools.groupby(range(len(empty)), empty.__getitem__):
        experts = [*run]
        for gradient in gradients if without else ():
            gradient[experts[0] : experts[-1] + 1].zero_()


class GroupedLinear(torch.autograd.Function):
    """y [P, O] = x W^T + scale (x A^T) B^T for rows x [P, I] grouped by expert, with W frozen in `storage`.

    A [E, r, I] and B [E, O, r] may be None. needed: if False, y is NaN, for when only its gradient is needed. Saves for
    backward only x, x A^T and the parameters A and B themselves, not views of them: ZeRO-3 can free what it gathered
    for the forward, and gathers it again.
    """

    @staticmethod
    def forward(ctx, x_PI, A_ErI, B_EOr, storage, scale, ends, needed=True):
        """Returns y [P, O]."""
        forward = _by_expert if on_threads(x_PI, storage.out_features) else _grouped
        y_PO, h_Pr = forward(x_PI, A_ErI, B_EOr, storage, scale, ends, needed)
        ctx.save_for_backward(*((x_PI, h_Pr, A_ErI, B_EOr) if A_ErI is not None else ()))
        ctx.storage, ctx.scale, ctx.ends = storage, scale, ends
        return y_PO

    @staticmethod
    def backward(ctx, grad_PO):
        """Returns the gradients of x [P, I], A [E, r, I] and B [E, O, r], and None for the other arguments."""
        lora, needed = ctx.saved_tensors, ctx.needs_input_grad[0]
        backward = _gradients_by_expert if on_threads(grad_PO, ctx.storage.in_features) else _grouped_gradients
        x_PI, h_Pr, A_ErI, B_EOr = lora or [None] * 4
        grads = backward(grad_PO.contiguous(), x_PI, h_Pr, A_ErI, B_EOr, ctx.storage, ctx.scale, ctx.ends, needed)
        return *grads, *[None] * 4


def _grouped(x_PI, A_ErI, B_EOr, storage, scale, ends, needed):
    """Returns y [P, O] and x A^T [P, r]."""
    y_PO = frozen_product(x_PI, storage, ends) if needed else _nan(x_PI, storage.out_features)
    if A_ErI is None:
        return y_PO, None
    h_Pr = F.grouped_mm(x_PI, A_ErI.to(x_PI.dtype).transpose(1, 2), offs=ends.device)
    if needed:
        add_grouped_(y_PO, h_Pr, B_EOr.to(x_PI.dtype).transpose(1, 2), ends, scale)
    return y_PO, h_Pr


def _grouped_gradients(grad_PO, x_PI, h_Pr, A_ErI, B_EOr, storage, scale, ends, needed):
    """Returns the gradients of x, A and B."""
    grad_PI = frozen_product(grad_PO, storage, ends, transposed=True) if needed else None
    if A_ErI is None:
        return grad_PI, None, None
    A, B = A_ErI.to(x_PI.dtype), B_EOr.to(x_PI.dtype)
    scaled_Pr = F.grouped_mm(grad_PO, B, offs=ends.device).mul_(scale)
    grad_B = F.grouped_mm(grad_PO.T, h_Pr, offs=ends.device).mul_(scale)
    grad_A = F.grouped_mm(scaled_Pr.T, x_PI, offs=ends.device)
    zero_without_rows(ends, grad_A, grad_B)
    if grad_PI is not None:
        add_grouped_(grad_PI, scaled_Pr, A, ends)
    return grad_PI, grad_A.to(A_ErI.dtype), grad_B.to(B_EOr.dtype)


def _weight(storage: Storage, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Returns a function from an expert's index to its weight [O, I]."""
    plain = storage.plain
    return lambda expert: storage.weights(expert, expert + 1, dtype)[0] if plain is None else plain[expert]


def _by_expert(x_PI, A_ErI, B_EOr, storage, scale, ends, needed):
    """Does what `_grouped` does, each expert on a single CPU thread."""
    y_PO = x_PI.new_empty(len(x_PI), storage.out_features) if needed else _nan(x_PI, storage.out_features)
    weight = _weight(storage, x_PI.dtype)

    def products(expert, x, y, h=None, A=None, B=None):
        if needed:
            torch.mm(x, weight(expert).T, out=y)
        if A is not None:
            torch.mm(x, A, out=h)
        if needed and A is not None:
            y.addmm_(h, B, alpha=scale)

    if A_ErI is None:
        each_expert(ends, products, range(storage.experts), x_PI, y_PO)
        return y_PO, None
    h_Pr = x_PI.new_empty(len(x_PI), A_ErI.shape[1])
    transposed = (factor.to(x_PI.dtype).transpose(1, 2).unbind() for factor in (A_ErI, B_EOr))
    each_expert(ends, products, range(storage.experts), x_PI, y_PO, h_Pr, *transposed)
    return y_PO, h_Pr


def _gradients_by_expert(grad_PO, x_PI, h_Pr, A_ErI, B_EOr, storage, scale, ends, needed):
    """Does what `_grouped_gradients` does, each expert on a single CPU thread."""
    grad_PI = grad_PO.new_empty(len(grad_PO), storage.in_features) if needed else _nan(grad_PO, storage.in_features)
    weight = _weight(storage, grad_PO.dtype)

    def products(expert, grad, grad_x, x=None, h=None, A=None, B=None, grad_A=None, grad_B=None):
        if needed:
            torch.mm(grad, weight(expert), out=grad_x)
        if A is None:
            return
        scaled = torch.mm(grad, B).mul_(scale)
        torch.mm(grad.T, h, out=grad_B).mul_(scale)
        torch.mm(scaled.T, x, out=grad_A)
        if needed:
            grad_x.addmm_(scaled, A)

    if A_ErI is None:
        each_expert(ends, products, range(storage.experts), grad_PO, grad_PI)
        return grad_PI if needed else None, None, None
    A, B = A_ErI.to(x_PI.dtype), B_EOr.to(x_PI.dtype)
    grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
    zero_without_rows(ends, grad_A, grad_B)
    factors = (part.unbind() for part in (A, B, grad_A, grad_B))
    each_expert(ends, products, range(storage.experts), grad_PO, grad_PI, x_PI, h_Pr, *factors)
    return grad_PI if needed else None, grad_A.to(A_ErI.dtype), grad_B.to(B_EOr.dtype)


class GroupedTrained(torch.autograd.Function):
    """y [P, O] = x W^T for rows x [P, I] grouped by expert, with W [E, O, I] trained. Saves the parameter itself for
    backward: a view of it would keep alive what ZeRO-3 gathered. needed: if False, y is NaN."""

    @staticmethod
    def forward(ctx, x_PI, weight_EOI, ends, needed=True):
        """Returns y [P, O]."""
        ctx.save_for_backward(x_PI, weight_EOI)
        ctx.ends = ends
        if not needed:
            return _nan(x_PI, weight_EOI.shape[1])
        if not on_threads(x_PI, weight_EOI.shape[1]):
            return F.grouped_mm(x_PI, weight_EOI.transpose(1, 2), offs=ends.device)
        y_PO = x_PI.new_empty(len(x_PI), weight_EOI.shape[1])
        each_expert(ends, lambda x, y, weight: torch.mm(x, weight.T, out=y), x_PI, y_PO, weight_EOI.unbind())
        return y_PO

    @staticmethod
    def backward(ctx, grad_PO):
        """Returns the gradients of x [P, I] and W [E, O, I], and None for the other arguments."""
        (x_PI, weight_EOI), ends_E = ctx.saved_tensors, ctx.ends.device
        grad_PO = grad_PO.contiguous()
        if on_threads(grad_PO, weight_EOI.shape[2]):
            needed = ctx.needs_input_grad[0]
            return *_trained_gradients_by_expert(grad_PO, x_PI, weight_EOI, ctx.ends, needed), None, None
        grad_PI = F.grouped_mm(grad_PO, weight_EOI, offs=ends_E) if ctx.needs_input_grad[0] else None
        grad_EOI = F.grouped_mm(grad_PO.T, x_PI, offs=ends_E)
        zero_without_rows(ctx.ends, grad_EOI)
        return grad_PI, grad_EOI, None, None


def _trained_gradients_by_expert(grad_PO, x_PI, weight_EOI, ends, needed):
    """Returns the gradients of x and W, each expert computed on a single CPU thread."""
    grad_PI = torch.empty_like(x_PI) if needed else _nan(x_PI, x_PI.shape[1])
    grad_EOI = torch.empty_like(weight_EOI)
    zero_without_rows(ends, grad_EOI)

    def products(grad, x, grad_x, weight, grad_weight):
        if needed:
            torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.T, x, out=grad_weight)

    each_expert(ends, products, grad_PO, x_PI, grad_PI, weight_EOI.unbind(), grad_EOI.unbind())
    return grad_PI if needed else None, grad_EOI
