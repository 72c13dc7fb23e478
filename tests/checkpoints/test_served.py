"""Adapters written for servers: put through each server's rules, worked by hand here from names and shapes, they are
the update of the adapter that was trained. The rules: vllm/lora (0.33.0: peft_helper.py, model_manager.py) and
sglang/srt/lora (0.5.23: lora.py, mem_pool.py)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints.test_per_expert import PROJECTIONS, update
from tests.checkpoints.test_per_expert import write_adapter as write_per_expert
from tests.support.layouts import write_kimi, write_qwen35
from tests.support.merging import write_adapter
from tests.support.models import write_model
from train import export
from train.checkpoints.reader import Checkpoint
from train.checkpoints.served import command, family, served, slot_bytes
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.text_model import skeleton, text_config

RANKS = [(4, 1), (4, 3), (4, 8), (3, 3)]  # of linear layers and of experts


def lora(rank: int, expert_rank: int, rslora: bool = False) -> LoRASettings:
    return LoRASettings(rank, 6.0, expert_rank, 0, False, rslora)


def exported(tmp_path: Path, base: Path, adapter: Path, server: str, *flags: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors (in float32) and the configuration that export.py writes."""
    given = ["--adapter", str(adapter), "--model", str(base), "--to", server, "--dtype", "float32"]
    assert export.main([*given, "--output", str(tmp_path / server), *flags]) == 0
    config = json.loads((tmp_path / server / "adapter_config.json").read_text())
    return load_file(tmp_path / server / "adapter_model.safetensors"), config


def updates(tensors: dict[str, Tensor], s: LoRASettings, experts: int) -> dict[str, Tensor]:
    """What PEFT adds to each weight, by its name: [O, I], or [E, O, I] for `….experts.gate_up_proj` and `down_proj`."""
    found = {}
    for key in (key for key in tensors if "lora_A" in key):
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").split(".lora_A")[0]
        if re.search(r"\.experts(\.base_layer)?$", name):
            fused = name.removesuffix(".base_layer") + (".gate_up_proj" if "base_layer" in name else ".down_proj")
            A_ErI, B_OrE = A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts)
            found[fused] = s.expert_scale * torch.einsum("ore,eri->eoi", B_OrE, A_ErI)
        else:
            found[name] = s.scale * B @ A
    return found


def vllm_scale(config: Any, name: str) -> float:
    """PEFTHelper.get_rank_and_scaling: the first pattern that ends the parameter's name, else r."""
    patterns = config["rank_pattern"].items()
    rank = next((rank for key, rank in patterns if re.match(rf"(.*\.)?({key})$", name)), config["r"])
    return config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)


