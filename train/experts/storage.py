"""Frozen expert weights as a rank keeps them.

Shapes: E experts of this rank.

Weights stay in the checkpoint's own format (BF16, FP8 blocks, packed INT4) or become NF4 as they are read. ZeRO never
sees them: they are buffers.
"""

import threading

import torch
from torch import Tensor, nn

from train.checkpoints.formats import Format

NF4_BLOCK = 64
_QUANTIZING = threading.Lock()


class FrozenExperts(nn.Module):
    """Weights [E, out, in] in the checkpoint's own format; gate and up, where they are two matrices, one under the
    other. For each suffix of the format there is a buffer [E, matrices, ...], filled through `matrix_parts`."""

    data: Tensor

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        self.experts, self.out_features, self.in_features = experts, out_features, in_features

    def allocate(self, format: Format, matrices: int, dtypes: dict[str, torch.dtype], device: torch.device) -> None:
        """Makes room for all experts. dtypes: suffix -> dtype, as on disk."""
        self.format, self.suffixes = format, list(dtypes)
        for suffix, (_, shape) in format.tensors(self.out_features // matrices, self.in_features).items():
            buffer = torch.empty(self.experts, matrices, *shape, dtype=dtypes[suffix], device=device)
            self.register_buffer(f"data{suffix}", buffer, persistent=False)

    def matrix_parts(self, expert: int, matrix: int) -> dict[str, Tensor]:
        """suffix -> the place of an expert's matrix."""
        return {suffix: getattr(self, f"data{suffix}")[expert, matrix] for suffix in self.suffixes}

    def weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The weights [experts, out, in] of experts first..last, dequantized."""
        parts = {suffix: getattr(self, f"data{suffix}")[first:last] for suffix in self.suffixes}
        return self.format.decode(parts).flatten(1, 2).to(dtype)

    divisible = True

    @property
    def plain(self) -> Tensor | None:
        """All weights [E, out, in], where they need no dequantization."""
        return self.data.flatten(1, 2) if self.format.kind == "plain" else None


class NF4Experts(nn.Module):
    """Weights [E, out, in] in bitsandbytes' NF4: 4 bits a value, blocks of 64, their scales quantized again (QLoRA,
    Dettmers et al., arXiv 2305.14314): 4.127 bits a weight."""

    plain = None
    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    offset: Tensor
    code: Tensor
    code2: Tensor

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        self.experts, self.out_features, self.in_features = experts, out_features, in_features

    def allocate(self, device: torch.device) -> None:
        count = self.out_features * self.in_features
        blocks = -(-count // NF4_BLOCK)
        for name, size, dtype in (
            ("packed", -(-count // 2), torch.uint8),
            ("absmax", blocks, torch.uint8),
            ("absmax2", -(-blocks // 256), torch.float32),
            ("offset", 1, torch.float32),
        ):
            buffer = torch.empty(self.experts, size, dtype=dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)

    def quantize(self, expert: int, weight: Tensor) -> None:
        """Keeps an expert's weight [out, in], on the device on which it comes. One at a time, whatever thread asks:
        bitsandbytes takes some 14 bytes a weight for it on a CPU."""
        import bitsandbytes.functional as bnb  # here: its import takes longer than all others, and only NF4 needs it

        with _QUANTIZING:
            packed, state = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
        self.packed[expert], self.absmax[expert] = packed.flatten(), state.absmax
        self.absmax2[expert], self.offset[expert] = state.state2.absmax, state.offset
        if not hasattr(self, "code"):  # the same tables for every expert
            self.register_buffer("code", state.code, persistent=False)
            self.register_buffer("code2", state.state2.code, persistent=False)
            self.dtype = weight.dtype

    @property
    def divisible(self) -> bool:
        """Whether experts that lie next to each other are dequantized to the same bits together as one by one: no block
        of values, and none of scales, has some of two experts in it."""
        count = self.out_features * self.in_features
        return count % NF4_BLOCK == 0 and count // NF4_BLOCK % 256 == 0

    def weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The weights [experts, out, in] of experts first..last, dequantized; several only where `divisible`."""
        import bitsandbytes.functional as bnb

        count, run = last - first, slice(first, last)
        scale_NB = bnb.dequantize_blockwise(
            self.absmax[run].flatten(), absmax=self.absmax2[run].flatten(), code=self.code2, blocksize=256
        ).view(count, -1)
        shape = torch.Size((count * self.out_features, self.in_features))
        absmax = (scale_NB + self.offset[run]).flatten()
        state = bnb.QuantState(absmax, shape, self.code, NF4_BLOCK, "nf4", self.dtype)
        whole = bnb.dequantize_4bit(self.packed[run].reshape(-1, 1), state)
        return whole.view(count, self.out_features, self.in_features).to(dtype)


Storage = FrozenExperts | NF4Experts
