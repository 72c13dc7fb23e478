"""The expert-parallel module in one process: against transformers' own experts, and the initial LoRA weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from launch.trace import HostWaits
from tests.support.models import QWEN
from train.experts import products
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts, padded_rank
from train.experts.recompute import same_routing
from train.experts.storage import FrozenExperts
from train.formats import PLAIN
from train.layers.lora import LoRASettings

LORA = LoRASettings(rank=8, alpha=16.0, expert_rank=3, seed=4)


def pair(ep: ExpertGroup | None = None) -> tuple[Qwen3_5MoeExperts, ExpertParallelExperts]:
    """transformers' module and ours with the same weights; ours holds the experts of `ep`."""
    torch.manual_seed(0)
    stock = Qwen3_5MoeExperts(Qwen3_5MoeTextConfig(**QWEN))
    ours = ExpertParallelExperts("layers.0.mlp.experts", 8, 32, 16, stock.act_fn, ep or ExpertGroup())
    owned = ours.ep.owned(8)
    for name, parameter in stock.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        storage = FrozenExperts(len(owned), *parameter.shape[1:])
        storage.allocate(PLAIN, 1, {"": parameter.dtype}, torch.device("cpu"))
        storage.data[:, 0] = parameter.data[owned.start : owned.stop]
        ours.frozen[name] = storage
    return stock, ours


def train_weights(ours: ExpertParallelExperts) -> None:
    """Makes parameters of the frozen weights."""
    for name, storage in dict(ours.frozen).items():
        ours.register_parameter(name, nn.Parameter(storage.plain))
    ours.frozen.clear()


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden_TH = torch.randn(tokens, 32, requires_grad=True)
    index_Tk = torch.stack([torch.randperm(7)[:2] for _ in range(tokens)])  # expert 7 gets nothing
    weight_Tk = torch.rand(tokens, 2, requires_grad=True)
    return hidden_TH, index_Tk, weight_Tk


def test_output_and_gradients_are_those_of_transformers():
    stock, ours = pair()
    hidden_TH, index_Tk, weight_Tk = routing(20)
    grad_TH = torch.randn(20, 32)
    expected = torch.autograd.grad(stock(hidden_TH, index_Tk, weight_Tk), (hidden_TH, weight_Tk), grad_TH)
    found = torch.autograd.grad(ours(hidden_TH, index_Tk, weight_Tk), (hidden_TH, weight_Tk), grad_TH)
    torch.testing.assert_close(ours(hidden_TH, index_Tk, weight_Tk), stock(hidden_TH, index_Tk, weight_Tk))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_lora_is_the_frozen_layer_with_w_plus_scale_b_a():
    stock, ours = pair()
    ours.add_lora(LORA, torch.float32, torch.device("cpu"))
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B"):
            parameter.data[:, :, :3] = torch.randn_like(parameter[:, :, :3]) * 0.1
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            A, B = (getattr(ours, f"{name}_lora_{f}") for f in "AB")
            parameter += 16 / 3 * B @ A
    hidden_TH, index_Tk, weight_Tk = routing(20)
    torch.testing.assert_close(
        ours(hidden_TH, index_Tk, weight_Tk), stock(hidden_TH, index_Tk, weight_Tk), rtol=1e-4, atol=1e-5
    )


def test_padding_is_sent_nowhere_and_counted_nowhere():
    stock, ours = pair()
    hidden_TH, index_Tk, weight_Tk = routing(6)
    ours.keep_T = torch.tensor([True, True, False, True, False, True])
    out_TH = ours(hidden_TH, index_Tk, weight_Tk)
    expected_TH = stock(hidden_TH, index_Tk, weight_Tk)
    torch.testing.assert_close(out_TH[ours.keep_T], expected_TH[ours.keep_T])
    assert not out_TH[~ours.keep_T].any()
    assert ours.load_E.tolist() == torch.bincount(index_Tk[ours.keep_T].flatten(), minlength=8).tolist()


def test_without_any_token_the_output_is_zero_and_every_factor_has_a_zero_gradient():
    _, ours = pair()
    ours.add_lora(LORA, torch.float32, torch.device("cpu"))
    hidden_TH, index_Tk, weight_Tk = routing(3)
    ours.keep_T = torch.zeros(3, dtype=torch.bool)
    out_TH = ours(hidden_TH, index_Tk, weight_Tk)
    out_TH.backward(torch.ones(3, 32))
    assert not out_TH.any()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())  # ZeRO-3 waits for each of them


