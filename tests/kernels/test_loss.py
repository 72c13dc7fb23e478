"""The terms of the loss in one launch, against the CPU's way."""

import pytest
import torch

from train.masking.loss import _terms


@pytest.mark.parametrize("vocabulary", [2, 40, 4096, 4097, 9000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_terms_and_gradients_are_the_cpus(kernels, vocabulary, scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(6, vocabulary, generator=generator)
    target = torch.tensor([0, 1, vocabulary - 1, vocabulary // 2, 0, vocabulary - 1])
    coefficient = torch.tensor([1.0, -1.0, 0.5, -0.25, 0.0, 2.0])
    logits[0, 0] = logits[1, 1] = 3 * scale  # nearly certain
    nll, term, gradient = _terms(logits.clone(), target[:, None], coefficient[:, None], True)
    for tracked in (False, True):
        given = logits.clone()
        found = kernels("loss").terms_(given, target, coefficient, tracked)
        torch.testing.assert_close(found[0], nll[:, 0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1], term[:, 0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(given, gradient if tracked else logits, rtol=1e-5, atol=1e-7)
    assert (gradient[4] == 0).all() and (given[4] == 0).all()
