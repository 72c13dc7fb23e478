"""What preflight has a GPU compute, computed on a CPU: right where it is right, and told where it is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import computing, launches, network
from launch.agreement import Wrong
from launch.check_results import MAY_PASS, PASSED, WILL_NOT_PASS
from launch.computing import CHECKS, computed, judge, of_model
from launch.node import model
from tests.support.models import write_model
from train import formats
from train.config.settings import parse
from train.data.row import Row
from train.experts import products, storage
from train.experts.dispatch import ExpertGroup, Places
from train.layers import mixing, norms
from train.masking import loss as masking_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_passes_on_a_cpu_in_fp32(name):
    assert CHECKS[name](CPU, torch.float32) < 3e-6


def changed(owner: Any, name: str, change: Callable[..., Any]) -> tuple[Any, str, Callable[..., Any]]:
    """`owner.name` with what it returns changed: (owner, name, the function that does so)."""
    right = getattr(owner, name)
    return owner, name, lambda *given, **more: change(right(*given, **more), *given)


def mixed(out: Tensor, *_: Any) -> Tensor:
    """With a little of each row in the next."""
    return out + 0.1 * out.roll(1, 0)


def first(change: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    """Of the first of what is returned."""
    return lambda out, *given: (change(out[0], *given), *out[1:])


GroupedTrained = products.GroupedTrained


class Halved(GroupedTrained):
    """A grouped product whose weight gets half its gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *rest = GroupedTrained.backward(ctx, grad)
        return x, weight / 2, *rest


