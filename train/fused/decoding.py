"""Decodes FP8 blocks and INT4 words to BF16, any number of matrices at once, bit-identical to train/formats.py.

Rounding to BF16 (to nearest, ties to even, as in torch) is coded explicitly, since Triton's interpreter and old GPUs
round differently.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program


@triton.jit
def _bfloat16_bits(value):
    """Returns the upper half of an fp32 value, rounded, as int16."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _int4(packed, scale, out, words, words_of_a_group, WORDS: tl.constexpr):
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    value = tl.load(packed + word, mask=inside, other=0)
    factor = tl.load(scale + word // words_of_a_group, mask=inside, other=0.0).to(tl.float32)
    nibble = tl.arange(0, 8)[None, :]
    q = ((value[:, None] >> (4 * nibble)) & 15) - 8  # lowest bits first
    place = word[:, None] * 8 + nibble
    tl.store(out + place, _bfloat16_bits(q.to(tl.float32) * factor[:, None]), mask=inside[:, None])


@triton.jit
def _fp8(weight, scale, table, out, rows, columns, high, wide, block_rows, block_columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # of all matrices
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    place = row * columns + column
    value = tl.load(table + tl.load(weight + place, mask=inside, other=0).to(tl.int32), mask=inside, other=0.0)
    block = (row // rows * high + row % rows // block_rows) * wide + column // block_columns
    factor = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, _bfloat16_bits(value * factor), mask=inside)


@functools.cache
def _values_of_bytes(device: torch.device) -> Tensor:
    """Returns the fp32 values [256] of all F8_E4M3 bytes: GPUs before Hopper cannot convert them natively."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def int4_decode(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """Decodes INT4 words [..., out, in/8] with scales [..., out, in/group] to BF16 [..., out, in]. `group` must be a
    multiple of 8."""
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=torch.bfloat16, device=packed.device)
    words = BLOCK // 8
    grid = (triton.cdiv(packed.numel(), words),)
    _int4[grid](
        packed.contiguous(), scale.contiguous(), out.view(torch.int16), packed.numel(), group // 8, WORDS=words
    )  # fmt: skip
    return out


def fp8_decode(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Decodes F8_E4M3 [..., out, in] with scales [..., ceil(out/b0), ceil(in/b1)] to BF16 [..., out, in]. `block`:
    (b0, b1), the rows and columns that share a scale."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    (rows, columns), (high, wide) = weight.shape[-2:], scale.shape[-2:]
    grid = (math.prod(weight.shape[:-1]), triton.cdiv(columns, BLOCK))
    _fp8[grid](
        weight.contiguous().view(torch.uint8), scale.contiguous(), _values_of_bytes(weight.device),
        out.view(torch.int16), rows, columns, high, wide, *block, COLUMNS=BLOCK,
    )  # fmt: skip
    return out
