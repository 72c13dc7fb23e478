"""Quantized formats against compressed-tensors, transformers and the makers' formulas, bit for bit."""

import itertools
import json

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.support.layouts import FP8, INT4
from train.experts.dispatch import Ends
from train.experts.products import GroupedLinear, runs
from train.experts.storage import FrozenExperts, NF4Experts
from train.formats import (
    Format,
    fp8_decode,
    fp8_decode_range,
    fp8_encode,
    int4_decode,
    int4_encode,
    quantized_format,
)
from train.runtime.errors import UserError


def fp8_matrix(rows: int, columns: int, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    scale = torch.rand(-(-rows // block), -(-columns // block), generator=generator) * 1e-3
    return codes.view(torch.float8_e4m3fn), scale


def int4_matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int64, generator=generator).int()
    return packed, (torch.randn(rows, columns // 32, generator=generator) * 0.01).bfloat16()


def test_int4_by_hand():
    # 0x8F012345: the lowest four bits first, each less 8; the last with the sign bit set
    packed = torch.tensor([[0x8F012345 - 2**32, 0x76543210, 0, 0]], dtype=torch.int32)
    scale = torch.tensor([[0.5]], dtype=torch.bfloat16)
    expected = [-3, -4, -5, -6, -7, -8, 7, 0, -8, -7, -6, -5, -4, -3, -2, -1, *[-8] * 16]
    assert int4_decode(packed, scale, 32).tolist() == [[q * 0.5 for q in expected]]


def test_int4_is_the_decompression_of_compressed_tensors_bit_for_bit():
    packed, scale = int4_matrix(48, 96)
    q = unpack_from_int32(packed, 4, torch.Size((48, 96)))
    expected = (q.unflatten(1, (3, 32)).to(torch.bfloat16) * scale[..., None]).flatten(1)
    assert torch.equal(int4_decode(packed, scale, 32), expected)
    assert torch.equal(pack_to_int32(q, 4), packed)
    stacked = int4_decode(packed.expand(2, 3, -1, -1), scale.expand(2, 3, -1, -1), 32)
    assert torch.equal(stacked[1, 2], expected)


def test_int4_with_f16_scales_is_rounded_once():
    packed, _ = int4_matrix(64, 128)
    scale = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)).mul(0.01).half()
    words = packed.numpy().astype(np.int64) & 0xFFFFFFFF
    q = np.stack([((words >> (4 * j)) & 15) - 8 for j in range(8)], -1).reshape(64, 128)
    exact = q * scale.double().numpy().repeat(32, 1)
    assert torch.equal(int4_decode(packed, scale, 32), torch.from_numpy(exact).bfloat16())


def test_int4_written_again_with_its_scales_is_the_same_bits():
    packed, scale = int4_matrix(48, 96)
    words, scales = int4_encode(int4_decode(packed, scale, 32), scale, 32)
    assert torch.equal(words, packed) and torch.equal(scales, scale)
    weight = int4_decode(packed, scale, 32)
    weight[3, 40] = 1.0  # beyond its group's scale
    words, scales = int4_encode(weight, scale, 32)
    assert scales[3, 1] == torch.tensor(1 / 7.5).bfloat16() and (scales != scale).sum() == 1
    assert int4_decode(words, scales, 32)[3, 40].item() == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "code", "kept"), [(7.49, 7, True), (7.51, 7, False), (-8.49, -8, True), (-8.51, -8, False)]
)
def test_an_int4_scale_is_kept_while_rounding_is_not_cut(sign, value, code, kept):
    """Of -8..7, no value further than half a step: by hand, with the scale 0.25 of either sign."""
    packed, scale = torch.full((1, 4), 0x11111111 * 8 - 2**32, dtype=torch.int32), torch.tensor([[sign * 0.25]])
    weight = int4_decode(packed, scale, 32).float()
    assert not weight.any()
    weight[0, 9] = value * sign * 0.25
    words, scales = int4_encode(weight, scale, 32)
    assert (scales == scale).all() == kept
    if kept:
        assert int4_decode(words, scales, 32)[0, 9] == code * sign * 0.25
    else:
        assert scales == pytest.approx(abs(value) * 0.25 / 7.5)
    assert int4_decode(words, scales, 32).count_nonzero() == 1


