"""Computes the loss of each token by its treatment, from hidden states, without materializing all logits at once.

Shapes: N predicted tokens, H hidden size, V vocabulary size, C tokens of a chunk, r LoRA rank of lm_head.

Two kinds of terms are a difference of two log-sum-exps of the logits z, over the whole vocabulary and a part of it:
    cross-entropy   -log p_y      = lse(z) - lse(z over {y})        gradient p - 1_y
    unlikelihood    -log(1 - p_y) = lse(z) - lse(z over V without y)  gradient p_y (1_y - q), q the softmax without y
(Welleck et al., arXiv 1908.04319, for unlikelihood). In this form, unlikelihood is stable as p_y -> 1. Its gradient
with respect to z_y is p_y, so it does not vanish there.

A held token's term is the Kullback-Leibler divergence of the model's p from the base's b over the whole vocabulary:
    held            sum_v b_v (log b_v - log p_v)                     gradient p - b
It is computed as log(1 + sum b (exp(-e) - 1 + e)), where e = d - sum b d and d = log b - log p. Every summand is at
least 0, so that a small divergence does not drown in the rounding of large ones that cancel.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data.kinds import TermKind
from train.fused import IN_ONE_LAUNCH
from train.fused.operations import held_terms_, loss_terms_
from train.layers.lora import LoRASettings, initial_A

CHUNK_BYTES = 2**28  # of a chunk's logits, in fp32 or, on a GPU, in the dtype of the model
LARGE = 0.1  # nats; a divergence above it is summed as it is defined
CHUNK_TOKENS = 512  # with fewer, matmuls are slower; more only take more memory


class Terms(NamedTuple):
    """loss: scalar, the sum of coefficient * term. term_N: each token's own term, unweighted; 0 where the coefficient
    is 0. nll_N: -log p of each token, whatever its treatment. kl_N: the divergence from the base, in nats; 0 where what
    the base predicts is not known. layers_DM: the nll of M of the tokens after each of D decoder layers, if that was
    asked for. All in nats."""

    loss: Tensor
    term_N: Tensor
    nll_N: Tensor
    kl_N: Tensor
    layers_DM: Tensor | None = None


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients along with the loss, chunk by chunk, so that a chunk's logits are computed only once and
    not kept for the backward pass."""

    @staticmethod
    def forward(
        ctx, hidden_NH, weight_VH, A_rH, B_Vr, scale, target_N, coefficient_N, unlikely_N, base_NH, grad_enabled
    ):  # fmt: skip
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
        of_base = None if base_NH is None else torch.empty_like(logits)
        for start in range(0, len(hidden_NH), size):
            chunk = slice(start, start + size)
            hidden_CH, target_C, coefficient_C = hidden_NH[chunk], target_N[chunk], coefficient_N[chunk]
            logits_CV = torch.mm(hidden_CH, weight_VH.T, out=logits[: len(hidden_CH)])
            if A is not None and B is not None:
                down_Cr = F.linear(hidden_CH, A)
                logits_CV.addmm_(down_Cr, B.T, alpha=scale)
            if of_base is not None:
                base_CV = torch.mm(base_NH[chunk], weight_VH.T, out=of_base[: len(hidden_CH)])
                terms_, given = held_terms_ if in_one_launch else _held_terms_, (base_CV, target_C, coefficient_C)
            else:
                terms_, given = loss_terms_ if in_one_launch else _terms_, (target_C, coefficient_C, unlikely_N[chunk])
            logits_CV = logits_CV if in_one_launch else logits_CV.to(exact)
            nll_N[chunk], term_N[chunk] = terms_(logits_CV, *given, tracked)
            if not tracked:
                continue
            grad_CV = logits_CV.to(hidden_CH.dtype)  # what were the logits
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
        ctx.mark_non_differentiable(term_N, nll_N)
        return (coefficient_N * term_N).sum(), term_N, nll_N

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, A, B = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, A, B, None, None, None, None, None, None


def _terms_(
    logits_CV: Tensor, target_C: Tensor, coefficient_C: Tensor, unlikely_C: Tensor, tracked: bool
) -> tuple[Tensor, Tensor]:
    """Returns nll [C] and term [C]. The logits are overwritten: if tracked, by the gradient of coefficient * term.

    z_y is kept apart from the other logits, whose log-sum-exp is r, so that there is no cancellation:
    -log p_y = softplus(r - z_y), and -log(1 - p_y) = softplus(z_y - r).
    """
    target_C1, unlikely_C1 = target_C[:, None], unlikely_C[:, None]
    target_logit_C1 = logits_CV.gather(1, target_C1)
    logits_CV.scatter_(1, target_C1, float("-inf"))
    most_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(most_C1).exp_()
    sum_C1 = exp_CV.sum(1, keepdim=True)
    margin_C1 = target_logit_C1 - most_C1 - sum_C1.log()
    nll_C1, unlikelihood_C1 = softplus(-margin_C1), softplus(margin_C1)
    if tracked:
        # Gradient of cross-entropy: p = (1 - p_y) q, but p_y - 1 at y. Of unlikelihood: -p_y q, but p_y at y.
        size_C1 = torch.where(unlikely_C1, -margin_C1.sigmoid(), (-margin_C1).sigmoid()) * coefficient_C[:, None]
        exp_CV.mul_(size_C1 / sum_C1).scatter_(1, target_C1, -size_C1)
    return nll_C1[:, 0], torch.where(unlikely_C1, unlikelihood_C1, nll_C1)[:, 0]