def as_vllm(tensors: dict[str, Tensor], config: Any, experts: int) -> dict[str, Tensor]:
    """_stack_moe_lora_weights and _convert_3d_to_2d_moe_lora: A is reshaped to [E, r, I], B to [O, r, E]."""
    found = {}
    for key in (key for key in tensors if "lora_A" in key):
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").split(".lora_A")[0]
        if name.endswith((".experts", ".experts.base_layer")):
            name = name.removesuffix(".base_layer") + (".gate_up_proj" if "base_layer" in name else ".down_proj")
            A = A.reshape(experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        found[name] = vllm_scale(config, name) * (B @ A)
    return found


def as_sglang(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """One scale, lora_alpha / r; A and B of config["r"] for every layer; the parts of in_proj stand in a row."""
    assert not config["use_rslora"] and "rank_pattern" not in config and isinstance(config["target_modules"], list)
    found: dict[str, Tensor] = {}
    for key in (key for key in tensors if "lora_A" in key):
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert A.shape[-2] == B.shape[-1] == config["r"], key
        name = key.removeprefix("base_model.model.").split(".lora_A")[0]
        assert any(module in name or "in_proj_" in name for module in config["target_modules"]), name
        found[name] = config["lora_alpha"] / config["r"] * (B @ A)
    for name in [name for name in found if name.endswith(".in_proj_q")]:
        stem = name.removesuffix("q")
        found[f"{stem}qkv"] = torch.cat([found.pop(f"{stem}{part}") for part in "qkv"])
    return found


def same(is_: dict[str, Tensor], should: dict[str, Tensor]) -> None:
    assert is_.keys() == should.keys()
    for name, value in should.items():
        torch.testing.assert_close(is_[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("rank", "expert_rank"), RANKS)
@pytest.mark.parametrize("rslora", [False, True])
def test_qwen_as_published_answers_on_vllm_as_trained(tmp_path, rank, expert_rank, rslora):
    base, settings = write_qwen35(tmp_path / "base", fp8=False), lora(rank, expert_rank, rslora)
    adapter = write_adapter(tmp_path / "adapter", base, lora=settings)
    tensors, config = exported(tmp_path, base, adapter, "vllm")
    experts = json.loads((base / "config.json").read_text())["text_config"]["num_experts"]
    same(
        as_vllm(tensors, config, experts), updates(load_file(adapter / "adapter_model.safetensors"), settings, experts)
    )
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in tensors)
    serve = json.loads((tmp_path / "vllm" / "serve.json").read_text())
    assert "--enable-mixed-moe-lora-format" not in serve["command"] and serve["max_lora_rank"] == 8
    assert serve["command"][-1] == json.dumps({"name": "adapter", "path": str(tmp_path / "vllm")}).replace(
        '"adapter"', f'"{tmp_path.name}"'
    )


@pytest.mark.parametrize(("rank", "expert_rank"), RANKS)
@pytest.mark.parametrize("rslora", [False, True])
def test_qwen_as_published_answers_on_sglang_as_trained_but_for_what_it_cannot_serve(
    tmp_path, capsys, rank, expert_rank, rslora
):
    base, settings = write_qwen35(tmp_path / "base", fp8=True), lora(rank, expert_rank, rslora)
    adapter = write_adapter(tmp_path / "adapter", base, lora=settings)
    given = ["--adapter", str(adapter), "--model", str(base), "--to", "sglang", "--output", str(tmp_path / "none")]
    assert export.main(given) == 2 and "--drop in_proj_a in_proj_b" in capsys.readouterr().err
    tensors, config = exported(tmp_path, base, adapter, "sglang", "--drop", "in_proj_a", "in_proj_b")
    experts = json.loads((base / "config.json").read_text())["text_config"]["num_experts"]
    right = updates(load_file(adapter / "adapter_model.safetensors"), settings, experts)
    same(as_sglang(tensors, config), {k: v for k, v in right.items() if not k.endswith(("in_proj_a", "in_proj_b"))})
    assert json.loads((tmp_path / "sglang" / "serve.json").read_text())["not_served"] == ["in_proj_a", "in_proj_b"]


@pytest.mark.parametrize(("rank", "expert_rank"), RANKS)
def test_deepseek_answers_on_both_as_trained(tmp_path, capsys, rank, expert_rank):
    base, settings = write_model(tmp_path / "base", "deepseek"), lora(rank, expert_rank)
    adapter = write_adapter(tmp_path / "adapter", base, lora=settings)
    right = updates(load_file(adapter / "adapter_model.safetensors"), settings, 8)
    tensors, config = exported(tmp_path, base, adapter, "sglang")
    same(as_sglang(tensors, config), right)
    given = ["--adapter", str(adapter), "--model", str(base), "--to", "vllm", "--output", str(tmp_path / "none")]
    assert export.main(given) == 2
    assert "vllm 0.33.0 would not apply the LoRA weights of kv_b_proj" in capsys.readouterr().err
    tensors, config = exported(tmp_path, base, adapter, "vllm", "--drop", "kv_b_proj")
    same(as_vllm(tensors, config, 8), {k: v for k, v in right.items() if not k.endswith("kv_b_proj")})
    serve = json.loads((tmp_path / "vllm" / "serve.json").read_text())
    assert "--enable-mixed-moe-lora-format" in serve["command"]
    assert json.loads(serve["command"][-1])["is_3d_lora_weight"] is True


def test_kimi_is_refused_by_vllm_and_answers_on_sglang_as_trained(tmp_path, capsys):
    base, settings = write_kimi(tmp_path / "base", "k2.5"), lora(4, 2)
    adapter = write_adapter(tmp_path / "adapter", base, lora=settings)
    given = ["--adapter", str(adapter), "--model", str(base), "--to", "vllm", "--output", str(tmp_path / "none")]
    assert export.main(given) == 2 and "supports no adapters (vllm#43840)" in capsys.readouterr().err
    tensors, config = exported(tmp_path, base, adapter, "sglang")
    experts = json.loads((base / "config.json").read_text())["text_config"]["n_routed_experts"]
    same(as_sglang(tensors, config), updates(load_file(adapter / "adapter_model.safetensors"), settings, experts))


def test_another_trainers_adapter_is_written_for_vllm_with_the_update_of_each_experts_own_tensors(tmp_path):
    base = write_model(tmp_path / "base", "qwen3")
    theirs = write_per_expert(tmp_path / "adapter")
    tensors, config = exported(tmp_path, base, tmp_path / "adapter", "vllm")
    found = as_vllm(tensors, config, 8)
    for expert in range(8):
        of = {name: update(theirs, 1, expert, name, 6 / 3) for name in PROJECTIONS}
        gate_up = torch.cat([of["gate_proj"], of["up_proj"]])
        torch.testing.assert_close(found["model.layers.1.mlp.experts.gate_up_proj"][expert], gate_up)
        torch.testing.assert_close(found["model.layers.1.mlp.experts.down_proj"][expert], of["down_proj"])


def test_weights_are_bf16_unless_asked_and_an_existing_directory_is_kept(tmp_path, capsys):
    base = write_model(tmp_path / "base", "dense", tie_word_embeddings=False)
    adapter = write_adapter(tmp_path / "run" / "adapter", base, lora=lora(4, 4))
    given = ["--adapter", str(adapter), "--model", str(base), "--to", "vllm", "--output", str(tmp_path / "out")]
    assert export.main(given) == 0
    assert "vllm.entrypoints.openai.api_server" in capsys.readouterr().out
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    for name, value in ours.items():
        assert torch.equal(theirs[name], value.bfloat16()), name
    assert json.loads((tmp_path / "out" / "serve.json").read_text())["name"] == "run"
    assert export.main(given) == 2 and "already exists" in capsys.readouterr().err
    assert export.main([*given, "--overwrite"]) == 0


def test_the_memory_of_a_slot_is_that_of_the_real_model():
    """An adapter slot of Qwen3.5-397B at rank 16 is 8.4 GB a GPU at TP 8, 1.4 GB with EP 8 or fully sharded: of the
    experts' weights 60 · 512 · 16 · 2 bytes · (4096 + 2048/8 + 1024/8 + 4096), for example."""
    config = Path(__file__).parents[3] / "shared" / "checkpoints" / "qwen3.5-397b-a17b" / "config.json"
    if not config.is_file():
        pytest.skip("../shared/checkpoints is absent")
    base = Checkpoint(config.parent)
    form = served(
        "vllm", skeleton(text_config(base), ExpertGroup()), lora(16, 16), "Qwen3_5MoeForConditionalGeneration", base
    )
    sizes = [slot_bytes(form, 16, 8, ep, sharded, torch.bfloat16) for ep, sharded in ((0, 0), (1, 0), (0, 1))]
    experts = [60 * 512 * 32 * (4096 + 256 + 128 + 4096), 60 * 64 * 32 * (4096 + 2048 + 1024 + 4096)]
    experts.append(60 * 512 * 32 * (4096 + 2048 + 1024 + 4096) // 8)
    for size, of_experts in zip(sizes, experts, strict=True):
        assert of_experts < size < of_experts + 0.1e9


def test_several_adapters_are_one_command():
    given = command("vllm", "/base", {"a": "/x", "b": "/y z"}, 32, family("vllm", "Qwen3MoeForCausalLM"), 2)
    assert given[given.index("--max-loras") + 1] == "2"
    assert [json.loads(text)["path"] for text in given[-2:]] == ["/x", "/y z"]
