"""Two layers of Qwen3.5-397B-A17B and of Kimi K2.5 at real width on one GPU: a training step, measured.

    python tests/benchmarks/gpu.py [--json FILE] [--models qwen3.5-397b-a17b kimi-k2.5] [--tokens 8192] [--tiny]

A rank's share of a layer: all of it, but 64 of Qwen's experts (NF4) and 48 of Kimi's (INT4), with their top 10 and 8,
so that as many pairs reach them as at expert parallelism 8; embedding, head and loss as they are. The weights are
drawn. They come in by the trainer's own loading and train on its engine, with LoRA of rank 32, gradient checkpointing,
and one row of whole documents. Tokens a second; share of the GPU's peak, by the FLOPs of launch.plan (recomputation
and the masked half of attention counted); memory against the plan; and where a step's time goes, by marks in forward,
recomputation and backward: `experts` are their products and what lies between, `dispatch` the rest of their module,
`attention` and `delta rule` whole modules with their projections. --tiny: widths for a CPU, on which it all runs too. A
process for each model.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import finish, run
from torch import Tensor, nn

from launch import computing
from launch.cluster import GPUS, Cluster
from launch.config_only import BareCheckpoint
from launch.memory import planned_batch
from launch.planning import Plan
from train.config.settings import ds_config, parse
from train.data.batches import Batch
from train.experts.module import ExpertParallelExperts
from train.layers import mixing
from train.model.engine import make_engine
from train.model.text_model import LanguageModel, build, text_config
from train.runtime.command import leave
from train.runtime.distributed import start_distributed
from train.training.job import lora_settings
from train.training.metrics import measured_memory

QWEN: dict[str, Any] = dict(
    model_type="qwen3_5_moe_text", architectures=["Qwen3_5MoeForCausalLM"], dtype="bfloat16", vocab_size=248320,
    hidden_size=4096, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_attention_heads=32,
    num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=64, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4, num_experts=64, num_experts_per_tok=10,
    moe_intermediate_size=1024, shared_expert_intermediate_size=1024, max_position_embeddings=262144,
    rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, rope_parameters=dict(
        rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.25, mrope_interleaved=True,
        mrope_section=[11, 11, 10],
    ),
)  # fmt: skip
KIMI: dict[str, Any] = dict(
    model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16", vocab_size=163840,
    hidden_size=7168, intermediate_size=18432, num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=64,
    num_key_value_heads=64, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, n_routed_experts=48, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
    n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.827, scoring_func="sigmoid",
    topk_method="noaux_tc", max_position_embeddings=262144, rms_norm_eps=1e-5, hidden_act="silu",
    tie_word_embeddings=False, rope_theta=50000.0, quantization_config=dict(
        quant_method="compressed-tensors", format="pack-quantized", config_groups=dict(group_0=dict(
            weights=dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32),
        )),
    ),
)  # fmt: skip
MODELS = {"qwen3.5-397b-a17b": (QWEN, "qlora"), "kimi-k2.5": (KIMI, "lora")}
TINY: dict[str, dict[str, Any]] = {
    "qwen3.5-397b-a17b": dict(
        vocab_size=512, hidden_size=64, num_attention_heads=4, head_dim=64, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32, num_experts=16,
        moe_intermediate_size=64, shared_expert_intermediate_size=64,
    ),
    "kimi-k2.5": dict(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16,
        moe_intermediate_size=64,
    ),
}  # fmt: skip
DOCUMENTS = (0.43, 0.26, 0.16, 0.09, 0.05)  # of a row, the rest is one more
WARM_UP, STEPS = 3, 5  # by the third step ZeRO-3 has learned the order of the layers
KINDS = ("experts", "attention", "delta rule", "dispatch", "loss", "other")


class Drawn(BareCheckpoint):
    """A checkpoint whose weights are drawn as they are read, from a pool over and over: matrices such that a product
    keeps its input's size, norms about where they begin."""

    def __init__(self, config: Path):
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.normal_N = torch.randn(2**22, generator=generator)
        self.word_N = torch.randint(-(2**31), 2**31, (2**22,), generator=generator, dtype=torch.int64).int()

    def read(self, name: str, start: int, out: Tensor) -> None:
        shape, flat = self.tensors[name].shape, out.view(-1)
        centre, spread = 0.0, shape[-1] ** -0.5
        if name.endswith("_scale"):
            spread = (shape[-1] * 32) ** -0.5 / 5  # of 4 bits, about 4.6 a word
            centre, spread = spread, spread / 10
        elif len(shape) == 1:
            centre, spread = (0.0 if "qwen" in self.config["model_type"] else 1.0), 0.1
        most = len(self.word_N) - 997
        for place in range(0, len(flat), most):
            part, first = flat[place : place + most], (start + place) % 997
            values = slice(first, first + len(part))
            part.copy_(self.word_N[values] if out.dtype == torch.int32 else self.normal_N[values] * spread + centre)
        self.bytes_read += out.nbytes


