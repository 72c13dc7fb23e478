"""Checks the fused kernels of train/fused (all kernels except products, attention and the delta rule) against the same
functions in torch's own operations in fp32. On a CPU, both are torch's.

Shapes: R rows, H hidden size, T tokens, k experts per token, E experts, P (token, expert) pairs, I expert width, O
output features, r LoRA rank, V vocabulary.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated

from launch.agreement import compared, drawn_values
from train.data.kinds import TermKind
from train.experts.dispatch import Dispatch, Ends, ExpertGroup
from train.experts.module import gated
from train.experts.products import add_grouped_
from train.layers import norms
from train.masking.loss import LossHead

NORMS = {"qwen": Qwen3_5MoeRMSNorm, "llama": LlamaRMSNorm, "gated": Qwen3_5MoeRMSNormGated}


class Case(NamedTuple):
    """A function to check: `ours`, its reference `plain`, their arguments by name, and the gradient `out` of their
    value."""

    what: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    given: dict[str, Tensor]
    out: Tensor

    def error(self) -> float:
        """Returns the largest relative error of value and gradients. Raises Wrong if it is more than rounding."""
        return compared(self.what, [*self.given], self.ours, self.plain, [*self.given.values()], self.out)


def norm(device: torch.device, dtype: torch.dtype, kind: str = "gated", rows: int = 70, columns: int = 128) -> Case:
    """Returns the case of an RMSNorm over rows [R, H]. kind: a key of NORMS."""
    weight, x, gate, out = drawn_values(device, dtype, (columns,), *[(rows, columns)] * 3)
    plain = NORMS[kind](columns)
    plain.weight = nn.Parameter(weight.float(), requires_grad=False)
    model = nn.Sequential(copy.deepcopy(plain).to(dtype))
    norms.install(model)
    given = {"x": x, "gate": gate} if kind == "gated" else {"x": x}
    return Case(f"RMSNorm, {kind},", model[0], plain, given, out)


def activation(device: torch.device, dtype: torch.dtype, pairs: int = 20, width: int = 136) -> Case:
    """Returns the case of the experts' gated activation: gate and up [P, 2I], weight [P, 1] -> [P, I]."""
    gate_up, weight, out = drawn_values(device, dtype, (pairs, 2 * width), (pairs, 1), (pairs, width))

    def plain(gate_up: Tensor, weight: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate) * up * weight

    def ours(gate_up: Tensor, weight: Tensor) -> Tensor:
        return gated(gate_up, weight, nn.SiLU())

    return Case("gated activation", ours, plain, {"gate and up": gate_up, "weight": weight}, out)


def exchange(
    device: torch.device, dtype: torch.dtype, tokens: int = 40, experts: int = 8, k: int = 3, hidden: int = 64
) -> Case:
    """Returns the case of the exchange on a single rank: tokens [T, H] to their (token, expert) pairs [P, H] and
    back."""
    score = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    index_Tk = score.topk(k).indices.to(device)
    dispatch = Dispatch(index_Tk, experts, ExpertGroup(), device)
    x, out = drawn_values(device, dtype, (tokens, hidden), (tokens, hidden))
    token_P = index_Tk.flatten().argsort(stable=True) // k

    def ours(x: Tensor) -> Tensor:
        return dispatch.combine(dispatch.spread(x) * 0.5)

    def plain(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token_P, x[token_P] * 0.5)

    return Case("tokens to experts and back", ours, plain, {"x": x}, out)


class _Sum(torch.autograd.Function):
    """y + 2 h @ right[e] for the rows of each expert e. Only y has a gradient."""

    @staticmethod
    def forward(ctx, y, h, right, ends):
        y = y.clone()
        add_grouped_(y, h, right, ends, 2.0)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def sums(
    device: torch.device, dtype: torch.dtype, counts: Sequence[int] = (70, 0, 1), rank: int = 8, columns: int = 136
) -> Case:
    """Returns the case of LoRA's sum y [P, O] + 2 h [P, r] @ right [E, r, O]. counts: rows of each expert."""
    host = list(itertools.accumulate(counts))
    ends = Ends(torch.tensor(host, dtype=torch.int32, device=device), host)
    y, h, right = drawn_values(device, dtype, (host[-1], columns), (host[-1], rank), (len(counts), rank, columns))

    def plain(y: Tensor) -> Tensor:
        parts = zip(h.float().split([*counts]), right.float(), strict=True)
        return y + 2.0 * torch.cat([rows @ matrix for rows, matrix in parts])

    return Case("sum of LoRA updates", lambda y: _Sum.apply(y, h, right, ends), plain, {"y": y}, y)


def loss(device: torch.device, dtype: torch.dtype, tokens: int = 40, hidden: int = 64, vocabulary: int = 5000) -> Case:
    """Returns the case of the loss of hidden states [T, H], whose tokens take turns: cross-entropy with weight 1,
    unlikelihood, cross-entropy with weight 0.25, and measured only."""
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype)
    weight, x = drawn_values(device, dtype, (vocabulary, hidden), (tokens, hidden))
    head.weight = nn.Parameter(weight * hidden**-0.5, requires_grad=False)
    target = torch.arange(tokens, device=device) * 7919 % vocabulary
    coefficient = torch.tensor([1.0, 0.5, 0.25, 0.0], device=device).repeat(tokens)[:tokens] / tokens
    kind = torch.tensor([0, 1, 0, 0], dtype=torch.int8, device=device).repeat(tokens)[:tokens]

    def ours(x: Tensor) -> Tensor:
        return LossHead(head)(x, target, coefficient, kind).loss

    def plain(x: Tensor) -> Tensor:
        logits = x @ head.weight.float().T
        p = -nn.functional.cross_entropy(logits, target, reduction="none")
        term = torch.where(kind == 1, -torch.log1p(-p.exp()), -p)
        return (coefficient * term).sum()

    return Case("loss", ours, plain, {"x": x}, torch.ones((), device=device))


def held(device: torch.device, dtype: torch.dtype, tokens: int = 40, hidden: int = 64, vocabulary: int = 5000) -> Case:
    """Returns the case of the loss of hidden states [T, H] whose tokens are held to the base's, near by."""
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype)
    weight, x, away = drawn_values(device, dtype, (vocabulary, hidden), *[(tokens, hidden)] * 2)
    head.weight = nn.Parameter(weight * hidden**-0.5, requires_grad=False)
    base, target = (x + 0.3 * away).detach(), torch.arange(tokens, device=device) * 7919 % vocabulary
    coefficient = torch.full((tokens,), 1 / tokens, device=device)
    kind = torch.full((tokens,), TermKind.HELD, dtype=torch.int8, device=device)

    def ours(x: Tensor) -> Tensor:
        return LossHead(head)(x, target, coefficient, kind, base, kind == TermKind.HELD).loss

    def plain(x: Tensor) -> Tensor:
        of_base = (base @ head.weight.T).float().log_softmax(-1)
        divergence = of_base.exp() * (of_base - (x @ head.weight.float().T).log_softmax(-1))
        return (coefficient * divergence.sum(-1)).sum()

    return Case("loss of held tokens", ours, plain, {"x": x}, torch.ones((), device=device))


def fused(device: torch.device, dtype: torch.dtype) -> float:
    """Checks all fused kernels on small inputs. Returns the largest relative error. Raises Wrong if one is more than
    rounding."""
    cases = [norm(device, dtype, kind) for kind in NORMS]
    cases += [one(device, dtype) for one in (activation, exchange, sums, loss, held)]
    return max(case.error() for case in cases)
