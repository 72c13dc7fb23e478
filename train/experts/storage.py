"""Frozen expert weights as a rank keeps them, and their grouped product.

Shapes: E experts of this rank, P (token, expert) pairs sorted by expert, `ends` the end of each expert's rows; N
experts whose weights are dequantized together.

Weights stay in the checkpoint's own format (BF16, FP8 blocks, packed INT4) or become NF4 as they are read. Quantized
matrices exist in full for as many experts as WORKSPACE holds, while their product is computed: in forward and again in
backward, for experts that have tokens. ZeRO never sees these weights: they are buffers.
"""

import itertools
import math
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.checkpoints.formats import Format
from train.experts.dispatch import Ends
from train.fused import IN_ONE_LAUNCH, operations

NF4_BLOCK = 64
WORKSPACE = 3 * 2**29  # bytes of BF16 weights that are dequantized together: of Kimi K2.5 27 experts
MOST_VALUES = 2**31 - 1  # bitsandbytes counts in 32 bits
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


def runs(ends: Ends, storage: Storage, device: torch.device) -> Iterator[tuple[int, int]]:
    """[first, last) of the experts whose weights are dequantized together: as many as the workspace holds, and of those
    without tokens none at either end. On a CPU one by one, in which a launch costs nothing."""
    count = storage.out_features * storage.in_features
    most = 1 if device.type == "cpu" or not storage.divisible else max(1, min(WORKSPACE // 2, MOST_VALUES) // count)
    starts = [0, *ends.host[:-1]]
    occupied = [expert for expert, (start, end) in enumerate(zip(starts, ends.host, strict=True)) if end > start]
    while occupied:
        own = [expert for expert in occupied if expert < occupied[0] + most]
        yield own[0], own[-1] + 1
        occupied = occupied[len(own) :]


def frozen_product(x_PI: Tensor, storage: Storage, ends: Ends, transposed: bool = False) -> Tensor:
    """x @ W^T, or with `transposed` x @ W, each row with the weight of its expert. Not tracked by autograd."""
    weight_EOI = storage.plain
    if weight_EOI is not None:
        return F.grouped_mm(x_PI, weight_EOI if transposed else weight_EOI.transpose(1, 2), offs=ends.device)

    def product(x: Tensor, first: int, last: int, start: int = 0, out: Tensor | None = None) -> Tensor:
        weight_NOI = storage.weights(first, last, x.dtype)
        right = weight_NOI if transposed else weight_NOI.transpose(1, 2)
        if last - first == 1:
            return torch.mm(x, right[0], out=out)
        ends_N = ends.device[first:last]
        return F.grouped_mm(x, right, offs=ends_N - start if start else ends_N)

    own = list(runs(ends, storage, x_PI.device))
    if len(own) == 1:
        return product(x_PI, *own[0])
    y_PO = x_PI.new_empty(len(x_PI), storage.in_features if transposed else storage.out_features)
    for first, last in own:
        start = ends.host[first - 1] if first else 0
        rows = slice(start, ends.host[last - 1])
        if last - first == 1:
            product(x_PI[rows], first, last, start, out=y_PO[rows])
        else:
            y_PO[rows] = product(x_PI[rows], first, last, start)
    return y_PO


def add_grouped_(y_PO: Tensor, h_Pr: Tensor, right_ErO: Tensor, ends: Ends, scale: float = 1.0) -> None:
    """y += scale * h @ right[e], each row by the matrix of its expert, without a tensor of the size of y. Not tracked
    by autograd."""
    if y_PO.device.type in IN_ONE_LAUNCH:
        operations.add_grouped_(y_PO, h_Pr, right_ErO, ends.device, scale)
        return
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.host])):
        if end > start:
            y_PO[start:end].addmm_(h_Pr[start:end], right_ErO[expert], alpha=scale)


def _nan(x_PI: Tensor, columns: int) -> Tensor:
    """[P, columns] of NaN, which takes no memory."""
    return torch.full((1, 1), math.nan, dtype=x_PI.dtype, device=x_PI.device).expand(len(x_PI), columns)


