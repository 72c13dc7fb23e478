"""A training step with experts divided among ranks, and with ZeRO-3 gathering them on every rank.

    python tests/benchmarks/step.py [--json FILE] [--ranks 2 4] [--experts 16 64] [--tokens 256 1024]

A Qwen3.5-MoE of two layers (hidden 256, expert width 128, top 4, fp32) with the same LoRA either way. Ours: expert
parallelism over all ranks, tokens travel. The other: every expert weight is a ZeRO-3 parameter of a leaf module,
gathered before forward and again before backward; all else is the same code. Both take turns in one run, on gloo over
loopback.
The communication volume is counted as it is sent; the expected volume is computed from the routing alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import finish, header, run
from torch import Tensor, nn

from tests.support.models import write_model
from train.runtime.command import leave
from train.runtime.distributed import start_distributed

HIDDEN, WIDTH, TOP, LAYERS, ROWS = 256, 128, 4, 2, 2
ROUNDS = 7


class Gathered(nn.Module):
    """Stands in the place of a storage: the weight is a ZeRO-3 parameter of the experts' module."""

    def __init__(self, owner: Any, name: str):
        super().__init__()
        self.weight_of = lambda: getattr(owner, name)
        self.experts, self.out_features, self.in_features = owner.shapes()[name]

    @property
    def plain(self) -> Tensor:
        return self.weight_of()


