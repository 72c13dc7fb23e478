"""The expert-parallel module that replaces a model's `experts`, with frozen weights and LoRA weights (A and B) for
every expert, or with trained weights.

Every MoE model of transformers 5 calls `experts(hidden_TH, index_Tk, weight_Tk)` and keeps the router and the shared
expert outside, so one module serves Qwen3.5, Qwen3, DeepSeek-V3 and Kimi alike.

Shapes: E experts of this rank, H hidden size, I expert width, T tokens of this rank, R tokens received, k experts per
token, P (token, expert) pairs, r the LoRA rank as padded for the grouped product.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from train.experts.dispatch import Dispatch, Ends, ExpertGroup
from train.experts.products import GroupedLinear, GroupedTrained
from train.experts.recompute import first_time, recomputing
from train.fused import IN_ONE_LAUNCH, operations
from train.layers.lora import LoRASettings, initial_A


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Returns the rank rounded up to a multiple of 16 bytes, since grouped_mm requires strides of 16 bytes. The LoRA
    weights in the padding and their gradients are exactly zero."""
    step = 16 // dtype.itemsize
    return -(-rank // step) * step


class ExpertParallelExperts(nn.Module):
    """Gated expert MLPs, E of them on this rank: out = sum over k of weight * down(act(gate x) * up x).

    The weights are gate_up_proj [E, 2I, H] (gate rows first) and down_proj [E, H, I]. Frozen weights are storage
    modules in `frozen`, which ZeRO never sees. Trained weights are parameters with these names. The parameters (trained
    weights or LoRA weights) are ZeRO-3 partitioned over the ranks that hold the same experts.
    """

    def __init__(
        self, name: str, experts: int, hidden: int, width: int, act: Callable[[Tensor], Tensor], ep: ExpertGroup
    ):
        super().__init__()
        self.name, self.experts, self.hidden, self.width, self.act, self.ep = name, experts, hidden, width, act, ep
        self.frozen = nn.ModuleDict()
        self.rank, self.padded_rank, self.scale = 0, 0, 0.0  # rank: without padding; 0: no LoRA
        self.ends_the_layer = False  # nothing after it in its layer needs its output for a gradient
        self.keep_T: Tensor | None = None  # set for each batch: False for padding
        self.load_E: Tensor | None = None  # tokens of this rank for each expert of the layer since the last reset

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns the shapes of the layer's fused weights by transformers' names: (experts of all ranks, out, in)."""
        return {
            "gate_up_proj": (self.experts, 2 * self.width, self.hidden),
            "down_proj": (self.experts, self.hidden, self.width),
        }

    def add_lora(self, settings: LoRASettings, dtype: torch.dtype, device: torch.device) -> None:
        """Adds LoRA weights A [E, r, in] and B [E, out, r] in fp32 for both weights. The compute dtype `dtype` decides
        how the rank is padded."""
        self.rank, self.scale = settings.expert_rank, settings.expert_scale
        self.padded_rank = padded_rank(self.rank, dtype)
        for name, value in self.initial_factors(settings.seed).items():
            self.register_parameter(name, nn.Parameter(value.to(device)))

    def initial_factors(self, seed: int) -> dict[str, Tensor]:
        """Returns the unpartitioned LoRA weights of this rank's experts before the first step of a run with this seed:
        A [E, r, in] and B [E, out, r] for both weights."""
        factors, owned = {}, self.ep.owned(self.experts)
        for weight, (_, out_features, in_features) in self.shapes().items():
            A = torch.zeros(len(owned), self.padded_rank, in_features)
            for i, expert in enumerate(owned):
                A[i, : self.rank] = initial_A(f"{self.name}.{weight}.{expert}", self.rank, in_features, seed)
            factors[f"{weight}_lora_A"] = A
            factors[f"{weight}_lora_B"] = torch.zeros(len(owned), out_features, self.padded_rank)
        return factors

    def without_padding(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that the parameter of this name has without the padding of the LoRA rank. `shape`: with
        padding."""
        if name.endswith("lora_A"):
            return shape[0], self.rank, shape[2]
        return (*shape[:2], self.rank) if name.endswith("lora_B") else shape

    def _product(self, x_PI: Tensor, name: str, ends: Ends, needed: bool = True) -> Tensor:
        """Returns x_PI @ (W + scale B A)^T, where rows ends[e-1]:ends[e] of x belong to expert e. If it is not needed,
        returns NaN, which still has the right gradient."""
        if name not in self.frozen:
            return GroupedTrained.apply(x_PI, getattr(self, name), ends, needed)
        with_lora = self.rank and self.scale  # scale 0: the base alone
        A, B = (getattr(self, f"{name}_lora_{f}") if with_lora else None for f in "AB")
        return GroupedLinear.apply(x_PI, A, B, self.frozen[name], self.scale, ends, needed)

    def forward(self, hidden_TH: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """Maps hidden states [T, H], expert indices [T, k] and routing weights [T, k] to [T, H]. In a recomputation the
        output is NaN where `ends_the_layer`, since no gradient needs it."""
        dispatch = first_time(lambda: Dispatch(index_Tk, self.experts, self.ep, hidden_TH.device, self.keep_T))
        if not recomputing():
            self.load_E = dispatch.load_E if self.load_E is None else self.load_E + dispatch.load_E
        needed = not (self.ends_the_layer and recomputing())
        weight_P1 = dispatch.weights(weight_Tk)[:, None]
        gate_up_P2I = self._product(dispatch.spread(hidden_TH), "gate_up_proj", dispatch.ends)
        # down_proj is linear, so the routing weight may be applied before it: to I numbers per pair instead of H.
        inner_PI = gated(gate_up_P2I, weight_P1.to(gate_up_P2I.dtype), self.act)
        return dispatch.combine(self._product(inner_PI, "down_proj", dispatch.ends, needed), needed)


def gated(gate_up_P2I: Tensor, weight_P1: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns act(gate) * up * weight [P, I]. gate and up are the two halves of a row of gate_up [P, 2I]."""
    if gate_up_P2I.device.type in IN_ONE_LAUNCH and isinstance(act, nn.SiLU | SiLUActivation):
        return _Gated.apply(gate_up_P2I, weight_P1)
    gate, up = gate_up_P2I.chunk(2, dim=-1)
    return act(gate) * up * weight_P1


class _Gated(torch.autograd.Function):
    """silu(gate) * up * weight [P, I]. Saves only gate_up [P, 2I] and weight [P, 1] for backward."""

    @staticmethod
    def forward(ctx, gate_up_P2I, weight_P1):
        ctx.save_for_backward(gate_up_P2I, weight_P1)
        return operations.gated(gate_up_P2I, weight_P1)

    @staticmethod
    def backward(ctx, grad_PI):
        return operations.gated_backward(grad_PI.contiguous(), *ctx.saved_tensors)
