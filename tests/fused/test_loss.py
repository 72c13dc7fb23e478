"""The terms of the loss in one launch, against the CPU's way."""

import pytest
import torch
from torch import nn

from train.layers.lora import LoRASettings
from train.masking import loss
from train.masking.loss import _held_terms_, _terms_


@pytest.mark.parametrize("vocabulary", [2, 40, 4096, 4097, 9000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_terms_and_gradients_are_the_cpus(kernels, vocabulary, scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(6, vocabulary, generator=generator)
    target = torch.tensor([0, 1, vocabulary - 1, vocabulary // 2, 0, vocabulary - 1])
    coefficient = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.0, 2.0])
    unlikely = torch.tensor([False, True, False, True, False, False])
    logits[0, 0] = logits[1, 1] = 3 * scale  # nearly certain
    gradient = logits.clone()
    nll, term = _terms_(gradient, target, coefficient, unlikely, True)
    for tracked in (False, True):
        given = logits.clone()
        found = kernels("loss").terms_(given, target, coefficient, unlikely, tracked)
        torch.testing.assert_close(found[0], nll, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1], term, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(given, gradient if tracked else logits, rtol=1e-5, atol=1e-7)
    assert (gradient[4] == 0).all() and (given[4] == 0).all()


@pytest.mark.parametrize("vocabulary", [2, 40, 4097, 9000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_divergence_from_the_base_and_its_gradient_are_the_cpus(kernels, vocabulary, scale):
    generator = torch.Generator().manual_seed(0)
    base = scale * torch.randn(6, vocabulary, generator=generator)
    drift = torch.tensor([0.0, 1e-3, 0.1, 1.0, 5.0, 1.0])[:, None]
    logits = base + drift * torch.randn(6, vocabulary, generator=generator)
    logits[5] = -base[5]  # far from it
    target, coefficient = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([1.0, 2.0, 0.5, 0.25, 1.0, 0.0])
    gradient = logits.clone()
    nll, term = _held_terms_(gradient, base, target, coefficient, True)
    exact = _held_terms_(logits.double(), base.double(), target, coefficient.double(), False)
    for tracked in (False, True):
        given = logits.clone()
        found = kernels("loss").held_terms_(given, base, target, coefficient, tracked)
        torch.testing.assert_close(found[0], nll, rtol=1e-5, atol=1e-5)
        for each in (found[1], term):
            torch.testing.assert_close(each.double(), exact[1], rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(given, gradient if tracked else logits, rtol=1e-4, atol=1e-6 * scale)
    assert found[1][0] == 0 and not given[0].any() and not given[5].any()


@pytest.mark.parametrize("lora", [False, True])
def test_a_models_loss_in_bf16_by_several_chunks_is_that_without_kernels(kernels, monkeypatch, lora):
    """The head's logits are those of BF16 in both; rounding of their gradients differs."""
    kernels("loss")
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2 * 50 * 4)  # with kernels four tokens a chunk, without two
    head = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    head.weight = nn.Parameter(torch.randn(50, 16, generator=generator).bfloat16(), requires_grad=False)
    module = loss.LossHead(head)
    if lora:
        module.add_lora(LoRASettings(rank=3, alpha=6.0, expert_rank=1, seed=0), torch.device("cpu"))
        module.lora_B.data.normal_(generator=generator)
    hidden = torch.randn(11, 16, generator=generator).bfloat16().requires_grad_()
    target, coefficient = torch.arange(11) * 7 % 50, torch.tensor([1.0, 0.5, 0.0, 0.25, 2.0, 1.0, 1, 1, 0, 2, 1])
    kind = torch.tensor([0, 1, 0, 0, 2, 1, 2, 0, 2, 1, 2], dtype=torch.int8)
    given = target, coefficient, kind, torch.randn(4, 16, generator=generator).bfloat16(), kind == 2
    wanted = [hidden, *(p for p in module.parameters() if p.requires_grad)]
    found = []
    for devices in ({"cuda"}, {"cuda", "cpu"}):
        monkeypatch.setattr(loss, "IN_ONE_LAUNCH", devices)
        terms = module(hidden, *given)
        found.append((terms, torch.autograd.grad(terms.loss, wanted)))
        assert torch.equal(module(hidden.detach(), *given).term_N, terms.term_N)  # nothing tracked but LoRA
    (plain, theirs), (terms, ours) = found
    for one, other in zip(terms, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()
