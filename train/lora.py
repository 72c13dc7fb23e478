"""LoRA on linear layers (Hu et al., arXiv 2106.09685): y = x W^T + scale (x A^T) B^T, with W frozen.

A's initial values depend on the seed and the parameter's name alone, not on ranks or expert parallelism; B is zero.

Shapes: T tokens, I and O input and output features, r rank.
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
        y_TO = _Product.apply(x.flatten(0, -2), self.weight, self.bias, self.lora_A, self.lora_B, self.scale)
        return y_TO.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T for x [T, in], W [out, in] and bias frozen. The sums are done by the
    products themselves, without a pass of their own over [T, out] or, in backward, [T, in]."""

    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O, A_rI, B_Or, scale):
        y_TO, h_Tr = F.linear(x_TI, weight_OI, bias_O), F.linear(x_TI, A_rI.to(x_TI.dtype))
        ctx.save_for_backward(x_TI, h_Tr, weight_OI, A_rI, B_Or)
        ctx.scale = scale
        return y_TO.addmm_(h_Tr, B_Or.to(x_TI.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx, grad_TO):
        x_TI, h_Tr, weight_OI, A_rI, B_Or = ctx.saved_tensors
        grad_h_Tr = ctx.scale * (grad_TO @ B_Or.to(grad_TO.dtype))
        grad_A, grad_B = grad_h_Tr.T @ x_TI, ctx.scale * (grad_TO.T @ h_Tr)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ weight_OI).addmm_(grad_h_Tr, A_rI.to(grad_TO.dtype))
        return grad_x, None, None, grad_A.to(A_rI.dtype), grad_B.to(B_Or.dtype), None


def lora_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer that gets factors, by name. Left out: routers (in transformers not nn.Linear, or a gate of
    one or of `experts` outputs) and lm_head, which is asked for apart."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", "gate", "shared_expert_gate")
    }
