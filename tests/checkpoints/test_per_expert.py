"""Adapters with an A and a B for each expert's projection, as other trainers write them: the updates worked by hand
from their tensors are what loads, on any rank, and what is merged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.load_worker import IDS
from tests.support.models import write_model
from train import merge
from train.checkpoints.adapter_files import adapter_settings, check_adapter, load_adapter
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.model.text_model import add_lora, architecture, skeleton, text_config
from train.runtime.errors import UserError

PREFIX = "base_model.model.model.layers.{}.mlp.experts.{}.{}.lora_{}.weight"
PROJECTIONS = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
LINEARS = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}


def write_adapter(directory: Path, rank: int = 3, **config: Any) -> dict[str, Tensor]:
    """An adapter of the per-expert form for `write_model(…, "qwen3")`, of random values. -> its tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in (0, 1):
        shapes = {f"self_attn.{name}": shape for name, shape in LINEARS.items()}
        shapes |= {f"mlp.experts.{e}.{name}": shape for e in range(8) for name, shape in PROJECTIONS.items()}
        for name, (height, width) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_{{}}.weight"
            tensors[key.format("A")] = torch.randn(rank, width, generator=generator) * 0.2
            tensors[key.format("B")] = torch.randn(height, rank, generator=generator) * 0.2
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [*PROJECTIONS, *LINEARS]} | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def update(tensors: dict[str, Tensor], layer: int, expert: int, projection: str, scale: float) -> Tensor:
    A, B = (tensors[PREFIX.format(layer, expert, projection, f)] for f in "AB")
    return scale * (B @ A)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_the_merged_model_has_the_update_of_each_experts_own_tensors(tmp_path, rslora, scale):
    base = write_model(tmp_path / "base", "qwen3")
    tensors = write_adapter(tmp_path / "adapter", use_rslora=rslora)
    command = ["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert merge.main(command) == 0
    right: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for number, layer in enumerate(right.model.layers):
            for expert in range(8):
                of = {name: update(tensors, number, expert, name, scale) for name in PROJECTIONS}
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([of["gate_proj"], of["up_proj"]])
                layer.mlp.experts.down_proj[expert] += of["down_proj"]
            for name in LINEARS:
                key = f"base_model.model.model.layers.{number}.self_attn.{name}.lora_{{}}.weight"
                linear = getattr(layer.self_attn, name)
                linear.weight += scale * tensors[key.format("B")] @ tensors[key.format("A")]
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        for (name, is_), should in zip(merged.named_parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(is_, should, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(merged(torch.tensor([IDS])).logits, right(torch.tensor([IDS])).logits)


def loaded(base: Path, directory: Path, ep: ExpertGroup) -> Any:
    """The text model with the adapter's LoRA weights, as one rank of `ep` has it before ZeRO-3 divides them."""
    checkpoint, lora = Checkpoint(base), adapter_settings(directory)
    model = skeleton(text_config(checkpoint), ep)
    check_adapter(directory, model, lora, architecture(checkpoint), checkpoint)
    add_lora(model, lora, torch.float32, torch.device("cpu"))
    load_adapter(directory, SimpleNamespace(causal=model, architecture=architecture(checkpoint)), lora)
    return model


def test_each_rank_loads_the_updates_of_its_own_experts(tmp_path):
    base = write_model(tmp_path / "base", "qwen3")
    tensors = write_adapter(tmp_path / "adapter")
    lora = adapter_settings(tmp_path / "adapter")
    assert (lora.rank, lora.expert_rank, lora.alpha) == (3, 6, 6.0)
    for rank in (0, 1):
        model = loaded(base, tmp_path / "adapter", ExpertGroup(size=2, rank=rank))
        for number, layer in enumerate(model.model.layers):
            experts: Any = layer.mlp.experts
            for local, expert in enumerate(range(4 * rank, 4 * rank + 4)):
                of = {name: update(tensors, number, expert, name, 6 / 3) for name in PROJECTIONS}
                for weight, right in (
                    ("gate_up_proj", torch.cat([of["gate_proj"], of["up_proj"]])),
                    ("down_proj", of["down_proj"]),
                ):
                    A, B = (getattr(experts, f"{weight}_lora_{f}")[local] for f in "AB")
                    torch.testing.assert_close(lora.expert_scale * B @ A, right, rtol=0, atol=1e-6)


def test_a_missing_projection_of_one_expert_is_named(tmp_path):
    base = write_model(tmp_path / "base", "qwen3")
    tensors = write_adapter(tmp_path / "adapter")
    lost = PREFIX.format(1, 5, "up_proj", "B")
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"1 tensors differ .* among them {lost}: absent there, \(16, 3\) here"):
        loaded(base, tmp_path / "adapter", ExpertGroup())


def test_the_shared_adapter_of_another_trainer_loads(tmp_path):
    directory = Path(__file__).parents[3] / "shared" / "cases" / "adapters" / "tinker_form"
    if not directory.is_dir():
        pytest.skip("../shared/cases is absent")
    tensors = load_file(directory / "adapter_model.safetensors")
    attention = "base_model.model.model.layers.0.self_attn.{}.lora_B.weight"
    heads, kv = (tensors[attention.format(name)].shape[0] // 16 for name in ("q_proj", "k_proj"))
    base = write_model(
        tmp_path / "base", "qwen3", hidden_size=64, moe_intermediate_size=32, num_attention_heads=heads,
        num_key_value_heads=kv,
    )  # fmt: skip
    model = loaded(base, directory, ExpertGroup())
    experts: Any = model.model.layers[1].mlp.experts
    A, B = experts.down_proj_lora_A[7], experts.down_proj_lora_B[7]
    right = update(tensors, 1, 7, "down_proj", 32 / 4)
    torch.testing.assert_close(adapter_settings(directory).expert_scale * B @ A, right, rtol=1e-5, atol=1e-6)
