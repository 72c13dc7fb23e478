"""Checks that a GPU computes the operations of a training step correctly, against plain references on the same device:
grouped products, NF4 and INT4, packed attention, the packed convolution and the packed gated delta rule. The inputs are
small, so the checks take seconds. They run on a CPU too.

Each check takes (device, dtype), calls the trainer's own functions and returns the largest relative error that it
found. It raises Wrong, which says what is off, if an error is more than rounding.

Shapes: P rows, E groups of rows, O and I output and input features; T tokens of a packed row, H heads, K and V head
sizes of keys and values, C channels; D documents, L tokens of the longest one.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen

from launch.agreement import Wrong, compared, drawn_values, most, near
from launch.check_results import MAY_PASS, PASSED, WILL_NOT_PASS, Finding
from launch.launches import fused
from train import formats
from train.data.row import Row
from train.experts import products, storage
from train.experts.dispatch import Ends
from train.layers import mixing

LENGTHS = (
    65,
    64,
    3,
    1,
    70,
)  # tokens of a row's documents: a chunk of 64, a little more than one, and almost none
NF4_STEP = 0.152  # half of the widest gap between codes, -1 to -0.6962 (Dettmers et al., arXiv 2305.14314, appendix E)


def grouped_products(device: torch.device, dtype: torch.dtype) -> float:
    """Checks the product of rows [P, I] with the weights [E, O, I] of their groups, and both gradients: with groups of
    very different sizes, one of them empty, and with all groups empty."""
    worst = 0.0
    for sizes in ((24, 1, 0, 40), (0, 0, 0, 0)):
        x_PI, weight_EOI, out_PO = drawn_values(device, dtype, (sum(sizes), 64), (len(sizes), 32, 64), (sum(sizes), 32))
        host = list(itertools.accumulate(sizes))
        every = Ends(torch.tensor(host, dtype=torch.int32, device=device), host)

        def product(x: Tensor, weight: Tensor, ends: Ends = every) -> Tensor:
            return products.GroupedTrained.apply(x, weight, ends)

        def plain(x: Tensor, weight: Tensor, sizes: Sequence[int] = sizes) -> Tensor:
            return torch.cat([part @ one.T for part, one in zip(x.split(list(sizes)), weight, strict=True)])

        worst = max(worst, compared("grouped product", ("x", "W"), product, plain, (x_PI, weight_EOI), out_PO))
    return worst


def nf4(device: torch.device, dtype: torch.dtype) -> float:
    """Checks two matrices quantized to NF4: they are decoded as the format defines, and no value is farther from the
    original one than half a step."""
    (weight_EOI,) = drawn_values(device, dtype, (2, 64, 256))
    experts = storage.NF4Experts(*weight_EOI.shape)
    experts.allocate(device)
    for expert, weight_OI in enumerate(weight_EOI):
        experts.quantize(expert, weight_OI)
    # The high half of a byte comes first. The scale of 64 values is itself a code: 256 of these codes share a scale,
    # and a matrix has one offset.
    code = torch.stack([experts.packed >> 4, experts.packed & 15], -1).flatten(1).long()
    scale = experts.code2[experts.absmax.long()] * experts.absmax2 + experts.offset  # a matrix has exactly 256 codes
    plain = (experts.code[code].unflatten(1, (-1, 64)) * scale[..., None]).view_as(weight_EOI)
    worst = near("NF4, decoded,", experts.weights(0, 2, dtype), plain, most(dtype))
    values = weight_EOI.float().unflatten(-1, (-1, 64))
    off = (values - plain.unflatten(-1, (-1, 64))).abs().amax(-1) / values.abs().amax(-1)
    if not bool((off < 1.1 * NF4_STEP).all()):
        raise Wrong(f"NF4: a value differs from the original by {off.max().item():.2f} of its block's largest value")
    return worst


def int4(device: torch.device, dtype: torch.dtype) -> float:
    """Checks INT4 words of random bits, of several matrices at once: they are decoded to exactly the values that the
    format defines, and encoding these values gives the same words."""
    drawn = torch.Generator().manual_seed(0)
    word = torch.randint(-(2**31), 2**31, (2, 3, 64, 32), generator=drawn, dtype=torch.int64).int().to(device)
    scale = (torch.rand(2, 3, 64, 8, generator=drawn) + 0.5).bfloat16().to(device)
    place = torch.arange(8, device=device)
    q = (((word[..., None] >> (4 * place)) & 15) - 8).flatten(-2).float()
    plain = (q.unflatten(-1, (-1, 32)) * scale.float()[..., None]).flatten(-2).bfloat16()
    found = formats.int4_decode(word, scale, 32)
    if not torch.equal(found, plain):
        raise Wrong(f"INT4: {int((found != plain).sum())} of {plain.numel()} values are decoded wrongly")
    again, kept = formats.int4_encode(found[0, 0], scale[0, 0], 32)
    if not (torch.equal(again, word[0, 0]) and torch.equal(kept, scale[0, 0])):
        raise Wrong("INT4: encoding the decoded values does not give the same words")
    return 0.0


def attention(device: torch.device, dtype: torch.dtype) -> float:
    """Checks attention within the documents of a packed row: with query heads that share keys, as in Qwen, and with
    values smaller than the keys, as in MLA."""
    row, tokens = Row(LENGTHS), sum(LENGTHS)
    worst = 0.0
    for heads, shared, K, V in ((4, 2, 128, 128), (2, 2, 192, 128)):
        shapes = (heads, tokens, K), (shared, tokens, K), (shared, tokens, V), (tokens, heads, V)
        *given, out = drawn_values(device, dtype, *shapes)
        module = nn.Module()

        def packed(q: Tensor, k: Tensor, v: Tensor, module: nn.Module = module) -> Tensor:
            return mixing.attention(module, q[None], k[None], v[None], None, scaling=q.shape[-1] ** -0.5, packed=row)[
                0
            ][0]

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            document_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).to(q.device)
            seen_TT = (document_T[:, None] == document_T).tril()
            weight = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen_TT, float("-inf")).softmax(-1)
            return (weight @ v).transpose(0, 1)

        worst = max(worst, compared("packed attention", ("q", "k", "v"), packed, plain, given, out))
    return worst


def convolution(device: torch.device, dtype: torch.dtype) -> float:
    """Checks the causal convolution with four taps [C, 4] within the documents of a packed row [C, T]."""
    row, tokens = Row(LENGTHS), sum(LENGTHS)
    x_CT, weight_C4, out_CT = drawn_values(device, dtype, (64, tokens), (64, 4), (64, tokens))

    def packed(x: Tensor, weight: Tensor) -> Tensor:
        return mixing.convolution(
            transformers_own("causal_conv1d_fn"), x[None], weight, None, activation="silu", packed=row
        )[0]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        each = (F.pad(part, (3, 0)).unfold(1, 4, 1) for part in x.split(list(LENGTHS), 1))
        return F.silu(torch.cat([(taps * weight[:, None]).sum(-1) for taps in each], 1))

    return compared("packed convolution", ("x", "W"), packed, plain, (x_CT, weight_C4), out_CT)


def delta_rule(device: torch.device, dtype: torch.dtype) -> float:
    """Checks the gated delta rule within the documents of a packed row against its recurrence, token by token (Yang et
    al., arXiv 2412.06464, equation 10)."""
    row, tokens, K = Row(LENGTHS), sum(LENGTHS), 64
    shapes = (tokens, 2, K), (tokens, 2, K), (tokens, 4, K), (tokens, 4), (tokens, 4), (tokens, 4, K)
    q, k, v, decay, beta, out = drawn_values(device, dtype, *shapes)
    given = q, k, v, -decay.abs().float() / 4, beta.sigmoid()

    def packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return mixing.delta_rule(chunked_delta_rule, q[None], k[None], v[None], g[None], beta[None], packed=row)[0][0]

    def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(2, 1) for x in (q * K**-0.5, k))
        made = []
        for start, stop in itertools.pairwise(row.ends):
            state_HKV = q.new_zeros(4, K, K)
            for t in range(start, stop):
                state_HKV = state_HKV * g[t].exp()[:, None, None]
                new_HV = beta[t][:, None] * (v[t] - (k[t][:, None] @ state_HKV)[:, 0])
                state_HKV = state_HKV + k[t][:, :, None] * new_HV[:, None]
                made.append((q[t][:, None] @ state_HKV)[:, 0])
        return torch.stack(made)

    return compared("packed delta rule", ("q", "k", "v", "g", "beta"), packed, plain, given, out)


CHECKS: dict[str, Callable[[torch.device, torch.dtype], float]] = {
    "grouped products": grouped_products, "NF4": nf4, "INT4": int4, "packed attention": attention,
    "packed convolution": convolution, "packed delta rule": delta_rule, "norms, sums and the loss": fused,
}  # fmt: skip


def of_model(model: Any | None) -> list[str]:
    """Returns the names of the checks that a model needs; of all checks if the model is not known (None)."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    linear = model is None or "linear_attention" in kinds
    return [name for name in CHECKS if linear or name not in ("packed convolution", "packed delta rule")]


