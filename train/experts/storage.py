"""Storage for a rank's frozen expert weights.

Shapes: E experts of this rank, N experts that are dequantized together, O and I output and input features.

Weights stay in the checkpoint's own format (BF16, FP8 blocks, packed INT4) or are quantized to NF4 as they are read.
They are buffers, so ZeRO never sees them.
"""

import threading

import torch
from torch import Tensor, nn

from train.formats import Format

NF4_BLOCK = 64
_QUANTIZING = threading.Lock()


class FrozenExperts(nn.Module):
    """Weights [E, O, I] in the checkpoint's own format. Separate gate and up matrices are stacked along O. For each
    suffix of the format there is a buffer [E, matrices, ...], which is filled through `matrix_parts`."""

    data: Tensor

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        self.experts, self.out_features, self.in_features = experts, out_features, in_features

    def allocate(self, format: Format, matrices: int, dtypes: dict[str, torch.dtype], device: torch.device) -> None:
        """Allocates the buffers of all experts. matrices: number of matrices per weight. dtypes: suffix -> dtype, as on
        disk."""
        self.format, self.suffixes = format, list(dtypes)
        for suffix, (_, shape) in format.tensors(self.out_features // matrices, self.in_features).items():
            buffer = torch.empty(self.experts, matrices, *shape, dtype=dtypes[suffix], device=device)
            self.register_buffer(f"data{suffix}", buffer, persistent=False)

    def matrix_parts(self, expert: int, matrix: int) -> dict[str, Tensor]:
        """Returns, for each suffix, a view of an expert's matrix in the buffer [E, matrices, ...], to be filled."""
        return {suffix: getattr(self, f"data{suffix}")[expert, matrix] for suffix in self.suffixes}

    def weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Returns the dequantized weights [N, O, I] of experts first to last - 1."""
        parts = {suffix: getattr(self, f"data{suffix}")[first:last] for suffix in self.suffixes}
        return self.format.decode(parts).flatten(1, 2).to(dtype)

    divisible = True

    @property
    def plain(self) -> Tensor | None:
        """All weights [E, O, I] if they need no dequantization, else None."""
        return self.data.flatten(1, 2) if self.format.kind == "plain" else None


class NF4Experts(nn.Module):
    """Weights [E, O, I] in bitsandbytes' NF4: 4 bits per value in blocks of 64, whose scales are quantized again
    (QLoRA, Dettmers et al., arXiv 2305.14314), which makes 4.127 bits per weight."""

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
        """Allocates the buffers of all experts."""
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
        """Quantizes and stores an expert's weight [O, I], on the device that it is on.

        Only one thread at a time quantizes, since bitsandbytes needs about 14 bytes per weight for it on a CPU.
        """
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
        """Whether adjacent experts, dequantized together, have bit-identical values to those dequantized one by one.
        This is so if no block of values and no block of scales spans two experts."""
        count = self.out_features * self.in_features
        return count % NF4_BLOCK == 0 and count // NF4_BLOCK % 256 == 0

    def weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Returns the dequantized weights [N, O, I] of experts first to last - 1. N > 1 only if `divisible`."""
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
