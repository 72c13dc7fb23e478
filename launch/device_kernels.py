"""The kernels that a planned device would use in a step without data (launch/trace.py), or stand-ins that keep and
compute the same.

Shapes: B documents, T tokens, H heads, K and V head sizes of keys and values, C tokens of a chunk, N chunks of all
heads; D documents of a group, L tokens of the longest one.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from train.data.row import Row
from train.experts import products
from train.fused import IN_ONE_LAUNCH
from train.layers import mixing

aten = torch.ops.aten


def attention(gpu: bool, *given: Any, **more: Any) -> tuple[Tensor, None]:
    """Runs the model's own attention (`mixing.attention`) with the kernel that the planned device would use.

    On a GPU it is the memory-efficient kernel, which keeps what flash attention keeps: queries, keys, values, output
    and a log-sum-exp per row (Dao et al., arXiv 2205.14135). On a CPU it is the one that torch chooses: flash
    attention, or all T x T weights. Returns ([1, T, H, V], None).
    """
    more["kernel"] = partial(_planned_causal, gpu)
    return mixing.attention(*given, **more)


def _planned_causal(
    gpu: bool, q_DLHK: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_DLHK, k, v))
    gqa = q.shape[1] // k.shape[1]
    if gpu:
        if gqa > 1:
            k, v = (x.repeat_interleave(gqa, dim=1) for x in (k, v))
        out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scaling)[0]
    elif _chosen_on_cpu(q, k, v, gqa > 1) == SDPBackend.MATH.value:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa > 1
        )
    else:
        out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2)


def _chosen_on_cpu(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> int:
    """Returns torch's choice of backend on a CPU, which depends on heads, head sizes and dtype."""
    with _disable_current_modes():
        small = [torch.empty(1, x.shape[1], 2, x.shape[3], dtype=x.dtype) for x in (q, k, v)]
        choose: Any = torch._fused_sdp_choice
        return choose(*small, None, 0.0, True, scale=None, enable_gqa=gqa)


for _gpu in (True, False):
    ALL_ATTENTION_FUNCTIONS.register(f"planned_{_gpu}", partial(attention, _gpu))
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"planned_{_gpu}", sdpa_mask)


class DeltaRule(torch.autograd.Function):
    """Stands in for flash-linear-attention's chunk kernel of the gated delta rule (Yang et al., arXiv 2412.06464): it
    keeps the same tensors for backward, creates the same temporary ones and computes the same products. transformers'
    own fallback, for CPUs, takes many times as much memory.

    Kept are q, k, v, beta, the cumulated decay and the [C, C] triangle of each chunk. Backward computes everything
    again, and a gradient of each tensor with twice the products.
    """

    CHUNK = 64

    @staticmethod
    def forward(ctx, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH):
        kept = torch.empty_like(g_BTH), v_BTHV.new_empty(*v_BTHV.shape[:3], DeltaRule.CHUNK)
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, beta_BTH, *kept)
        DeltaRule.products(k_BTHK, v_BTHV)
        return torch.empty_like(v_BTHV)

    @staticmethod
    def products(k_BTHK: Tensor, v_BTHV: Tensor) -> list[Tensor]:
        """Computes for all N chunks of all heads, and returns: triangle [N, C, C], w [N, C, K], u [N, C, V], state
        [N, K, V], new values [N, C, V], output [N, C, V]."""
        B, T, H, _ = v_BTHV.shape  # keys may have fewer heads, each of which is read for several heads of values
        chunks, C = B * H * -(-T // DeltaRule.CHUNK), DeltaRule.CHUNK
        k, v = (x.new_empty(()).expand(chunks, C, x.shape[-1]) for x in (k_BTHK, v_BTHV))
        triangle = k @ k.mT
        w, u, state = triangle @ k, triangle @ v, k.mT @ v
        new = w @ state
        return [triangle, w, u, state, new, (k @ state).add_(triangle @ new)]

    @staticmethod
    def backward(ctx, grad):
        q, k, v, beta, decay, _ = ctx.saved_tensors
        made, gradients = DeltaRule.products(k, v), DeltaRule.products(k, v)
        DeltaRule.products(k, v)
        out = [torch.empty_like(x) for x in (q, k, v, decay, beta)]
        del made, gradients
        return tuple(out)


def _delta_rule(q, k, v, g, beta, packed: Row, **kwargs):
    """Replaces transformers' function of this signature. Like the kernel, it knows where documents end, and takes fewer
    heads of queries and keys than of values."""
    packed.mixed += 1
    return DeltaRule.apply(q, k, v, g, beta), None


class Convolution(torch.autograd.Function):
    """Stands in for flash-linear-attention's kernel of the causal convolution and its activation: one pass, which keeps
    x [1, C, T] for backward."""

    @staticmethod
    def forward(ctx, x_1CT):
        ctx.save_for_backward(x_1CT)
        return torch.empty_like(x_1CT)

    @staticmethod
    def backward(ctx, grad_1CT):
        return grad_1CT + ctx.saved_tensors[0]


def _convolution(x_1CT, *_, **__):
    """Replaces transformers' `causal_conv1d_fn`, with frozen weights."""
    return Convolution.apply(x_1CT)


LINEAR = {"causal_conv1d_fn": _convolution, "torch_chunk_gated_delta_rule": _delta_rule}


@contextmanager
def device_kernels(model: Any, gpu: bool) -> Iterator[None]:
    """Inside the context, the model runs with the attention of the planned device and dequantizes as many experts at a
    time as that device does. For a GPU, stand-ins for its kernels of the convolution and the gated delta rule replace
    the model's fallbacks."""
    usual, kernels = model.config._attn_implementation, LINEAR if gpu else {}
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    fallbacks = [
        (module, name, getattr(module, name)) for module in modules for name in kernels if hasattr(module, name)
    ]
    for module, name, _ in fallbacks:
        setattr(module, name, kernels[name])
    model.config._attn_implementation, together = f"planned_{gpu}", products.WORKSPACE
    if gpu:
        IN_ONE_LAUNCH.add("meta")
    else:
        products.WORKSPACE = 0
    try:
        yield
    finally:
        products.WORKSPACE = together
        IN_ONE_LAUNCH.discard("meta")
        model.config._attn_implementation = usual
        for module, name, fallback in fallbacks:
            setattr(module, name, fallback)
