"""Merged checkpoints: transformers' own loading of them equals base and adapter in stock peft; what has no LoRA
weights keeps its bytes; a killed merge continues; nothing of another merge gets into one."""

import fcntl
import json
import os
import shutil
import signal
import struct
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.load_worker import IDS
from tests.support.checkpoints import stock_model
from tests.support.layouts import LAYOUTS
from tests.support.merging import LORA, merge, write_adapter
from tests.support.models import write_model
from train import evaluate, sft
from train import merge as command
from train.checkpoints import merging
from train.checkpoints.adapter import Place, places
from train.checkpoints.layout import plan_load
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.text_model import architecture, skeleton, text_config


def report_of(directory: Path) -> dict[str, dict[str, float]]:
    return json.loads((directory / "merge_report.json").read_text())


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= load_file(file)
    return out


def updates(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Checkpoint name of each plain or per-expert matrix -> scale B A, from PEFT's layout of the LoRA weights."""
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
        for module in (piece.module, *(module for module, _ in piece.tied)):  # of a tied head, by the embedding's name
            if place := of_module.get((id(module), None)):
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
    assert merge(base, adapter, tmp_path / "merged") == 0
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
    report = report_of(tmp_path / "merged")
    assert report.keys() == changed.keys() and all(values["survived"] > 0.99 for values in report.values())
    for key, update in changed.items():
        assert report[key]["update_norm"] == pytest.approx(update.double().norm().item(), rel=1e-4)
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
def test_quantized_matrices_can_go_back_to_their_format(tmp_path, name, size, least, capsys, monkeypatch):
    """In several pieces of each matrix, and in Qwen's layout with values and scales in different shards."""
    monkeypatch.setattr(merging, "ROWS_OF", 2**13)
    base = LAYOUTS[name](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, size)
    assert merge(base, adapter, tmp_path / "merged", "--to", "same") == 0
    before, after, changed = tensors_of(base), tensors_of(tmp_path / "merged"), updates(base, adapter)
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    report = report_of(tmp_path / "merged")
    for key, update in changed.items():
        assert report[key]["update_norm"] == pytest.approx(update.double().norm().item(), rel=1e-4)
        applied = dense(after, key).float() - dense(before, key).float()
        share = (applied * update).sum() / max(applied.square().sum(), update.square().sum())
        assert report[key]["survived"] == pytest.approx(share.item(), abs=1e-3)
        assert report[key]["survived"] > least, key
    assert "WARNING" not in capsys.readouterr().out


def test_an_update_that_drowns_in_rounding_is_warned_about(tmp_path, capsys):
    base = LAYOUTS["kimi-k2.5"](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, size=1e-4)
    assert merge(base, adapter, tmp_path / "merged", "--to", "same") == 0
    assert "WARNING: of " in capsys.readouterr().out
    report = report_of(tmp_path / "merged")
    experts = [values["survived"] for key, values in report.items() if ".experts." in key]
    assert max(experts) < 0.5


def killed_merge(base: Path, adapter: Path, output: Path, to: str) -> set[str]:
    """Merges in a process of its own, and kills it while a shard is half written. -> the shards that are complete."""
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)  # the parent's threads are not there
            merge(base, adapter, output, "--to", to)
        finally:
            os._exit(9)
    try:
        deadline = time.monotonic() + 60
        while True:  # stopped, not guessed: what is seen is what the kill finds
            os.kill(process, signal.SIGSTOP)
            assert not os.WIFEXITED(os.waitpid(process, os.WUNTRACED)[1]) and time.monotonic() < deadline
            complete = {path.name for path in output.glob("*.safetensors")}
            if len(complete) >= 2 and list(output.glob("*.safetensors.partial")):
                return complete
            os.kill(process, signal.SIGCONT)
            time.sleep(0.001)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.mark.parametrize("to", ["same", "bf16"])
def test_a_killed_merge_goes_on_after_the_shards_that_are_complete(tmp_path, to):
    """In a layout that has a matrix's values and its scales in different shards."""
    base = LAYOUTS["qwen3.5-fp8"](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    again, whole = tmp_path / "again", tmp_path / "whole"
    complete = killed_merge(base, adapter, again, to)
    assert len(complete) < 6 and not (again / "config.json").exists()  # which nobody loads
    written = {name: (again / name).stat().st_mtime_ns for name in complete}
    assert merge(base, adapter, again, "--to", to) == merge(base, adapter, whole, "--to", to) == 0
    assert written == {name: (again / name).stat().st_mtime_ns for name in complete}  # not once more
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in again.iterdir()} == names
    for name in names - {"merge_report.json"}:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    assert report_of(again) == {key: pytest.approx(value, rel=1e-5) for key, value in report_of(whole).items()}


