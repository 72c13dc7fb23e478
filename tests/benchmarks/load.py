"""Time and host memory of a load on 2 ranks under ZeRO-3: ours, and transformers' own `from_pretrained`.

    python tests/benchmarks/load.py [--json FILE] [--layouts qwen3.5 kimi] [--experts 128]

Generates a checkpoint of several GB in Qwen3.5's layout (BF16, fused experts) and one in Kimi K2.5's (packed INT4),
and loads each in turn, files in the page cache. Ours keeps INT4 packed; transformers decompresses it, it has no other
way. A load's time is that of its slowest rank, imports not counted; memory is each rank's peak resident set, imports
counted.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import finish, header, run

from tests.support import layouts

RANKS = 2
SIZES: dict[str, Any] = dict(hidden_size=1024, moe_intermediate_size=768, num_hidden_layers=6, vocab_size=32_000)


class QuickBits(layouts.Bits):
    """Drawing gigabytes takes minutes: here a million values are drawn once and repeated."""

    def __init__(self, seed: int):
        super().__init__(seed)
        values = self.rng.standard_normal(2**20).astype("<f4") * 0.02
        self.block = (values.view("<u4") >> 16).astype("<u2").tobytes()
        self.words = self.rng.integers(0, 256, 2**20).astype(np.uint8).tobytes()

    def bf16(self, name, *shape, scale=None, shift=0.0):
        size = 2 * math.prod(shape)
        return name, "BF16", shape, (self.block * (size // len(self.block) + 1))[:size]

    def int4(self, name, out, inside):
        size = out * inside // 2
        yield f"{name}.weight_packed", "I32", (out, inside // 8), (self.words * (size // len(self.words) + 1))[:size]
        yield self.bf16(f"{name}.weight_scale", out, inside // 32)
        yield f"{name}.weight_shape", "I32", (2,), np.array([out, inside], "<i4").tobytes()


def generate(directory: Path, layout: str, experts: int) -> Path:
    layouts.Bits, kept = QuickBits, layouts.Bits  # type: ignore[misc]
    try:
        if layout == "qwen3.5":
            kinds = ["linear_attention"] * 3 + ["full_attention"]
            types = [kinds[i % 4] for i in range(SIZES["num_hidden_layers"])]
            return layouts.write_qwen35(directory, fp8=False, num_experts=experts, layer_types=types, **SIZES)
        return layouts.write_kimi(directory, "k2.5", n_routed_experts=2 * experts, **SIZES)
    finally:
        layouts.Bits = kept  # type: ignore[misc]


def worker(kind: str, directory: str, out: str) -> None:
    """One rank of one load; rank 0 writes what all measured."""
    import torch.distributed as dist

    from train.config.settings import ds_config, parse
    from train.runtime.command import leave
    from train.runtime.distributed import peak_host_bytes, start_distributed

    device = start_distributed()
    config = ds_config(parse([], ""), dist.get_world_size())
    if kind == "ours":
        from train.checkpoints.reader import Checkpoint
        from train.experts.storage import FrozenExperts
        from train.model.text_model import build

        dist.barrier()
        started = time.perf_counter()
        model, loaded = build(Checkpoint(directory), "lora", None, "", dist.get_world_size(), config, device)
        seconds = time.perf_counter() - started
        share = sum(p.ds_tensor.nbytes for p in model.parameters())
        for module in model.modules():
            if isinstance(module, FrozenExperts):
                share += sum(buffer.nbytes for buffer in module.buffers())
        persistent = [piece.module._buffers[piece.target] for piece in loaded.plan.buffers]
        share += sum(buffer.nbytes for buffer in persistent if buffer is not None)
        own = {"seconds": seconds, "peak": peak_host_bytes(), "read": loaded.bytes_read, "share": share}
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig
        from transformers.integrations import HfDeepSpeedConfig

        # ZeRO-3 is on as long as this lives. Without bf16 it would make every parameter fp32, whatever dtype is asked
        held = HfDeepSpeedConfig(config | {"bf16": {"enabled": True}})
        packed = "kimi" in json.loads((Path(directory) / "config.json").read_text())["model_type"]
        options: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
        auto = AutoModelForImageTextToText if packed else AutoModelForCausalLM
        dist.barrier()
        started = time.perf_counter()
        model = auto.from_pretrained(directory, dtype=torch.bfloat16, **options)
        own = {"seconds": time.perf_counter() - started, "peak": peak_host_bytes()}
        assert held.is_zero3() and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(every))
    dist.barrier()
    leave(0)


def load(kind: str, directory: Path, out: Path) -> list[dict[str, Any]]:
    run(__file__, "--worker", kind, str(directory), str(out), ranks=RANKS)
    return json.loads(out.read_text())


def measure(layout: str, directory: Path, rounds: int) -> dict[str, Any]:
    loads: dict[str, list[list[dict[str, Any]]]] = {"ours": [], "transformers": []}
    for turn in range(rounds):
        for kind, done in loads.items():
            done.append(load(kind, directory, directory.with_name("out.json")))
            slowest = max(own["seconds"] for own in done[-1])
            peaks = ", ".join(f"{own['peak'] / 1e9:.2f}" for own in done[-1])
            print(f"    {layout}, turn {turn + 1}: {kind} {slowest:.2f} s, peaks {peaks} GB", flush=True)
    seconds = {kind: [max(own["seconds"] for own in turn) for turn in done] for kind, done in loads.items()}
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    ours = loads["ours"][0]
    peaks = {kind: [max(turn[r]["peak"] for turn in done) for r in range(RANKS)] for kind, done in loads.items()}
    return {
        "layout": layout, "time_over_transformers": median["ours"] / median["transformers"],
        "share_bytes": max(own["share"] for own in ours), "bytes_read_per_rank": [own["read"] for own in ours],
        "bytes_kept_per_rank": [own["share"] for own in ours],
        "peak_bytes_per_rank": peaks["ours"], "transformers_peak_bytes_per_rank": peaks["transformers"],
        "checkpoint_bytes": sum(file.stat().st_size for file in directory.glob("*.safetensors")), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--worker"] or "--worker" in sys.argv:
        at = sys.argv.index("--worker")
        worker(*sys.argv[at + 1 : at + 4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--layouts", nargs="+", default=["qwen3.5", "kimi"], choices=["qwen3.5", "kimi"])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    header()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for layout in args.layouts:
            directory = generate(Path(temporary) / layout, layout, args.experts)
            rows.append(row := measure(layout, directory, args.rounds))
            print(
                f"{layout}, {row['checkpoint_bytes'] / 1e9:.2f} GB: {row['time_over_transformers']:.3f} x the time of "
                f"transformers; largest share {row['share_bytes'] / 1e9:.3f} GB, "
                f"peaks {', '.join(f'{b / 1e9:.2f}' for b in row['peak_bytes_per_rank'])} GB "
                f"(transformers {', '.join(f'{b / 1e9:.2f}' for b in row['transformers_peak_bytes_per_rank'])}); "
                f"read {row['bytes_read_per_rank']}, kept {row['bytes_kept_per_rank']}",
                flush=True,
            )
            shutil.rmtree(directory)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
