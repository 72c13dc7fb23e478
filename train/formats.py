"""Decodes and encodes weight matrices in the formats in which checkpoints store them.

plain   one tensor NAME [out, in] in F32, BF16 or F16.
fp8     NAME in F8_E4M3 and NAME_scale_inv [ceil(out/b), ceil(in/b)], one scale per block of b x b (b = 128):
        W = float(w8) * scale_inv[block] (DeepSeek-V3, arXiv 2412.19437, section 3.3).
int4    NAME_packed [out, in/8] I32, NAME_scale [out, in/g] and NAME_shape [2]: compressed-tensors' `pack-quantized`,
        symmetric, one scale per group of g inputs (g = 32). Eight values per word along the input, lowest bits first,
        offset by 8: q = ((word >> 4j) & 15) - 8, W = q * scale.

Decoding computes products in fp32 and rounds them to BF16. If scales are BF16 or F16, fp32 holds the products exactly,
so they are rounded only once. Where shapes begin with "...", any leading dimensions are allowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.fused import IN_ONE_LAUNCH, operations
from train.runtime.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8_MAX = 448.0  # the largest finite F8_E4M3


Tensors = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]  # name -> its possible dtypes, its shape


@dataclass(frozen=True)
class Format:
    """The tensors that store a matrix: the suffixes of their names after the plain name, their dtypes and shapes.

    `block` is the size [rows, columns] of fp8's blocks, or [1, columns] of int4's groups.
    """

    kind: str = "plain"  # plain | fp8 | int4
    block: tuple[int, int] = (1, 1)

    def tensors(self, out_features: int, in_features: int) -> Tensors:
        """Returns suffix -> (possible dtypes, shape) for a matrix [out, in]. The first tensor has most of the bytes."""
        blocks = -(-out_features // self.block[0]), -(-in_features // self.block[1])
        if self.kind == "fp8":
            return {
                "": ((torch.float8_e4m3fn,), (out_features, in_features)),
                "_scale_inv": ((torch.bfloat16, torch.float32), blocks),
            }
        if self.kind == "int4":
            return {
                "_packed": ((torch.int32,), (out_features, in_features // 8)),
                "_scale": ((torch.bfloat16, torch.float16, torch.float32), blocks),
            }
        return {"": (FLOATS, (out_features, in_features))}

    def encode(self, weight: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes a changed fp32 matrix [out, in] in this format; returns suffix -> tensor.

        parts: the tensors before the change. Their scales are kept wherever the new values fit, so that unchanged
        values keep their bits.
        """
        if self.kind == "fp8":
            return dict(zip(("", "_scale_inv"), fp8_encode(weight, parts["_scale_inv"], self.block), strict=True))
        if self.kind == "int4":
            return dict(zip(("_packed", "_scale"), int4_encode(weight, parts["_scale"], self.block[1]), strict=True))
        return {"": weight.to(parts[""].dtype)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Decodes suffix -> tensor [..., rows, columns] to the matrix [..., out, in], in BF16 unless plain."""
        if self.kind == "fp8":
            return fp8_decode(parts[""], parts["_scale_inv"], self.block)
        if self.kind == "int4":
            return int4_decode(parts["_packed"], parts["_scale"], self.block[1])
        return parts[""]


PLAIN = Format()


def blocks_to_elements(scale: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Expands one value per block [..., ceil(rows/b0), ceil(columns/b1)] to the elements [..., rows, columns]."""
    return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]


