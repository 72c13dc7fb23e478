"""How a weight matrix is written in a checkpoint, and how it becomes a plain matrix again.

plain   one tensor NAME [out, in] in F32, BF16 or F16.
fp8     NAME in F8_E4M3 and NAME_scale_inv [ceil(out/b), ceil(in/b)], one scale a block of b x b (b = 128):
        W = float(w8) * scale_inv[block] (DeepSeek-V3, arXiv 2412.19437, section 3.3).
int4    NAME_packed [out, in/8] I32, NAME_scale [out, in/g] and NAME_shape [2]: compressed-tensors' `pack-quantized`,
        symmetric, one scale a group of g inputs (g = 32). Eight values a word along the input, lowest bits first,
        offset by 8: q = ((word >> 4j) & 15) - 8, W = q * scale.

Products are those of fp32, rounded to BF16: just once where scales are BF16 or F16, whose products fp32 holds exactly.
All functions take any leading dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.errors import UserError
from train.fused import IN_ONE_LAUNCH, operations

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8_MAX = 448.0  # the largest finite F8_E4M3


Tensors = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]  # name -> its possible dtypes, its shape


@dataclass(frozen=True)
class Format:
    """The tensors of a matrix: what its name ends in, past the plain name, and their dtypes and shapes.

    `block` is the edge of fp8's blocks [rows, columns], or int4's group size [1, columns].
    """

    kind: str = "plain"  # plain | fp8 | int4
    block: tuple[int, int] = (1, 1)

    def tensors(self, out_features: int, in_features: int) -> Tensors:
        """suffix -> (dtypes that it may have, shape); the first is the one with most of the bytes."""
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
        """A changed matrix [out, in], fp32, in this format. parts: as it was, whose scales are kept wherever the new
        values fit in them: so what did not change keeps its bits."""
        if self.kind == "fp8":
            return dict(zip(("", "_scale_inv"), fp8_encode(weight, parts["_scale_inv"], self.block), strict=True))
        if self.kind == "int4":
            return dict(zip(("_packed", "_scale"), int4_encode(weight, parts["_scale"], self.block[1]), strict=True))
        return {"": weight.to(parts[""].dtype)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """suffix -> tensor [..., rows, columns] to the matrix [..., out, in]; BF16 but for plain."""
        if self.kind == "fp8":
            return fp8_decode(parts[""], parts["_scale_inv"], self.block)
        if self.kind == "int4":
            return int4_decode(parts["_packed"], parts["_scale"], self.block[1])
        return parts[""]


PLAIN = Format()


def blocks_to_elements(scale: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """[..., ceil(rows/b0), ceil(columns/b1)] -> [..., rows, columns], each value over its block."""
    return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]


def fp8_decode(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., out, in] F8 and its block scales -> BF16."""
    if weight.device.type in IN_ONE_LAUNCH:
        return operations.fp8_decode(weight, scale, *block)
    return (weight.float() * blocks_to_elements(scale.float(), block, *weight.shape[-2:])).bfloat16()


def fp8_decode_range(raw: Tensor, scale: Tensor, block: tuple[int, int], start: int, columns: int) -> Tensor:
    """Elements start, start+1, … of a flattened F8 matrix of `columns` -> BF16. scale: of the rows of blocks from the
    first that the range touches. One row of blocks at a time, so that what it needs beside the result is small."""
    out = torch.empty(len(raw), dtype=torch.bfloat16)
    first = start // columns // block[0]
    scale_RB = scale.float().view(-1, -(-columns // block[1]))
    position = start
    while position < start + len(raw):
        row = position // columns // block[0]
        stop = min((row + 1) * block[0] * columns, start + len(raw))
        here = slice(position - start, stop - start)
        lead, tail = position % columns, -stop % columns  # to whole rows
        values = F.pad(raw[here].float(), (lead, tail)).view(-1, columns)
        values = values * scale_RB[row - first].repeat_interleave(block[1])[:columns]
        out[here] = values.flatten()[lead : lead + stop - position].bfloat16()
        position = stop
    return out


def fp8_encode(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[out, in] -> F8 and scales, in the dtype of those given, which are kept where no value of the block rounds to
    more than 448 of them; else absmax / 448."""
    out_features, in_features = weight.shape
    rows, columns = scale.shape
    padded = weight.float().new_zeros(rows * block[0], columns * block[1])
    padded[:out_features, :in_features] = weight
    needed = padded.view(rows, block[0], columns, block[1]).abs().amax((1, 3)) / FP8_MAX
    scale = torch.where(needed > (1 + 2**-5) * scale.float().abs(), needed.to(scale.dtype), scale)
    quotient = weight.float() / blocks_to_elements(_divisor(scale), block, out_features, in_features)
    return quotient.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _divisor(scale: Tensor) -> Tensor:
    """Where a scale is 0, all its values are, and 0 / 1 is 0."""
    scale = scale.float()
    return scale.where(scale != 0, 1.0)


def int4_decode(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """[..., out, in/8] words and scales [..., out, in/g] -> BF16 [..., out, in]."""
    if packed.device.type in IN_ONE_LAUNCH and group % 8 == 0:
        return operations.int4_decode(packed, scale, group)
    if scale.dtype != torch.bfloat16:  # F16 would round a product to its 11 bits, and BF16 once more
        scale = scale.float()
    octets = packed.contiguous().view(torch.uint8)  # little-endian: byte b holds elements 2b (low) and 2b + 1 (high)
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=scale.dtype, device=packed.device)
    halves = out.unflatten(-1, (-1, 2))
    halves[..., 0], halves[..., 1] = octets & 15, octets >> 4
    out.sub_(8).unflatten(-1, (-1, group)).mul_(scale[..., None])
    return out.bfloat16()


def int4_encode(weight: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[out, in] -> words [out, in/8] and scales, in the dtype of those given, which are kept where every value of the
    group is within half a step of -8..7 of them; else absmax / 7.5 (compressed-tensors' rule). The nearest of -8..7 for
    each value."""
    grouped = weight.float().unflatten(-1, (-1, group))
    ends = torch.stack(grouped.aminmax(dim=-1))
    low, high = (ends / _divisor(scale)).aminmax(dim=0)  # of either sign are scales
    absmax = ends.abs().amax(0)
    beyond = (low < -8.5) | (high > 7.5) | ((scale == 0) & (absmax > 0))
    scale = torch.where(beyond, (absmax / 7.5).to(scale.dtype), scale)
    q = (grouped / _divisor(scale)[..., None]).round_().clamp_(-8, 7)
    u = q.add_(8).flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2))
    return (u[..., 0] | (u[..., 1] << 4)).contiguous().view(torch.int32), scale


def _object(value: Any) -> dict[str, Any]:
    """A value of config.json that must be an object: an empty one in the place of any other."""
    return value if isinstance(value, dict) else {}


def quantized_format(config: Mapping[str, Any], where: str) -> Format:
    """The format of a checkpoint's quantized matrices from its config.json, whose quantization_config may be inside
    text_config; PLAIN without one. UserError for a kind that cannot be read."""
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
