"""Kernel for the loss terms of a chunk of logits and their gradient, by the formulas of train/masking/loss.py.

Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # logits of a row that are processed at a time


@triton.jit
def _softplus(x):
    """log(1 + e^x). log1p is computed with Kahan's correction, so that small losses keep their full precision."""
    small = tl.exp(-tl.abs(x))
    sum = 1 + small
    return tl.maximum(x, 0.0) + tl.where(sum == 1, small, tl.log(sum) * (small / tl.where(sum == 1, 1.0, sum - 1)))


@triton.jit
def _terms(logits, target, coefficient, nll, term, vocabulary, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own, weight = tl.load(target + row), tl.load(coefficient + row).to(tl.float32)
    here = logits + row * vocabulary
    target_logit = tl.load(here + own).to(tl.float32)
    most, total = float("-inf"), 0.0
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        rest = (column < vocabulary) & (column != own)
        value = tl.load(here + column, mask=rest, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(value, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(value - higher), 0)
        most = higher
    margin = target_logit - most - tl.log(total)
    likely, unlikely = _softplus(-margin), _softplus(margin)
    tl.store(nll + row, likely)
    tl.store(term + row, tl.where(weight < 0, unlikely, likely))
    if GRADIENT:
        size = tl.where(weight < 0, -tl.sigmoid(margin), tl.sigmoid(-margin)) * tl.abs(weight)
        for start in range(0, vocabulary, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < vocabulary
            value = tl.load(here + column, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(column == own, -size, tl.exp(value - most) * (size / total))
            tl.store(here + column, slope.to(logits.dtype.element_ty), mask=inside)


def terms_(logits_CV: Tensor, target_C: Tensor, coefficient_C: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Returns nll [C] and term [C] in fp32. With `gradient`, overwrites the logits [C, V] with the gradient of
    |coefficient| * term."""
    rows, vocabulary = logits_CV.shape
    nll, term = (logits_CV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        _terms[(rows,)](
            logits_CV, target_C, coefficient_C, nll, term, vocabulary, GRADIENT=gradient,
            COLUMNS=min(COLUMNS, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return nll, term
