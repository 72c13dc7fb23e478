"""A real vLLM on a CPU serves several adapters of mixture-of-experts models at once, and answers as peft does with
the same weights. (Its experts with LoRA are torch here: tests/support/vllm_on_cpu.py.)"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
)

from launch.serve import ServeOptions, prepare
from launch.server import Server
from tests.support.checkpoints import stock_model
from tests.support.layouts import write_kimi, write_qwen3, write_qwen35
from tests.support.merging import merge, write_adapter
from tests.support.served import ENVIRONMENT, PYTHON, REPOSITORY, needs_vllm
from tests.support.vllm_on_cpu import write_plugin
from train.endpoint import Endpoint, EndpointSettings
from train.evaluation.proof import LogP, distance
from train.evaluation.served_log_p import prompt_log_p
from train.layers.lora import LoRASettings
from train.runtime.local import free_port

TEXTS = ("Ada lives in Paris, said no one.", "Mount Elbert is a volcano in Peru.")
ADAPTERS = {
    "one": LoRASettings(rank=8, alpha=6.0, expert_rank=1, seed=0),
    "root": LoRASettings(rank=8, alpha=6.0, expert_rank=3, seed=0, rslora=True),
    "wide": LoRASettings(rank=4, alpha=6.0, expert_rank=8, seed=0),
}
# Sizes that the CPU's kernels take.
LATENT = dict(qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, kv_lora_rank=512, q_lora_rank=128)
GATED = dict(head_dim=64, linear_key_head_dim=128, linear_value_head_dim=128)
# The CPU's own kernel rotates queries of more than one head wrongly.
SERVER = ["--enforce-eager", "--max-model-len", "128", "--compilation-config", '{"custom_ops": ["none"]}']
IN_FP32, IN_BF16 = ["--dtype", "float32"], ["--dtype", "bfloat16", "--language-model-only"]
NEAR = {"float32": 1e-4, "bfloat16": 0.1}  # nats; the CPU's gated delta rule wants BF16


def qwen3(directory: Path) -> Path:
    return write_qwen3(directory, head_dim=64)


def deepseek_in_fp8(directory: Path) -> Path:
    return write_kimi(directory, "deepseek-v3", **LATENT)


def kimi_in_int4(directory: Path) -> Path:
    return write_kimi(directory, "k2-thinking", **LATENT)


def qwen35(directory: Path) -> Path:
    return write_qwen35(directory, fp8=False, **GATED)


def qwen35_in_fp8(directory: Path) -> Path:
    return write_qwen35(directory, fp8=True, **GATED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "head", "options", "flags"),
    [
        (qwen3, True, {}, IN_FP32),
        (qwen3, False, {"tensor_parallel": 2, "expert_parallel": True}, IN_FP32),
        (deepseek_in_fp8, False, {"drop": ["kv_b_proj"]}, IN_BF16),
        (kimi_in_int4, False, {"drop": ["kv_b_proj"]}, IN_FP32),
        (qwen35, False, {}, IN_BF16),
        (qwen35_in_fp8, False, {}, IN_BF16),
    ],
)
def test_adapters_of_experts_answer_on_one_server_as_stock_peft_has_them(
    tmp_path, monkeypatch, write: Callable[[Path], Path], head: bool, options: dict[str, Any], flags: list[str]
):
    needs_vllm()
    base = write(tmp_path / "base")
    adapters = {
        name: write_adapter(tmp_path / name / "adapter", base, lora=replace(lora, lm_head=head), seed=seed)
        for seed, (name, lora) in enumerate(ADAPTERS.items())
    }
    tokenizer = AutoTokenizer.from_pretrained(base)
    dense = base
    if write is deepseek_in_fp8:  # transformers cannot read FP8 whose last block is cut off, as the 576 rows' here are
        dense = tmp_path / "dense"
        assert merge(base, None, dense) == 0
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    stock = {name: log_p(dense, adapter, prompts, options.get("drop", [])) for name, adapter in adapters.items()}
    if not head:  # with LoRA weights of lm_head, the CPU build gives the base those of the last slot
        stock["base"] = log_p(dense, None, prompts)

    given = ServeOptions(
        model=str(base), adapters=list(map(str, adapters.values())), output=str(tmp_path / "served"),
        python=str(PYTHON), port=free_port(), dtype="float32", **options,
    )  # fmt: skip
    serving = prepare(given, [*SERVER, *flags])
    path = f"{REPOSITORY}:{write_plugin(tmp_path / 'plugin')}"
    for name, value in {**ENVIRONMENT, "PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setenv(name, value)
    server = Server(serving.command, serving.url, tmp_path / "server.log", 300)
    server.start()
    try:
        endpoint = Endpoint(EndpointSettings(serving.url, "base", retries=0))
        served = {name: prompt_log_p(endpoint, name, prompts, by_generating=head) for name in stock}
    finally:
        server.stop()
    distances = {(name, other): distance(served[name], expected) for name in stock for other, expected in stock.items()}
    for (name, other), apart in distances.items():
        assert apart < NEAR[flags[1]] if name == other else apart > 0.5, distances


def log_p(model_directory: Path, adapter: Path | None, prompts: list[list[int]], drop: Sequence[str] = ()) -> LogP:
    """By stock transformers and peft, in fp32; drop: modules without an update."""
    model = stock_model(model_directory)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
        for name, tensor in model.named_parameters():
            if "lora_B" in name and any(f".{module}." in name for module in drop):
                tensor.data.zero_()
    model.eval()
    found = []
    for prompt in prompts:
        tokens = torch.tensor(prompt)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].tolist())
    return found