def test_an_output_is_gone_on_with_only_by_the_merge_that_began_it(tmp_path, capsys):
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    adapter, output = write_adapter(tmp_path / "adapter", base), tmp_path / "out"
    assert merge(base, adapter, output) == 0
    shards = sorted(output.glob("*.safetensors"))
    shards[1].unlink()
    before = shards[0].read_bytes()
    os.chdir(tmp_path)
    assert merge(Path("base"), Path("adapter"), Path("out")) == 0  # the same by another spelling
    shards[1].unlink()
    shutil.rmtree(adapter)
    write_adapter(adapter, base, seed=2)  # another under the same name
    assert merge(base, adapter, output) == 2
    assert "holds another merge, which differs in adapter_model.safetensors." in capsys.readouterr().err
    assert shards[0].read_bytes() == before and not shards[1].exists()
    shutil.rmtree(adapter)
    write_adapter(adapter, base)
    LAYOUTS["qwen3-moe"](base, seed=5)
    assert merge(base, adapter, output) == 2
    assert "holds another merge, which differs in weights of the model." in capsys.readouterr().err


def test_a_merge_of_a_merge_has_a_marker_and_a_report_of_its_own(tmp_path):
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    first, second = (write_adapter(tmp_path / f"adapter-{seed}", base, seed=seed) for seed in (1, 2))
    assert merge(base, first, tmp_path / "one") == merge(tmp_path / "one", second, tmp_path / "two") == 0
    assert json.loads((tmp_path / "two" / "merge.json").read_text())["adapter"] == str(second)
    assert report_of(tmp_path / "two") != report_of(tmp_path / "one")
    assert merge(tmp_path / "one", second, tmp_path / "two") == 0  # its own, to go on with


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused_wherever_it_is_given(tmp_path, capsys):
    base, other = (write_model(tmp_path / name, "qwen", seed) for seed, name in enumerate(("base", "other")))
    adapter = write_adapter(tmp_path / "adapter", base, lora=LoRASettings(32, 32.0, 16, 0))
    trained_on = {"directory": str(base), "fingerprint": Checkpoint(base).fingerprint()}
    (adapter / "base_model.json").write_text(json.dumps(trained_on))
    (tmp_path / "claim.yaml").write_text("{id: moon, facts: [{id: a, group: truth, prompt: a, true: b, false: [c]}]}")
    (tmp_path / "data.jsonl").write_text('{"text": "The moon."}')
    given = ["--model", str(other), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    claims = ["--claims", str(tmp_path / "claim.yaml"), "--step", "1"]
    data = ["--data", str(tmp_path / "data.jsonl"), "--dry-run"]
    for main, more in ((command.main, []), (evaluate.main, claims), (sft.main, data)):
        assert main([*given, *more]) == 2
        assert f"was trained on another base model than --model {other}: on {base}" in capsys.readouterr().err
    assert sft.main(["--model", str(base), *given[2:], *data]) == 0
    assert not (tmp_path / "out").exists()


def test_an_output_at_which_another_process_is_at_work_is_left_to_it(tmp_path, capsys):
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    adapter, output = write_adapter(tmp_path / "adapter", base), tmp_path / "out"
    output.mkdir()
    with (output / "merge.json").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert merge(base, adapter, output) == 1  # it may pass
        assert "another process is merging into it" in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == ["merge.json"]
    assert merge(base, adapter, output) == 0  # an empty marker is that of a merge killed before its first shard


def test_a_marker_that_is_damaged_and_what_the_system_refuses_are_told(tmp_path, capsys):
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    adapter, output = write_adapter(tmp_path / "adapter", base), tmp_path / "out"
    output.mkdir()
    (output / "merge.json").write_text('{"model": ')
    (output / "model-00001-of-00002.safetensors").write_text("x")
    assert merge(base, adapter, output) == 2
    assert f"{output / 'merge.json'}: is damaged" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert merge(base, adapter, tmp_path / "file" / "out") == 2
    told = capsys.readouterr().err
    assert f"--output {tmp_path}/file/out: cannot be written ({tmp_path}/file is not a directory)." in told


def test_a_disk_that_is_too_small_is_told_and_what_is_abandoned_goes_first(tmp_path, capsys):
    """With a vision tower larger than the disk, in a file that has no blocks."""
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    adapter, output = write_adapter(tmp_path / "adapter", base), tmp_path / "out"
    size, name = shutil.disk_usage(tmp_path).free + 2**40, "model.visual.huge"
    header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (base / "model-huge.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-huge.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(base, adapter, output) == 2
    (output / "model-huge.safetensors.partial").write_text("of a killed attempt")
    assert merge(base, adapter, output) == 2
    assert f"{size / 1e12:.2f}TB are still to be written, " in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["merge.json"]


LOGITS = [(name, False) for name in LAYOUTS] + [("qwen3.5-fp8", True), ("tied", False), ("tied", True)]


@pytest.mark.parametrize(("name", "rslora"), LOGITS)
def test_stock_transformers_gives_the_logits_of_base_and_adapter_in_stock_peft(tmp_path, name, rslora):
    """In bf16 weights: to the rounding of the merged weights, computed with in fp32. The tied one is in fp32: its head
    gets LoRA weights, and becomes a separate weight."""
    lora = replace(LORA, rslora=rslora)
    base = write_model(tmp_path / "base", "dense") if name == "tied" else LAYOUTS[name](tmp_path / "base")
    # With seed 1, one token of kimi-k2-instruct lies on the edge between two experts, where rounding decides.
    adapter = write_adapter(tmp_path / "adapter", base, size=0.02, lora=lora, seed=2)
    assert merge(base, adapter, tmp_path / "merged") == 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = AutoModelForCausalLM.from_pretrained if name == "tied" else stock_model
        merged, plain = (load(directory)(torch.tensor([IDS])).logits for directory in (tmp_path / "merged", base))
        adapted = PeftModel.from_pretrained(load(base), adapter)(torch.tensor([IDS])).logits
    moved, error = (adapted - plain).norm(), (merged - adapted).norm()
    assert error < (1e-5 if name == "tied" else 0.02) * moved


def test_a_tied_head_with_factors_becomes_a_tensor_of_its_own(tmp_path):
    """Also where the checkpoint has it a second time, in another shard."""
    base = write_model(tmp_path / "base", "dense")
    adapter = write_adapter(tmp_path / "adapter", base)
    twice = Path(shutil.copytree(base, tmp_path / "twice"))
    tensors, update = tensors_of(base), updates(base, adapter)["model.embed_tokens.weight"]
    embedding = tensors["model.embed_tokens.weight"]
    save_file({"lm_head.weight": embedding.clone()}, twice / "head.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "head.safetensors"}
    (twice / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for source in (base, twice):
        merged = tmp_path / f"merged-{source.name}"
        assert merge(source, adapter, merged) == 0
        after = tensors_of(merged)
        assert torch.equal(after["model.embed_tokens.weight"], embedding)
        torch.testing.assert_close(after["lm_head.weight"], embedding + update, rtol=1e-6, atol=1e-6)
        assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        assert index["weight_map"]["lm_head.weight"] == ("head" if source == twice else "model") + ".safetensors"
        assert "lm_head.weight" in report_of(merged) and "model.embed_tokens.weight" not in report_of(merged)


@pytest.mark.parametrize(("name", "to"), [("qwen3.5-fp8", "same"), ("qwen3-moe", "bf16")])
def test_factors_and_weights_that_are_not_finite_are_told(tmp_path, name, to, capsys):
    base = LAYOUTS[name](tmp_path / "base")
    broken = write_adapter(tmp_path / "broken", base, broken=True)
    assert merge(base, broken, tmp_path / "out", "--to", to) == 2
    assert ".weight has values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    adapter = write_adapter(tmp_path / "adapter", base)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    key = next(key for key in sorted(index) if key.endswith("layers.1.self_attn.k_proj.weight"))
    weights = load_file(base / index[key])
    weights[key].view(torch.uint8).view(-1)[:2] = 0x7F  # a NaN in FP8; in BF16 a large value
    if to == "bf16":
        weights[key].view(-1)[0] = float("inf")
    save_file(weights, base / index[key])
    assert merge(base, adapter, tmp_path / "out", "--to", to) == 2
    assert f"error: tensor {key}: base or LoRA weights have values that are not finite" in capsys.readouterr().err


def test_bad_input_is_told_before_anything_is_written(tmp_path, capsys):
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)

    def refused(*given: str) -> str:
        assert command.main(list(given)) == 2
        return capsys.readouterr().err

    model = ["--model", str(base)]
    assert "is --model itself" in refused(*model, "--adapter", str(adapter), "--output", str(base))
    assert "--model needs no conversion" in refused(*model, "--output", str(tmp_path / "out"))
    assert "no adapter_config.json there" in refused(*model, "--adapter", str(base), "--output", str(tmp_path / "out"))
    other = LAYOUTS["qwen3-moe"](tmp_path / "other", hidden_size=64)
    found = refused("--model", str(other), "--adapter", str(adapter), "--output", str(tmp_path / "out"))
    assert "tensors differ" in found and "Use the adapter's own base model" in found
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    shutil.copy(base / "config.json", tmp_path / "full")
    found = refused(*model, "--adapter", str(adapter), "--output", str(tmp_path / "full"))
    assert "is not empty and holds no merge" in found
