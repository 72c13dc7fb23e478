"""Whole documents laid end to end in one row, of which none sees another: attention, convolution and the gated delta
rule of transformers' models, each within the documents.

On a GPU by kernels that know where documents end, where there is one for the dtype; else by groups of documents of like
length, padded within the group alone, where a causal model does not see it.

Shapes: T tokens of the row, D documents of a group, L its longest one, H heads, K and V head sizes of queries and
values, C channels.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "packed"
"""Of the attention in transformers' interface; and of the argument by which a model hands the Row on to it."""
A_CALL = 128
"""Tokens of padding that cost about as much as a group's own calls."""


@dataclass(frozen=True)
class _Group:
    """Documents that stand next to each other in the row. at_DL: of each token of the padded group the place in the
    row, after its document's end that of its last token; inside_S: the places in the padded group of what is no
    padding. None, None: the documents are equally long, and nothing is padded."""

    start: int
    stop: int
    documents: int
    longest: int
    at_DL: Tensor | None
    inside_S: Tensor | None


class Row:
    """Where the documents of a row end. lengths: of each, in its order, best with those of like length together."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self.ends = [0, *itertools.accumulate(self.lengths)]
        self.mixed = 0  # how often tokens were mixed, by attention or by the delta rule
        self._made: dict[Any, Any] = {}

    def position_T(self) -> Tensor:
        """The place of each token in its document."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def ends_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """0 and where each document ends, as kernels take it."""
        return self._once(
            ("ends", device, dtype), lambda: torch.tensor(self.ends, dtype=dtype).to(device, non_blocking=True)
        )

    def ends_for_fla(self, device: torch.device) -> dict[str, Tensor]:
        """As flash-linear-attention takes them; without the copy of the CPU the host would wait for the GPU's."""
        both = {"cu_seqlens": device, "cu_seqlens_cpu": torch.device("cpu")}
        return {name: self.ends_on(where, torch.int64) for name, where in both.items()}

    def groups(self, device: torch.device) -> list[_Group]:
        """A document is in the group before it where its padding costs less than calls of its own."""
        device = torch.device("cpu") if device.type == "meta" else device
        return self._once(("groups", device), lambda: [self._group(*part, device) for part in self._parts()])

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _parts(self) -> list[tuple[int, int]]:
        """[first, last) of the documents of each group."""
        parts = [0]
        longest = self.lengths[0]
        for number, length in enumerate(self.lengths):
            if abs(longest - length) > A_CALL:
                parts.append(number)
                longest = length
        return list(itertools.pairwise([*parts, len(self.lengths)]))

    def _group(self, first: int, last: int, device: torch.device) -> _Group:
        lengths, longest = self.lengths[first:last], max(self.lengths[first:last])
        place = self.ends[first], self.ends[last], len(lengths), longest
        if min(lengths) == longest:
            return _Group(*place, None, None)
        length_D1 = torch.tensor(lengths)[:, None]
        token_L = torch.arange(longest)
        at_DL = torch.tensor(self.ends[first:last])[:, None] + torch.minimum(token_L, length_D1 - 1)
        (inside_S,) = (token_L < length_D1).flatten().nonzero(as_tuple=True)
        return _Group(*place, at_DL.to(device), inside_S.to(device))

    def within(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """A causal function of documents [D, L, …] done with a row [T, …]."""
        done = []
        for group in self.groups(rows[0].device):
            shape = group.documents, group.longest
            if group.at_DL is None or group.inside_S is None:
                out = function(*(row[group.start : group.stop].unflatten(0, shape) for row in rows))
                done.append(out.flatten(0, 1))
            else:
                at = group.at_DL.flatten()
                out = function(*(row.index_select(0, at).unflatten(0, shape) for row in rows))
                done.append(out.flatten(0, 1).index_select(0, group.inside_S))
        return done[0] if len(done) == 1 else torch.cat(done)


def attention(
    module: nn.Module, q_1HTK: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
    packed: Row | None = None, sliding_window: int | None = None, kernel: Callable[..., Tensor] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention in transformers' interface -> [1, T, H, V]. Without a row transformers' own, as generation
    takes it. kernel: of padded groups, in the place of what the device has."""
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
    """-> [D, L, H, V]. window: how many tokens, with its own, a token sees; None: all before it."""
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
    """(q [T, H, K], k, v, row, scaling, window) -> [T, H, V] in one launch: flash-attn's where it is installed, else
    torch's own; None where no kernel takes this device and dtype."""
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
        # MLA's values are smaller than its queries, which the kernels do not take.
        size, most, shared = v.shape[-1], row.longest, q.shape[1] // k.shape[1]
        ends = row.ends_on(q.device, torch.int32)
        given: dict[str, Any] = {scale: q.shape[-1] ** -0.5 if scaling is None else scaling}
        given["window_size"] = (-1 if window is None else window - 1), 0
        if flash:
            given["causal"] = True
        elif shared > 1 and "enable_gqa" in taken:
            given["enable_gqa"] = True
        elif shared > 1:  # torch 2.11
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        rows = (x.contiguous() for x in (q, k, F.pad(v, (0, q.shape[-1] - size))))
        return theirs(*rows, ends, ends, most, most, **given)[..., :size]

    return varlen


@functools.cache
def _flash_linear_attention() -> Any:
    """(convolution, delta rule) of the package; None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    convolution = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    return convolution, importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule


def convolution(
    fallback: Callable[..., Tensor], x_1CT: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, packed: Row | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    """transformers' `causal_conv1d_fn` -> [1, C, T]."""
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
    """transformers' `torch_chunk_gated_delta_rule` -> [1, T, H, V]."""
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
    """A function that transformers binds to a GPU's kernel at import, where the package is installed: the kernel takes
    no tensors of a CPU, and the plain function does."""
    return (theirs if x.is_cuda else getattr(theirs, "__wrapped__", theirs))(x, *given, **more)


LINEAR: dict[str, Callable[..., Any] | None] = {
    "causal_conv1d_fn": convolution, "torch_chunk_gated_delta_rule": delta_rule,
    "causal_conv1d_update": None, "torch_recurrent_gated_delta_rule": None,
}  # fmt: skip
"""By their names in transformers' modules, where the layers look them up; None: of generation alone, without rows."""


def bind(module: Any) -> None:
    """Makes the layers of one of transformers' modules run on the device of their tensors, and take rows."""
    for name, packed in LINEAR.items():
        theirs = getattr(module, name, None)
        if theirs is not None and not isinstance(theirs, partial):
            own = partial(on_its_device, theirs)
            setattr(module, name, partial(packed, own) if packed else own)


def install(model: Any) -> None:
    """Makes the model take `packed=Row`."""
    model.config._attn_implementation = NAME
    for module in {sys.modules[type(module).__module__] for module in model.modules()}:
        bind(module)


def states_of_row(model: Any, ids_T: Tensor, row: Row, position_T: Tensor | None = None) -> Tensor:
    """The last hidden states [T, H] of a causal model that `install` was called with."""
    position_T = row.position_T().to(ids_T.device) if position_T is None else position_T
    no_mask = torch.zeros(1, 1, 1, 1, device=ids_T.device)  # given one of four dimensions, transformers makes none
    return model.model(
        input_ids=ids_T[None], position_ids=position_T[None], attention_mask=no_mask, use_cache=False, packed=row
    ).last_hidden_state[0]


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
