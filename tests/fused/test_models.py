"""Whole models with the GPU's kernels, interpreted, have the losses and gradients that they have without."""

import pytest
import torch

from launch.memory import planned_batch, planned_model
from launch.trace import PlannedGroup
from tests.support.models import write_model
from train import fused as package
from train.checkpoints.reader import Checkpoint
from train.layers.lora import LoRASettings
from train.model.text_model import LanguageModel

LORA = LoRASettings(rank=4, alpha=8.0, expert_rank=3, seed=0)


def loss_and_gradients(model: LanguageModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(planned_batch([17, 16, 3, 1])).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen", "deepseek", "qwen3", "dense"])
def test_kernels_change_nothing_but_rounding(kernels, tmp_path, family, checkpointing):
    for name in ("experts", "norms"):
        kernels(name)
    model, _ = planned_model(Checkpoint(write_model(tmp_path, family)), "lora", LORA, PlannedGroup())
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(0, 0.2, generator=generator)
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss, gradients = loss_and_gradients(model)
    package.IN_ONE_LAUNCH.add("cpu")
    called: list[str] = []
    try:
        with _Called(called):
            found, others = loss_and_gradients(model)
    finally:
        package.IN_ONE_LAUNCH.remove("cpu")
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == others.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    wanted = {"rms_norm", "rms_norm_backward"}
    if family != "dense":
        wanted |= {"gated", "gated_backward", "add_grouped", "summed"}
    assert set(called) == wanted


class _Called(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, called: list[str]):
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spanwise":
            self.called.append(func._opname)
        return func(*args, **(kwargs or {}))