def test_a_scale_of_zero_keeps_zeros_and_gives_way_to_others_and_nan_stays_nan():
    zeros, scale = torch.zeros(128, 256), torch.zeros(1, 2)
    codes, scales = fp8_encode(zeros, scale, (128, 128))
    assert not codes.float().any() and not scales.any()
    zeros[3, 200], zeros[5, 201] = 1.0, float("nan")
    codes, scales = fp8_encode(zeros, torch.tensor([[0.0, 0.01]]), (128, 128))
    assert codes.float()[5, 201].isnan() and codes.float().isnan().sum() == 1
    words, scales = int4_encode(torch.zeros(2, 64), torch.zeros(2, 2), 32)
    assert not int4_decode(words, scales, 32).any() and not scales.any()
    weight = torch.zeros(2, 64)
    weight[1, 40] = 0.7
    words, scales = int4_encode(weight, torch.zeros(2, 2), 32)
    assert scales.count_nonzero() == 1 and int4_decode(words, scales, 32)[1, 40].item() == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (64, 96), (384, 128)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_the_dequantization_of_transformers_bit_for_bit(rows, columns, scale_dtype):
    weight, scale = fp8_matrix(rows, columns)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.to(scale_dtype)).bfloat16()
    assert torch.equal(fp8_decode(weight, scale.to(scale_dtype), (128, 128)), expected)


