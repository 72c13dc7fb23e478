"""What is done around the grouped products, against plain torch.

Shapes as in train/fused/experts.py.
"""

import pytest
import torch
import torch.nn.functional as F

from train.experts.dispatch import Ends
from train.experts.module import gated
from train.experts.products import add_grouped_


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("width", [8, 24, 1100])
def test_the_gated_activation_and_its_gradients_are_torchs(kernels, width):
    gate_up, weight, grad = drawn(5, 2 * width), drawn(5, 1, seed=1), drawn(5, width, seed=2)
    leaves = gate_up.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = gated(*leaves, F.silu)
    experts = kernels("experts")
    torch.testing.assert_close(experts.gated(gate_up, weight), expected, rtol=1e-6, atol=1e-6)
    found = experts.gated_backward(grad, gate_up, weight)
    for mine, theirs in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [[3, 0, 70, 1, 0], [0, 0, 0, 0, 130], [64, 64, 1, 0, 2], [0] * 5])
@pytest.mark.parametrize(("rank", "columns"), [(4, 24), (20, 136), (130, 24)])
def test_each_row_gets_the_product_with_its_experts_matrix_added(kernels, counts, rank, columns):
    ends, pairs = torch.tensor(counts).cumsum(0).int(), sum(counts)
    y, h, B = drawn(pairs, columns), drawn(pairs, rank, seed=1), drawn(5, columns, rank, seed=2)
    for right in (B.transpose(1, 2), B.transpose(1, 2).contiguous()):
        expected, found = y.clone(), y.clone()
        add_grouped_(expected, h, right, Ends(ends, ends.tolist()), 0.5)
        kernels("experts").add_grouped_(found, h, right, ends, 0.5)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_summed_in_fp32_and_a_place_of_minus_one_is_none(kernels):
    x = drawn(7, 1030, dtype=torch.bfloat16)
    place = torch.tensor([[0, 3, -1], [-1, -1, -1], [6, -1, 2], [5, 1, 4]], dtype=torch.int32)
    found = kernels("experts").summed(x, place)
    expected = torch.stack([
        sum((x[i].float() for i in row if i >= 0), torch.zeros(1030)) for row in place.tolist()
    ])  # fmt: skip
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)
    assert (found[1] == 0).all()
