"""What is wrong with a checkpoint is told from its headers, before a weight is read, by file and tensor."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import edit_header, rename, shard_of
from tests.support.layouts import LAYOUTS, write_kimi, write_qwen3, write_qwen35
from tests.support.models import write_model
from train.checkpoints.layout import plan_load
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.model.text_model import skeleton, text_config
from train.runtime.errors import UserError


def check(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    plan_load(skeleton(text_config(checkpoint), ExpertGroup()), checkpoint)


def message(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(directory)
    return str(caught.value).replace(str(directory), "DIR")


NORM = "model.norm.weight"


def test_a_missing_and_an_unexpected_tensor_are_named(tmp_path):
    write_qwen3(tmp_path)
    rename(tmp_path, NORM, "model.norm.bias")
    assert message(tmp_path).startswith(
        "--model DIR: 1 of 69 weights are missing from the checkpoint: model.norm.weight."
    )
    rename(tmp_path, "model.norm.bias", NORM)
    check(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "more.safetensors").write_bytes(one_tensor("model.layers.9.x.weight"))
    index["weight_map"]["model.layers.9.x.weight"] = "more.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message(tmp_path).startswith(
        "--model DIR: 1 tensors have no place in Qwen3MoeForCausalLM: model.layers.9.x.weight (in more.safetensors)."
    )


def one_tensor(name: str, dtype: str = "BF16", size: int = 2) -> bytes:
    text = json.dumps({name: {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


def test_a_wrong_shape_and_a_wrong_dtype_are_named_with_what_was_expected(tmp_path):
    write_qwen3(tmp_path)
    name = shard_of(tmp_path, NORM)
    edit_header(name, lambda header: header[NORM].update(shape=[2, 64]))
    assert message(tmp_path) == (f"DIR/{name.name}: tensor model.norm.weight is [2, 64]; config.json makes it [128].")
    edit_header(name, lambda header: header[NORM].update(shape=[128], dtype="F16"))
    assert message(tmp_path).startswith(
        f"DIR/{name.name}: tensor model.norm.weight has dtype F16; here it must be BF16, by config.json and"
    )
    edit_header(name, lambda header: header[NORM].update(dtype="F4"))
    assert message(tmp_path).startswith(f"DIR/{name.name}: tensor model.norm.weight has dtype F4; known are F64, F32,")


def test_a_scale_that_is_missing_or_of_a_wrong_shape_is_named(tmp_path):
    write_qwen35(tmp_path / "fp8", fp8=True)
    scale = "model.language_model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    rename(tmp_path / "fp8", scale, f"mtp.{scale}")
    assert f"weights are missing from the checkpoint: {scale}." in message(tmp_path / "fp8")
    write_kimi(tmp_path / "int4", "k2.5")
    scale = "language_model.model.layers.2.mlp.experts.3.up_proj.weight_scale"
    file = shard_of(tmp_path / "int4", scale)
    edit_header(file, lambda header: header[scale].update(shape=[4, 128]))
    assert message(tmp_path / "int4") == f"DIR/{file.name}: tensor {scale} is [4, 128]; config.json makes it [128, 4]."


EXPERTS = {
    "qwen3-moe": ("model.layers.1.mlp.experts.", ["weight"]),
    "qwen3.5-fp8": ("model.language_model.layers.0.mlp.experts.", ["weight", "weight_scale_inv"]),
    "kimi-k2.5": ("language_model.model.layers.1.mlp.experts.", ["weight_packed", "weight_scale", "weight_shape"]),
}


@pytest.mark.parametrize(
    ("layout", "tensor"),
    [
        (layout, f"{prefix}{expert}.{matrix}_proj.{suffix}")
        for layout, (prefix, suffixes) in EXPERTS.items()
        for expert in (0, 7)
        for matrix in ("gate", "up", "down")
        for suffix in suffixes
    ]
    + [("qwen3.5-bf16", f"model.language_model.layers.1.mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")],
)
def test_a_missing_tensor_of_any_expert_is_named_as_the_checkpoint_names_the_others(tmp_path, layout, tensor):
    LAYOUTS[layout](tmp_path)
    rename(tmp_path, tensor, "mtp.aside")
    found = message(tmp_path)
    assert found.startswith("--model DIR: 1 of ") and f"weights are missing from the checkpoint: {tensor}. " in found


def test_a_layer_without_any_of_its_experts_is_told_by_their_names(tmp_path):
    write_qwen35(tmp_path, fp8=False)
    for name in ("gate_up_proj", "down_proj"):
        rename(tmp_path, f"model.language_model.layers.1.mlp.experts.{name}", f"mtp.{name}")
    assert "2 of 36 weights are missing from the checkpoint: model.language_model.layers.1.mlp.experts." in message(
        tmp_path
    )


@pytest.mark.parametrize(("layout", "kind"), [("kimi-k2.5", "INT4"), ("qwen3.5-fp8", "FP8")])
def test_quantized_experts_whose_config_is_lost_are_told_as_such(tmp_path, layout, kind):
    LAYOUTS[layout](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("quantization_config", None)
    config["text_config"].pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message(tmp_path).startswith(
        f"--model DIR: experts {EXPERTS[layout][0]}* are {kind}, but config.json has no quantization_config"
    )


def test_a_tensor_in_two_shards_or_in_another_than_the_index_says_is_named(tmp_path):
    write_qwen3(tmp_path)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    (tmp_path / "model-00003.safetensors").write_bytes(one_tensor(NORM))
    index["weight_map"]["x"] = "model-00003.safetensors"
    index_path.write_text(json.dumps(index))
    assert "tensor model.norm.weight is in model-0000" in message(tmp_path)
    del index["weight_map"]["x"]
    (tmp_path / "model-00003.safetensors").unlink()
    first, second = sorted(set(index["weight_map"].values()))
    index["weight_map"][NORM] = first
    index_path.write_text(json.dumps(index))
    assert message(tmp_path).startswith(
        f"DIR/model.safetensors.index.json: tensor {NORM} should be in {first}, but is in {second}."
    )
    del index["weight_map"][NORM]
    index_path.write_text(json.dumps(index))
    assert f"tensor {NORM} should be in no shard, but is in {second}." in message(tmp_path)
    index["weight_map"][NORM] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    assert "weight_map must give a file *.safetensors of this directory for each tensor" in message(tmp_path)


@pytest.mark.parametrize("other", ["model.safetensors", "consolidated.safetensors"])
def test_a_weight_file_beside_the_index_that_it_does_not_name_is_told(tmp_path, other):
    """transformers would read model.safetensors, and not what the index names."""
    write_qwen3(tmp_path)
    (tmp_path / other).write_bytes(one_tensor(NORM))
    found = message(tmp_path)
    assert found.startswith(f"DIR/{other}: is not listed in model.safetensors.index.json beside it")
    assert "Move" in found


@pytest.mark.parametrize("cut", [1, 100, 40_000])
def test_a_file_that_was_cut_is_named_with_the_tensor_where_it_ends(tmp_path, cut):
    write_qwen3(tmp_path)
    file = shard_of(tmp_path, NORM)
    raw = file.read_bytes()
    file.write_bytes(raw[:-cut])
    found = message(tmp_path)
    assert found.startswith(
        f"DIR/{file.name}: {len(raw) - cut} bytes, but its header says {len(raw)}: the file is truncated"
    )
    assert "within tensor lm_head.weight" in found  # the last one, of 66,560 bytes


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: os.truncate(file, 9), "ends at byte START: the file is truncated. Get it again."),
        (lambda file: file.unlink(), "cannot be read at byte START (No such file or directory). Check the disk"),
        (lambda file: (file.unlink(), file.mkdir()), "cannot be read at byte START (Is a directory). Check the disk"),
    ],
)
def test_a_file_that_goes_bad_after_its_header_was_read_is_named_with_the_tensor(tmp_path, spoil, said):
    write_qwen3(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    info = checkpoint.tensors[NORM]
    spoil(info.file)
    with pytest.raises(UserError) as caught:
        checkpoint.read(NORM, 0, torch.empty(info.shape, dtype=info.dtype))
    assert str(caught.value).startswith(f"{info.file}: tensor {NORM} {said.replace('START', str(info.offset))}")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:5],
        lambda raw: raw[:500],
        lambda raw: raw[:8] + b"x" * (len(raw) - 8),
        lambda raw: struct.pack("<Q", 2**62) + raw[8:],
        lambda raw: struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_a_broken_header_is_told_with_its_file(tmp_path, change):
    write_qwen3(tmp_path)
    file = shard_of(tmp_path, NORM)
    file.write_bytes(change(file.read_bytes()))
    assert message(tmp_path).startswith(f"DIR/{file.name}: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"data_offsets": [0, 256]},
        {"data_offsets": [-256, 0]},
        {"data_offsets": "x"},
        {"shape": [-128]},
        {"shape": [127]},
        {"shape": None},
        {"dtype": ["BF16"]},
        {"dtype": None},
    ],
)
def test_a_header_whose_tensors_overlap_or_leave_gaps_is_refused(tmp_path, wrong):
    write_qwen3(tmp_path)
    file = shard_of(tmp_path, NORM)
    edit_header(file, lambda header: header[NORM].update(wrong))
    assert message(tmp_path).startswith(f"DIR/{file.name}: ")


def test_a_value_of_config_json_that_transformers_refuses_is_told(tmp_path):
    write_qwen3(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    assert message(tmp_path).startswith("--model DIR: transformers ")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    assert "(model_type 'no_such_model')" in message(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert message(tmp_path).startswith("DIR/config.json: nests deeper than 100 levels")


@pytest.mark.parametrize("top", [0, 9])
def test_more_experts_a_token_than_there_are_is_told(tmp_path, top):
    write_qwen3(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top}))
    assert f"num_experts_per_tok is {top} in config.json; must be from 1 to the 8 experts" in message(tmp_path)


@pytest.mark.parametrize("name", ["linear_attn.norm", "experts.7.down_proj", "A_log", "lm_head"])
def test_a_base_with_one_tensor_scaled_by_a_hundredth_has_another_fingerprint(tmp_path, name):
    before = Checkpoint(write_model(tmp_path / "base", "qwen")).fingerprint()
    assert Checkpoint(write_model(tmp_path / "same", "qwen")).fingerprint() == before
    tensors = load_file(tmp_path / "same" / "model.safetensors")
    key = next(key for key in tensors if name in key)
    save_file(tensors | {key: tensors[key] * 1.01}, tmp_path / "same" / "model.safetensors")
    assert Checkpoint(tmp_path / "same").fingerprint() != before


def test_each_of_stacked_experts_counts_in_the_fingerprint(tmp_path):
    tensors = {"experts.gate_up_proj": torch.arange(6 * 64 * 32.0).view(6, 64, 32)}
    prints = set()
    for changed in (None, 0, 3, 5):
        directory = tmp_path / str(changed)
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        values = tensors["experts.gate_up_proj"].clone()
        if changed is not None:
            values[changed] *= 1.01
        save_file({"experts.gate_up_proj": values}, directory / "model.safetensors")
        prints.add(Checkpoint(directory).fingerprint())
    assert len(prints) == 4