def test_fp8_blocks_at_the_edges_are_cut_blocks():
    """Kimi's kv_a_proj has 576 rows: four blocks and a half, which transformers would divide evenly."""
    weight, scale = fp8_matrix(576, 200)
    values, scales = weight.float().numpy(), scale.numpy()
    expected = np.array([[values[r, c] * scales[r // 128, c // 128] for c in range(200)] for r in range(576)])
    assert torch.equal(fp8_decode(weight, scale, (128, 128)), torch.from_numpy(expected).bfloat16())


@settings(deadline=None)
@given(st.integers(0, 576 * 200), st.integers(0, 576 * 200))
def test_any_range_of_a_flattened_fp8_matrix_can_be_decoded(one, other):
    start, stop = min(one, other), max(one, other)
    weight, scale = fp8_matrix(576, 200)
    if start == stop:
        return
    first, last = start // 200 // 128, (stop - 1) // 200 // 128
    found = fp8_decode_range(weight.view(-1)[start:stop], scale[first : last + 1].view(-1), (128, 128), start, 200)
    assert torch.equal(found, fp8_decode(weight, scale, (128, 128)).view(-1)[start:stop])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_written_again_with_its_scales_is_the_same_bits(scale_dtype):
    weight, scale = fp8_matrix(576, 200)
    scale = scale.to(scale_dtype)
    codes, scales = fp8_encode(fp8_decode(weight, scale, (128, 128)).float(), scale, (128, 128))
    assert torch.equal(codes.float(), weight.float()) and torch.equal(scales, scale)  # -0 and 0 alike


def test_an_fp8_block_gets_a_new_scale_where_a_value_is_beyond_its_own():
    weight, scale = fp8_matrix(256, 128)
    values = fp8_decode(weight, scale, (128, 128)).float()
    values[200, 5] = 10.0
    codes, scales = fp8_encode(values, scale, (128, 128))
    assert scales[0] == scale[0] and scales[1] == pytest.approx(10 / 448)
    assert fp8_decode(codes, scales, (128, 128))[200, 5].item() == 10.0
    assert torch.equal(codes[:128].float(), weight[:128].float())


def test_the_format_is_that_of_config_json_wherever_it_stands():
    assert quantized_format({}, "") == Format()
    assert quantized_format({"quantization_config": FP8}, "") == Format("fp8", (128, 128))
    assert quantized_format({"text_config": {"quantization_config": INT4}}, "") == Format("int4", (1, 32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"quant_method": "gptq"},
        FP8 | {"weight_block_size": None},
        FP8 | {"weight_block_size": [True, 128]},
        "fp8",
        INT4 | {"format": "nvfp4-pack-quantized"},
        json.loads(json.dumps(INT4).replace('"num_bits": 4', '"num_bits": 8')),
        json.loads(json.dumps(INT4).replace('"symmetric": true', '"symmetric": false')),
        json.loads(json.dumps(INT4).replace('"group_size": 32', '"group_size": true')),
        INT4 | {"config_groups": [1]},
        INT4 | {"config_groups": {"group_0": {"weights": "int4"}}},
    ],
)
def test_another_quantization_is_refused_with_what_can_be_read(wrong):
    with pytest.raises(UserError, match=r"^DIR/config\.json: quantization_config.* can be read|are read"):
        quantized_format({"quantization_config": wrong}, "DIR")


# Storage: the grouped product of quantized experts is that of the dequantized ones


def stored(kind: str, experts: int, out: int, inside: int) -> tuple[FrozenExperts | NF4Experts, torch.Tensor]:
    """A storage of experts, and their weights [E, out, in] as the formula of its format gives them."""
    cpu = torch.device("cpu")
    if kind == "nf4":
        nf4 = NF4Experts(experts, out, inside)
        nf4.allocate(cpu)
        expected = []
        for expert in range(experts):
            weight = torch.randn(out, inside, generator=torch.Generator().manual_seed(expert)).bfloat16()
            nf4.quantize(expert, weight)
            packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            expected.append(bnb.dequantize_4bit(packed, state))
        return nf4, torch.stack(expected)
    format = {"plain": Format(), "fp8": Format("fp8", (128, 128)), "int4": Format("int4", (1, 32))}[kind]
    storage = FrozenExperts(experts, out, inside)
    dtypes = {"plain": {"": torch.bfloat16}, "fp8": {"": torch.float8_e4m3fn, "_scale_inv": torch.float32}}
    storage.allocate(format, 2, dtypes.get(kind, {"_packed": torch.int32, "_scale": torch.bfloat16}), cpu)
    weights = []
    for expert in range(experts):
        halves = []
        for matrix in range(2):
            parts = storage.matrix_parts(expert, matrix)
            if kind == "plain":
                values = [torch.randn(out // 2, inside).bfloat16()]
                halves.append(values[0])
            elif kind == "fp8":
                values = list(fp8_matrix(out // 2, inside))
                halves.append(fp8_decode(*values, (128, 128)))
            else:
                values = list(int4_matrix(out // 2, inside))
                halves.append(int4_decode(*values, 32))
            for place, value in zip(parts.values(), values, strict=True):
                place.copy_(value + expert if value.dtype == torch.int32 else value)
        if kind == "int4":
            halves = [int4_decode(int4_matrix(out // 2, inside)[0] + expert, int4_matrix(out // 2, inside)[1], 32)] * 2
        weights.append(torch.cat(halves))
    return storage, torch.stack(weights)


@pytest.mark.parametrize("way", ["one by one", "together", "on threads"])
@pytest.mark.parametrize("kind", ["plain", "fp8", "int4", "nf4"])
def test_products_and_gradients_of_stored_experts_are_those_of_the_dequantized(kind, way, monkeypatch):
    """One by one, as on a CPU's only thread, in one launch, as on a GPU, or each by one of a CPU's threads."""
    together = way == "together"
    experts, out, inside, rank, scale = 5, 256 if together else 320, 192, 4, 1.7
    if together:
        cpu = runs
        monkeypatch.setattr("train.experts.products.runs", lambda *given: cpu(*given[:2], torch.device("meta")))
    monkeypatch.setattr("train.experts.products.on_threads", lambda *_: way == "on threads")
    storage, weight_EOI = stored(kind, experts, out, inside)
    counts = [3, 0, 7, 1, 0]  # two experts without tokens
    ends = Ends(torch.tensor(counts).cumsum(0).to(torch.int32), list(itertools.accumulate(counts)))
    torch.manual_seed(0)
    x = torch.randn(sum(counts), inside, requires_grad=True)
    A = (torch.randn(experts, rank, inside) * 0.1).requires_grad_()
    B = (torch.randn(experts, out, rank) * 0.1).requires_grad_()
    if kind == "plain":  # the product of what is not quantized takes activations of the same dtype
        storage.data = storage.data.float()
    seen = []
    whole = storage.weights
    storage.weights = lambda *given: seen.append(given[:2]) or whole(*given)  # type: ignore[method-assign]
    y = GroupedLinear.apply(x, A, B, storage, scale, ends)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, A, B), grad)

    expert_P = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))
    expected_y = torch.einsum("poi,pi->po", (weight_EOI.float() + scale * B @ A)[expert_P], x)
    expected = torch.autograd.grad(expected_y, (x, A, B), grad)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    # In forward and again in backward; together, those without tokens between others are not left out.
    each = [(0, 1), (2, 3), (3, 4)] if not together else [(0, 4)]
    assert sorted(seen) == ([] if kind == "plain" else sorted(2 * each))


@pytest.mark.parametrize("kind", ["fp8", "int4", "nf4"])
def test_experts_are_dequantized_together_to_the_bits_of_one_by_one(kind):
    storage, weight_EOI = stored(kind, 6, 256, 192)
    assert torch.equal(storage.weights(1, 5, torch.bfloat16), weight_EOI[1:5])
    odd, _ = stored("nf4", 2, 320, 192)
    assert storage.divisible and not odd.divisible
