"""The kernels of a step at sizes that the caller gives: each against a plain reference in fp32, and timed.

Every function takes (device, dtype) and sizes, -> its figures: `error`, the largest relative error of values and
gradients, and milliseconds. Wrong (launch/computing.py) where that is more than rounding.

Shapes: T tokens of the row, E experts, O and I sizes out and in, P (token, expert) pairs, r the LoRA rank.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from launch.agreement import compared, drawn_values, most, near
from launch.computing import chunked_delta_rule, transformers_own
from train import formats
from train.data.row import Row
from train.experts.dispatch import Ends
from train.experts.products import GroupedLinear
from train.experts.storage import FrozenExperts, NF4Experts, Storage
from train.layers import mixing

Figures = dict[str, Any]


def milliseconds(device: torch.device, work: Callable[[], Any], times: int = 5) -> float:
    """The median of as many calls, after one."""
    work()
    spent = []
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent) * 1e3


def both_ways(function: Callable[..., Tensor], given: Sequence[Tensor], out: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in given]
    return lambda: torch.autograd.grad(function(*leaves), leaves, out)


def attention(
    device: torch.device, dtype: torch.dtype, lengths: Sequence[int], heads: int, shared: int, K: int, V: int
) -> Figures:
    row, tokens, module = Row(lengths), sum(lengths), nn.Module()
    shapes = (heads, tokens, K), (shared, tokens, K), (shared, tokens, V), (tokens, heads, V)
    *given, out = drawn_values(device, dtype, *shapes)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mixing.attention(module, q[None], k[None], v[None], None, scaling=K**-0.5, packed=row)[0][0]

    def plain(*rows: Tensor) -> Tensor:
        return row.within(partial(mixing.causal, scaling=K**-0.5), *(x.transpose(0, 1) for x in rows))

    error = compared("packed attention", ("q", "k", "v"), packed, plain, given, out)
    seen = sum(length * (length + 1) // 2 for length in lengths)
    flops = (2 + 5) * (K + V) * seen * heads  # of forward two products, of backward five
    ms = milliseconds(device, both_ways(packed, given, out))
    return {"error": error, "forward_backward_ms": ms, "tflop_per_second": flops / ms / 1e9}


def convolution(device: torch.device, dtype: torch.dtype, lengths: Sequence[int], channels: int) -> Figures:
    row, tokens = Row(lengths), sum(lengths)
    *given, out = drawn_values(device, dtype, (channels, tokens), (channels, 4), (channels, tokens))
    theirs = transformers_own("causal_conv1d_fn")

    def packed(x: Tensor, weight: Tensor) -> Tensor:
        return mixing.convolution(theirs, x[None], weight, None, activation="silu", packed=row)[0]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        each = (theirs(part[None], weight, None, activation="silu")[0] for part in x.split(row.lengths, 1))
        return torch.cat(list(each), 1)

    error = compared("packed convolution", ("x", "W"), packed, plain, given, out)
    return {"error": error, "forward_backward_ms": milliseconds(device, both_ways(packed, given, out))}


def delta_rule(
    device: torch.device, dtype: torch.dtype, lengths: Sequence[int], key_heads: int, value_heads: int, size: int
) -> Figures:
    row, T = Row(lengths), sum(lengths)
    shapes = (T, key_heads, size), (T, key_heads, size), (T, value_heads, size), (T, value_heads), (T, value_heads)
    q, k, v, decay, beta, out = drawn_values(device, dtype, *shapes, (T, value_heads, size))
    given = q, k, v, -decay.abs().float() / 4, beta.sigmoid()

    def packed(*rows: Tensor) -> Tensor:
        return mixing.delta_rule(chunked_delta_rule, *(x[None] for x in rows), packed=row)[0][0]

    def plain(*rows: Tensor) -> Tensor:
        def each(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            return chunked_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

        return row.within(each, *rows)

    with torch.no_grad():
        figures = {"forward_error": near("packed delta rule", packed(*given), plain(*given), most(dtype))}
        figures["forward_ms"] = milliseconds(device, lambda: packed(*given))
    figures["error"] = compared("packed delta rule", ("q", "k", "v", "g", "beta"), packed, plain, given, out)
    return figures | {"forward_backward_ms": milliseconds(device, both_ways(packed, given, out))}


def _decoded(device: torch.device, decode: Callable[[], Tensor], read: int) -> Figures:
    """`decode` gives the very bits that it gives by torch's own operations. read: bytes of what it decodes."""
    found = decode()
    usual = set(formats.IN_ONE_LAUNCH)
    try:
        formats.IN_ONE_LAUNCH.clear()
        plain = decode()
        plain_ms = milliseconds(device, decode, 3)
    finally:
        formats.IN_ONE_LAUNCH.update(usual)
    assert torch.equal(found.view(torch.int16), plain.view(torch.int16))
    ms = milliseconds(device, decode)
    return {"ms": ms, "gigabytes_per_second": (read + found.nbytes) / ms / 1e6, "plain_ms": plain_ms}


