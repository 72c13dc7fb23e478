"""Qwen3.5-397B-A17B and Kimi K2.5 at their real size: what each rank reads, and one rank's share loaded for real.

    python tests/benchmarks/full_size.py [--json FILE] [--models qwen3.5-397b-a17b kimi-k2.5]

Makes sparse files of the real names, shapes, dtypes and shards (807 GB and 595 GB that occupy almost nothing), plans
the load for EP 8, 16 and 64, and for EP 8 on 16 ranks, and checks that the ranks' ranges tile every wanted tensor.
Then, in a process of its own, it loads the share of one rank of 64 (Qwen's experts as NF4, Kimi's as packed INT4) and
runs one layer's experts forward and backward at real width. The values are zeros: that changes neither what is read nor
what is kept. The 63 other ranks are not there (torch's fake process group), and none of what is measured talks to them.

Needs the tables of tensors, which are no part of the repository: --checkpoints DIR, ../shared/checkpoints by default.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import finish, header
from torch import nn

from train.checkpoints.layout import LoadPlan, plan_load
from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import READERS
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.layers.lora import LoRASettings
from train.model.text_model import skeleton, text_config

MODELS = {"qwen3.5-397b-a17b": "qlora", "kimi-k2.5": "lora"}
RANK, RANKS, TOKENS = 37, 64, 512
BYTES = {"BF16": 2, "F32": 4, "I32": 4}


def tensors_of(table: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of every tensor that the table's patterns stand for."""
    text = config["text_config"]
    layers = range(text["num_hidden_layers"])
    kinds = text.get("layer_types") or ["full_attention"] * len(layers)
    experts = text.get("num_experts") or text["n_routed_experts"]
    for entry in table["tensors"]:
        pattern, found = entry["name"], 0
        at = [i for i in layers if _has(pattern, i, kinds, text)] if ".layers.L." in pattern else [None]
        for layer in at:
            for block in range(27) if ".blocks.B." in pattern else [None]:
                for expert in range(experts) if ".experts.E." in pattern else [None]:
                    name = pattern.replace(".layers.L.", f".layers.{layer}.").replace(".blocks.B.", f".blocks.{block}.")
                    yield name.replace(".experts.E.", f".experts.{expert}."), entry["dtype"], entry["shape"]
                    found += 1
        assert found == entry["count"], (pattern, found, entry["count"])


def _has(pattern: str, layer: int, kinds: list[str], text: dict[str, Any]) -> bool:
    if ".linear_attn." in pattern:
        return kinds[layer] == "linear_attention"
    if ".self_attn." in pattern and "linear_attention" in kinds:
        return kinds[layer] == "full_attention"
    return not (".mlp." in pattern and layer < text.get("first_k_dense_replace", 0))


def shard_of(model: str, name: str, table: dict[str, Any]) -> int:
    """The number of a tensor's shard, from 1, where the table has it; the rest goes to the last one of its kind."""
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    if model.startswith("kimi"):
        if "vision_tower" in name or "mm_projector" in name:
            return 64 if "vision_tower" in name else 63
        return 62 if layer is None else layer + 1
    layout = table["shard_layout"]
    if name.endswith("mlp.experts.gate_up_proj"):
        return layout["gate_up_proj_layer_of_shard_1_to_60"].index(layer) + 1
    if name.endswith("mlp.experts.down_proj"):
        return 61 + next(i for i, pair in enumerate(layout["down_proj_layers_of_shard_61_to_90"]) if layer in pair)
    return 93 if name.startswith("mtp.") else 91 if name in ("lm_head.weight",) or "embed" in name else 94


def write_sparse(directory: Path, model: str, tables: Path) -> Path:
    """The checkpoint as files with headers and holes."""
    directory.mkdir(parents=True)
    config = json.loads((tables / model / "config.json").read_text())
    table = json.loads((tables / model / "tensors.json").read_text())
    shards: dict[int, dict[str, Any]] = {}
    sizes: dict[int, int] = {}
    weight_map, total = {}, 0
    for name, dtype, shape in tensors_of(table, config):
        number = shard_of(model, name, table)
        begin = sizes.get(number, 0)
        sizes[number] = begin + BYTES[dtype] * torch.Size(shape).numel()
        shards.setdefault(number, {})[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [begin, sizes[number]]
        }  # fmt: skip
        weight_map[name] = table["shard_name"].format(i=number)
        total += sizes[number] - begin
    assert total == table["totals"]["bytes"] and len(weight_map) == table["totals"]["tensors"]
    for number, entries in shards.items():
        text = json.dumps(entries).encode()
        with (directory / table["shard_name"].format(i=number)).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + sizes[number])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def plan_of(directory: Path, group: ExpertGroup) -> tuple[Checkpoint, LoadPlan]:
    checkpoint = Checkpoint(directory)
    return checkpoint, plan_load(skeleton(text_config(checkpoint), group), checkpoint)