def gather_by_zero3(model: Any, config: dict[str, Any]) -> None:
    """Turns the frozen expert weights, all on each rank, into partitioned parameters of leaf modules."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    from train.experts.module import ExpertParallelExperts

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)
    for module in model.expert_layers:
        for name in module.shapes():
            parameter: Any = nn.Parameter(module.frozen[name].plain.contiguous(), requires_grad=False)
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()
            module.register_parameter(name, parameter)
            module.frozen[name] = Gathered(module, name)
    set_z3_leaf_modules(model, [ExpertParallelExperts])


def theory(index_Tk: Tensor, experts: int, ep: Any) -> int:
    """Communication volume of this rank's tokens for one layer, both ways, in bytes: for each token and each other rank
    that holds one of its experts, in forward hidden state, weights (fp32) and slots (int32) go and a partial sum
    returns, and in backward their gradients do, but for the slots. Before that, each other rank is told how many come,
    and how often each of its experts is wanted (int64).
    """
    owner = index_Tk // (experts // ep.size)
    away = sum(len(set(row) - {ep.rank}) for row in owner.tolist())
    k = index_Tk.shape[1]
    return (ep.size - 1) * 8 * (1 + experts // ep.size) + away * 4 * ((HIDDEN + k + k + HIDDEN) + (HIDDEN + HIDDEN + k))


def make_engines(directory: str) -> dict[str, Any]:
    """Ours, with expert parallelism over all ranks, and ZeRO-3's, which gathers the same experts."""
    import deepspeed
    import torch.distributed as dist

    from train.checkpoints.reader import Checkpoint
    from train.config.settings import ds_config, parse
    from train.layers.lora import LoRASettings
    from train.model.text_model import build

    device, ranks = start_distributed(), dist.get_world_size()
    config = ds_config(parse([], ""), ranks)
    engines: dict[str, Any] = {}
    for kind, ep in (("ours", ranks), ("zero3", 1)):
        lora = LoRASettings(rank=8, alpha=16.0, expert_rank=8, seed=0)
        model, _ = build(Checkpoint(directory), "lora", lora, "", ep, config, device)
        if kind == "zero3":
            gather_by_zero3(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        engines[kind], *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engines


def drawn_batch(tokens: int, rank: int, ranks: int) -> Any:
    """A rank's micro-batch of so many random tokens."""
    from train.data.batches import measured_only, pack

    generator = torch.Generator().manual_seed(rank)
    samples = []
    for _ in range(ROWS):
        ids = torch.randint(0, 256, (tokens // ROWS,), generator=generator).int().numpy()
        target = ids >= 0
        target[0] = False
        samples.append(replace(measured_only("row", ids, target), weight_L=target.astype("float32")))
    return pack(samples, [sample.weight_L / (ROWS * tokens * ranks) for sample in samples])


def worker(directory: str, tokens: int, out: str) -> None:
    import torch.distributed as dist

    engines, ranks = make_engines(directory), dist.get_world_size()
    batch = drawn_batch(tokens, dist.get_rank(), ranks)
    expected = [0]
    for layer in engines["ours"].module.expert_layers:
        layer.register_forward_pre_hook(
            lambda layer, given: expected.__setitem__(0, expected[0] + theory(given[1], layer.experts, layer.ep))
        )
    seconds: dict[str, list[float]] = {kind: [] for kind in engines}
    losses: dict[str, float] = {}
    ep_group = engines["ours"].module.expert_layers[0].ep
    for turn in range(ROUNDS + 1):
        for kind, engine in engines.items():
            dist.barrier()
            ep_group.wire_bytes = expected[0] = 0
            started = time.perf_counter()
            loss = engine(batch).loss
            engine.backward(loss * ranks, scale_wrt_gas=False)
            engine.step()
            dist.barrier()
            if turn:
                seconds[kind].append(time.perf_counter() - started)
            losses.setdefault(kind, loss.item())
            if kind == "ours":
                counts = torch.tensor([ep_group.wire_bytes, expected[0]])
    dist.all_reduce(counts)
    assert abs(losses["ours"] - losses["zero3"]) < 1e-6 * abs(losses["ours"]) + 1e-9, losses
    if dist.get_rank() == 0:
        gathered = sum(
            e * o * i * 4 for layer in engines["ours"].module.expert_layers for e, o, i in layer.shapes().values()
        )
        Path(out).write_text(
            json.dumps({
                "seconds": seconds, "wire_bytes": int(counts[0]), "wire_bytes_theory": int(counts[1]),
                # every rank is sent the other ranks' partitions of every weight, before forward and before backward
                "zero3_gathered_bytes": 2 * gathered * (ranks - 1),
            })
        )  # fmt: skip


def measure(ranks: int, experts: int, tokens: int, directory: Path) -> dict[str, Any]:
    out = directory.with_name("out.json")
    run(__file__, "--worker", str(directory), str(tokens), str(out), ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    found = json.loads(out.read_text())
    median = {kind: statistics.median(values) for kind, values in found["seconds"].items()}
    return {
        "ranks": ranks, "experts": experts, "tokens": tokens, "wire_bytes": found["wire_bytes"],
        "wire_bytes_theory": found["wire_bytes_theory"], "speedup_over_zero3": median["zero3"] / median["ours"],
        "zero3_gathered_bytes": found["zero3_gathered_bytes"], "seconds": median,
        "spread": {kind: max(values) / min(values) for kind, values in found["seconds"].items()},
    }  # fmt: skip


def main() -> None:
    if "--worker" in sys.argv:
        directory, tokens, out = sys.argv[sys.argv.index("--worker") + 1 :][:3]
        worker(directory, int(tokens), out)
        leave(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    args = parser.parse_args()
    header()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for experts in args.experts:
            directory = write_model(
                Path(temporary) / f"model-{experts}", "qwen", hidden_size=HIDDEN, moe_intermediate_size=WIDTH,
                num_experts=experts, num_experts_per_tok=TOP, num_hidden_layers=LAYERS,
            )  # fmt: skip
            for ranks in args.ranks:
                for tokens in args.tokens:
                    rows.append(row := measure(ranks, experts, tokens, directory))
                    ours, other = (row["seconds"][kind] * 1e3 for kind in ("ours", "zero3"))
                    wire, worked_out, gathered = (
                        row[key] / 1e6 for key in ("wire_bytes", "wire_bytes_theory", "zero3_gathered_bytes")
                    )
                    print(
                        f"{ranks} ranks, {experts} experts, {tokens} tokens a rank: ours {ours:.0f} ms, ZeRO-3 "
                        f"{other:.0f} ms, {row['speedup_over_zero3']:.2f} x as fast; sent {wire:.2f} MB "
                        f"(expected {worked_out:.2f}), gathered by ZeRO-3 {gathered:.2f} MB",
                        flush=True,
                    )
    assert all(row["wire_bytes"] == row["wire_bytes_theory"] for row in rows)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