def int4(device: torch.device, experts: int, out: int, inside: int) -> Figures:
    drawn = torch.Generator(device).manual_seed(0)
    shape = experts, 2, out // 2, inside // 8
    packed = torch.randint(-(2**31), 2**31, shape, generator=drawn, dtype=torch.int64, device=device).int()
    scale = torch.randn(*shape[:-1], inside // 32, generator=drawn, device=device).bfloat16()
    return _decoded(device, lambda: formats.int4_decode(packed, scale, 32), packed.nbytes + scale.nbytes)


def fp8(device: torch.device, experts: int, out: int, inside: int) -> Figures:
    drawn = torch.Generator(device).manual_seed(0)
    octets = torch.randint(0, 256, (experts, 1, out, inside), generator=drawn, dtype=torch.int64, device=device).byte()
    weight = octets.masked_fill(octets & 127 == 127, 0).view(torch.float8_e4m3fn)  # without NaN
    scale = torch.randn(experts, 1, -(-out // 128), -(-inside // 128), generator=drawn, device=device)
    return _decoded(device, lambda: formats.fp8_decode(weight, scale, (128, 128)), weight.nbytes + scale.nbytes)


def storage(device: torch.device, dtype: torch.dtype, kind: str, E: int, O: int, I: int) -> Storage:  # noqa: E741
    """E drawn matrices [O, I], as `kind` keeps them: nf4 or int4."""
    drawn = torch.Generator(device).manual_seed(0)
    if kind == "nf4":
        nf4 = NF4Experts(E, O, I)
        nf4.allocate(device)
        for expert in range(E):
            nf4.quantize(expert, torch.randn(O, I, generator=drawn, device=device).to(dtype) * I**-0.5)
        return nf4
    frozen = FrozenExperts(E, O, I)
    dtypes = {"_packed": torch.int32, "_scale": torch.bfloat16}
    frozen.allocate(formats.Format("int4", (1, 32)), 1, dtypes, device)
    frozen.get_buffer("data_packed").random_(-(2**31), 2**31 - 1, generator=drawn)
    frozen.get_buffer("data_scale").normal_(I**-0.5 / 5, I**-0.5 / 50, generator=drawn)
    return frozen


def experts(
    device: torch.device, dtype: torch.dtype, kind: str, E: int, O: int, I: int, pairs: int, rank: int = 8  # noqa: E741
) -> Figures:  # fmt: skip
    """The product of frozen experts with LoRA. Expert 2 gets no pairs, and must get gradients of zero."""
    kept = storage(device, dtype, kind, E, O, I)
    share = torch.rand(E, generator=torch.Generator().manual_seed(0)) + 0.5
    share[2] = 0
    counts = (share / share.sum() * pairs).long().tolist()
    host = list(itertools.accumulate(counts))
    ends = Ends(torch.tensor(host, dtype=torch.int32, device=device), host)
    x, out = drawn_values(device, dtype, (host[-1], I), (host[-1], O))
    A, B = (factor * 0.02 for factor in drawn_values(device, torch.float32, (E, rank, I), (E, O, rank)))
    given = x, A, B

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return GroupedLinear.apply(x, A, B, kept, 2.0, ends)

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        each = []
        for expert, rows in enumerate(x.split(counts)):
            weight = kept.weights(expert, expert + 1, dtype)[0].float() + 2.0 * B[expert] @ A[expert]
            each.append(rows @ weight.T)
        return torch.cat(each)

    leaves = [value.detach().requires_grad_() for value in given]
    _, *of_factors = torch.autograd.grad(ours(*leaves), leaves, out)
    assert not any(gradient[2].any() for gradient in of_factors)
    # Factors are rounded to the dtype, and so is what lies between them.
    error = compared(f"{kind} experts", ("x", "A", "B"), ours, plain, given, out)
    ms = milliseconds(device, both_ways(ours, given, out))
    return {"error": error, "forward_backward_ms": ms, "tflop_per_second": 4 * host[-1] * O * I / ms / 1e9}


def nf4_together(device: torch.device, dtype: torch.dtype, E: int, O: int, I: int) -> Figures:  # noqa: E741
    """Matrices dequantized together are those dequantized one by one, to the bit."""
    kept = storage(device, dtype, "nf4", E, O, I)
    assert kept.divisible
    together = kept.weights(0, E, dtype)
    for expert in range(E):
        assert torch.equal(together[expert], kept.weights(expert, expert + 1, dtype)[0])
    ms = milliseconds(device, lambda: kept.weights(0, E, dtype))
    return {"ms": ms, "gigabytes_per_second": together.nbytes * (1 + 4.127 / 16) / ms / 1e6}
