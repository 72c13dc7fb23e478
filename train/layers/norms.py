"""RMSNorm of transformers' models in one kernel launch on a GPU. torch needs eight, each of them a pass over all rows.

RMSNorm modules are recognized by what they compute, not by their names. Their weights must be frozen: the gradient of a
trained weight is a sum over all rows, so modules with trained weights keep their own forward.

Shapes: R rows, H hidden size.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.fused import IN_ONE_LAUNCH
from train.fused.operations import rms_norm, rms_norm_backward


class _RMSNorm(torch.autograd.Function):
    """y [..., H] from x and, for a gated RMSNorm, gate [..., H]. Saves both and one number per row for backward."""

    @staticmethod
    def forward(ctx, x, weight_H, gate, eps, one_more):
        x_RH, gate_RH = x.flatten(0, -2), None if gate is None else gate.flatten(0, -2).contiguous()
        y_RH, rstd_R = rms_norm(x_RH, weight_H, gate_RH, eps, one_more)
        ctx.save_for_backward(x, weight_H, gate_RH, rstd_R)
        ctx.one_more = one_more
        return y_RH.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight_H, gate_RH, rstd_R = ctx.saved_tensors
        grad_RH = grad.flatten(0, -2).contiguous()
        grads = rms_norm_backward(grad_RH, x.flatten(0, -2), weight_H, gate_RH, rstd_R, ctx.one_more)
        grad_x, grad_gate = grads
        return grad_x.view(x.shape), None, None if gate_RH is None else grad_gate.view(x.shape), None, None


def _forward(module: Any, usual: Any, eps: float, one_more: bool, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """Replaces the module's forward, `usual`, which is still called on other devices, for trained weights and where
    the dtypes of weight and x differ."""
    alike = one_more or module.weight.dtype == x.dtype
    if x.device.type not in IN_ONE_LAUNCH or module.weight.requires_grad or not alike or x.stride(-1) != 1:
        return usual(x) if gate is None else usual(x, gate)
    return _RMSNorm.apply(x, module.weight, gate, eps, one_more)


def install(model: nn.Module) -> None:
    """Makes every RMSNorm of the model, gated or not, run in one kernel launch where there is a kernel for it."""
    known: dict[tuple[type, float], bool | None] = {}
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float) or list(module._parameters) != ["weight"] or list(module.children()):
            continue
        kind = type(module), eps
        if kind not in known:
            known[kind] = _one_more(module, eps)
        one_more = known[kind]
        if one_more is not None:
            module.forward = partial(_forward, module, module.forward, eps, one_more)


def _one_more(module: nn.Module, eps: float) -> bool | None:
    """Returns whether the module multiplies by 1 + weight instead of weight. None: it does not compute an RMSNorm."""
    generator = torch.Generator().manual_seed(0)
    x, gate, weight = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (3, 8), (8,)))
    tried = copy.copy(module)
    tried._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    for given in ((x,), (x, gate)):
        try:
            found = tried(*given)
        except Exception:  # the module takes other arguments
            continue
        for one_more in (False, True):
            if isinstance(found, Tensor) and torch.allclose(found, _plain(*given, weight=weight + one_more, eps=eps)):
                return one_more
    return None


def _plain(x: Tensor, gate: Tensor | None = None, *, weight: Tensor, eps: float) -> Tensor:
    y = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if gate is None else y * F.silu(gate)
