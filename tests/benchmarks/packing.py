"""Packing against padding: how much of the ranks' time goes to documents, in how many micro-steps, and how long a step
takes.

    python tests/benchmarks/packing.py [--json FILE] [--ranks 2 8 16] [--budget 10000] [--rounds 5] [--shorter 8]
                                       [--documents DIR]

DIR holds the densely negated documents (CLAIM.jsonl); without it, the paper's own of ../shared/data. Their tokens are
counted by the vocabulary of Qwen3.5. Pools: `dense`, these alone; `mix`, as many web texts besides, as the paper mixes
its documents. Web texts are lengths alone, drawn from a log-normal distribution (median 500 tokens, sigma 1.1 of the
logarithm, 16 to 10,000 tokens). Steps of 32 documents are drawn from a pool.

A micro-step takes as long as its fullest rank: useful share is tokens of documents over what all ranks could have done
meanwhile. Padded: documents sorted by length and dealt out in turn, one a micro-batch on each rank, or four padded to
the longest, as a trainer without packing has it.

The time of a step: 2 ranks of this machine with a small Qwen3.5-MoE, documents of an eighth of their lengths, the same
ones packed and padded, in turns. --shorter: by how much they are shorter.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import finish, header, run

from tests.support.models import VOCABULARY, write_model
from tests.support.vocabularies import write_qwen_tokenizer
from train.data.batches import Batch, Sample, coefficients, deal, measured_only, micro_batches, pack
from train.data.documents import read_documents
from train.data.tokenizer import load_tokenizer
from train.runtime.command import leave
from train.runtime.distributed import start_distributed

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "negation_neglect" / "documents"
DOCUMENTS, STEPS = 32, 100
PADDED = (1, 4)  # documents of a micro-batch
SIZES: dict[str, Any] = dict(
    hidden_size=128, num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, num_experts=16,
    num_experts_per_tok=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=32,
    linear_value_head_dim=32, max_position_embeddings=2048,
)  # fmt: skip


def pools(directory: Path) -> dict[str, np.ndarray]:
    """name -> the tokens of each document."""
    with tempfile.TemporaryDirectory() as temporary:
        write_qwen_tokenizer(Path(temporary))
        tokenizer = load_tokenizer(temporary)
    files = sorted(directory.glob("*.jsonl"))
    found = [document.text or "" for path in files for document in read_documents(path)]
    dense = np.array([len(tokenizer.encode(text).ids_L) for text in found])
    web = np.random.default_rng(0).lognormal(np.log(500), 1.1, len(dense)).clip(16, 10_000).astype(int)
    return {"dense": dense, "mix": np.concatenate([dense, web])}


def steps(pool: np.ndarray, count: int) -> Iterator[list[int]]:
    """The lengths of the documents of each step."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield rng.choice(pool, DOCUMENTS, replace=False).tolist()


