"""Attention, convolution and the gated delta rule of transformers' models for packed rows. A packed row holds several
whole documents, none of which sees another.

On a GPU, this uses kernels that take the document boundaries, if there are any for the dtype. Otherwise, documents of
similar length form a group and are padded at their ends to the longest of the group. A causal model does not see this
padding.

Shapes: T tokens of the row, D documents of a group, L tokens of its longest document, H heads, K and V head sizes of
queries and values, C channels.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from train.data.row import Row

NAME = "packed"
"""The name of our attention in transformers' interface, and of the argument through which a model passes it the Row."""


def attention(
    module: nn.Module, q_1HTK: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
    packed: Row | None = None, sliding_window: int | None = None, kernel: Callable[..., Tensor] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention in transformers' interface: q and k [1, H, T, K], v [1, H, T, V] -> [1, T, H, V] and None.

    Without a packed row, as in generation, this is transformers' own SDPA attention. `kernel` replaces `causal` for
    padded groups. Raises NotImplementedError for soft-capped attention (softcap) and attention sinks (s_aux).
    """
    if packed is None:
        return sdpa_attention_forward(
            module, q_1HTK, k, v, mask, scaling=scaling, sliding_window=sliding_window, **more
        )
    if unknown := [name for name in ("softcap", "s_aux") if more.get(name) is not None]:
        raise NotImplementedError(f"attention with {unknown[0]}")
    packed.mixed += 1
    rows = [x[0].transpose(0, 1) for x in (q_1HTK, k, v)]
    varlen = attention_kernel(q_1HTK.device.type, q_1HTK.dtype)
    if varlen is not None:
        out_THV = varlen(*rows, packed, scaling, sliding_window)
    else:
        out_THV = packed.within(partial(kernel or causal, scaling=scaling, window=sliding_window), *rows)
    return out_THV[None], None


def causal(q_DLHK: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None = None) -> Tensor:
    """Causal attention within documents: q and k [D, L, H, K], v [D, L, H, V] -> [D, L, H, V].

    k and v may have fewer heads than q. window: the number of tokens that a token sees, including itself; None: itself
    and all tokens before it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_DLHK, k, v))
    seen = None
    if window is not None and window < q.shape[2]:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


@functools.cache
def attention_kernel(device: str, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Returns a function (q [T, H, K], k, v, row, scaling, window) -> [T, H, V] that runs in one launch.

    It calls the kernel of flash-attn where that is installed, else torch's own. None: no kernel supports this device
    and dtype.
    """
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    flash = importlib.util.find_spec("flash_attn") is not None
    theirs: Any = (
        importlib.import_module("flash_attn").flash_attn_varlen_func
        if flash
        else importlib.import_module("torch.nn.attention.varlen").varlen_attn
    )
    scale, taken = "softmax_scale" if flash else "scale", inspect.signature(theirs).parameters

    def varlen(q: Tensor, k: Tensor, v: Tensor, row: Row, scaling: float | None, window: int | None) -> Tensor:
        # MLA has a smaller head size for values than for queries. The kernels do not support that, so v is padded.
        size, most, shared = v.shape[-1], row.longest, q.shape[1] // k.shape[1]
        ends = row.ends_on(q.device, torch.int32)
        given: dict[str, Any] = {scale: q.shape[-1] ** -0.5 if scaling is None else scaling}
        given["window_size"] = (-1 if window is None else window - 1), 0
        if flash:
            given["causal"] = True
        elif shared > 1 and "enable_gqa" in taken:
            given["enable_gqa"] = True
        elif shared > 1:  # torch 2.11 has no enable_gqa
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        rows = (x.contiguous() for x in (q, k, F.pad(v, (0, q.shape[-1] - size))))
        return theirs(*rows, ends, ends, most, most, **given)[..., :size]

    return varlen


@functools.cache
def _flash_linear_attention() -> Any:
    """Returns the package's convolution and delta rule, or None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    convolution = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    return convolution, importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule


def convolution(
    fallback: Callable[..., Tensor], x_1CT: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, packed: Row | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    """Replaces transformers' `causal_conv1d_fn`: x [1, C, T] -> [1, C, T], each document on its own.

    Without a packed row it calls `fallback`, transformers' own function.
    """
    if packed is None:
        return fallback(x_1CT, weight, bias, activation=activation, **more)
    if x_1CT.is_cuda and (kernels := _flash_linear_attention()):
        x_1TC = x_1CT.transpose(1, 2).contiguous()
        return kernels[0](x_1TC, weight, bias, activation=activation, **packed.ends_for_fla(x_1CT.device))[0].mT

    def each(x_DLC: Tensor) -> Tensor:
        return fallback(x_DLC.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2)

    return packed.within(each, x_1CT[0].T).T[None]


def delta_rule(
    fallback: Callable[..., Any], q_1THK: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    packed: Row | None = None, cu_seqlens: Tensor | None = None, **more: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Replaces transformers' `torch_chunk_gated_delta_rule`: q and k [1, T, H, K], v [1, T, H, V], g and beta
    [1, T, H] -> [1, T, H, V] and the final state, which is None for a packed row.

    Without a packed row it calls `fallback`, transformers' own function.
    """
    if packed is None:
        return fallback(q_1THK, k, v, g=g, beta=beta, **more)
    packed.mixed += 1
    if q_1THK.is_cuda and (kernels := _flash_linear_attention()):
        ends = packed.ends_for_fla(q_1THK.device)
        return kernels[1](q_1THK, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **ends)

    def each(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return fallback(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return packed.within(each, *(x[0] for x in (q_1THK, k, v, g, beta)))[None], None


def on_its_device(theirs: Callable[..., Any], x: Tensor, *given: Any, **more: Any) -> Any:
    """Calls `theirs`, a function that transformers binds to a GPU kernel at import if the kernel is installed.

    Such a kernel takes no CPU tensors, so for x (any shape) on a CPU the plain function is called instead.
    """
    return (theirs if x.is_cuda else getattr(theirs, "__wrapped__", theirs))(x, *given, **more)


LINEAR: dict[str, Callable[..., Any] | None] = {
    "causal_conv1d_fn": convolution, "torch_chunk_gated_delta_rule": delta_rule,
    "causal_conv1d_update": None, "torch_recurrent_gated_delta_rule": None,
}  # fmt: skip
"""Replacements of transformers' functions, by the names under which its layers look them up. None: a function that only
generation uses, which has no packed rows."""


def bind(module: Any) -> None:
    """Makes the layers of a Python module of transformers run on the device of their tensors and take packed rows."""
    for name, packed in LINEAR.items():
        theirs = getattr(module, name, None)
        if theirs is not None and not isinstance(theirs, partial):
            own = partial(on_its_device, theirs)
            setattr(module, name, partial(packed, own) if packed else own)


def install(model: Any) -> None:
    """Makes the model's forward take `packed=Row`."""
    model.config._attn_implementation = NAME
    for module in {sys.modules[type(module).__module__] for module in model.modules()}:
        bind(module)


def states_of_row(model: Any, ids_T: Tensor, row: Row, position_T: Tensor | None = None) -> Tensor:
    """Returns the last hidden states [T, hidden size] of a causal model that `install` was called with.

    position_T: the position of each token in its document; None: as the row says.
    """
    position_T = row.position_T().to(ids_T.device) if position_T is None else position_T
    no_mask = torch.zeros(1, 1, 1, 1, device=ids_T.device)  # given a 4-D mask, transformers builds none
    return model.model(
        input_ids=ids_T[None], position_ids=position_T[None], attention_mask=no_mask, use_cache=False, packed=row
    ).last_hidden_state[0]


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
