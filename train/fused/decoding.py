"""Decodes FP8 blocks and INT4 words, any number of matrices at once, to the bits of train/checkpoints/formats.py.

Rounding to BF16 is written out, to nearest and ties to even (as torch has it), since Triton's interpreter and old GPUs
round otherwise.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program


@triton.jit
def _bfloat16_bits(value):
    """The upper half of fp32, rounded; int16."""
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
    """F8_E4M3 byte -> fp32, [256]: GPUs before Hopper do not convert it themselves."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def int4_decode(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """[..., out, in/8] words and scales [..., out, in/g] -> BF16 [..., out, in]; g a multiple of 8."""
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=torch.bfloat16, device=packed.device)
    words = BLOCK // 8
    grid = (triton.cdiv(packed.numel(), words),)
    _int4[grid](
        packed.contiguous(), scale.contiguous(), out.view(torch.int16), packed.numel(), group // 8, WORDS=words
    )  # fmt: skip
    return out


def fp8_decode(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., out, in] F8 and its block scales [..., ceil(out/b), ceil(in/b)] -> BF16."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    (rows, columns), (high, wide) = weight.shape[-2:], scale.shape[-2:]
    grid = (math.prod(weight.shape[:-1]), triton.cdiv(columns, BLOCK))
    _fp8[grid](
        weight.contiguous().view(torch.uint8), scale.contiguous(), _values_of_bytes(weight.device),
        out.view(torch.int16), rows, columns, high, wide, *block, COLUMNS=BLOCK,
    )  # fmt: skip
    return out
