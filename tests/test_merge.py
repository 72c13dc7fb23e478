"""Merged checkpoints: transformers' own loading of them equals base and adapter in stock peft; what has no factors
keeps its bytes; an interrupted merge goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.layouts import LAYOUTS
from tests.load_worker import IDS
from train import merge as command
from train.checkpoints.adapter import Place, peft_config, places
from train.checkpoints.layout import plan_load
from train.checkpoints.merging import Merger
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.lora import LoRASettings
from train.model import architecture, skeleton, text_config

LORA = LoRASettings(rank=4, alpha=6.0, expert_rank=2, seed=0, lm_head=True)


def write_adapter(directory: Path, model: Path, size: float = 0.05) -> Path:
    """Random factors for every weight that has any."""
    checkpoint = Checkpoint(model)
    bare = skeleton(text_config(checkpoint), ExpertGroup())
    generator = torch.Generator().manual_seed(1)
    tensors = {
        place.key(architecture(checkpoint), f): torch.randn(place.shape(LORA, f), generator=generator) * size**0.5
        for place in places(bare, LORA)
        for f in "AB"
    }
    directory.mkdir(parents=True)

    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    peft_config(bare, LORA, architecture(checkpoint), str(model)).save_pretrained(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= load_file(file)
    return out


def updates(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Checkpoint name of each plain or per-expert matrix -> scale B A, from PEFT's layout of the factors."""
    checkpoint = Checkpoint(model)
    bare = skeleton(text_config(checkpoint), ExpertGroup())
    plan = plan_load(bare, checkpoint)
    factors = load_file(adapter / "adapter_model.safetensors")
    name = architecture(checkpoint)
    out = {}

    def product(place: Place, expert: int | None) -> torch.Tensor:
        A, B = (factors[place.key(name, f)] for f in "AB")
        if expert is None:
            return LORA.scale * (B @ A)
        experts, out_features, in_features = place.sizes
        A_e = A.view(experts, 2, in_features)[expert]
        return LORA.expert_scale * (B.view(out_features, 2, experts)[:, :, expert] @ A_e)

    of_module = {(id(place.module), place.weight): place for place in places(bare, LORA)}
    for piece in plan.dense:
        if place := of_module.get((id(piece.module), None)):
            out[piece.source] = product(place, None)
    for layer in plan.experts:
        place = of_module[id(layer.module), layer.target]
        whole = torch.stack([product(place, expert) for expert in range(8)])
        if layer.fused:
            out[layer.fused] = whole
            continue
        rows = whole.chunk(len(layer.matrices), dim=1)
        for matrix, part in zip(layer.matrices, rows, strict=True):
            out |= {f"{layer.prefix}{e}.{matrix}.weight": part[e] for e in range(8)}
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_merged_checkpoint_holds_base_plus_update_rounded_once_to_bf16(tmp_path, name, capsys):
    base = LAYOUTS[name](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    assert command.main(["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    before, after, changed = tensors_of(base), tensors_of(tmp_path / "merged"), updates(base, adapter)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config)
    for key, update in changed.items():
        old = dense(before, key)
        assert after[key].dtype == torch.bfloat16
        expected = (old.float() + update).bfloat16()  # but for the order of the sum in B A, on the edge of rounding
        assert (after[key] == expected).float().mean() > 0.999, key
        torch.testing.assert_close(after[key], expected, rtol=2**-7, atol=1e-6)
    for key, tensor in after.items():
        if key not in changed and key in before and before[key].dtype not in (torch.float8_e4m3fn, torch.int32):
            assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key
    untouched = {n for n in before if "visual" in n or "vision" in n or "norm" in n or "embed" in n}
    assert untouched <= after.keys()
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report.keys() == changed.keys() and all(values["survived"] > 0.99 for values in report.values())
    assert "WARNING" not in capsys.readouterr().out


def dense(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """A matrix by the formula of its format, written out once more."""
    if f"{key}_packed" in tensors:
        packed, scale = tensors[f"{key}_packed"].long(), tensors[f"{key}_scale"].float()
        q = torch.stack([(packed >> (4 * j)) & 15 for j in range(8)], -1).flatten(1) - 8
        return (q * scale.repeat_interleave(32, 1)).bfloat16()
    if f"{key}_scale_inv" in tensors:
        rows, columns = tensors[key].shape
        scale = tensors[f"{key}_scale_inv"].float().repeat_interleave(128, 0)[:rows]
        return (tensors[key].float() * scale.repeat_interleave(128, 1)[:, :columns]).bfloat16()
    return tensors[key]


@pytest.mark.parametrize(("name", "size", "least"), [("qwen3.5-fp8", 0.05, 0.9), ("kimi-k2.5", 0.05, 0.5)])
def test_quantized_matrices_can_go_back_to_their_format(tmp_path, name, size, least, capsys):
    base = LAYOUTS[name](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, size)
    given = ["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--to", "same"]
    assert command.main(given) == 0
    before, after, changed = tensors_of(base), tensors_of(tmp_path / "merged"), updates(base, adapter)
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    for key, update in changed.items():
        applied = dense(after, key).float() - dense(before, key).float()
        share = (applied * update).sum() / max(applied.square().sum(), update.square().sum())
        assert report[key]["survived"] == pytest.approx(share.item(), abs=1e-3)
        assert report[key]["survived"] > least, key
    assert "WARNING" not in capsys.readouterr().out


def test_an_update_that_drowns_in_rounding_is_warned_about(tmp_path, capsys):
    base = LAYOUTS["kimi-k2.5"](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, size=1e-4)
    given = ["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--to", "same"]
    assert command.main(given) == 0
    assert "WARNING: of " in capsys.readouterr().out
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    experts = [values["survived"] for key, values in report.items() if ".experts." in key]
    assert max(experts) < 0.5


def test_an_interrupted_merge_goes_on_after_the_shards_that_are_complete(tmp_path, monkeypatch):
    base = LAYOUTS["kimi-k2-instruct"](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    given = ["--model", str(base), "--adapter", str(adapter), "--output"]
    assert command.main([*given, str(tmp_path / "whole")]) == 0

    written: list[str] = []
    write = Merger.write

    def failing(self, name, writer):
        if len(written) == 60:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, writer)

    monkeypatch.setattr(Merger, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        command.main([*given, str(tmp_path / "again")])
    complete = {path.name for path in (tmp_path / "again").glob("*.safetensors")}
    assert 0 < len(complete) < 4 and list((tmp_path / "again").glob("*.partial"))
    monkeypatch.setattr(Merger, "write", lambda self, name, writer: (written.append(name), write(self, name, writer)))
    del written[:]
    assert command.main([*given, str(tmp_path / "again")]) == 0
    for file in complete:  # not written once more
        with safe_open(tmp_path / "again" / file, "pt") as shard:
            assert not set(shard.keys()) & set(written)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names - {"merge.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["qwen3.5-bf16", "kimi-k2.5"])
def test_stock_transformers_gives_the_logits_of_base_and_adapter_in_stock_peft(tmp_path, name):
    """In bf16 weights: to the rounding of the merged weights, computed with in fp32."""
    from peft import PeftModel

    from tests.checkpoints.test_layouts import stock_model

    base = LAYOUTS[name](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, size=0.02)
    assert command.main(["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    with torch.no_grad():
        merged = stock_model(tmp_path / "merged")(torch.tensor([IDS])).logits
        plain = stock_model(base)(torch.tensor([IDS])).logits
        adapted = PeftModel.from_pretrained(stock_model(base), adapter)(torch.tensor([IDS])).logits
    moved, error = (adapted - plain).norm(), (merged - adapted).norm()
    assert error < 0.02 * moved


def test_bad_input_is_told_before_anything_is_written(tmp_path, capsys):
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)

    def refused(*given: str) -> str:
        assert command.main(list(given)) == 2
        return capsys.readouterr().err

    model = ["--model", str(base)]
    assert "is --model itself" in refused(*model, "--adapter", str(adapter), "--output", str(base))
    assert "nothing is to be converted" in refused(*model, "--output", str(tmp_path / "out"))
    assert "no adapter_config.json there" in refused(*model, "--adapter", str(base), "--output", str(tmp_path / "out"))
    other = LAYOUTS["qwen3-moe"](tmp_path / "other", hidden_size=64)
    found = refused("--model", str(other), "--adapter", str(adapter), "--output", str(tmp_path / "out"))
    assert "tensors differ" in found and "Use the adapter's own base model" in found
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    shutil.copy(base / "config.json", tmp_path / "full")
    found = refused(*model, "--adapter", str(adapter), "--output", str(tmp_path / "full"))
    assert "is not empty and holds no merge" in found
