"""The GPU's decoders give the bits of the CPU's own way."""

import pytest
import torch

from train import formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "group"), [((3, 2, 5, 24), 32), ((1, 1, 7, 8), 64), ((4, 130, 4), 8)])
def test_int4_words_become_the_same_bits(kernels, shape, group, dtype):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()
    scale = torch.randn(*shape[:-1], shape[-1] * 8 // group, generator=generator).to(dtype)
    assert torch.equal(kernels("decoding").int4_decode(packed, scale, group), formats.int4_decode(packed, scale, group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 2, 130, 140), (2, 128, 128), (1, 1, 3, 1100)])
def test_fp8_blocks_become_the_same_bits(kernels, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    octets = torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).byte()
    weight = octets.masked_fill(octets & 127 == 127, 0).view(torch.float8_e4m3fn)  # without NaN
    blocks = -(-shape[-2] // 128), -(-shape[-1] // 128)
    scale = torch.randn(*shape[:-2], *blocks, generator=generator).to(dtype)
    found, expected = (
        kernels("decoding").fp8_decode(weight, scale, (128, 128)),
        formats.fp8_decode(weight, scale, (128, 128)),
    )
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
