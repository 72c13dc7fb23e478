"""The module that stands in the place of `experts`: expert-parallel, with frozen weights and LoRA factors for every
expert, or with the weights themselves trained.

Every MoE model of transformers 5 calls `experts(hidden_TH, index_Tk, weight_Tk)` and keeps the router and the shared
expert outside, so that one module serves Qwen3.5, Qwen3, DeepSeek-V3 and Kimi alike.

Shapes: E experts of this rank, H hidden size, I expert width, T tokens of this rank, R tokens received, k experts per
token, P (token, expert) pairs, r the LoRA rank as padded for the grouped product.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from train.experts.dispatch import Dispatch, Ends, ExpertGroup
from train.experts.recompute import first_time, recomputing
from train.experts.storage import GroupedLinear, GroupedTrained
from train.lora import LoRASettings, initial_A


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """grouped_mm wants strides of 16 bytes. The padding's factors and gradients are exactly zero."""
    step = 16 // dtype.itemsize
    return -(-rank // step) * step


class ExpertParallelExperts(nn.Module):
    """Gated expert MLPs, E of them on this rank: out = sum over k of weight * down(act(gate x) * up x).

    The weights are gate_up_proj [E, 2I, H] (gate rows first) and down_proj [E, H, I]: frozen, they are storage modules
    in `frozen`, which ZeRO never sees; trained, they are parameters of these names. Parameters (those, or the LoRA
    factors) are ZeRO-3 partitioned over the ranks that hold the same experts.
    """

    def __init__(
        self, name: str, experts: int, hidden: int, width: int, act: Callable[[Tensor], Tensor], ep: ExpertGroup
    ):
        super().__init__()
        self.name, self.experts, self.hidden, self.width, self.act, self.ep = name, experts, hidden, width, act, ep
        self.frozen = nn.ModuleDict()
        self.rank, self.padded_rank, self.scale = 0, 0, 0.0  # the true LoRA rank, 0: no LoRA; the factors' scale
        self.keep_T: Tensor | None = None  # set for each batch: False for padding
        self.load_E: Tensor | None = None  # tokens of this rank for each expert of the layer, since the last reset

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """The layer's fused weights as transformers names them: name -> (all experts, out, in)."""
        return {
            "gate_up_proj": (self.experts, 2 * self.width, self.hidden),
            "down_proj": (self.experts, self.hidden, self.width),
        }

    def add_lora(self, settings: LoRASettings, dtype: torch.dtype, device: torch.device) -> None:
        """Adds factors A [E, r, in] and B [E, out, r] for both weights, in fp32; `dtype` is the compute dtype."""
        self.rank, self.scale = settings.expert_rank, settings.expert_scale
        self.padded_rank = padded_rank(self.rank, dtype)
        for name, value in self.initial_factors(settings.seed).items():
            self.register_parameter(name, nn.Parameter(value.to(device)))

    def initial_factors(self, seed: int) -> dict[str, Tensor]:
        """This rank's factors, whole, before the first step of a run with this seed."""
        factors, owned = {}, self.ep.owned(self.experts)
        for weight, (_, out_features, in_features) in self.shapes().items():
            A = torch.zeros(len(owned), self.padded_rank, in_features)
            for i, expert in enumerate(owned):
                A[i, : self.rank] = initial_A(f"{self.name}.{weight}.{expert}", self.rank, in_features, seed)
            factors[f"{weight}_lora_A"] = A
            factors[f"{weight}_lora_B"] = torch.zeros(len(owned), out_features, self.padded_rank)
        return factors

    def without_padding(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter of this name, which is `shape` with the padding of the factors' rank."""
        if name.endswith("lora_A"):
            return shape[0], self.rank, shape[2]
        return (*shape[:2], self.rank) if name.endswith("lora_B") else shape

    def _product(self, x_PI: Tensor, name: str, ends: Ends) -> Tensor:
        """x_PI @ (W + scale B A)^T, where rows ends[e-1]:ends[e] of x belong to expert e."""
        if name not in self.frozen:
            return GroupedTrained.apply(x_PI, getattr(self, name), ends)
        A, B = (getattr(self, f"{name}_lora_{f}") if self.rank else None for f in "AB")
        return GroupedLinear.apply(x_PI, A, B, self.frozen[name], self.scale, ends)

    def forward(self, hidden_TH: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        dispatch = first_time(lambda: Dispatch(index_Tk, self.experts, self.ep, self.keep_T))
        if not recomputing():
            self.load_E = dispatch.load_E if self.load_E is None else self.load_E + dispatch.load_E
        hidden_RH, weight_Rk = dispatch.send(hidden_TH, weight_Tk)

        x_PH = hidden_RH.index_select(0, dispatch.row_P)
        gate, up = self._product(x_PH, "gate_up_proj", dispatch.ends).chunk(2, dim=-1)
        weight_P1 = weight_Rk.flatten().index_select(0, dispatch.pair_P)[:, None].to(gate.dtype)
        # The weight before down_proj, which is linear: on I numbers a pair, not on H.
        out_PH = self._product(self.act(gate) * up * weight_P1, "down_proj", dispatch.ends)
        partial_RH = torch.zeros_like(hidden_RH).index_add_(0, dispatch.row_P, out_PH)
        return dispatch.combine(partial_RH)