def _held_terms_(
    logits_CV: Tensor, base_CV: Tensor, target_C: Tensor, coefficient_C: Tensor, tracked: bool
) -> tuple[Tensor, Tensor]:
    """Returns nll [C] and the divergence [C] from the base, whose logits are base_CV. The logits are overwritten: if
    tracked, by the gradient of coefficient * divergence."""
    log_b_CV = base_CV.to(logits_CV.dtype)
    log_b_CV = log_b_CV - log_b_CV.logsumexp(1, keepdim=True)  # as below, so that equal logits differ by exactly 0
    log_p_CV = logits_CV.sub_(logits_CV.logsumexp(1, keepdim=True))
    nll_C = -log_p_CV.gather(1, target_C[:, None])[:, 0]
    b_CV, e_CV = log_b_CV.exp(), log_b_CV - log_p_CV
    plain_C1 = (b_CV * e_CV).sum(1, keepdim=True)
    e_CV -= plain_C1
    # exp(-e) could overflow where the model gives far more than the base; b exp(-e) cannot, for it is p exp(plain)
    summand_CV = torch.where(
        e_CV < -10, (log_p_CV + plain_C1).exp() - b_CV * (1 - e_CV), b_CV * (torch.expm1(-e_CV) + e_CV)
    )
    close_C1 = summand_CV.sum(1, keepdim=True).clamp(min=0).log1p()
    if tracked:
        log_p_CV.exp_().sub_(b_CV).mul_(coefficient_C[:, None])
    return nll_C, torch.where(plain_C1 > LARGE, plain_C1, close_C1)[:, 0]


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
        self, hidden_NH: Tensor, target_N: Tensor | None = None, coefficient_N: Tensor | None = None,
        kind_N: Tensor | None = None, base_MH: Tensor | None = None, known_N: Tensor | None = None,
    ) -> Terms | Tensor:  # fmt: skip
        """Returns the Terms of N predicted tokens. coefficient_N: at least 0; 0: only measured, without any effect on
        gradients. kind_N: TermKind. base_MH: the base's hidden states for the M tokens where known_N is True, among
        them all that are held; None without any. Without targets, returns logits [N, V] as lm_head itself does, for
        generation.
        """
        if target_N is None:
            logits = F.linear(hidden_NH, self.weight)
            if self.lora_A is None or self.lora_B is None:
                return logits
            low = F.linear(hidden_NH, self.lora_A.to(hidden_NH.dtype))
            return logits + self.scale * F.linear(low, self.lora_B.to(hidden_NH.dtype))
        assert coefficient_N is not None and kind_N is not None
        in_loss_N, unlikely_N = coefficient_N != 0, kind_N == TermKind.UNLIKELIHOOD
        held_N = in_loss_N & (kind_N == TermKind.HELD)
        # what is in the loss comes first, even if it is nothing: every rank's loss has a graph
        groups = [(in_loss_N & ~held_N, True, False)]
        if base_MH is None or known_N is None:
            groups += [(~in_loss_N, False, False)]
        else:
            place_N = known_N.cumsum(0) - 1  # of a token in base_MH
            groups += [(held_N, True, True), (known_N & ~held_N, False, True), (~in_loss_N & ~known_N, False, False)]
        losses: list[Tensor] = []
        found = []
        for chosen_N, in_loss, by_base in groups:
            rows = chosen_N.nonzero()[:, 0]
            if losses and not len(rows):
                continue
            base = base_MH[place_N[rows]] if by_base and base_MH is not None else None
            with torch.set_grad_enabled(in_loss and torch.is_grad_enabled()):
                loss, own, nll = _ChunkedLoss.apply(
                    hidden_NH.index_select(0, rows), self.weight, self.lora_A, self.lora_B, self.scale, target_N[rows],
                    coefficient_N[rows], unlikely_N[rows], base, torch.is_grad_enabled(),
                )  # fmt: skip
            losses += [loss] if in_loss else []
            found.append((rows, in_loss, by_base, own, nll))
        if len(found) == 1 and len(found[0][0]) == len(target_N):
            return Terms(losses[0], own, nll, torch.zeros_like(nll))
        term_N, nll_N, kl_N = (torch.zeros(len(target_N), device=nll.device, dtype=nll.dtype) for _ in range(3))
        for rows, in_loss, by_base, own, nll in reversed(found):  # whose nll is in the loss has it from there
            nll_N[rows] = nll
            if by_base:
                kl_N[rows] = own
            if in_loss:
                term_N[rows] = own
        return Terms(sum(losses[1:], losses[0]), term_N, nll_N, kl_N)
