"""What the host has to do for a micro-batch at full size, counted on the operations of a step that is run without data.

    python tests/benchmarks/host.py [--json FILE] [--checkpoints DIR] [--tokens 8192]

For Qwen3.5-397B-A17B with experts in NF4 and Kimi K2.5 with its INT4, at expert parallelism 8, with gradient
checkpointing and LoRA of rank 32 on everything: operations issued in forward, recomputation and backward; those of the
experts' products, dequantization among them; and how often, a layer, the host waits for the GPU and ranks exchange
tokens. DIR holds each model's config.json; without it ../shared/checkpoints. What ZeRO-3 gathers, reduces and waits for
is not among it.
"""

import argparse
from pathlib import Path

from harness import finish, header

from launch.cluster import Cluster
from launch.planning import Plan
from launch.proposal import opened
from train.config.settings import parse

MODELS = {"qwen3.5-397b-a17b": "qlora", "kimi-k2.5": "lora"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    default = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
    parser.add_argument("--checkpoints", type=Path, default=default, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    header()
    rows = []
    for model, method in MODELS.items():
        flags = ["--gradient-checkpointing", "--max-tokens", str(args.tokens), "--expert-parallel", "8"]
        settings = parse(["--model", str(args.checkpoints / model), "--method", method, *flags], "")
        plan = Plan(settings, opened(settings.model), Cluster(nodes=1, gpus=8, memory=141), args.tokens)
        step, layers = plan.chosen.step, len(plan.model.causal.model.layers)
        rows.append({
            "model": model, "method": method, "tokens": args.tokens, "operations": step.operations,
            "expert_operations": step.expert_operations, "synchronisations_per_layer": step.waits / layers,
            "collectives_per_layer": step.collectives / layers,
        })  # fmt: skip
        print(
            f"{model}, {method}, {args.tokens} tokens: {step.operations:,} operations, {step.expert_operations:,} of "
            f"them for experts; a layer {step.waits / layers:.2f} waits and {step.collectives / layers:.2f} exchanges",
            flush=True,
        )
    finish(rows, args.json)


if __name__ == "__main__":
    main()
