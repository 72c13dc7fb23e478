"""The kernels of a step at real widths: 8,192 tokens of whole documents, heads and experts of the real models."""

import pytest
import torch

from launch import launches
from launch.computing import CHECKS
from tests.gpu import parts
from tests.gpu.launches import figures as measured

DOCUMENTS = [3500, 2047, 1300, 700, 400, 129, 65, 41, 5, 3, 1, 1]  # 8,192 tokens
BF16 = torch.bfloat16


@pytest.mark.parametrize("name", CHECKS)
def test_what_preflight_computes(gpu, figures, name):
    figures[f"preflight: {name}"] = {"error": CHECKS[name](gpu, BF16)}


@pytest.mark.parametrize(
    ("model", "heads", "shared", "K", "V"), [("Qwen3.5-397B", 32, 2, 256, 256), ("Kimi K2.5", 64, 64, 192, 128)]
)
def test_attention(gpu, figures, model, heads, shared, K, V):
    figures[f"attention of {model}"] = parts.attention(gpu, BF16, DOCUMENTS, heads, shared, K, V)


def test_convolution_of_qwen(gpu, figures):
    figures["convolution of Qwen3.5-397B"] = parts.convolution(gpu, BF16, DOCUMENTS, 2 * 16 * 128 + 64 * 128)


def test_delta_rule_of_qwen(gpu, figures):
    try:
        figures["delta rule of Qwen3.5-397B"] = parts.delta_rule(gpu, BF16, DOCUMENTS, 16, 64, 128)
    except RuntimeError as error:
        if "Triton" not in str(error):
            raise
        pytest.skip(str(error))  # flash-linear-attention does not take this Triton on this GPU


def test_int4_and_fp8_are_decoded_to_the_same_bits(gpu, figures):
    figures["INT4 of Kimi K2.5"] = parts.int4(gpu, 27, 4096, 7168)
    figures["FP8 of DeepSeek-V3"] = parts.fp8(gpu, 16, 2048, 7168)
    parts.fp8(gpu, 2, 2050, 4100)  # which no block divides


def test_nf4_of_many_experts_is_decoded_to_the_same_bits(gpu, figures):
    figures["NF4 of Qwen3.5-397B"] = parts.nf4_together(gpu, BF16, 64, 2048, 4096)


@pytest.mark.parametrize(
    ("model", "kind", "E", "shape", "pairs"),
    [("Qwen3.5-397B", "nf4", 64, (2048, 4096), 81_920), ("Kimi K2.5", "int4", 48, (4096, 7168), 65_536)],
)
def test_experts(gpu, figures, model, kind, E, shape, pairs):
    figures[f"experts of {model}, {kind}"] = parts.experts(gpu, BF16, kind, E, *shape, pairs)


@pytest.mark.parametrize(
    ("kind", "rows", "columns"), [("qwen", 8192, 4096), ("llama", 8192, 7168), ("gated", 2**19, 128)]
)
def test_norms(gpu, figures, kind, rows, columns):
    case = launches.norm(gpu, BF16, kind, rows, columns)
    # Forward reads and writes as many as the gate adds to; backward reads them and the gradient, and writes.
    moved = case.out.nbytes * (8 if kind == "gated" else 5)
    figures[f"RMSNorm, {kind}, {columns} wide"] = measured(gpu, case, ["rms_norm", "rms_norm_backward"], moved)


def test_what_stands_around_the_experts_products(gpu, figures):
    case = launches.activation(gpu, BF16, 81_920, 1024)
    figures["gated activation"] = measured(gpu, case, ["gated", "gated_backward"], 8 * case.out.nbytes)
    case = launches.exchange(gpu, BF16, 8192, 64, 10, 4096)
    figures["tokens to 64 experts and back"] = measured(gpu, case, ["summed"])
    for rank in (8, 256):
        case = launches.sums(gpu, BF16, [1300] * 60 + [0, 1, 0, 3900], rank, 4096)
        figures[f"sums of factors of rank {rank}"] = measured(gpu, case, ["add_grouped"])


def test_loss_of_qwen(gpu, figures):
    case = launches.loss(gpu, BF16, 2048, 4096, 248_320)
    figures["loss of Qwen3.5-397B"] = measured(gpu, case, ["loss_terms"])
    case = launches.held(gpu, BF16, 2048, 4096, 248_320)
    figures["loss of held tokens of Qwen3.5-397B"] = measured(gpu, case, ["held_terms"])