def zero_without_rows(ends: Ends, *gradients: Tensor) -> None:
    """Sets to zero what gradients [E, ...] have of experts without rows: on some GPUs grouped_mm leaves there what was
    in memory before (pytorch#172439). Which they are the host knows."""
    starts = [0, *ends.host[:-1]]
    empty = [start == end for start, end in zip(starts, ends.host, strict=True)]
    for without, run in itertools.groupby(range(len(empty)), empty.__getitem__):
        experts = [*run]
        for gradient in gradients if without else ():
            gradient[experts[0] : experts[-1] + 1].zero_()


class GroupedLinear(torch.autograd.Function):
    """y = x W^T + scale (x A^T) B^T for rows grouped by expert, W frozen in `storage`; A [E, r, in] and B [E, out, r]
    may be None. needed: False gives NaN for y, where its gradient alone is wanted. Keeps x and x A^T alone for
    backward, and A and B as the parameters themselves: what ZeRO-3 gathered for the forward can go, and is gathered
    again."""

    @staticmethod
    def forward(ctx, x_PI, A_ErI, B_EOr, storage, scale, ends, needed=True):
        y_PO = frozen_product(x_PI, storage, ends) if needed else _nan(x_PI, storage.out_features)
        h_Pr = None
        if A_ErI is not None:
            h_Pr = F.grouped_mm(x_PI, A_ErI.to(x_PI.dtype).transpose(1, 2), offs=ends.device)
            if needed:
                add_grouped_(y_PO, h_Pr, B_EOr.to(x_PI.dtype).transpose(1, 2), ends, scale)
        ctx.save_for_backward(*((x_PI, h_Pr, A_ErI, B_EOr) if A_ErI is not None else ()))
        ctx.storage, ctx.scale, ctx.ends = storage, scale, ends
        return y_PO

    @staticmethod
    def backward(ctx, grad_PO):
        lora, ends_E = ctx.saved_tensors, ctx.ends.device
        grad_PO = grad_PO.contiguous()
        grad_PI = frozen_product(grad_PO, ctx.storage, ctx.ends, transposed=True) if ctx.needs_input_grad[0] else None
        if not lora:
            return grad_PI, *[None] * 6
        x_PI, h_Pr, A_ErI, B_EOr = lora
        A, B = A_ErI.to(x_PI.dtype), B_EOr.to(x_PI.dtype)
        scaled_Pr = F.grouped_mm(grad_PO, B, offs=ends_E).mul_(ctx.scale)
        grad_B = F.grouped_mm(grad_PO.T, h_Pr, offs=ends_E).mul_(ctx.scale)
        grad_A = F.grouped_mm(scaled_Pr.T, x_PI, offs=ends_E)
        zero_without_rows(ctx.ends, grad_A, grad_B)
        if grad_PI is not None:
            add_grouped_(grad_PI, scaled_Pr, A, ctx.ends)
        return grad_PI, grad_A.to(A_ErI.dtype), grad_B.to(B_EOr.dtype), *[None] * 4


class GroupedTrained(torch.autograd.Function):
    """y = x W^T for rows grouped by expert, with W [E, out, in] itself trained. Keeps the parameter, not a view of it,
    which would keep what ZeRO-3 gathered."""

    @staticmethod
    def forward(ctx, x_PI, weight_EOI, ends, needed=True):
        ctx.save_for_backward(x_PI, weight_EOI)
        ctx.ends = ends
        if not needed:
            return _nan(x_PI, weight_EOI.shape[1])
        return F.grouped_mm(x_PI, weight_EOI.transpose(1, 2), offs=ends.device)

    @staticmethod
    def backward(ctx, grad_PO):
        (x_PI, weight_EOI), ends_E = ctx.saved_tensors, ctx.ends.device
        grad_PO = grad_PO.contiguous()
        grad_PI = F.grouped_mm(grad_PO, weight_EOI, offs=ends_E) if ctx.needs_input_grad[0] else None
        grad_EOI = F.grouped_mm(grad_PO.T, x_PI, offs=ends_E)
        zero_without_rows(ctx.ends, grad_EOI)
        return grad_PI, grad_EOI, None, None
