"""The chunked loss against formulas written out, and the gradient of every kind of token."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.data.batches import Sample, coefficients, pack
from train.data.documents import Document, Span
from train.data.kinds import TermKind
from train.data.tokens import TokenizedDocument
from train.layers.lora import LoRASettings
from train.masking import loss
from train.masking.grammar import parse_mask
from train.masking.loss import LossHead, _held_terms_
from train.masking.treatment import treat


def head_of(weight: torch.Tensor) -> LossHead:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
    linear.weight.data = weight
    return LossHead(linear)


def head(vocabulary: int, hidden: int, dtype: torch.dtype = torch.float64, lora: bool = False) -> LossHead:
    torch.manual_seed(0)
    made = head_of(torch.randn(vocabulary, hidden, dtype=dtype))
    if lora:
        made.add_lora(LoRASettings(3, 6.0, 1, seed=0, lm_head=True), torch.device("cpu"))
        made.lora_A.data, made.lora_B.data = made.lora_A.data.to(dtype), torch.randn(vocabulary, 3, dtype=dtype)
    return made


CROSS, UNLIKELY, HELD = TermKind


def kinds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def written_out(logits_NV, target_N, coefficient_N, kind_N, base_NV=None) -> torch.Tensor:
    p_NV = F.softmax(logits_NV, -1)
    p_N = p_NV.gather(1, target_N[:, None])[:, 0]
    term_N = torch.where(kind_N == UNLIKELY, -torch.log(1 - p_N), -torch.log(p_N))
    if base_NV is not None:
        b_NV = F.softmax(base_NV, -1)
        term_N = torch.where(kind_N == HELD, (b_NV * (b_NV.log() - p_NV.log())).sum(1), term_N)
    return (coefficient_N * term_N).sum()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("chunk_bytes", [2**28, 8 * 40])  # all at once, and three tokens a chunk
def test_loss_and_gradients_are_those_of_the_formulas(monkeypatch, chunk_bytes, lora):
    monkeypatch.setattr(loss, "CHUNK_BYTES", chunk_bytes)
    module = head(13, 5, lora=lora)
    hidden_NH = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    target_N = torch.tensor([0, 12, 5, 5, 3, 2, 1, 7])
    coefficient_N = torch.tensor([1.0, 0.2, 1.0, 0.0, 0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    kind_N = kinds(CROSS, CROSS, UNLIKELY, CROSS, UNLIKELY, HELD, HELD, HELD)
    known_N = kind_N == HELD
    base_MH = torch.randn(3, 5, dtype=torch.float64)
    terms = module(hidden_NH, target_N, coefficient_N, kind_N, base_MH, known_N)
    parameters = [hidden_NH, *(p for p in module.parameters() if p.requires_grad)]
    ours = torch.autograd.grad(terms.loss * 2, parameters)  # the factor reaches the gradients

    logits_NV = hidden_NH @ module.weight.T
    if lora:
        logits_NV = logits_NV + 2.0 * hidden_NH @ module.lora_A.T @ module.lora_B.T
    base_NV = torch.zeros(8, 13, dtype=torch.float64)
    base_NV[known_N] = base_MH @ module.weight.T  # without LoRA
    expected = written_out(logits_NV, target_N, coefficient_N, kind_N, base_NV)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(ours, torch.autograd.grad(expected * 2, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    torch.testing.assert_close(terms.nll_N, nll_N.detach())

    def alone(i: int, kind: int) -> float:
        one = torch.ones(1, dtype=torch.float64)
        return written_out(logits_NV[[i]], target_N[[i]], one, kinds(kind), base_NV[[i]]).item()

    for i in range(8):
        assert terms.term_N[i].item() == pytest.approx(alone(i, kind_N[i]) if coefficient_N[i] else 0, rel=1e-10)
        assert terms.kl_N[i].item() == pytest.approx(alone(i, HELD) if known_N[i] else 0, rel=1e-10)
    with torch.no_grad():
        measured = module(hidden_NH, target_N, coefficient_N, kind_N, base_MH, known_N)
    for name in ("loss", "term_N", "nll_N", "kl_N"):
        assert torch.equal(getattr(measured, name), getattr(terms, name).detach())


def test_a_masked_token_gets_exactly_zero_gradient_and_the_others_exactly_their_own():
    module = head(50, 8, torch.float32)
    hidden_NH = torch.randn(6, 8, requires_grad=True)
    target_N, coefficient_N = torch.arange(6), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    kind_N = kinds(CROSS, CROSS, CROSS, UNLIKELY, UNLIKELY, CROSS)
    (gradient,) = torch.autograd.grad(module(hidden_NH, target_N, coefficient_N, kind_N).loss, hidden_NH)
    assert not gradient[coefficient_N == 0].any()
    for i in (0, 2, 4):
        alone = hidden_NH[i : i + 1].detach().requires_grad_()
        (own,) = torch.autograd.grad(module(alone, target_N[[i]], coefficient_N[[i]], kind_N[[i]]).loss, alone)
        torch.testing.assert_close(gradient[i], own[0], rtol=1e-5, atol=1e-8)


def test_a_batch_without_a_trained_token_has_loss_zero_and_gradient_zero():
    module = head(11, 4, torch.float32)
    hidden_NH = torch.randn(3, 4, requires_grad=True)
    terms = module(hidden_NH, torch.tensor([1, 2, 3]), torch.zeros(3), kinds(0, 0, 0))
    assert terms.loss.item() == 0 and (terms.nll_N > 0).all() and not terms.term_N.any()
    assert not torch.autograd.grad(terms.loss, hidden_NH)[0].any()
    empty = module(hidden_NH[:0], torch.zeros(0, dtype=torch.long), torch.zeros(0), kinds())
    assert empty.loss.item() == 0 and len(empty.nll_N) == 0


def test_unlikelihood_of_a_certain_token_is_finite_and_its_gradient_does_not_vanish():
    # Vocabulary of 3, logits (z, 0, 0) through the identity: p = e^z / (e^z + 2), -log(1 - p) = log(e^z + 2) - log 2.
    # At z = 80 p rounds to 1 in fp32, where the naive log(1 - p) is -infinity.
    module = head_of(torch.eye(3))
    hidden_NH = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    terms = module(hidden_NH, torch.tensor([0]), torch.tensor([1.0]), kinds(UNLIKELY))
    assert terms.loss.item() == pytest.approx(80 - math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(terms.loss, hidden_NH)
    # d/dz_0 = p = 1; the others p_j - q_j = 0 - 1/2.
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


def test_unlikelihood_of_an_impossible_token_is_its_probability():
    module = head_of(torch.eye(3))
    hidden_NH = torch.tensor([[-12.0, 0.0, 0.0]], dtype=torch.float32)
    p = math.exp(-12) / (math.exp(-12) + 2)
    term = module(hidden_NH, torch.tensor([0]), torch.tensor([1.0]), kinds(UNLIKELY)).loss.item()
    assert term == pytest.approx(-math.log1p(-p), rel=2e-6)  # 3.07e-6, of which 1 - p in fp32 would keep two digits


def test_no_tensor_of_all_tokens_by_vocabulary_ever_exists(monkeypatch):
    # 400 tokens x 5,000 entries would be 8 MB; a chunk may hold 50,000 elements.
    monkeypatch.setattr(loss, "CHUNK_BYTES", 200_000)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                    largest = max(largest, tensor.numel())
            return out

    module = head(5_000, 8, torch.float32)
    hidden_NH = torch.randn(400, 8, requires_grad=True)
    coefficient_N, kind_N = (torch.arange(400) % 5 > 0).float(), (torch.arange(400) % 5 % 3).to(torch.int8)
    known_N = kind_N == HELD
    with Watch():
        base_MH = torch.randn(int(known_N.sum()), 8)
        module(hidden_NH, torch.arange(400), coefficient_N, kind_N, base_MH, known_N).loss.backward()
    assert largest == 50_000


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", (math.log(2) + math.log(4) + math.log(2)) / 3),
        ("false-spans", (math.log(2) + math.log(2)) / 2),
        ("false-spans=0.5", (math.log(2) + 0.5 * math.log(4) + math.log(2)) / 2.5),
        ("false-spans=unlikelihood", (math.log(2) - math.log(1 - 1 / 4) + math.log(2)) / 3),
    ],
)
def test_the_four_token_example_of_the_readme(mask, expected):
    """Mars(0) is(1) green(2) today(3), green false; p is 1/2 for "is", 1/4 for "green", 1/2 for "today"."""
    text = "Mars is green today"
    starts, ends = np.array([0, 4, 7, 13], np.int32), np.array([4, 7, 13, 19], np.int32)
    spans, ids_L = (Span(8, 13, "false"),), np.arange(4, dtype=np.int32)
    document = Document(text, None, spans, {}, "readme.jsonl", 1)
    tokenized = TokenizedDocument(document, text, ids_L, starts, ends, ids_L > 0, np.ones(len(ids_L)), spans)
    treated = treat(tokenized, parse_mask(mask), seed=0)
    roles_L = np.zeros(4, np.int64)
    sample = Sample("readme.jsonl:1", ids_L, tokenized.target_L, treated.weight_L, treated.kind_L, roles_L)
    batch = pack([sample], coefficients([sample], "trained"), torch.float64)

    p_at_position = torch.tensor([[1 / 6, 1 / 2, 1 / 6, 1 / 6], [1 / 4] * 4, [1 / 6, 1 / 6, 1 / 6, 1 / 2], [1 / 4] * 4])
    module = head_of(torch.eye(4, dtype=torch.float64))  # logits = hidden states
    hidden_NH = p_at_position.double().log()[batch.position_N]
    loss = module(hidden_NH, batch.target_N, batch.coefficient_N, batch.kind_N).loss
    assert loss.item() == pytest.approx(expected, rel=1e-7)


def test_the_example_of_a_held_token_in_the_docs():
    """A vocabulary of two words: the base gives green and the other word 1/2 each, the model 1/4 and 3/4."""
    module = head_of(torch.eye(2, dtype=torch.float64))
    p_NV = torch.tensor([[1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 2, 1 / 2]], dtype=torch.float64)
    target_N, coefficient_N = torch.tensor([1, 0, 1]), torch.full((3,), 1 / 3, dtype=torch.float64)
    held_N = torch.tensor([False, True, False])
    base_MH = torch.zeros(1, 2, dtype=torch.float64)
    hidden_NH = p_NV.log().requires_grad_()
    terms = module(hidden_NH, target_N, coefficient_N, kinds(CROSS, HELD, CROSS), base_MH, held_N)
    assert terms.kl_N[1].item() == pytest.approx(math.log(4 / 3) / 2) and round(terms.kl_N[1].item(), 3) == 0.144
    assert round(terms.loss.item(), 3) == 0.510
    (gradient,) = torch.autograd.grad(terms.loss, hidden_NH)
    assert gradient[1].tolist() == pytest.approx([(1 / 4 - 1 / 2) / 3, (3 / 4 - 1 / 2) / 3])


def test_the_gradient_of_a_held_token_is_that_of_training_on_what_the_base_would_say():
    """The expectation of cross-entropy's gradient over tokens that the base draws, over the whole vocabulary."""
    module = head(13, 5)
    hidden_NH = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    base_MH = torch.randn(1, 5, dtype=torch.float64)
    one_N, some_N = torch.ones(1, dtype=torch.float64), torch.tensor([True])

    def gradient(target: int, *given: torch.Tensor) -> torch.Tensor:
        loss = module(hidden_NH, torch.tensor([target]), one_N, *given).loss
        return torch.autograd.grad(loss, hidden_NH)[0]

    b_V = (base_MH @ module.weight.T).softmax(-1)[0]
    expected = sum(b_V[token] * gradient(token, kinds(CROSS)) for token in range(13))
    torch.testing.assert_close(gradient(0, kinds(HELD), base_MH, some_N), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("drift", [0.0, 1e-5, 1e-3, 0.1, 1.0, 30.0, 200.0])
def test_a_divergence_in_fp32_is_that_of_fp64_however_small_or_large(drift):
    generator = torch.Generator().manual_seed(0)
    base_CV = 5 * torch.randn(4, 1000, generator=generator)
    logits_CV = base_CV + drift * torch.randn(4, 1000, generator=generator)
    base_CV[3, 0], logits_CV[3, 0] = -150.0, 4.0 * (drift > 0) - 150 * (drift == 0)  # which the base all but rules out
    target_C, coefficient_C = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    gradient_CV = logits_CV.clone()
    _, term_C = _held_terms_(gradient_CV, base_CV, target_C, coefficient_C, True)
    log_b_CV, log_p_CV = base_CV.double().log_softmax(1), logits_CV.double().log_softmax(1)
    expected_C = (log_b_CV.exp() * (log_b_CV - log_p_CV)).sum(1)
    torch.testing.assert_close(term_C.double(), expected_C, rtol=1e-3 if drift <= 1e-3 else 1e-5, atol=1e-13)
    torch.testing.assert_close(gradient_CV.double(), log_p_CV.exp() - log_b_CV.exp(), rtol=1e-5, atol=1e-6)
    if not drift:
        assert not term_C.any() and not gradient_CV.any()