def transformers_own(name: str) -> Callable[..., Tensor]:
    """Returns the plain function of transformers' Qwen3.5 module, without the GPU kernel that transformers may have
    bound to its name at import."""
    theirs = getattr(qwen, name)
    while isinstance(theirs, functools.partial):  # layers/mixing.py has bound it, in a process that has built a model
        theirs = theirs.args[0]
    return getattr(theirs, "__wrapped__", theirs)


def chunked_delta_rule(q_DLHK: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
    """Runs transformers' own fallback on q [D, L, H, K] and k, v with fewer or as many heads of keys as of values. The
    shared heads are repeated, since the fallback of transformers 5.17 does not take them."""
    shared = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(shared, 2) for x in (q_DLHK, k)) if shared > 1 else (q_DLHK, k)
    return transformers_own("torch_chunk_gated_delta_rule")(q, k, v, **more)


def computed(names: Sequence[str], devices: Sequence[torch.device], dtype: torch.dtype = torch.bfloat16) -> Finding:
    """Runs the named checks on each device and returns the finding. An exception of any kind is a failed check."""
    wrong: list[dict[str, str]] = []
    worst = 0.0
    for device in devices:
        wrong.append({})
        for name in names:
            try:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # for Triton's launches
                    worst = max(worst, CHECKS[name](device, dtype))
            except Exception as error:  # of any kind: a kernel may fail to compile, or fault
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                wrong[-1][name] = first if isinstance(error, Wrong) else f"{name}: {type(error).__name__}: {first}"
    return judge(names, wrong, worst)


def judge(names: Sequence[str], wrong: Sequence[dict[str, str]], worst: float = 0.0) -> Finding:
    """Returns the finding on the GPUs of a node. wrong: for each GPU, check -> what went wrong. worst: the largest
    relative error. If the same checks fail on all GPUs, the cause is assumed to be the software (WILL_NOT_PASS), else a
    GPU (MAY_PASS)."""
    told = [f"GPU {index}: {text}" for index, own in enumerate(wrong) for text in own.values()]
    if not told:
        text = f"{len(wrong)} GPUs: {', '.join(names)}: error against plain references at most {worst:.1e}"
        return Finding("computing", PASSED, text)
    if len({frozenset(own) for own in wrong}) == 1:
        fix = "Install the versions of constraints.txt with the gpu extra (pip install -e '.[gpu]')."
        return Finding("computing", WILL_NOT_PASS, "; ".join([*told, fix]))
    fix = "Exclude this node (sbatch --exclude=NODE), and have its GPU tested."
    return Finding("computing", MAY_PASS, "; ".join([*told, fix]))
