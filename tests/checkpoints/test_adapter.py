"""Adapters written and read part by part. (That stock peft takes them, from any ranks: test_layouts.py.)"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support.models import write_model
from train.checkpoints.adapter import save_adapter
from train.checkpoints.adapter_files import check_adapter, load_adapter
from train.checkpoints.reader import Checkpoint, TensorFile
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.text_model import add_lora, skeleton, text_config
from train.runtime.errors import UserError

LORA = LoRASettings(rank=3, alpha=6.0, expert_rank=2, seed=0)
CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def factored(directory: Path, ep: ExpertGroup) -> Any:
    """The text model with LoRA weights, as one rank of `ep` has it before ZeRO-3 partitions them."""
    model = skeleton(text_config(Checkpoint(directory)), ep)
    add_lora(model, LORA, torch.float32, CPU)
    return SimpleNamespace(causal=model, architecture="Qwen3_5MoeForCausalLM")


def factors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.causal.named_parameters():
        if "lora_" in name:
            yield f"causal.{name}", parameter.detach()


@pytest.mark.usefixtures("alone")
def test_each_rank_gets_its_experts_factors_back_and_reads_no_others_where_they_lie_together(tmp_path, monkeypatch):
    write_model(tmp_path / "base", "qwen")
    whole = factored(tmp_path / "base", ExpertGroup())
    generator = torch.Generator().manual_seed(3)
    for name, value in factors_of(whole):
        value.normal_(generator=generator)
        if ".experts." in name:  # rank 2, padded to 4
            (value[:, 2:] if name.endswith("A") else value[:, :, 2:]).zero_()
    save_adapter(tmp_path / "adapter", whole, factors_of(whole), LORA, Checkpoint(tmp_path / "base"), 7)
    assert [path.name for path in tmp_path.iterdir() if "adapter" in path.name] == ["adapter"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # by PEFT's own layout: A [E r, in], an expert's rows together; B [out, r E], an expert's columns E apart
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"
    experts: Any = whole.causal.model.layers[1].mlp.experts
    assert torch.equal(tensors[key.format("A")][10:12], experts.gate_up_proj_lora_A[5, :2])
    assert torch.equal(tensors[key.format("B")][:, [5, 13]], experts.gate_up_proj_lora_B[5, :, :2])

    read: dict[str, int] = {}
    plain_read = TensorFile.read

    def counting(self, name, start, out):
        read[name] = read.get(name, 0) + out.numel()
        plain_read(self, name, start, out)

    monkeypatch.setattr(TensorFile, "read", counting)
    for rank in (0, 1):
        part = factored(tmp_path / "base", ExpertGroup(size=2, rank=rank))
        read.clear()
        load_adapter(tmp_path / "adapter", part, LORA)
        for (name, value), (_, all_of_it) in zip(factors_of(part), factors_of(whole), strict=True):
            owned = all_of_it[4 * rank : 4 * rank + 4] if ".experts." in name else all_of_it
            assert torch.equal(value, owned), name
        for name, tensor in tensors.items():
            assert read[name] == tensor.numel() // (2 if "experts" in name and name.endswith("A.weight") else 1), name


@pytest.mark.usefixtures("alone")
def test_an_earlier_adapter_stays_until_the_new_one_is_whole(tmp_path):
    first, other = (Checkpoint(write_model(tmp_path / name, "qwen", seed)) for seed, name in enumerate(("one", "two")))
    model = factored(first.directory, ExpertGroup())
    save_adapter(tmp_path / "adapter", model, factors_of(model), LORA, first, 7)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, value) in enumerate(factors_of(model)):
            if number == 5:
                raise OSError("a rank is gone")
            yield name, value + 1

    with pytest.raises(OSError, match="a rank is gone"):
        save_adapter(tmp_path / "adapter", model, breaking(), LORA, other, 7)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(AssertionError, match="elements written"):
        save_adapter(tmp_path / "adapter", model, list(factors_of(model))[1:], LORA, other, 7)
    save_adapter(tmp_path / "adapter", model, factors_of(model), LORA, other, 7)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(other.directory)


@pytest.mark.usefixtures("alone")
def test_an_adapter_is_of_its_base_and_not_of_another_of_the_same_shapes(tmp_path, capsys):
    first, other = (Checkpoint(write_model(tmp_path / name, "qwen", seed)) for seed, name in enumerate(("one", "two")))
    model = factored(first.directory, ExpertGroup())
    save_adapter(tmp_path / "adapter", model, factors_of(model), LORA, first, 7)
    given = tmp_path / "adapter", skeleton(text_config(first), ExpertGroup()), LORA, model.architecture
    check_adapter(*given, first)
    shutil.copytree(first.directory, tmp_path / "moved")
    check_adapter(*given, Checkpoint(tmp_path / "moved"))
    with pytest.raises(UserError, match=f"was trained on another base model than --model {other.directory}: on "):
        check_adapter(*given, other)
    assert capsys.readouterr().out == ""
    check_adapter(*given, other, other_base=True)
    assert f"--other-base: {tmp_path / 'adapter'} was trained on {first.directory}, not on" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--other-base: --model .* is what .* was trained on; leave it out"):
        check_adapter(*given, first, other_base=True)
    (tmp_path / "adapter" / "base_model.json").unlink()
    assert capsys.readouterr().out == ""
    check_adapter(*given, other)
    assert "does not record its base model's weights" in capsys.readouterr().out
