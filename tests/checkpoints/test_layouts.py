"""Checkpoints in the layouts of the real ones, written byte by byte (tests/layouts.py): each gives the logits of
transformers' own loading, and a rank reads what it keeps and nothing else."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
)

from launch.local import run
from tests import load_worker
from tests.checkpoints.test_reader import rename
from tests.layouts import LAYOUTS
from train.checkpoints.layout import plan_load
from train.checkpoints.reader import Checkpoint
from train.errors import UserError
from train.experts.dispatch import ExpertGroup
from train.model import skeleton, text_config

RANKS = [(1, 1), (2, 2), (4, 2)]
LEFT_OUT = {
    "qwen3.5-bf16": {"vision": 21, "multi-token prediction": 39},
    "qwen3.5-fp8": {"vision": 21, "multi-token prediction": 70},
    "kimi-k2.5": {"vision": 23},
    "kimi-k2-instruct": {"rotary table": 3},
    "deepseek-v3": {"multi-token prediction": 73},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout, and a record of each under all of RANKS."""
    root = tmp_path_factory.mktemp("layouts")
    directories = [str(write(root / name)) for name, write in LAYOUTS.items()]
    for ranks, ep in RANKS:
        command = [str(root), str(ep), "lora", *directories]
        done = run(
            load_worker.__file__, *command, ranks=ranks, capture_output=True, text=True,
            env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return root


def stock_model(directory: Path) -> Any:
    """transformers' own loading, quantized weights made BF16, then in fp32 with the F32 tensors that it rounded."""
    config = json.loads((directory / "config.json").read_text())
    quantization = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    options: dict[str, Any] = {}
    if quantization:
        kind = FineGrainedFP8Config if quantization["quant_method"] == "fp8" else CompressedTensorsConfig
        options["quantization_config"] = kind(dequantize=True)
    if config["model_type"] == "kimi_k2":  # which transformers does not know by itself
        directory = Path(
            shutil.copytree(directory, directory.with_name(f"{directory.name}-as-deepseek"), dirs_exist_ok=True)
        )
        (directory / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.bfloat16, **options).float()
    state = model.state_dict()
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.dtype == torch.float32 and name in state:
                state[name].copy_(tensor)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_transformers_own_loading_on_any_ranks(loaded, name):
    expected = log_p(stock_model(loaded / name))
    assert expected.std() > 0.5  # the model has an opinion
    for ranks, ep in RANKS:
        found = load_file(loaded / f"{name}-{ranks}-{ep}.safetensors")["log_p"]
        assert (found - expected).abs().max() < 1e-5, (ranks, ep)


def log_p(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([load_worker.IDS])).logits[0].float().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_stock_peft_puts_the_adapter_on_the_checkpoints_own_architecture(loaded, name):
    """Every tensor of it, from any number of ranks, with the logits of the run to 1e-5 (of up to 12 or so)."""
    base = stock_model(loaded / name)
    plain = log_p(base)
    first = load_file(loaded / f"{name}-1-1.adapter" / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(base, loaded / f"{name}-1-1.adapter")
    taken = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}
    assert taken.keys() == first.keys() and all(torch.equal(taken[key], first[key]) for key in first)
    expected = log_p(model)
    assert (expected - plain).abs().max() > 0.5  # the factors do something
    for ranks, ep in RANKS:
        saved = load_file(loaded / f"{name}-{ranks}-{ep}.adapter" / "adapter_model.safetensors")
        assert saved.keys() == first.keys() and all(torch.equal(saved[key], first[key]) for key in first)
        found = load_file(loaded / f"{name}-{ranks}-{ep}.safetensors")["adapted"]
        assert (found - expected).abs().max() < 1e-5, (ranks, ep)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_read_each_wanted_element_once(loaded, name):
    """The frozen experts once in each expert-parallel group, the scales of an FP8 block once on each rank that holds a
    part of the block, buffers on every rank."""
    checkpoint = Checkpoint(loaded / name)
    plan = plan_load(skeleton(text_config(checkpoint), ExpertGroup()), checkpoint)
    experts = {read.name for piece in plan.experts for e in range(8) for m in piece.reads(e) for read in m.values()}
    buffers = {piece.source for piece in plan.buffers}
    scales = {f"{piece.source}_scale_inv" for piece in plan.dense if piece.format.kind == "fp8"}
    wanted = {piece.source for piece in plan.dense} | experts | buffers | scales
    for ranks, ep in RANKS:
        record = load_file(loaded / f"{name}-{ranks}-{ep}.safetensors")
        read: Counter[str] = Counter()
        for key, count in record.items():
            if key.startswith("read."):
                read[key.split(".", 2)[2]] += int(count)
        assert read.keys() == wanted
        for tensor in wanted:
            whole = math.prod(checkpoint.tensors[tensor].shape)
            times = ranks // ep if tensor in experts else ranks if tensor in buffers else 1
            if tensor in scales:
                assert whole <= read[tensor] <= ranks * whole
            else:
                assert read[tensor] == times * whole, (tensor, ranks, ep)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_has_no_place_in_the_text_model_is_left_out_and_counted(tmp_path, name):
    checkpoint = Checkpoint(LAYOUTS[name](tmp_path))
    plan = plan_load(skeleton(text_config(checkpoint), ExpertGroup()), checkpoint)
    assert plan.left_out == LEFT_OUT.get(name, {})
    f32 = {p.source.rpartition(".")[2] for p in (*plan.dense, *plan.buffers) if p.dtype == torch.float32}
    expected = {"A_log", "weight"} if name.startswith("qwen3.5") else {"e_score_correction_bias"}
    assert f32 == (set() if name == "qwen3-moe" else expected)  # kept as on disk


@pytest.mark.parametrize(
    ("name", "head", "outer", "text", "own_head"),
    [
        ("qwen3-moe", "lm_head.weight", True, None, True),
        ("qwen3-moe", "lm_head.weight", True, None, False),
        ("qwen3.5-bf16", "lm_head.weight", True, True, True),
        ("qwen3.5-bf16", "lm_head.weight", True, False, False),
        ("qwen3.5-bf16", "lm_head.weight", True, None, False),
        ("qwen3.5-bf16", "lm_head.weight", False, True, False),
        ("kimi-k2.5", "language_model.lm_head.weight", False, True, True),
        ("kimi-k2.5", "language_model.lm_head.weight", None, False, True),  # outside, Kimi's default is to tie
        ("kimi-k2.5", "language_model.lm_head.weight", None, False, False),
    ],
)
def test_the_head_is_tied_where_transformers_ties_it_and_never_dropped(tmp_path, name, head, outer, text, own_head):
    """outer, text: tie_word_embeddings of config.json and of its text_config; None: it says nothing there."""
    LAYOUTS[name](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for inside, flag in ((config, outer), (config.get("text_config", {}), text)):
        inside |= {"tie_word_embeddings": flag}
        if flag is None:
            del inside["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not own_head:
        rename(tmp_path, head, "mtp.aside")
    stock = stock_model(tmp_path)
    tied = stock.lm_head.weight is stock.get_input_embeddings().weight
    checkpoint = Checkpoint(tmp_path)
    bare = skeleton(text_config(checkpoint), ExpertGroup())
    if not tied and not own_head:  # transformers draws it at random
        with pytest.raises(UserError, match=f"1 of .* weights are missing from the checkpoint: {head}"):
            plan_load(bare, checkpoint)
        return
    plan = plan_load(bare, checkpoint)
    assert [piece.source for piece in plan.dense if piece.module is bare.lm_head] == ([head] if own_head else [])
    assert [module for piece in plan.dense for module, _ in piece.tied] == ([bare.lm_head] if tied else [])
