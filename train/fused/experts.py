"""Kernels for the operations around the experts' grouped matrix products.

Shapes: P (token, expert) pairs sorted by expert, E experts of this rank, I expert width, H hidden size, O columns, r
padded LoRA rank, T rows that are sums of at most k pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128  # size of a program's tile


@triton.jit
def _gated(gate_up, weight, out, width, COLUMNS: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(gate_up + pair * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (pair * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * tl.load(weight + pair).to(tl.float32)
    tl.store(out + pair * width + column, value.to(out.dtype.element_ty), mask=inside)


def gated(gate_up_P2I: Tensor, weight_P1: Tensor) -> Tensor:
    """Returns silu(gate) * up * weight [P, I]. gate and up are the two halves of a row of gate_up [P, 2I]."""
    pairs, width = len(gate_up_P2I), gate_up_P2I.shape[1] // 2
    out = gate_up_P2I.new_empty(pairs, width)
    columns = min(1024, triton.next_power_of_2(width))
    if pairs:
        _gated[(pairs, triton.cdiv(width, columns))](gate_up_P2I, weight_P1, out, width, COLUMNS=columns)
    return out


@triton.jit
def _gated_backward(grad, gate_up, weight, grad_gate_up, grad_weight, width, COLUMNS: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    factor, total = tl.load(weight + pair).to(tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        upper, lower = pair * 2 * width + column, (pair * 2 + 1) * width + column
        gate = tl.load(gate_up + upper, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + lower, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + pair * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        kind = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + upper, (given * factor * up * slope).to(kind), mask=inside)
        tl.store(grad_gate_up + lower, (given * factor * silu).to(kind), mask=inside)
        total += tl.sum(given * silu * up, 0)
    tl.store(grad_weight + pair, total.to(grad_weight.dtype.element_ty))


def gated_backward(grad_PI: Tensor, gate_up_P2I: Tensor, weight_P1: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate_up [P, 2I] and of weight [P, 1]."""
    grads = torch.empty_like(gate_up_P2I), torch.empty_like(weight_P1)
    pairs, width = grad_PI.shape
    columns = min(1024, triton.next_power_of_2(width))
    if pairs:
        _gated_backward[(pairs,)](grad_PI, gate_up_P2I, weight_P1, *grads, width, COLUMNS=columns)
    return grads


@triton.jit
def _add_grouped(
    y, h, right, ends, scale, pairs, columns, rank, experts, stride_expert, stride_rank, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    row, column = first + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=2147483647)
    # The index of a row's expert is the number of experts whose rows end before it.
    lowest = tl.sum((end <= first).to(tl.int32), 0)
    highest = tl.sum((end <= tl.minimum(first + ROWS, pairs) - 1).to(tl.int32), 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for e in range(lowest, highest + 1):
        start, stop = tl.sum(tl.where(expert == e - 1, end, 0), 0), tl.sum(tl.where(expert == e, end, 0), 0)
        own = (row >= start) & (row < stop)
        place = right + (tl.zeros((), tl.int64) + e) * stride_expert
        for first_k in range(0, rank, RANK):
            k = first_k + tl.arange(0, RANK)
            left = tl.load(
                h + row.to(tl.int64)[:, None] * rank + k[None, :], mask=own[:, None] & (k < rank)[None, :], other=0.0
            )
            matrix = tl.load(
                place + k[:, None] * stride_rank + column[None, :] * stride_column,
                mask=(k < rank)[:, None] & (column < columns)[None, :], other=0.0,
            )  # fmt: skip
            total += tl.dot(left, matrix, input_precision="ieee")
    at = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < pairs)[:, None] & (column < columns)[None, :]
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (before + scale * total).to(y.dtype.element_ty), mask=inside)


def add_grouped_(y_PO: Tensor, h_Pr: Tensor, right_ErO: Tensor, ends_E: Tensor, scale: float) -> None:
    """Adds scale * h @ right[e] to y [P, O] in place, where e is the expert of each row."""
    (pairs, columns), (experts, rank, _) = y_PO.shape, right_ErO.shape
    if pairs:
        _add_grouped[(triton.cdiv(pairs, ROWS), triton.cdiv(columns, COLUMNS))](
            y_PO, h_Pr.contiguous(), right_ErO, ends_E, scale, pairs, columns, rank, experts, *right_ErO.stride(),
            ROWS=ROWS, COLUMNS=COLUMNS, RANK=min(64, max(16, triton.next_power_of_2(rank))),
            EXPERTS=triton.next_power_of_2(experts),
        )  # fmt: skip


@triton.jit
def _summed(x, place, out, most, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in range(most):
        at = tl.load(place + row * most + i).to(tl.int64)
        total += tl.load(x + at * columns + column, mask=inside & (column * 0 + at >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=inside)


def summed(x_PH: Tensor, place_Tk: Tensor) -> Tensor:
    """Returns [T, H], whose row t is the sum of the rows place[t] of x, accumulated in fp32. A place of -1 adds
    nothing."""
    (rows, most), columns = place_Tk.shape, x_PH.shape[1]
    out = x_PH.new_empty(rows, columns)
    block = min(1024, triton.next_power_of_2(columns))
    if rows:
        _summed[(rows, triton.cdiv(columns, block))](x_PH, place_Tk, out, most, columns, COLUMNS=block)
    return out
