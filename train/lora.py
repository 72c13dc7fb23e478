"""LoRA on linear layers (Hu et al., arXiv 2106.09685): y = x W^T + scale (x A^T) B^T, with W frozen.

A's initial values depend on the seed and the parameter's name alone, not on ranks or expert parallelism; B is zero.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRASettings:
    """Ranks and scales of the factors. Scale is alpha / rank, as in PEFT, for linear layers and experts alike; with
    `rslora`, alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732)."""

    rank: int
    alpha: float
    expert_rank: int
    seed: int
    lm_head: bool = False
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self._scale(self.rank)

    @property
    def expert_scale(self) -> float:
        return self._scale(self.expert_rank)

    def _scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def initial_A(name: str, rank: int, in_features: int, seed: int) -> Tensor:
    """A [rank, in] in fp32, uniform in ±1/sqrt(in): PEFT's kaiming_uniform_(a=sqrt(5))."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
    return (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)


class LoRALinear(nn.Module):
    """A linear layer with frozen weight [out, in] and trainable factors lora_A [rank, in], lora_B [out, rank] in fp32.

    All of them are parameters of one module, so that ZeRO-3 gathers them together.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, name: str, linear: nn.Linear, settings: LoRASettings, device: torch.device):
        super().__init__()
        self.name, self.rank = name, settings.rank
        self.weight, self.bias, self.scale = linear.weight, linear.bias, settings.scale
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for factor, value in self.initial_factors(settings.seed).items():
            self.register_parameter(factor, nn.Parameter(value.to(device)))

    def initial_factors(self, seed: int) -> dict[str, Tensor]:
        """The factors, whole, before the first step of a run with this seed."""
        A = initial_A(self.name, self.rank, self.in_features, seed)
        return {"lora_A": A, "lora_B": torch.zeros(self.out_features, self.rank)}

    def forward(self, x: Tensor) -> Tensor:
        down = self.scale * F.linear(x, self.lora_A.to(x.dtype))  # scaled where it is small
        return F.linear(x, self.weight, self.bias) + F.linear(down, self.lora_B.to(x.dtype))


def lora_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer that gets factors, by name. Left out: routers (in transformers not nn.Linear, or a gate of
    one or of `experts` outputs) and lm_head, which is asked for apart."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", "gate", "shared_expert_gate")
    }
