"""Kernels for RMSNorm (Zhang and Sennrich, arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps) per row, in fp32.

Shapes: R rows, H columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements per program, which takes several rows if they are shorter


@triton.jit
def _weight(weight, column, inside, ONE_MORE: tl.constexpr):
    value = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ONE_MORE:
        value += 1.0
    return value


@triton.jit
def _rms_norm(
    x, weight, gate, y, rstd, rows, columns, stride, eps,
    ONE_MORE: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    root = 1 / tl.sqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(rstd + row, root, mask=row < rows)
    value = value * root[:, None]
    if not ONE_MORE:  # the result is rounded before the multiplication by the weight as well
        value = value.to(y.dtype.element_ty).to(tl.float32)
    value *= _weight(weight, column, column < columns, ONE_MORE)[None, :]
    place = row[:, None] * columns + column[None, :]
    if GATED:
        z = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(y.dtype.element_ty).to(tl.float32) * z * tl.sigmoid(z)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, gate, rstd, grad_x, grad_gate, rows, columns, stride,
    ONE_MORE: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    root = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    normed = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32) * root
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    given *= _weight(weight, column, column < columns, ONE_MORE)[None, :]
    if GATED:
        z = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        slope = sigmoid * (1 + z * (1 - sigmoid))
        tl.store(grad_gate + place, (given * normed * slope).to(grad_gate.dtype.element_ty), mask=inside)
        given *= z * sigmoid
    mean = tl.sum(given * normed, 1) / columns
    tl.store(grad_x + place, (root * (given - normed * mean[:, None])).to(grad_x.dtype.element_ty), mask=inside)


def _tile(columns: int) -> dict[str, int]:
    wide = triton.next_power_of_2(columns)
    return {"ROWS": max(1, TILE // wide), "COLUMNS": wide, "num_warps": 4 if wide <= TILE else 8}


def rms_norm(
    x_RH: Tensor, weight_H: Tensor, gate_RH: Tensor | None, eps: float, one_more: bool
) -> tuple[Tensor, Tensor]:
    """Returns y [R, H] in the dtype of x, and 1 / sqrt(mean(x^2) + eps) [R] in fp32.

    gate: multiplies y by silu(gate). one_more: multiplies by 1 + weight instead of weight. There may
    be gaps between the rows of x.
    """
    rows, columns = x_RH.shape
    y, rstd = x_RH.new_empty(rows, columns), x_RH.new_empty(rows, dtype=torch.float32)
    tile = _tile(columns)
    if rows:
        _rms_norm[(triton.cdiv(rows, tile["ROWS"]),)](
            x_RH, weight_H, gate_RH, y, rstd, rows, columns, x_RH.stride(0), eps,
            ONE_MORE=one_more, GATED=gate_RH is not None, **tile,
        )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    grad_RH: Tensor, x_RH: Tensor, weight_H: Tensor, gate_RH: Tensor | None, rstd_R: Tensor, one_more: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [R, H] and of the gate [R, H]; without a gate, the latter is empty, [0]."""
    rows, columns = x_RH.shape
    grads = torch.empty_like(grad_RH), grad_RH.new_empty(0) if gate_RH is None else torch.empty_like(gate_RH)
    tile = _tile(columns)
    if rows:
        _rms_norm_backward[(triton.cdiv(rows, tile["ROWS"]),)](
            grad_RH, x_RH, weight_H, gate_RH, rstd_R, *grads, rows, columns, x_RH.stride(0),
            ONE_MORE=one_more, GATED=gate_RH is not None, **tile,
        )  # fmt: skip
    return grads