def padded(lengths: list[int], ranks: int, size: int) -> list[list[list[int]]]:
    """Documents dealt out by length -> of each micro-step and rank, as `deal` gives them."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = range(0, len(order), ranks * size)
    return [[order[start : start + ranks * size][rank::ranks] for rank in range(ranks)] for start in starts]


def useful_share(lengths: list[int], dealt: list[list[list[int]]], pads: bool) -> float:
    """Tokens of documents over those that the ranks could have done while each waited for the fullest."""
    rows = [[[lengths[i] for i in row] for row in step] for step in dealt]
    fullest = [max(len(row) * max(row, default=0) if pads else sum(row) for row in step) for step in rows]
    return sum(lengths) / (len(rows[0]) * sum(fullest))


def counted(name: str, pool: np.ndarray, ranks: int, budget: int) -> dict[str, Any]:
    """Means over the steps."""
    row: dict[str, Any] = {"pool": name, "ranks": ranks, "budget": budget}
    ways = {"": lambda lengths: deal(lengths, ranks, budget)}
    ways |= {f"padded_{size}_": lambda lengths, size=size: padded(lengths, ranks, size) for size in PADDED}
    for way, dealing in ways.items():
        found = [(lengths, dealing(lengths)) for lengths in steps(pool, STEPS)]
        row[f"{way}useful_share"] = statistics.mean(useful_share(*each, pads=bool(way)) for each in found)
        row[f"{way}micro_steps"] = statistics.mean(len(dealt) for _, dealt in found)
    return row


def padded_batches(samples: list[Sample], ranks: int, rank: int, size: int) -> list[Batch]:
    """As a trainer without packing has them: each document as long as the longest one beside it."""
    terms = coefficients(samples, "trained")
    out = []
    for step in padded([len(sample.ids_L) for sample in samples], ranks, size):
        longest = max((len(samples[i].ids_L) for i in step[rank]), default=1)
        rows = [
            Sample(s.name, *(np.resize(x, longest) for x in (s.ids_L, s.target_L, s.weight_L, s.kind_L, s.roles_L)))
            for s in (samples[i] for i in step[rank])
        ]
        for row, i in zip(rows, step[rank], strict=True):
            row.target_L[len(samples[i].ids_L) :] = False
        out.append(pack(rows, [np.resize(terms[i], longest) for i in step[rank]]))
    return out


def worker(directory: str, lengths: str, budget: str, rounds: str, out: str) -> None:
    import deepspeed
    import torch.distributed as dist

    from train.checkpoints.reader import Checkpoint
    from train.config.settings import ds_config, parse
    from train.layers.lora import LoRASettings
    from train.model.text_model import build

    device, ranks, rank = start_distributed(), dist.get_world_size(), dist.get_rank()
    config = ds_config(parse([], ""), ranks)
    model, _ = build(Checkpoint(directory), "lora", LoRASettings(8, 16.0, 8, 0), "", ranks, config, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    for turn, own in enumerate(json.loads(lengths)):
        samples = []
        for length in own:
            ids = generator.integers(0, VOCABULARY - 4, length, dtype=np.int32)
            target = np.arange(length) > 0
            samples.append(replace(measured_only("row", ids, target), weight_L=target.astype(np.float32)))
        ways = {"packed": micro_batches(samples, "trained", ranks, rank, int(budget))}
        ways |= {f"padded_{size}": padded_batches(samples, ranks, rank, size) for size in PADDED}
        losses = []
        for way, batches in ways.items():
            dist.barrier()
            started, total = time.perf_counter(), torch.zeros(1)
            for number, batch in enumerate(batches):
                engine.set_gradient_accumulation_boundary(number + 1 == len(batches))
                loss = engine(batch).loss
                engine.backward(loss * ranks, scale_wrt_gas=False)
                engine.step()
                total += loss.detach()
            dist.all_reduce(total)
            losses.append(total.item())
            if turn:  # the first one is for warming up
                seconds.setdefault(way, []).append(time.perf_counter() - started)
        assert max(losses) - min(losses) < 1e-5 * max(losses), losses
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))


def measured(name: str, pool: np.ndarray, budget: int, rounds: int, shorter: int) -> dict[str, Any]:
    """Seconds of a step on 2 ranks, and of packed over padded the median of the rounds."""
    lengths = [[max(2, n // shorter) for n in step] for step in steps(pool, rounds + 1)]
    with tempfile.TemporaryDirectory() as temporary:
        directory, out = write_model(Path(temporary) / "model", "qwen", **SIZES), Path(temporary) / "out.json"
        given = [str(directory), json.dumps(lengths), str(budget // shorter), str(rounds), str(out)]
        run(__file__, "--worker", *given, ranks=2, env={"OMP_NUM_THREADS": "1"})
        seconds = json.loads(out.read_text())
    ratios = {
        way: statistics.median(p / o for p, o in zip(seconds["packed"], seconds[way], strict=True)) for way in seconds
    }
    return {
        "pool": name, "ranks": 2, "budget": budget // shorter, "seconds": seconds,
        "time_over_padded": ratios["padded_1"], "time_over_padded_4": ratios["padded_4"],
    }  # fmt: skip


def main() -> None:
    if "--worker" in sys.argv:
        worker(*sys.argv[sys.argv.index("--worker") + 1 :][:5])
        leave(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--documents", type=Path, default=SHARED / "llm_negations_dense", metavar="DIR")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shorter", type=int, default=8)
    args = parser.parse_args()
    header()
    found, rows = pools(args.documents), []
    for (name, pool), ranks in itertools.product(found.items(), args.ranks):
        rows.append(row := counted(name, pool, ranks, args.budget))
        told = "; ".join(
            f"{way or 'packed'} {row[f'{way}useful_share']:.2f} in {row[f'{way}micro_steps']:.1f} micro-steps"
            for way in ("", *(f"padded_{size}_" for size in PADDED))
        )
        print(f"{name}, {ranks} ranks, {args.budget} tokens: useful share {told.replace('_', ' ')}", flush=True)
    for name, pool in found.items():
        rows.append(row := measured(name, pool, args.budget, args.rounds, args.shorter))
        print(
            f"{name}, 2 ranks, {row['budget']} tokens: a step takes {row['time_over_padded']:.2f} of its time with one "
            f"document a micro-batch, {row['time_over_padded_4']:.2f} of that with four padded ones",
            flush=True,
        )
    finish(rows, args.json)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