def fp8_decode(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Decodes F8 [..., out, in] with block scales [..., ceil(out/b0), ceil(in/b1)] to BF16 [..., out, in]."""
    if weight.device.type in IN_ONE_LAUNCH:
        return operations.fp8_decode(weight, scale, *block)
    return (weight.float() * blocks_to_elements(scale.float(), block, *weight.shape[-2:])).bfloat16()


def fp8_decode_range(raw: Tensor, scale: Tensor, block: tuple[int, int], start: int, columns: int) -> Tensor:
    """Decodes `raw` [n], the elements start, start+1, … of a flattened F8 matrix with `columns` columns, to BF16 [n].

    scale: the scales of the rows of blocks [R, ceil(columns/b1)], beginning with the first row that the range touches.
    Decodes one row of blocks at a time, so that it needs little memory beside the result.
    """
    out = torch.empty(len(raw), dtype=torch.bfloat16)
    first = start // columns // block[0]
    scale_RB = scale.float().view(-1, -(-columns // block[1]))
    position = start
    while position < start + len(raw):
        row = position // columns // block[0]
        stop = min((row + 1) * block[0] * columns, start + len(raw))
        here = slice(position - start, stop - start)
        lead, tail = position % columns, -stop % columns  # pad to whole rows
        values = F.pad(raw[here].float(), (lead, tail)).view(-1, columns)
        values = values * scale_RB[row - first].repeat_interleave(block[1])[:columns]
        out[here] = values.flatten()[lead : lead + stop - position].bfloat16()
        position = stop
    return out


def fp8_encode(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Encodes [out, in] as F8 [out, in] and block scales [ceil(out/b0), ceil(in/b1)], in the dtype of those given.

    A given scale is kept if no value of its block rounds to more than 448 times the scale; else it becomes
    absmax / 448.
    """
    out_features, in_features = weight.shape
    rows, columns = scale.shape
    padded = weight.float().new_zeros(rows * block[0], columns * block[1])
    padded[:out_features, :in_features] = weight
    needed = padded.view(rows, block[0], columns, block[1]).abs().amax((1, 3)) / FP8_MAX
    scale = torch.where(needed > (1 + 2**-5) * scale.float().abs(), needed.to(scale.dtype), scale)
    quotient = weight.float() / blocks_to_elements(_divisor(scale), block, out_features, in_features)
    return quotient.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _divisor(scale: Tensor) -> Tensor:
    """Returns the scales in fp32 with 1 instead of 0: where a scale is 0, all its values are, and 0 / 1 is 0."""
    scale = scale.float()
    return scale.where(scale != 0, 1.0)


def int4_decode(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """Decodes words [..., out, in/8] with scales [..., out, in/g] to BF16 [..., out, in]."""
    if packed.device.type in IN_ONE_LAUNCH and group % 8 == 0:
        return operations.int4_decode(packed, scale, group)
    if scale.dtype != torch.bfloat16:  # an F16 product would be rounded to 11 bits, and then again to BF16
        scale = scale.float()
    octets = packed.contiguous().view(torch.uint8)  # little-endian: byte b holds elements 2b (low) and 2b + 1 (high)
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=scale.dtype, device=packed.device)
    halves = out.unflatten(-1, (-1, 2))
    halves[..., 0], halves[..., 1] = octets & 15, octets >> 4
    out.sub_(8).unflatten(-1, (-1, group)).mul_(scale[..., None])
    return out.bfloat16()


def int4_encode(weight: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Encodes [out, in] as words [out, in/8] and scales [out, in/g], in the dtype of those given.

    A given scale is kept if every value of its group, divided by the scale, is within half a step of -8..7; else it
    becomes absmax / 7.5 (compressed-tensors' rule). Each value is rounded to the nearest of -8..7.
    """
    grouped = weight.float().unflatten(-1, (-1, group))
    ends = torch.stack(grouped.aminmax(dim=-1))
    low, high = (ends / _divisor(scale)).aminmax(dim=0)  # scales can have either sign
    absmax = ends.abs().amax(0)
    beyond = (low < -8.5) | (high > 7.5) | ((scale == 0) & (absmax > 0))
    scale = torch.where(beyond, (absmax / 7.5).to(scale.dtype), scale)
    q = (grouped / _divisor(scale)[..., None]).round_().clamp_(-8, 7)
    u = q.add_(8).flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2))
    return (u[..., 0] | (u[..., 1] << 4)).contiguous().view(torch.int32), scale


def _object(value: Any) -> dict[str, Any]:
    """Returns a value of config.json that must be an object; {} if it is anything else."""
    return value if isinstance(value, dict) else {}


def quantized_format(config: Mapping[str, Any], where: str) -> Format:
    """Returns the format of a checkpoint's quantized matrices, from quantization_config in its config.json or in the
    text_config of that; PLAIN if there is none. Raises UserError for a format that cannot be read.

    where: the beginning of error messages.
    """
    given = config.get("quantization_config") or _object(config.get("text_config")).get("quantization_config")
    if not given:
        return PLAIN
    quantization = _object(given)
    method = quantization.get("quant_method")
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
            raise UserError(
                f"{where}/config.json: quantization_config.weight_block_size is {block!r}; FP8 checkpoints are read "
                "with block scales alone, such as [128, 128]. Use such a checkpoint, or a BF16 one."
            )
        return Format("fp8", (block[0], block[1]))
    if method == "compressed-tensors":
        groups = list(_object(quantization.get("config_groups")).values())
        weights = _object(_object(groups[0]).get("weights")) if len(groups) == 1 else {}
        wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        wrong = {key: weights.get(key) for key, value in wanted.items() if weights.get(key) != value}
        group = weights.get("group_size")
        if quantization.get("format") != "pack-quantized" or wrong or type(group) is not int or group < 1:
            raise UserError(
                f"{where}/config.json: quantization_config is format {quantization.get('format')!r}, weights "
                f"{dict(weights)}; of compressed-tensors, one group of pack-quantized symmetric INT4 weights with a "
                "scale a group of inputs can be read, as in Kimi K2.5. Use such a checkpoint, or a BF16 one."
            )
        return Format("int4", (1, group))
    raise UserError(
        f"{where}/config.json: quantization_config.quant_method is {method!r}; fp8 and compressed-tensors can be read. "
        "Use such a checkpoint, or a BF16 one."
    )
