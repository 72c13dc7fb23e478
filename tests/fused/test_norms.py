"""The RMSNorms of transformers' models in one launch, and which modules are found to be one."""

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated

from train.layers import norms


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = [(LlamaRMSNorm, False, False), (Qwen3_5MoeRMSNorm, False, True), (Qwen3_5MoeRMSNormGated, True, False)]


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (70, 128), (2, 5000)])
@pytest.mark.parametrize(("kind", "has_gate", "one_more"), CASES)
def test_values_and_gradients_are_the_modules_own(kernels, kind, has_gate, one_more, rows, columns):
    module = kind(columns, eps=1e-5)
    module.weight = nn.Parameter(drawn(columns), requires_grad=False)
    wide = drawn(rows, 2 * columns, seed=1)
    x = wide[:, :columns]  # rows that lie apart
    gate = drawn(rows, columns, seed=2) if has_gate else None
    leaves = [part.detach().clone().requires_grad_() for part in (x, gate) if part is not None]
    expected, grad = module(*leaves), drawn(rows, columns, seed=3)
    y, rstd = kernels("norms").rms_norm(x, module.weight, gate, 1e-5, one_more)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, (x.pow(2).mean(1) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    found = kernels("norms").rms_norm_backward(grad, x, module.weight, gate, rstd, one_more)
    for mine, theirs in zip(found, torch.autograd.grad(expected, leaves, grad), strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1e-3


@pytest.mark.parametrize(
    ("module", "expected"),
    [*[(kind(8), one_more) for kind, _, one_more in CASES], (DeepseekV3RMSNorm(8), False), (Shifted(8), None)],
)
def test_a_norm_is_known_by_what_it_computes(module, expected):
    assert norms._one_more(module, 1e-6) is expected


def test_the_norms_of_a_model_are_replaced_and_nothing_else():
    model = nn.Sequential(LlamaRMSNorm(8), nn.LayerNorm(8), Shifted(8), nn.Linear(8, 8))
    norms.install(model)
    assert ["forward" in vars(module) for module in model] == [True, False, False, False]
    x = drawn(2, 8)
    assert torch.equal(model[0](x), LlamaRMSNorm(8)(x))  # on a CPU its own