class Clock:
    """Divides a device's time among kinds of work: from a mark on it belongs to that mark's kind."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def at(self, kind: str) -> None:
        if self.device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((kind, moment))

    def seconds(self) -> Counter[str]:
        """Between the marks, by kind; and none is left."""
        spent: Counter[str] = Counter(dict.fromkeys(KINDS, 0.0))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (kind, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            spent[kind] += begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
        self.marks.clear()
        return spent


class _Mark(torch.autograd.Function):
    """A tensor on which the clock is set as it passes: forward to one kind, its gradient to another."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        clock.at(forward)
        ctx.clock, ctx.kind = clock, backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.at(ctx.kind)
        return grad, None, None, None


def watch_module(module: nn.Module, clock: Clock, kind: str) -> None:
    """What the module does is of this kind; before and after it, other work."""

    def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given:
            return (_Mark.apply(given[0], clock, kind, "other"), *given[1:]), named
        return given, named | {"hidden_states": _Mark.apply(named["hidden_states"], clock, kind, "other")}

    def leave_it(_: nn.Module, given: Any, out: Any) -> Any:
        if type(out) is tuple:  # not the loss, from which backward begins
            return (_Mark.apply(out[0], clock, "other", kind), *out[1:])
        return _Mark.apply(out, clock, "other", kind) if isinstance(out, Tensor) else None

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave_it)


def watch_products(layer: ExpertParallelExperts, clock: Clock) -> None:
    """From the first product to the last: experts; the rest of their module: dispatch."""
    product = layer._product

    def watched(x_PI: Tensor, name: str, *given: Any) -> Tensor:
        if name == "gate_up_proj":
            return product(_Mark.apply(x_PI, clock, "experts", "dispatch"), name, *given)
        return _Mark.apply(product(x_PI, name, *given), clock, "dispatch", "experts")

    layer._product = watched  # type: ignore[method-assign]


def watch(model: LanguageModel, clock: Clock) -> None:
    for name, module in model.named_modules():
        kinds = {"self_attn": "attention", "linear_attn": "delta rule", "experts": "dispatch", "lm_head": "loss"}
        if kind := kinds.get(name.rpartition(".")[2]):
            watch_module(module, clock, kind)
    for layer in model.expert_layers:
        watch_products(layer, clock)


def drawn_batch(lengths: list[int], vocabulary: int) -> Batch:
    """A row of documents of these lengths, all tokens but their first ones in the loss, which is their mean."""
    batch, generator = planned_batch(lengths), torch.Generator().manual_seed(0)
    batch.ids_T = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    batch.target_N = batch.ids_T[batch.position_N + 1]
    batch.coefficient_N /= len(batch.target_N)
    return batch


def delta_rule_used(device: torch.device) -> str:
    """By what the delta rule is computed; where the kernel cannot, the fallback is put in its place, and why."""
    if device.type != "cuda" or mixing._flash_linear_attention() is None:
        return "transformers' fallback"
    try:
        computing.delta_rule(device, torch.bfloat16)
    except Exception as error:
        mixing._flash_linear_attention = lambda: None  # type: ignore[assignment]
        return f"transformers' fallback: {str(error).splitlines()[0]}"
    return f"flash-linear-attention {version('flash-linear-attention')}"