@pytest.mark.parametrize("trained", [False, True])
def test_what_grouped_products_leave_of_experts_without_tokens_is_no_gradient(monkeypatch, trained):
    """On some GPUs that is whatever was in memory before: here NaN."""
    _, ours = pair()
    if trained:
        train_weights(ours)
    else:
        ours.add_lora(LORA, torch.float32, torch.device("cpu"))
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
    hidden_TH, _, weight_Tk = routing(3)
    index_Tk = torch.tensor([[3, 1], [3, 4], [4, 1]])  # of experts 0 to 7; nothing for 0, 2, 5, 6 and 7
    ours(hidden_TH, index_Tk, weight_Tk).sum().backward()
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    real, spoiled = F.grouped_mm, []

    def grouped_mm(a, b, *, offs):
        out = real(a, b, offs=offs)
        if out.dim() == 3:  # a matrix an expert
            spoiled.append(out)
            out[offs.diff(prepend=torch.zeros(1, dtype=offs.dtype)) == 0] = torch.nan
        return out

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    ours(hidden_TH, index_Tk, weight_Tk).sum().backward()
    assert len(spoiled) == (2 if trained else 4)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
        assert parameter.grad[[1, 3, 4]].any() and not parameter.grad[[0, 2, 5, 6, 7]].any(), name


@pytest.mark.parametrize("method", ["frozen", "lora", "full"])
def test_an_expert_on_each_thread_of_a_cpu_changes_nothing_but_rounding(monkeypatch, method):
    _, ours = pair()
    if method == "lora":
        ours.add_lora(LORA, torch.float32, torch.device("cpu"))
    if method == "full":
        train_weights(ours)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    hidden_TH, index_Tk, weight_Tk = routing(40)
    monkeypatch.setattr(products, "WORTH_THREADS", 40 * 2 * 16 * 16)
    called: list[int] = []
    each_expert = products.each_expert
    monkeypatch.setattr(products, "each_expert", lambda *given: called.append(1) or each_expert(*given))
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out_TH = checkpoint(ours, hidden_TH, index_Tk, weight_Tk, use_reentrant=False, context_fn=same_routing)
            wanted = (hidden_TH, weight_Tk, *ours.parameters())
            found[count] = (out_TH, *torch.autograd.grad(out_TH.square().sum(), wanted))
            assert bool(called) == (count > 1)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for alone, shared in zip(found[1], found[3], strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_the_host_waits_once_a_layer_and_not_again_in_the_recomputation_and_backward(padded):
    _, ours = pair()
    ours.add_lora(LORA, torch.float32, torch.device("cpu"))
    hidden_TH, index_Tk, weight_Tk = routing(20)
    ours.keep_T = torch.arange(20) % 3 > 0 if padded else None
    waits = HostWaits()
    with waits:
        checkpoint(ours, hidden_TH, index_Tk, weight_Tk, use_reentrant=False, context_fn=same_routing).sum().backward()
    assert waits.seen == ["tolist"]
    assert ours.load_E.sum() == 2 * (13 if padded else 20)  # counted once


def test_where_experts_end_the_layer_the_recomputation_leaves_their_output_out_and_a_layer_that_uses_it_is_nan():
    _, ours = pair()
    ours.add_lora(LORA, torch.float32, torch.device("cpu"))
    hidden_TH, index_Tk, weight_Tk = routing(20)

    def gradient(after: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def layer(x: torch.Tensor) -> torch.Tensor:
            return x + after(ours(x, index_Tk, weight_Tk)) + x.sin()

        out = checkpoint(layer, hidden_TH, use_reentrant=False, context_fn=same_routing)
        (found,) = torch.autograd.grad(out.sum(), hidden_TH)
        return found

    for after, needs in ((torch.clone, False), (torch.square, True)):
        ours.ends_the_layer = False
        expected = gradient(after)
        ours.ends_the_layer = True
        found = gradient(after)
        assert found.isnan().any() if needs else torch.equal(found, expected)


def test_initial_factors_depend_on_seed_and_name_alone_and_not_on_the_group():
    _, whole = pair()
    whole.add_lora(LORA, torch.float32, torch.device("cpu"))
    for rank in range(4):
        _, part = pair(ExpertGroup(size=4, rank=rank))
        part.add_lora(LORA, torch.bfloat16, torch.device("cpu"))  # pads to 8 instead of 4
        for name, parameter in part.named_parameters():
            axis = 1 if name.endswith("A") else 2
            mine, theirs = (
                parameter.narrow(axis, 0, 3),
                getattr(whole, name)[2 * rank : 2 * rank + 2].narrow(axis, 0, 3),
            )
            assert torch.equal(mine, theirs)
            assert not parameter.narrow(axis, 3, 5).any()
    A_Erh = whole.gate_up_proj_lora_A[:, :3]
    assert A_Erh.abs().max() <= 32**-0.5 and len({tuple(a.flatten().tolist()) for a in A_Erh}) == 8


@pytest.mark.parametrize(
    ("rank", "dtype", "padded"),
    [(1, torch.float32, 4), (4, torch.float32, 4), (5, torch.bfloat16, 8), (8, torch.bfloat16, 8)],
)
def test_ranks_are_padded_to_16_bytes(rank, dtype, padded):
    assert padded_rank(rank, dtype) == padded
