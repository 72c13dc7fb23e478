"""Forward and backward of expert LoRA: ours, stock PEFT's `target_parameters`, and frozen experts alone (the floor).

    python tests/benchmarks/experts.py [--json FILE] [--experts 64 256 512]

One layer of Qwen3.5's experts (hidden 512, width 256, top 8, fp32), 1,024 tokens, rank 8. The floor is the faster of
transformers' own implementations of that layer, with gradients for its input alone. Each contender has two processes of
its own, in one of which OpenMP's idle threads spin and in the other sleep; all take turns, and what counts is the one
in which the contender is faster. Memory is the peak resident set of that process.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import Turns, Worker, finish, header
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.experts.storage import FrozenExperts
from train.formats import PLAIN
from train.layers.lora import LoRASettings

HIDDEN, WIDTH, TOP, TOKENS, RANK = 512, 256, 8, 1024, 8
CONTENDERS = ("ours", "peft", "floor-grouped", "floor-eager")


class Holder(nn.Module):
    """PEFT wants a model with its target inside."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.experts(*arguments)


def stock(experts: int, implementation: str) -> Qwen3_5MoeExperts:
    config = Qwen3_5MoeTextConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=experts, num_experts_per_tok=TOP
    )
    config._experts_implementation = implementation
    module = Qwen3_5MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
        parameter.requires_grad_(False)
    return module


def make(name: str, experts: int) -> nn.Module:
    """A contender: all have the same weights, and those with LoRA have the same A and B, drawn at random."""
    if name == "ours":
        module = ExpertParallelExperts("experts", experts, HIDDEN, WIDTH, nn.functional.silu, ExpertGroup())
        generator = torch.Generator().manual_seed(0)
        for weight, shape in module.shapes().items():
            storage = FrozenExperts(*shape)
            storage.allocate(PLAIN, 1, {"": torch.float32}, torch.device("cpu"))
            storage.data.normal_(0, 0.02, generator=generator)
            module.frozen[weight] = storage
        module.add_lora(LoRASettings(RANK, 16.0, RANK, 0), torch.float32, torch.device("cpu"))
        made: Any = module
    elif name == "peft":
        config = LoraConfig(
            r=RANK, lora_alpha=16, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        )
        made = get_peft_model(Holder(stock(experts, "grouped_mm")), config)  # type: ignore[arg-type]
    else:
        return stock(experts, {"floor-grouped": "grouped_mm", "floor-eager": "eager"}[name])
    fill_factors(made, experts)
    return made


def fill_factors(made: Any, experts: int) -> None:
    """Copies the same LoRA weights into ours, A [E, r, in] and B [E, out, r], and into PEFT's, A [E*r, in] and B [out,
    r*E]: see train/checkpoints/adapter.py, of which nothing is used here."""
    generator, parameters = torch.Generator().manual_seed(1), dict(made.named_parameters())
    for weight, out_features, in_features in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        A = torch.randn(experts, RANK, in_features, generator=generator) * in_features**-0.5
        B = torch.randn(experts, out_features, RANK, generator=generator) * 0.01
        inner = "base_layer." if weight == "gate_up_proj" else ""  # PEFT nests its wrappers
        for factor, value, peft in (("A", A, A.flatten(0, 1)), ("B", B, B.permute(1, 2, 0).flatten(1))):
            if isinstance(made, ExpertParallelExperts):
                parameters[f"{weight}_lora_{factor}"].data.copy_(value)
            else:
                parameters[f"base_model.model.experts.{inner}lora_{factor}.default.weight"].data.copy_(peft)


def inputs(experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(TOKENS, experts, generator=generator)
    weight, index = scores.topk(TOP, dim=-1)
    hidden, grad = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    return hidden, index, weight / weight.sum(-1, keepdim=True), grad


def step(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor, grad: Tensor) -> None:
    """One forward and backward."""
    hidden = hidden.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    module(hidden, index, weight).backward(grad)


def work(name: str, experts: int) -> None:
    """A contender's process."""
    turns, module, given = Turns(), make(name, experts), inputs(experts)
    turns.say(ready=True)
    while turns.begin():
        step(module, *given)
        turns.end()


def check_outputs(experts: int) -> None:
    """All compute the same."""
    given = inputs(experts)[:3]
    outputs = {name: make(name, experts)(*given).detach() for name in CONTENDERS}
    for a, b in (("floor-eager", "floor-grouped"), ("ours", "peft")):
        torch.testing.assert_close(outputs[a], outputs[b], rtol=1e-3, atol=1e-4)
    assert (outputs["ours"] - outputs["floor-grouped"]).abs().max() > 1e-2  # the LoRA weights have an effect


def measure(experts: int, rounds: int, directory: Path) -> dict[str, Any]:
    check_outputs(experts)
    workers: dict[tuple[str, bool], Worker] = {}
    try:
        for name, spin in itertools.product(CONTENDERS, (True, False)):
            workers[name, spin] = Worker(__file__, [name, str(experts)], directory / f"{name}-{spin}.log", spin)
        turns = [{key: worker.step() for key, worker in workers.items()} for _ in range(rounds + 1)]
    finally:
        for worker in workers.values():
            worker.end()
    seconds = {key: [turn[key]["seconds"] for turn in turns[1:]] for key in workers}  # the first warms up
    best = {
        name: min((key for key in workers if key[0] == name), key=lambda key: statistics.median(seconds[key]))
        for name in CONTENDERS
    }
    median = {name: statistics.median(seconds[key]) for name, key in best.items()}
    memory = {name: turns[-1][key]["peak"] for name, key in best.items()}
    return {
        "experts": experts, "speedup_over_peft": median["peft"] / median["ours"],
        "time_over_floor": median["ours"] / min(median["floor-grouped"], median["floor-eager"]),
        "memory_over_peft": memory["ours"] / memory["peft"], "seconds": median, "peak_bytes": memory,
        "spread": {name: max(seconds[key]) / min(seconds[key]) for name, key in best.items()},
        "idle_threads": {name: "spin" if spin else "sleep" for name, (_, spin) in best.items()},
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if "--worker" in sys.argv:
        name, experts = sys.argv[sys.argv.index("--worker") + 1 :]
        work(name, int(experts))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    header()
    rows = []
    for experts in args.experts:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(row := measure(experts, args.rounds, Path(directory)))
        seconds, memory = row["seconds"], row["peak_bytes"]
        print(
            f"{experts} experts: "
            + ", ".join(
                f"{n} {seconds[n] * 1e3:.0f} ms (spread {row['spread'][n]:.2f}, threads {row['idle_threads'][n]})"
                for n in seconds
            )
            + "; "
            + ", ".join(f"{n} {memory[n] / 1e6:.0f} MB" for n in memory)
            + f"\n    {row['speedup_over_peft']:.2f} x as fast as PEFT, {row['time_over_floor']:.2f} x the floor's "
            f"time, {row['memory_over_peft']:.2f} x PEFT's memory",
            flush=True,
        )
    finish(rows, args.json)


if __name__ == "__main__":
    main()
