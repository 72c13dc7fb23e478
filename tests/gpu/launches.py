"""What a GPU does in one launch beside products, attention and delta rule, at sizes that the caller gives: against the
same by torch's own operations in fp32, and timed. On a CPU both are torch's.

Shapes: R rows, H hidden size, T tokens, k experts per token, E experts, P (token, expert) pairs, I expert width, V
vocabulary.
"""

import copy

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated

from launch.kernels import compared, drawn_values
from tests.gpu.parts import Figures, both_ways, milliseconds
from train import norms
from train.experts.dispatch import Dispatch, ExpertGroup
from train.experts.module import gated
from train.masking.loss import LossHead

NORMS = {"qwen": Qwen3_5MoeRMSNorm, "llama": LlamaRMSNorm, "gated": Qwen3_5MoeRMSNormGated}


def norm(device: torch.device, dtype: torch.dtype, kind: str, rows: int, columns: int) -> Figures:
    weight, *given, out = drawn_values(device, dtype, (columns,), *[(rows, columns)] * (3 if kind == "gated" else 2))
    plain = NORMS[kind](columns)
    plain.weight = nn.Parameter(weight.float(), requires_grad=False)
    model = nn.Sequential(copy.deepcopy(plain).to(dtype))
    norms.install(model)
    error = compared(f"RMSNorm, {kind},", ("x", "gate")[: len(given)], model[0], plain, given, out)
    ms = milliseconds(device, both_ways(model[0], given, out))
    moved = out.nbytes * (8 if kind == "gated" else 5)  # forward reads and writes; backward reads them and the gradient
    return {"error": error, "forward_backward_ms": ms, "gigabytes_per_second": moved / ms / 1e6}


def activation(device: torch.device, dtype: torch.dtype, pairs: int, width: int) -> Figures:
    gate_up, weight, out = drawn_values(device, dtype, (pairs, 2 * width), (pairs, 1), (pairs, width))

    def ours(gate_up: Tensor, weight: Tensor) -> Tensor:
        return gated(gate_up, weight, nn.SiLU())

    def plain(gate_up: Tensor, weight: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate) * up * weight

    error = compared("gated activation", ("gate and up", "weight"), ours, plain, (gate_up, weight), out)
    ms = milliseconds(device, both_ways(ours, (gate_up, weight), out))
    return {"error": error, "forward_backward_ms": ms, "gigabytes_per_second": out.nbytes * 8 / ms / 1e6}


def exchange(device: torch.device, dtype: torch.dtype, tokens: int, experts: int, k: int, hidden: int) -> Figures:
    """Rows to the pairs of one rank and back, without other ranks."""
    score = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    index_Tk = score.topk(k).indices.to(device)
    dispatch = Dispatch(index_Tk, experts, ExpertGroup(), device)
    x, out = drawn_values(device, dtype, (tokens, hidden), (tokens, hidden))
    token_P = index_Tk.flatten().argsort(stable=True) // k

    def ours(x: Tensor) -> Tensor:
        return dispatch.combine(dispatch.spread(x) * 0.5)

    def plain(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token_P, x[token_P] * 0.5)

    error = compared("tokens to experts and back", ("x",), ours, plain, (x,), out)
    ms = milliseconds(device, both_ways(ours, (x,), out))
    return {"error": error, "forward_backward_ms": ms}


def loss(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int) -> Figures:
    """Cross-entropy, unlikelihood and what is only measured, by turns."""
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype)
    (weight, x) = drawn_values(device, dtype, (vocabulary, hidden), (tokens, hidden))
    head.weight = nn.Parameter(weight * hidden**-0.5, requires_grad=False)
    target = torch.arange(tokens, device=device) * 7919 % vocabulary
    coefficient = torch.tensor([1.0, -0.5, 0.25, 0.0], device=device).repeat(tokens)[:tokens] / tokens

    def ours(x: Tensor) -> Tensor:
        return LossHead(head)(x, target, coefficient).loss

    def plain(x: Tensor) -> Tensor:
        logits = x @ head.weight.float().T
        p = -nn.functional.cross_entropy(logits, target, reduction="none")
        term = torch.where(coefficient < 0, -torch.log1p(-p.exp()), -p)
        return (coefficient.abs() * term).sum()

    out = torch.ones((), device=device)
    error = compared("loss", ("x",), ours, plain, (x,), out.to(dtype))
    ms = milliseconds(device, both_ways(ours, (x,), out))
    return {"error": error, "forward_backward_ms": ms, "tflop_per_second": 4 * x.numel() * vocabulary / ms / 1e9}
