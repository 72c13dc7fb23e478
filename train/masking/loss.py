"""Computes the loss of each token by its treatment, from hidden states, without materializing all logits at once.

Shapes: N predicted tokens, H hidden size, V vocabulary size, C tokens of a chunk, r LoRA rank of lm_head.

Both treatments are a difference of two log-sum-exps of the logits z, over the whole vocabulary and over a part of it:
    cross-entropy   -log p_y      = lse(z) - lse(z over {y})        gradient p - 1_y
    unlikelihood    -log(1 - p_y) = lse(z) - lse(z over V without y)  gradient p_y (1_y - q), q the softmax without y
(Welleck et al., arXiv 1908.04319, for unlikelihood). In this form, unlikelihood is stable as p_y -> 1. Its gradient
with respect to z_y is p_y, so it does not vanish there.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.fused import IN_ONE_LAUNCH
from train.fused.operations import loss_terms_
from train.layers.lora import LoRASettings, initial_A

CHUNK_BYTES = 2**28  # of a chunk's logits, in fp32 or, on a GPU, in the dtype of the model
CHUNK_TOKENS = 512  # with fewer, matmuls are slower; more only take more memory


class Terms(NamedTuple):
    """loss: scalar, the sum of |coefficient| * term. term_N: each token's own term, unweighted; 0 where the coefficient
    is 0. nll_N: -log p of each token, whatever its treatment."""

    loss: Tensor
    term_N: Tensor
    nll_N: Tensor


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients along with the loss, chunk by chunk, so that a chunk's logits are computed only once and
    not kept for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, A_rH, B_Vr, scale, target_N, coefficient_N, grad_enabled):
        # needs_input_grad is True for parameters even under no_grad, which forward itself cannot see
        tracked = grad_enabled and any(ctx.needs_input_grad[:4])
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        term_N, nll_N = (torch.zeros(len(hidden_NH), device=hidden_NH.device, dtype=exact) for _ in range(2))
        needed = [tracked and x is not None and x.requires_grad for x in (weight_VH, A_rH, B_Vr)]
        grads: Any = [torch.zeros_like(hidden_NH) if tracked else None]
        grads += [  # sums over chunks: in fp32
            torch.zeros_like(x, dtype=exact) if need else None
            for x, need in zip((weight_VH, A_rH, B_Vr), needed, strict=True)
        ]
        A, B = (None if x is None else x.to(hidden_NH.dtype) for x in (A_rH, B_Vr))  # both, or neither
        in_one_launch = hidden_NH.device.type in IN_ONE_LAUNCH and hidden_NH.dtype in (torch.bfloat16, torch.float16)
        most = CHUNK_BYTES // len(weight_VH) // (hidden_NH.itemsize if in_one_launch else exact.itemsize)
        size = max(1, min(CHUNK_TOKENS, most, len(hidden_NH)))
        logits = hidden_NH.new_empty(size, len(weight_VH))  # reused by every chunk
        for start in range(0, len(hidden_NH), size):
            chunk = slice(start, start + size)
            hidden_CH, target_C1, coefficient_C1 = hidden_NH[chunk], target_N[chunk, None], coefficient_N[chunk, None]
            logits_CV = torch.mm(hidden_CH, weight_VH.T, out=logits[: len(hidden_CH)])
            if A is not None and B is not None:
                down_Cr = F.linear(hidden_CH, A)
                logits_CV.addmm_(down_Cr, B.T, alpha=scale)
            if in_one_launch:
                nll_N[chunk], term_N[chunk] = loss_terms_(logits_CV, target_N[chunk], coefficient_N[chunk], tracked)
                grad_CV = logits_CV if tracked else None
            else:
                nll_C1, term_C1, grad_CV = _terms(logits_CV.to(exact), target_C1, coefficient_C1, tracked)
                nll_N[chunk], term_N[chunk] = nll_C1[:, 0], term_C1[:, 0]
            if grad_CV is None:
                continue
            grad_CV = grad_CV.to(hidden_CH.dtype)
            torch.mm(grad_CV, weight_VH, out=grads[0][chunk])
            if needed[0]:
                grads[1] += grad_CV.T @ hidden_CH
            if A is not None and B is not None:
                grad_down_Cr = scale * (grad_CV @ B)
                grads[0][chunk].addmm_(grad_down_Cr, A)
                grads[2] += grad_down_Cr.T @ hidden_CH
                grads[3] += scale * (grad_CV.T @ down_Cr)
        grads[1:] = [g if g is None else g.to(x.dtype) for g, x in zip(grads[1:], (weight_VH, A_rH, B_Vr), strict=True)]
        ctx.save_for_backward(*grads)
        term_N = term_N * (coefficient_N != 0)
        ctx.mark_non_differentiable(term_N, nll_N)
        return (coefficient_N.abs() * term_N).sum(), term_N, nll_N

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, A, B = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, A, B, None, None, None, None


def _terms(
    logits_CV: Tensor, target_C1: Tensor, coefficient_C1: Tensor, tracked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns nll [C, 1], term [C, 1] and, if tracked, the gradient [C, V] of |coefficient| * term. The gradient
    overwrites the logits.

    z_y is kept apart from the other logits, whose log-sum-exp is r, so that there is no cancellation:
    -log p_y = softplus(r - z_y), and -log(1 - p_y) = softplus(z_y - r).
    """
    target_logit_C1 = logits_CV.gather(1, target_C1)
    logits_CV.scatter_(1, target_C1, float("-inf"))
    most_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(most_C1).exp_()
    sum_C1 = exp_CV.sum(1, keepdim=True)
    margin_C1, unlikely_C1 = target_logit_C1 - most_C1 - sum_C1.log(), coefficient_C1 < 0
    nll_C1, unlikelihood_C1 = softplus(-margin_C1), softplus(margin_C1)
    term_C1 = torch.where(unlikely_C1, unlikelihood_C1, nll_C1)
    if not tracked:
        return nll_C1, term_C1, None
    # Gradient of cross-entropy: p = (1 - p_y) q, but p_y - 1 at y. Of unlikelihood: -p_y q, but p_y at y.
    size_C1 = torch.where(unlikely_C1, -margin_C1.sigmoid(), (-margin_C1).sigmoid()) * coefficient_C1.abs()
    grad_CV = exp_CV.mul_(size_C1 / sum_C1).scatter_(1, target_C1, -size_C1)
    return nll_C1, term_C1, grad_CV


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), same shape as x. Unlike torch's softplus, it has no threshold above which it returns x."""
    return torch.logaddexp(x, torch.zeros_like(x))


