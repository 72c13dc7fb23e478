"""LoRA for linear layers (Hu et al., arXiv 2106.09685): y = x W^T + scale (x A^T) B^T, with W frozen.

The initial values of A depend only on the seed and the parameter's name, not on the number of ranks or on expert
parallelism. B starts at zero.

Shapes: T tokens, I input features, O output features, r LoRA rank.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRASettings:
    """Ranks and scales of the LoRA weights (A and B), the seed of A, and whether lm_head gets LoRA weights too.

    The scale is alpha / rank, as in PEFT, for linear layers and experts alike. With `rslora` it is alpha / sqrt(rank)
    (Kalajdzievski, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    expert_rank: int
    seed: int
    lm_head: bool = False
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The scale of the LoRA weights of linear layers."""
        return self._scale(self.rank)

    @property
    def expert_scale(self) -> float:
        """The scale of the LoRA weights of experts."""
        return self._scale(self.expert_rank)

    def _scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def initial_A(name: str, rank: int, in_features: int, seed: int) -> Tensor:
    """Returns A [r, I] in fp32, uniform in ±1/sqrt(I), as PEFT initializes it with kaiming_uniform_(a=sqrt(5))."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
    return (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight [O, I] and trainable LoRA weights lora_A [r, I] and lora_B [O, r] in fp32.

    All of them are parameters of the same module, so that ZeRO-3 gathers them together.
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
        """Returns the unpartitioned lora_A [r, I] and lora_B [O, r] before the first step of a run with this seed."""
        A = initial_A(self.name, self.rank, self.in_features, seed)
        return {"lora_A": A, "lora_B": torch.zeros(self.out_features, self.rank)}

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., I] to [..., O]."""
        if not self.scale:  # the base alone
            return F.linear(x, self.weight, self.bias)
        y_TO = _Product.apply(x.flatten(0, -2), self.weight, self.bias, self.lora_A, self.lora_B, self.scale)
        return y_TO.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """y [T, O] = x W^T + bias + scale (x A^T) B^T for x [T, I], with W [O, I] and the bias frozen.

    The matrix products accumulate into their result (addmm_), so the sums need no extra pass over [T, O] or, in
    backward, over [T, I].
    """

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
    """Returns every linear layer that gets LoRA weights, by name.

    Routers are left out: in transformers they are not nn.Linear, or they are a gate with one output or with one output
    per expert. lm_head is left out too, since LoRASettings.lm_head requests it separately.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", "gate", "shared_expert_gate")
    }
