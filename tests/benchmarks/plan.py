"""What launch.plan says a rank takes, and what it takes: jobs of train/sft.py, started by the real launcher.

    python tests/benchmarks/plan.py [--json FILE] [--ranks 1 2 4] [--methods lora qlora full] [--tokens 256 512]

A Qwen3.5-MoE of four layers (hidden 256, 32 experts of width 256, top 4), four documents a micro-batch, four steps: at
the third, ZeRO-3 has learned the order of the layers and gathers as it will for the rest of the run. On a CPU a rank's
memory is what its process took beyond its imports and documents. Bytes read are counted as they are read.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from harness import finish, header, run

from tests.support.models import write_documents, write_model

SFT = Path(__file__).resolve().parents[2] / "train" / "sft.py"
SIZES: dict[str, Any] = dict(
    hidden_size=256, num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, num_experts=32,
    moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts_per_tok=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=32,
    linear_value_head_dim=32, max_position_embeddings=4096,
)  # fmt: skip
DOCUMENTS = 4  # of a micro-batch


def measure(model: Path, method: str, ranks: int, tokens: int, flags: list[str]) -> dict[str, Any]:
    """A job's plan and what it took."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "run"
        data = write_documents(Path(temporary) / "documents.jsonl", [{"text": "abcdefgh" * (tokens // 8 + 1)}] * 16)
        run(
            str(SFT), "--model", str(model), "--data", str(data), "--output", str(output), "--method", method,
            "--max-tokens", str(tokens), "--steps", "4", "--batch-size", str(DOCUMENTS * ranks),
            "--micro-batch-tokens", str(DOCUMENTS * tokens), "--lora-rank", "16", "--wandb", "disabled", *flags,
            ranks=ranks,
        )  # fmt: skip
        summary = json.loads((output / "summary.json").read_text())
    memory = summary["memory"]
    return {
        "method": method, "ranks": ranks, "tokens": tokens, "planned_bytes": memory["planned"],
        "measured_bytes": memory["measured"], "categories": memory["categories"], "moments": memory["moments"],
        "planned_read_bytes": memory["read"], "read_bytes": summary["load"][0]["bytes_read"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora", "full"], choices=("lora", "qlora", "full"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    flags = ["--gradient-checkpointing"] * args.checkpointing
    header()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model(Path(temporary) / "model", "qwen", **SIZES)
        for ranks in args.ranks:
            for method in args.methods:
                for tokens in args.tokens:
                    rows.append(row := measure(model, method, ranks, tokens, flags))
                    planned, measured = row["planned_bytes"], row["measured_bytes"]
                    print(
                        f"{ranks} ranks, {method}, {tokens} tokens: planned {planned / 1e6:.0f} MB, "
                        f"measured {measured / 1e6:.0f} MB ({measured / planned - 1:+.1%}); "
                        f"read {row['read_bytes'] / 1e6:.1f} MB (planned {row['planned_read_bytes'] / 1e6:.1f})",
                        flush=True,
                    )
    finish(rows, args.json)


if __name__ == "__main__":
    main()