class EmptyNotZero(GroupedTrained):
    """A grouped product that leaves something in the gradient of a group without rows."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *rest = GroupedTrained.backward(ctx, grad)
        return x, weight.index_fill(0, torch.tensor([2]), 0.5), *rest


def seen_together(*given: Any, packed: Row, **more: Any) -> tuple[Tensor, None]:
    """Attention over the whole row, whatever documents it holds."""
    return right_attention(*given, packed=Row([packed.ends[-1]]), **more)


def beyond_documents(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, packed, **more: function(*given, packed=Row([packed.ends[-1]]), **more)


right_attention = mixing.attention
WRONG: dict[str, tuple[str, Any, str, Any, str]] = {
    "a product": ("grouped products", *changed(torch.nn.functional, "grouped_mm", mixed), "grouped product is off"),
    "a gradient": ("grouped products", products, "GroupedTrained", Halved, "gradient of W, is off"),
    "an empty group": ("grouped products", products, "GroupedTrained", EmptyNotZero, "gradient of W, is off"),
    "NF4 decoded": ("NF4", *changed(storage.NF4Experts, "weights", mixed), "NF4, decoded, is off"),
    "NF4 quantized": (
        "NF4", storage.NF4Experts, "quantize",
        lambda own, expert, weight, right=storage.NF4Experts.quantize: right(own, expert, weight.flip(0)),
        "of its block's largest value",
    ),
    "INT4": ("INT4", *changed(formats, "int4_decode", lambda out, *_: out.roll(1, -1)), "values are decoded wrongly"),
    "INT4 back": ("INT4", *changed(formats, "int4_encode", first(lambda out, *_: out + 1)), "encoding the decoded"),
    "attention": ("packed attention", mixing, "attention", seen_together, "packed attention is off"),
    "convolution": ("packed convolution", mixing, "convolution", beyond_documents(mixing.convolution), "is off"),
    "delta rule": ("packed delta rule", mixing, "delta_rule", beyond_documents(mixing.delta_rule), "rule is off"),
    "a norm": ("norms, sums and the loss", norms, "install", lambda model: model[0].weight.add_(0.01), "RMSNorm"),
    "a sum of LoRA updates": ("norms, sums and the loss", launches, "add_grouped_", lambda *_: None, "updates is off"),
    "a sum of tokens": (
        "norms, sums and the loss", *changed(Places, "sum", lambda out, *_: out.roll(1, 0)), "experts and back is off"
    ),
    "an activation": (
        "norms, sums and the loss", launches, "gated", lambda gate_up, weight, _: gate_up.chunk(2, -1)[0] * weight,
        "gated activation is off",
    ),
    "a divergence": (
        "norms, sums and the loss", *changed(masking_loss, "_held_terms_", lambda out, *_: (out[0], out[1] * 1.01)),
        "loss of held tokens is off",
    ),
    "a shape": (
        "packed delta rule", *changed(mixing, "delta_rule", first(lambda out, *_: out[:, 1:])),
        "has shape (202, 4, 64), expected (203, 4, 64)",
    ),
    "NaN": (
        "packed attention", *changed(mixing, "attention", first(lambda out, *_: out / 0 * 0)), "is off by nan"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_each_check_tells_what_is_wrong(monkeypatch, what):
    check, owner, name, other, told = WRONG[what]
    monkeypatch.setattr(owner, name, other)
    with pytest.raises(Wrong) as raised:
        CHECKS[check](CPU, torch.float32)
    assert told in str(raised.value)


def test_a_failure_names_the_gpu_and_says_what_to_do(monkeypatch):
    found = computed(["INT4"], [CPU, CPU], torch.float32)
    assert (found.code, found.text) == (PASSED, "2 GPUs: INT4: error against plain references at most 0.0e+00")

    def broken(*_: Any) -> float:
        raise RuntimeError("Triton is too old\nand more")

    monkeypatch.setitem(computing.CHECKS, "NF4", broken)
    found = computed(["INT4", "NF4"], [CPU, CPU], torch.float32)
    assert found.code == WILL_NOT_PASS and found.text == (
        "GPU 0: NF4: RuntimeError: Triton is too old; GPU 1: NF4: RuntimeError: Triton is too old; "
        "Install the versions of constraints.txt with the gpu extra (pip install -e '.[gpu]')."
    )
    found = judge(["INT4"], [{}, {"INT4": "INT4: 5 of 9 values are decoded wrongly"}, {}])
    assert found.code == MAY_PASS and found.text == (
        "GPU 1: INT4: 5 of 9 values are decoded wrongly; "
        "Exclude this node (sbatch --exclude=NODE), and have its GPU tested."
    )


@pytest.mark.parametrize(("family", "linear"), [("qwen", True), ("deepseek", False)])
def test_the_delta_rule_is_checked_for_models_that_have_it(tmp_path, family, linear):
    flags = ["--model", str(write_model(tmp_path / "model", family)), "--lora-rank", "4"]
    share = model(parse(flags, ""), range(1), 1, 40)[1]
    names = of_model(share.plan.model.causal)
    assert ("packed delta rule" in names) == ("packed convolution" in names) == linear
    assert {*names} | {"packed delta rule", "packed convolution"} == {*CHECKS} == {*of_model(None)}


class Group(ExpertGroup):
    """One rank of several that are not there: told is what it sends and awaits, and wrong makes it get another's."""

    def __init__(self, size: int, rank: int, wrong: bool = False):
        super().__init__(size, rank)
        self.told, self.wrong = [], wrong

    def exchange(self, rows: Tensor, received_D: list[int], sent_D: list[int]) -> Tensor:
        self.told.append((sent_D, received_D))
        sender_R = torch.arange(self.size).repeat_interleave(torch.tensor(received_D)).to(rows) + self.wrong
        return sender_R[:, None].expand(-1, rows.shape[1])


def test_ranks_exchange_with_zero_splits_on_every_side():
    told = []
    for rank in range(3):
        group = Group(3, rank)
        network.exchange_with_zero_splits(group, CPU)
        told.append(group.told)
    assert [sent for (sent, _), _ in told] == [[0, 0, 0], [1, 2, 0], [2, 3, 0]]
    assert [received for (_, received), _ in told] == [[0, 1, 2], [0, 2, 3], [0, 0, 0]]
    assert all(nothing == ([0, 0, 0], [0, 0, 0]) for _, nothing in told)
    with pytest.raises(RuntimeError, match="all-to-all with zero splits: the received values differ from those sent"):
        network.exchange_with_zero_splits(Group(3, 0, wrong=True), CPU)