def wanted(directory: Path) -> set[str]:
    """The names of all tensors but those of vision and multi-token prediction, and the shapes of INT4 matrices, on
    which nothing depends: from the index alone, which write_sparse makes of the table."""
    names = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    apart = ("model.visual.", "mtp.", "vision_tower.", "mm_projector.")
    return {name for name in names if not name.startswith(apart) and not name.endswith(".weight_shape")}


def check_tiling(directory: Path, method: str) -> dict[str, Any]:
    """For EP 8, 16 and 64, and for 16 ranks in two groups of 8: every element of every wanted tensor goes to one rank,
    those of a frozen expert to one rank of each group, and those of the small buffers to all."""
    out: dict[str, Any] = {}
    for ranks, ep in ((8, 8), (16, 16), (64, 64), (16, 8)):
        group = ExpertGroup(size=ep)
        checkpoint, plan = plan_of(directory, group)
        ranges: dict[str, list[tuple[int, int]]] = {}
        sizes = []
        for rank in range(ranks):
            group.rank, size = rank % ep, 0
            for read in plan.reads(rank, ranks, method):
                ranges.setdefault(read.name, []).append((read.start, read.start + read.count))
                size += checkpoint.bytes_of(read.name, read.count)
            sizes.append(size)
        assert ranges.keys() == wanted(directory), sorted(ranges.keys() ^ wanted(directory))[:5]
        for name, parts in ranges.items():
            numel = torch.Size(checkpoint.tensors[name].shape).numel()
            if name.endswith(".e_score_correction_bias"):
                assert parts == [(0, numel)] * ranks, name
                continue
            copies, position = ranks // ep if ".mlp.experts." in name and method != "full" else 1, 0
            parts = sorted(part for part in parts if part[0] < part[1])
            assert all(parts[i : i + copies] == parts[i : i + 1] * copies for i in range(0, len(parts), copies)), name
            for start, stop in parts[::copies]:
                assert start == position, f"{name}: a gap or an overlap at element {start}"
                position = stop
            assert position == numel, name
        out[str(ep) if ranks == ep else f"{ep} on {ranks} ranks"] = {"most": max(sizes), "least": min(sizes)}
    return out


