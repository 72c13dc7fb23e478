"""Checkpoints in the layouts of the real ones, written byte by byte (tests/support/layouts.py): each gives the logits
of transformers' own loading, and a rank reads what it keeps and nothing else."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests import load_worker
from tests.support.checkpoints import rename, stock_model
from tests.support.layouts import LAYOUTS
from tests.support.ranks import run
from train.checkpoints.layout import plan_load
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.model.text_model import skeleton, text_config
from train.runtime.errors import UserError

RANKS = [(1, 1), (2, 2), (4, 2)]
LEFT_OUT = {
    "qwen3.5-bf16": {"vision": 21, "multi-token prediction": 39},
    "qwen3.5-fp8": {"vision": 21, "multi-token prediction": 70},
    "kimi-k2.5": {"vision": 23},
    "kimi-k2-instruct": {"rotary table": 3},
    "deepseek-v3": {"multi-token prediction": 73},
}


# Sizes that no block, group or number of ranks divides, but for what a format asks for: inputs of INT4 by 32.
ODD_QWEN: dict[str, Any] = dict(
    hidden_size=200, moe_intermediate_size=72, num_experts=12, num_experts_per_tok=5, num_hidden_layers=3, head_dim=24,
    num_attention_heads=3, num_key_value_heads=1, vocab_size=263,
)  # fmt: skip
ODD_QWEN35 = ODD_QWEN | dict(
    shared_expert_intermediate_size=136, layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_value_heads=6, linear_num_key_heads=3, linear_key_head_dim=24, linear_value_head_dim=40,
)  # fmt: skip
ODD_FP8: dict[str, Any] = dict(
    hidden_size=200, intermediate_size=232, moe_intermediate_size=72, num_hidden_layers=4, num_attention_heads=3,
    num_key_value_heads=3, n_routed_experts=12, num_experts_per_tok=5, first_k_dense_replace=2, q_lora_rank=72,
    kv_lora_rank=40, qk_rope_head_dim=24, qk_nope_head_dim=40, v_head_dim=56, vocab_size=263, n_group=2, topk_group=1,
)  # fmt: skip
ODD_INT4 = ODD_FP8 | dict(hidden_size=160, moe_intermediate_size=96)
ODD: dict[str, dict[str, Any]] = {
    "qwen3.5-bf16": ODD_QWEN35, "qwen3.5-fp8": ODD_QWEN35, "kimi-k2.5": ODD_INT4, "kimi-k2-thinking": ODD_INT4,
    "kimi-k2-instruct": ODD_FP8, "deepseek-v3": ODD_FP8, "qwen3-moe": ODD_QWEN,
}  # fmt: skip


def load_all(record: Path, ranks: int, ep: int, method: str, directories: list[Path]) -> None:
    """A record of each directory, in one start of the launcher."""
    done = run(
        load_worker.__file__, str(record), str(ep), method, *map(str, directories), ranks=ranks, capture_output=True,
        text=True, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout, and a record of each under all of RANKS."""
    root = tmp_path_factory.mktemp("layouts")
    directories = [write(root / name) for name, write in LAYOUTS.items()]
    for ranks, ep in RANKS:
        load_all(root, ranks, ep, "lora", directories)
    return root


@pytest.fixture(scope="module")
def loaded_odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout in its odd sizes, and a record of each on 3 ranks in METHOD/."""
    root = tmp_path_factory.mktemp("odd")
    directories = [write(root / name, **ODD[name]) for name, write in LAYOUTS.items()]
    for method in ("lora", "qlora"):
        (root / method).mkdir()
        load_all(root / method, 3, 3, method, directories)
    return root


def in_bf16(directory: Path) -> Path:
    """A copy of a checkpoint, FP8 and INT4 matrices decoded element by element: transformers divides FP8's blocks
    evenly over a matrix that cuts them."""
    out = directory.with_name(f"{directory.name}-in-bf16")
    out.mkdir(exist_ok=True)
    tensors = {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            words, scale = tensor.long() & 0xFFFFFFFF, tensors[name.replace("_packed", "_scale")].float()
            q = torch.stack([((words >> (4 * j)) & 15) - 8 for j in range(8)], -1).flatten(1)
            plain[name.removesuffix("_packed")] = (q * scale[:, torch.arange(q.shape[1]) // 32]).bfloat16()
        elif tensor.dtype == torch.float8_e4m3fn:
            row, column = (torch.arange(size) // 128 for size in tensor.shape)
            scale = tensors[f"{name}_scale_inv"].float()[row[:, None], column]
            plain[name] = (tensor.float() * scale).bfloat16()
        elif not name.endswith(("weight_scale_inv", "weight_scale", "weight_shape")):
            plain[name] = tensor
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    for inside in (config, config.get("text_config", {})):
        inside.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


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
    assert (expected - plain).abs().max() > 0.5  # the LoRA weights have an effect
    for ranks, ep in RANKS:
        saved = load_file(loaded / f"{name}-{ranks}-{ep}.adapter" / "adapter_model.safetensors")
        assert saved.keys() == first.keys() and all(torch.equal(saved[key], first[key]) for key in first)
        found = load_file(loaded / f"{name}-{ranks}-{ep}.safetensors")["adapted"]
        assert (found - expected).abs().max() < 1e-5, (ranks, ep)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_read_each_wanted_element_once(loaded, loaded_odd, name):
    """The frozen experts once in each expert-parallel group, the scales of an FP8 block once on each rank that holds a
    part of the block, buffers on every rank."""
    check_reads(loaded / name, [(ranks, ep, loaded) for ranks, ep in RANKS])
    check_reads(loaded_odd / name, [(3, 3, loaded_odd / "lora"), (3, 3, loaded_odd / "qlora")])


def check_reads(directory: Path, records: list[tuple[int, int, Path]]) -> None:
    checkpoint = Checkpoint(directory)
    plan = plan_load(skeleton(text_config(checkpoint), ExpertGroup()), checkpoint)
    experts = {name for piece in plan.experts for name in piece.sources()}
    buffers = {piece.source for piece in plan.buffers}
    scales = {f"{piece.source}_scale_inv" for piece in plan.dense if piece.format.kind == "fp8"}
    wanted = {piece.source for piece in plan.dense} | experts | buffers | scales
    for ranks, ep, where in records:
        record = load_file(where / f"{directory.name}-{ranks}-{ep}.safetensors")
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


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_of_odd_sizes_are_those_of_the_weights_and_under_qlora_of_their_round_trip_through_nf4(loaded_odd, name):
    """By bitsandbytes itself, an expert's gate and up as one matrix; INT4 experts stay as they are."""
    model = stock_model(in_bf16(loaded_odd / name))
    expected = {"lora": log_p(model)}
    for parameter_name, weight in model.named_parameters():
        if parameter_name.endswith(("experts.gate_up_proj", "experts.down_proj")) and ODD[name] is not ODD_INT4:
            for matrix in weight.data:
                packed, state = bnb.quantize_4bit(matrix.bfloat16(), None, None, 64, True, "nf4")
                matrix.copy_(bnb.dequantize_4bit(packed, state))
    expected["qlora"] = log_p(model)
    assert ((expected["lora"] - expected["qlora"]).abs().max() > 0.1) == (ODD[name] is not ODD_INT4)
    for method, log_probabilities in expected.items():
        found = load_file(loaded_odd / method / f"{name}-3-3.safetensors")["log_p"]
        assert (found - log_probabilities).abs().max() < 1e-5, method


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