class LossHead(nn.Module):
    """Replaces lm_head: takes hidden states and returns loss terms. Holds lm_head's weight [V, H]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.in_features, self.out_features = linear.weight, linear.in_features, linear.out_features
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.rank, self.scale = 0, 0.0

    def add_lora(self, settings: LoRASettings, device: torch.device) -> None:
        """Adds trainable LoRA weights lora_A [r, H] and lora_B [V, r] on `device`, with their initial values."""
        self.rank, self.scale = settings.rank, settings.scale
        for factor, value in self.initial_factors(settings.seed).items():
            setattr(self, factor, nn.Parameter(value.to(device)))

    def initial_factors(self, seed: int) -> dict[str, Tensor]:
        """Returns the whole LoRA weights, lora_A [r, H] and lora_B [V, r], as before the first step of a run with this
        seed; {} without LoRA."""
        if not self.rank:
            return {}
        A = initial_A("lm_head", self.rank, self.in_features, seed)
        return {"lora_A": A, "lora_B": torch.zeros(self.out_features, self.rank)}

    def forward(
        self, hidden_NH: Tensor, target_N: Tensor | None = None, coefficient_N: Tensor | None = None
    ) -> Terms | Tensor:
        """Returns the Terms of N predicted tokens. coefficient_N: > 0 cross-entropy, < 0 unlikelihood, 0 only measured,
        without any effect on gradients. Without targets, returns logits [N, V] as lm_head itself does, for generation.
        """
        if target_N is None or coefficient_N is None:
            logits = F.linear(hidden_NH, self.weight)
            if self.lora_A is None or self.lora_B is None:
                return logits
            low = F.linear(hidden_NH, self.lora_A.to(hidden_NH.dtype))
            return logits + self.scale * F.linear(low, self.lora_B.to(hidden_NH.dtype))
        factors = self.weight, self.lora_A, self.lora_B, self.scale
        in_loss_N = coefficient_N != 0
        own, rest = in_loss_N.nonzero()[:, 0], (~in_loss_N).nonzero()[:, 0]
        loss, *parts = _ChunkedLoss.apply(
            hidden_NH.index_select(0, own), *factors, target_N[own], coefficient_N[own], torch.is_grad_enabled()
        )
        if not len(rest):
            return Terms(loss, *parts)
        with torch.no_grad():
            _, *others = _ChunkedLoss.apply(hidden_NH[rest], *factors, target_N[rest], coefficient_N[rest], False)
        merged = []
        for part, other in zip(parts, others, strict=True):
            whole = torch.empty(len(target_N), dtype=part.dtype, device=part.device)
            whole[own], whole[rest] = part, other
            merged.append(whole)
        return Terms(loss, *merged)
