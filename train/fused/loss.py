"""Kernel for the loss terms of a chunk of logits and their gradient, by the formulas of train/masking/loss.py.

Shapes: C tokens of a chunk, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # logits of a row that are processed at a time
LARGE = tl.constexpr(0.1)  # as in train/masking/loss.py


@triton.jit
def _softplus(x):
    """log(1 + e^x). log1p is computed with Kahan's correction, so that small losses keep their full precision."""
    small = tl.exp(-tl.abs(x))
    sum = 1 + small
    return tl.maximum(x, 0.0) + tl.where(sum == 1, small, tl.log(sum) * (small / tl.where(sum == 1, 1.0, sum - 1)))


@triton.jit
def _with_more(most, total, value):
    """The largest of all values so far, and the sum of exp(value - largest), with some more values."""
    higher = tl.maximum(most, tl.max(value, 0))
    return higher, total * tl.exp(most - higher) + tl.sum(tl.exp(value - higher), 0)


@triton.jit
def _terms(logits, target, coefficient, unlikely, nll, term, vocabulary, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own, weight = tl.load(target + row), tl.load(coefficient + row).to(tl.float32)
    other = tl.load(unlikely + row) != 0
    here = logits + row * vocabulary
    target_logit = tl.load(here + own).to(tl.float32)
    most, total = float("-inf"), 0.0
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        rest = (column < vocabulary) & (column != own)
        value = tl.load(here + column, mask=rest, other=float("-inf")).to(tl.float32)
        most, total = _with_more(most, total, value)
    margin = target_logit - most - tl.log(total)
    likely, unlikelihood = _softplus(-margin), _softplus(margin)
    tl.store(nll + row, likely)
    tl.store(term + row, tl.where(other, unlikelihood, likely))
    if GRADIENT:
        size = tl.where(other, -tl.sigmoid(margin), tl.sigmoid(-margin)) * weight
        for start in range(0, vocabulary, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < vocabulary
            value = tl.load(here + column, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(column == own, -size, tl.exp(value - most) * (size / total))
            tl.store(here + column, slope.to(logits.dtype.element_ty), mask=inside)


def terms_(
    logits_CV: Tensor, target_C: Tensor, coefficient_C: Tensor, unlikely_C: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns nll [C] and term [C] in fp32. With `gradient`, overwrites the logits [C, V] with the gradient of
    coefficient * term."""
    return _launched(_terms, gradient, logits_CV, target_C, coefficient_C, unlikely_C)


def _launched(kernel: Any, gradient: bool, logits_CV: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
    """Runs a kernel with one program per row of the logits. Returns its two results [C] in fp32."""
    rows, vocabulary = logits_CV.shape
    nll, term = (logits_CV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        columns = min(COLUMNS, triton.next_power_of_2(vocabulary))
        kernel[(rows,)](logits_CV, *given, nll, term, vocabulary, GRADIENT=gradient, COLUMNS=columns, num_warps=8)
    return nll, term


@triton.jit
def _held(logits, base, target, coefficient, nll, term, vocabulary, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(coefficient + row).to(tl.float32)
    own_logit = tl.load(logits + row * vocabulary + tl.load(target + row)).to(tl.float32)
    here, there = logits + row * vocabulary, base + row * vocabulary
    most, total, base_most, base_total = float("-inf"), 0.0, float("-inf"), 0.0
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < vocabulary
        value = tl.load(here + column, mask=inside, other=float("-inf")).to(tl.float32)
        most, total = _with_more(most, total, value)
        value = tl.load(there + column, mask=inside, other=float("-inf")).to(tl.float32)
        base_most, base_total = _with_more(base_most, base_total, value)
    lse, base_lse = most + tl.log(total), base_most + tl.log(base_total)
    tl.store(nll + row, lse - own_logit)
    plain = 0.0
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < vocabulary
        log_p = tl.load(here + column, mask=inside, other=0.0).to(tl.float32) - lse
        log_b = tl.load(there + column, mask=inside, other=0.0).to(tl.float32) - base_lse
        plain += tl.sum(tl.where(inside, tl.exp(log_b) * (log_b - log_p), 0.0), 0)
    close = 0.0
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < vocabulary
        log_p = tl.load(here + column, mask=inside, other=0.0).to(tl.float32) - lse
        log_b = tl.load(there + column, mask=inside, other=0.0).to(tl.float32) - base_lse
        b, e = tl.exp(log_b), log_b - log_p - plain
        # exp(-e) - 1 + e: by its series where it is small, and as p exp(plain) where exp(-e) could overflow
        series = e * e * (0.5 - e * (1 / 6 - e * (1 / 24 - e * (1 / 120 - e / 720))))
        whole = tl.exp(log_p + plain) - b * (1 - e)
        summand = tl.where(tl.abs(e) < 0.3, b * series, whole)
        close += tl.sum(tl.where(inside, summand, 0.0), 0)
        if GRADIENT:
            slope = (tl.exp(log_p) - b) * weight
            tl.store(here + column, slope.to(logits.dtype.element_ty), mask=inside)
    close = tl.maximum(close, 0.0)
    sum = 1 + close  # Kahan's correction, as in _softplus
    close = tl.where(sum == 1, close, tl.log(sum) * (close / tl.where(sum == 1, 1.0, sum - 1)))
    tl.store(term + row, tl.where(plain > LARGE, plain, close))


def held_terms_(
    logits_CV: Tensor, base_CV: Tensor, target_C: Tensor, coefficient_C: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns nll [C] and, in fp32, the divergence [C] from the base, whose logits are base_CV. With `gradient`,
    overwrites the logits [C, V] with the gradient of coefficient * divergence."""
    return _launched(_held, gradient, logits_CV, base_CV, target_C, coefficient_C)