def step(engine: Any, batch: Batch, clock: Clock) -> float:
    """One optimizer step; -> its loss."""
    clock.at("other")
    terms = engine(batch)
    clock.at("loss")
    engine.backward(terms.loss, scale_wrt_gas=False)
    clock.at("other")
    engine.step()
    clock.at("other")
    return terms.loss.item()


def measure(name: str, tokens: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """The figures of one model, in this process, which does nothing else."""
    config, method = MODELS[name]
    device = start_distributed()
    lengths = [int(tokens * part) for part in DOCUMENTS]
    lengths.append(tokens - sum(lengths))
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(config | sizes))
        flags = ["--model", temporary, "--method", method, "--max-tokens", str(tokens), "--gradient-checkpointing"]
        flags += ["--batch-size", str(len(lengths)), "--learning-rate", "1e-3", "--wandb", "disabled"]
        settings = parse(flags, "")
        checkpoint = Drawn(Path(temporary))
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else 0
        plan = Plan(settings, checkpoint, Cluster(nodes=1, gpus=1, memory=memory), max(lengths), lengths)
        row: dict[str, Any] = {"model": name, "method": method, "tokens": tokens, "documents": lengths}
        row["delta_rule"] = delta_rule_used(device) if "layer_types" in config else None
        lora = lora_settings(settings, text_config(checkpoint))
        started = time.perf_counter()
        model, loaded = build(checkpoint, method, lora, "", 1, ds_config(settings, 1), device)
    row |= {"load_seconds": time.perf_counter() - started, "read_bytes": loaded.bytes_read}
    model.train()
    model.enable_gradient_checkpointing()
    clock = Clock(device)
    watch(model, clock)
    engine = make_engine(model, settings, ds_config(settings, 1))
    batch = drawn_batch(lengths, model.causal.config.vocab_size).to(device)
    losses, spent, seconds = [], Counter[str](), []
    for number in range(WARM_UP + STEPS):
        losses.append(step(engine, batch, clock))
        own = clock.seconds()
        if number >= WARM_UP:
            spent += own
            seconds.append(own.total())
    typical, peak = statistics.median(seconds), [g.flops for g in GPUS if g.name in gpu_name(device)]
    return row | {
        "experts": model.expert_layers[0].experts, "losses": losses, "seconds": typical,
        "spread": max(seconds) / min(seconds), "tokens_per_second": tokens / typical, "flops": plan.flops,
        "share_of_peak": plan.flops / typical / peak[0] if peak else None,
        "share_of_time": {kind: spent[kind] / spent.total() for kind in KINDS},
        "planned_bytes": plan.chosen.total, "measured_bytes": measured_memory(device), "planned": plan.chosen.gpu,
    }  # fmt: skip


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def show(row: dict[str, Any]) -> None:
    share = f", {row['share_of_peak']:.1%} of the GPU's peak" if row["share_of_peak"] else ""
    parts = ", ".join(f"{kind} {part:.0%}" for kind, part in row["share_of_time"].items())
    print(
        f"{row['model']}, {row['method']}, {row['experts']} experts, {row['tokens']} tokens, on {row['device']}: "
        f"{row['seconds'] * 1e3:.0f} ms, {row['tokens_per_second']:.0f} tokens/s, {row['flops'] / 1e12:.1f} TFLOP"
        f"{share}; planned {row['planned_bytes'] / 1e9:.2f} GB, measured {row['measured_bytes'] / 1e9:.2f} GB "
        f"({row['measured_bytes'] / row['planned_bytes'] - 1:+.1%}); {parts}"
        + (f"; delta rule by {row['delta_rule']}" if row["delta_rule"] else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="small widths, such as a CPU can do")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        (name,) = args.models
        row = measure(name, args.tokens, TINY[name] if args.tiny else {})
        row["device"] = gpu_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(json.dumps(row), flush=True)
        leave(0)
    rows = []
    for name in args.models:
        words = [__file__, "--alone", "--models", name, "--tokens", str(args.tokens)]
        allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the job scripts have it
        printed = run(*words, *["--tiny"] * args.tiny, env={"PYTORCH_CUDA_ALLOC_CONF": allocator})
        rows.append(json.loads(printed.splitlines()[-1]))
        show(rows[-1])
    finish(rows, args.json)


if __name__ == "__main__":
    main()
