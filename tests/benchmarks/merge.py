"""Time and host memory of a merge: train/merge.py, and stock peft's merge_and_unload with save_pretrained.

    python tests/benchmarks/merge.py [--json FILE] [--layouts qwen3.5 kimi] [--experts 32]

Generates a checkpoint in Qwen3.5's layout (BF16, fused experts) and one in Kimi K2.5's (packed INT4) with random
LoRA on everything, and merges each, files in the page cache: Qwen's in turn with peft, Kimi's to BF16 and back to
INT4. (transformers loads INT4, but fails to save what it made of it: "Undefined Operation encountered!") Each merge is
in a process of its own; imports count in memory, not in time.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import finish, header, run
from load import generate

MERGES = {"qwen3.5": ("bf16",), "kimi": ("bf16", "same")}


def worker(kind: str, base: str, adapter: str, output: str) -> None:
    """One merge. kind: peft, or what --to says. Prints seconds and peak in its last line."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from train import merge
    from train.runtime.distributed import peak_host_bytes

    started = time.perf_counter()
    if kind == "peft":
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    elif merge.main(["--model", base, "--adapter", adapter, "--output", output, "--to", kind]):
        raise SystemExit(1)
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_host_bytes()}))


def merged(kind: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    printed = run(__file__, "--worker", kind, str(base), str(adapter), str(output))
    return json.loads(printed.splitlines()[-1]) | {"written": bytes_of(output)}


def bytes_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measure(layout: str, to: str, base: Path, adapter: Path, rounds: int) -> dict[str, Any]:
    merges: dict[str, list[dict[str, float]]] = {to: []} | ({"peft": []} if layout == "qwen3.5" else {})
    for _ in range(rounds):
        for kind, done in merges.items():
            done.append(merged(kind, base, adapter, base.with_name("merged")))
            shutil.rmtree(base.with_name("merged"))
    seconds = {kind: statistics.median(one["seconds"] for one in done) for kind, done in merges.items()}
    return {
        "layout": layout, "to": to, "read_bytes": bytes_of(base), "written_bytes": int(merges[to][0]["written"]),
        "seconds": [one["seconds"] for one in merges[to]], "peak_bytes": max(one["peak"] for one in merges[to]),
        "written_bytes_per_second": merges[to][0]["written"] / seconds[to],
        "peft_seconds": [one["seconds"] for one in merges.get("peft", ())],
        "peft_peak_bytes": max((one["peak"] for one in merges.get("peft", ())), default=None),
        "time_over_peft": seconds[to] / seconds["peft"] if "peft" in seconds else None,
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--layouts", nargs="+", default=list(MERGES), choices=list(MERGES))
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    header()
    from tests.support.merging import write_adapter

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for layout in args.layouts:
            base = generate(Path(temporary) / layout, layout, args.experts)
            adapter = write_adapter(Path(temporary) / f"{layout}-adapter", base, size=1e-3)
            for to in MERGES[layout]:
                rows.append(row := measure(layout, to, base, adapter, args.rounds))
                print(
                    f"{layout}, {row['read_bytes'] / 1e9:.2f} GB to {to}, {row['written_bytes'] / 1e9:.2f} GB: "
                    f"{statistics.median(row['seconds']):.1f} s, {row['written_bytes_per_second'] / 1e6:.0f} MB/s, "
                    f"peak {row['peak_bytes'] / 1e9:.2f} GB",
                    flush=True,
                )
                if row["peft_seconds"]:
                    peft = statistics.median(row["peft_seconds"])
                    print(f"    peft: {peft:.1f} s, peak {row['peft_peak_bytes'] / 1e9:.2f} GB", flush=True)
            shutil.rmtree(base)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
