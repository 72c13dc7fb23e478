"""The fewest GPUs of each size on which the full-size models train, by launch.plan.

    python tests/benchmarks/needs.py [--json FILE] [--checkpoints DIR]

Documents of 10,000 tokens, one a micro-batch, gradient checkpointing, LoRA rank 32, experts divided among all GPUs;
nodes of up to 8 GPUs, and numbers of GPUs that are powers of two. DIR holds MODEL/config.json: ../shared/checkpoints by
default.
"""

import argparse
from functools import cache
from pathlib import Path

from harness import finish

from launch.cluster import GPUS, Cluster
from launch.planning import Plan
from launch.proposal import opened
from train.checkpoints.reader import Checkpoint
from train.config.settings import parse

CASES = (("qwen3.5-397b-a17b", "qlora"), ("qwen3.5-397b-a17b", "lora"), ("kimi-k2.5", "lora"))
COUNTS = (2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    default = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
    parser.add_argument("--checkpoints", type=Path, default=default, metavar="DIR")
    args = parser.parse_args()
    flags = ["--gradient-checkpointing", "--max-tokens", "10000"]

    @cache
    def opened_once(model: str) -> Checkpoint:
        return opened(str(args.checkpoints / model))

    def plan(model: str, method: str, gpus: int, memory: int) -> Plan:
        cluster = Cluster(nodes=max(1, gpus // 8), gpus=min(8, gpus), memory=memory)
        own = ["--model", str(args.checkpoints / model), "--method", method, "--expert-parallel", str(gpus)]
        settings = parse([*own, *flags], "")
        return Plan(settings, opened_once(model), cluster, settings.max_tokens)

    rows = []
    print("| model | method | GPU | fewest | GB per GPU | s per step, at least |\n|---|---|---|---:|---:|---:|")
    for model, method in CASES:
        least = 0
        for gpu in reversed([gpu for gpu in GPUS if gpu.grouped]):
            for count in COUNTS:
                if count < least:
                    continue
                found = plan(model, method, count, gpu.memory)
                if not found.fits:
                    continue
                least = count  # a smaller GPU needs as many
                total, step = found.gpu_bytes["total"], found.seconds["step"]
                rows.append({
                    "model": model, "method": method, "gpu": gpu.name, "memory": gpu.memory, "gpus": count,
                    "total_bytes": total, "step_seconds": step,
                })  # fmt: skip
                print(
                    f"| {model} | {method} | {gpu.name}, {gpu.memory} GB | {count} | {total / 1e9:.0f} | {step:.1f} |",
                    flush=True,
                )
                break
    finish(rows, args.json)


if __name__ == "__main__":
    main()