def planned(plan: LoadPlan, checkpoint: Checkpoint, method: str, lora: LoRASettings) -> int:
    """Bytes that the process of `share` needs above its imports: what it keeps, and the most that it holds besides.

    NF4: half a byte a weight, a byte for the scale of 64, 4 bytes for the scale of 256 of these (bitsandbytes). While
    loading: a matrix for each reader, and for NF4 14 bytes for each of its weights. In the layer's forward and
    backward: LoRA weights and their gradients, one dequantized weight, and the activations. The larger of the two
    counts.
    """
    local = plan.experts[0].module.experts // RANKS
    kept = sum(-(-torch.Size(p.shape).numel() // RANKS) * p.dtype.itemsize for p in plan.dense)
    kept += sum(torch.Size(p.shape).numel() * p.dtype.itemsize for p in plan.buffers)
    largest = 0
    for piece in plan.experts:
        weights = local * len(piece.matrices) * torch.Size(piece.matrix_shape).numel()
        largest = max(largest, weights // local)
        if method == "qlora":
            kept += weights // 2 + weights // 64 + weights // 64 // 256 * 4
        else:
            reads = [read for matrix in piece.reads(0) for read in matrix.values()]
            kept += local * sum(checkpoint.bytes_of(read.name, read.count) for read in reads)
    loading = (READERS * 2 + 14) * largest if method == "qlora" else 0
    layer = plan.experts[0].module
    factors = sum(local * lora.expert_rank * (o + i) for _, o, i in layer.shapes().values())
    pairs = TOKENS * TOP
    # BF16 rows of inputs, gate and up, their product, outputs, weighted outputs; and the gradients of them all
    rows = pairs * (6 * layer.hidden + 6 * layer.width) * 2
    # a weight in BF16, and while INT4 is decoded half a byte besides
    step = 2 * 4 * factors + (2.5 if method == "lora" else 2) * largest + rows
    return kept + int(max(loading, step))


TOP = 8


def share(directory: str, method: str) -> dict[str, Any]:
    """Loads one rank's share and runs one layer's experts; this process does nothing else."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from train.checkpoints.streaming import load
    from train.config.settings import ds_config, parse
    from train.runtime.distributed import peak_host_bytes

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    os.environ.update(RANK=str(RANK), WORLD_SIZE=str(RANKS), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as train.runtime.distributed has it
    deepspeed.init_distributed("fake", verbose=False)
    checkpoint, plan = plan_of(Path(directory), ExpertGroup(RANKS, RANK))
    lora = LoRASettings(rank=32, alpha=32.0, expert_rank=4, seed=0)
    expected = planned(plan, checkpoint, method, lora)
    warm_up()
    baseline = peak_host_bytes()
    started = time.perf_counter()
    loaded = load(plan, checkpoint, method, ds_config(parse([], ""), RANKS), torch.device("cpu"), show=True)
    after_load = peak_host_bytes() - baseline
    run_layer(plan.experts[0].module, lora)
    return {
        "planned_bytes": expected, "peak_bytes": peak_host_bytes() - baseline, "baseline_bytes": baseline,
        "peak_bytes_of_load": after_load,
        "seconds": time.perf_counter() - started, "bytes_read": loaded.bytes_read,
    }  # fmt: skip


def warm_up() -> None:
    """What the first use of a library takes for itself is no part of a share."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.zeros(64, 64).bfloat16(), blocksize=64, compress_statistics=True)
    bnb.dequantize_4bit(packed, state)
    x = torch.zeros(64, 64, requires_grad=True)
    (x @ x).sum().backward()


def run_layer(loaded: ExpertParallelExperts, lora: LoRASettings) -> None:
    """Forward and backward of this rank's experts of one layer, as tokens reach them."""
    local = loaded.experts // RANKS
    here = ExpertParallelExperts("layer", local, loaded.hidden, loaded.width, nn.functional.silu, ExpertGroup())
    here.frozen = loaded.frozen
    here.add_lora(lora, torch.bfloat16, torch.device("cpu"))
    hidden = torch.randn(TOKENS, loaded.hidden).bfloat16().requires_grad_()
    index = torch.stack([torch.arange(TOP) % local] * TOKENS)
    out = here(hidden, index, torch.full((TOKENS, TOP), 1 / TOP, dtype=torch.bfloat16))
    out.backward(torch.ones_like(out))
    assert hidden.grad is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    default = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
    parser.add_argument("--checkpoints", type=Path, default=default, metavar="DIR")
    parser.add_argument("--share", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share:
        print(json.dumps(share(*args.share)))
        return
    if not args.checkpoints.is_dir():
        parser.error(
            f"--checkpoints {args.checkpoints}: no such directory; give one with MODEL/config.json and tensors.json"
        )
    header()
    rows = []
    for model in args.models:
        method = MODELS[model]
        with tempfile.TemporaryDirectory() as temporary:
            directory = write_sparse(Path(temporary) / model, model, args.checkpoints)
            started = time.perf_counter()
            tiling = check_tiling(directory, method)
            print(f"{model}: every wanted byte goes to the rank that owns it ({time.perf_counter() - started:.0f} s):")
            for ep, size in tiling.items():
                print(f"    EP {ep}: {size['least'] / 1e9:.2f} to {size['most'] / 1e9:.2f} GB read by a rank")
            done = subprocess.run(
                [sys.executable, __file__, "--share", str(directory), method], stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                sys.exit(done.returncode)
            row = {"model": model, "method": method, **json.loads(done.stdout.splitlines()[-1]), "tiling": tiling}
            rows.append(row)
            print(
                f"    rank {RANK} of EP {RANKS}, {method}: read {row['bytes_read'] / 1e9:.2f} GB in "
                f"{row['seconds']:.0f} s; planned {row['planned_bytes'] / 1e9:.3f} GB, "
                f"peak {row['peak_bytes'] / 1e9:.3f} GB "
                f"({row['peak_bytes'] / row['planned_bytes'] - 1:+.1%})",
                flush=True,
            )
    finish(rows, args.json)


if __name__ == "__main__":
    main()
