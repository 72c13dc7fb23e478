"""Says before a job is queued whether it fits, how long it loads and what a step costs.

    python -m launch.plan --model DIR --nodes 1 --gpus 8 --gpu-memory 80 --method qlora --gradient-checkpointing
    python -m launch.plan --model config.json --nodes 2 --gpus 8 --gpu-memory 141 --search

Needs no weights and no GPU: a directory, or its config.json alone. Takes the settings of train/sft.py, by --recipe too;
every document is taken to have --max-tokens tokens, all of them in the loss. Exit code 1 where it does not fit.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import ASSUMED, GPUS, USABLE, Cluster
from launch.config_only import BareCheckpoint
from launch.memory import CATEGORIES
from launch.planning import Plan
from train.checkpoints.reader import Checkpoint
from train.config.command_line import MOST, Parser, check_ranges, setting
from train.config.recipe import flags
from train.config.settings import Recipe, Settings, parse
from train.runtime.errors import UserError
from train.runtime.outputs import check_apart, model_files, write
from train.runtime.terminal import NobodyReads, command


@dataclass(kw_only=True)
class PlanOptions:
    """The options of the plan, in addition to the settings of train/sft.py."""

    nodes: int = setting(1, "number of nodes", between=(1, MOST))
    gpus: int = setting(8, "GPUs per node", between=(1, MOST))
    gpu_memory: str = setting("80", "memory of each GPU in GB, or its name: A100, H100, H200, B200")
    search: bool = setting(False, "propose settings that fit, the fastest first")
    traffic: bool = setting(False, "show what a step reads and writes of the GPU's memory, by part of the model")
    json: str = setting("", "FILE that the plan is written to")


def changes(settings: Settings, cluster: Cluster, rounded: bool) -> Iterator[tuple[str, Settings, Cluster]]:
    """Yields changes that make a job smaller, the cheapest first, as (the change and its cost, settings, cluster). Each
    one comes on top of those before. rounded: whether qlora would quantize the experts further; else it is left out."""
    now = settings
    if not now.gradient_checkpointing:
        now = dataclasses.replace(now, gradient_checkpointing=True)
        yield "--gradient-checkpointing: a forward more, the same losses", now, cluster
    while now.row_tokens > now.max_tokens:
        now = dataclasses.replace(now, micro_batch_tokens=max(now.max_tokens, now.row_tokens // 2))
        yield f"--micro-batch-tokens {now.micro_batch_tokens}: more micro-batches, the same losses", now, cluster
    if now.expert_parallel not in (0, cluster.ranks):
        now = dataclasses.replace(now, expert_parallel=0)
        yield "no --expert-parallel: those of a node divide the experts, or all, the same losses", now, cluster
    methods = {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(now.method, [])
    for method in methods if rounded else methods[:-1]:
        now = dataclasses.replace(now, method=method)
        cost = "factors instead of weights are trained" if method == "lora" else "experts rounded to NF4"
        yield f"--method {method}: {cost}", now, cluster
    nodes = cluster.nodes
    while nodes < 64:
        nodes *= 2
        yield f"--nodes {nodes}", now, dataclasses.replace(cluster, nodes=nodes)
    while now.max_tokens > 1024:
        now = dataclasses.replace(now, max_tokens=now.max_tokens // 2, micro_batch_tokens=0)
        yield f"--max-tokens {now.max_tokens}: longer documents are cut", now, dataclasses.replace(cluster, nodes=nodes)


def search(settings: Settings, checkpoint: Checkpoint, cluster: Cluster) -> list[Plan]:
    """Returns the plans that fit, the fastest first, for all combinations of micro-batch, checkpointing, expert
    parallelism and method. qlora, which rounds the experts, is tried only if nothing fits with lora; full is tried
    alone."""
    found: list[Plan] = []
    methods = [settings.method] if settings.method == "full" else ["lora", "qlora"]
    groups = [size for size in (cluster.gpus, cluster.ranks) if settings.expert_parallel in (0, size)]
    for method in methods:
        for expert_parallel in sorted(set(groups or [settings.expert_parallel])):
            for checkpointing in (False, True):
                for micro in (1, 2, 4, 8):
                    if micro * cluster.ranks > max(settings.batch_size, cluster.ranks):
                        break
                    tried = dataclasses.replace(
                        settings, method=method, expert_parallel=expert_parallel,
                        micro_batch_tokens=micro * settings.max_tokens, gradient_checkpointing=checkpointing,
                    )  # fmt: skip
                    try:
                        plan = Plan(tried, checkpoint, cluster, settings.max_tokens)
                    except UserError:  # such as a number of ranks that does not divide the experts
                        break
                    if not plan.fits:
                        break  # a larger micro-batch does not fit either
                    found.append(plan)
        if found:
            break
    return sorted(found, key=lambda plan: plan.seconds["step"])


def searched(settings: Settings) -> str:
    """Returns the flags of the settings that a search decides."""
    names = ("method", "micro_batch_tokens", "expert_parallel", "gradient_checkpointing")
    return " ".join(flags({name: getattr(settings, name) for name in names}))


def show(plan: Plan) -> None:
    """Prints the plan."""
    cluster, gpu, held = plan.cluster, plan.cluster.gpu, plan.gpu_bytes
    wire, seconds = plan.wire_bytes, plan.seconds
    settings, chosen = plan.settings, dataclasses.replace(plan.settings, expert_parallel=plan.expert_parallel)
    print(f"{settings.model}: {cluster.nodes} x {cluster.gpus} GPUs of {cluster.memory:g} GB, {searched(chosen)}")
    rank = "" if settings.method == "full" else f", factors of rank {settings.lora_rank}"
    print(f"documents of {plan.tokens:,} tokens, {settings.batch_size} a step{rank}")
    print("\neach GPU, in GB, at its fullest moment, and the most of a step's tensors of a kind at any moment:")
    for name in (*CATEGORIES, "runtime", "total"):
        if name == "heap":  # only on CPUs
            continue
        most = plan.chosen.step.each.get(name)
        note = f"{most / 1e9:9.2f}" if most else ""
        if name == "experts":
            note = f"  {', '.join(f'{size / 1e9:.2f} as {kind}' for kind, size in plan.expert_bytes.items())}"
        print(f"  {name.replace('_', ' '):<18}{held[name] / 1e9:9.2f}{note}")
    for on in (False, True):
        kept, peak = plan.memory(on).step.kept, sum(plan.memory(on).step.peak.values())
        name = "with" if on else "without"
        print(f"  a step's tensors {name} checkpointing: {peak / 1e9:.2f}, of which {kept / 1e9:.2f} kept for backward")
    print(
        f"\neach node: {plan.host_bytes / 1e9:.0f} GB of host memory, {cluster.gpus * plan.read_bytes / 1e9:.1f} GB "
        f"read in {seconds['load']:.0f} s"
        f"\neach GPU and step: {plan.flops / 1e12:.1f} TFLOP; sends {wire['nvlink'] / 1e9:.2f} GB by NVLink and "
        f"{wire['network'] / 1e9:.2f} GB by network (experts {wire['experts'] / 1e9:.2f}, gathered "
        f"{wire['gather'] / 1e9:.2f}, gradients {wire['reduce'] / 1e9:.2f})"
        f"\na step of {plan.settings.batch_size} documents on {gpu.name}s takes at least {seconds['step']:.2f} s "
        f"(compute {seconds['compute']:.2f}, memory {seconds['memory']:.2f}, NVLink {seconds['nvlink']:.2f}, network "
        f"{seconds['network']:.2f}): at most {plan.tokens_per_second:,.0f} tokens/s\n\n{ASSUMED}"
    )
    if not gpu.grouped:
        print(f"{gpu.name}: {loop_note(plan)}; the time above is without that\n")
    print(f"{'fits' if plan.fits else 'does NOT fit'} into {USABLE * cluster.memory:.1f} GB of {cluster.memory:g}")


def show_traffic(plan: Plan) -> None:
    """Prints how much of a GPU's memory a step reads and writes, by part of the model."""
    total = sum(sum(operations.values()) for operations in plan.traffic_bytes.values())
    print(f"\neach GPU and step reads and writes {total / 1e12:.2f} TB of its memory:")
    for part, operations in plan.traffic_bytes.items():
        own = sum(operations.values())
        largest = ", ".join(f"{name} {moved / own:.0%}" for name, moved in [*operations.items()][:4])
        print(
            f"  {part:<20}{own / 1e9:9,.0f} GB{own / total:7.1%}{own / plan.cluster.gpu.bandwidth:8.2f} s   {largest}"
        )


def advise(plan: Plan) -> None:
    """Prints changes that make a job smaller, the cheapest first, each on top of those before, until it fits."""
    print("\nto make it fit, the cheapest first, each with those before:")
    rounded = bool(plan.expert_bytes.keys() - {"fp8", "int4"})  # qlora leaves these as they are
    for what, settings, cluster in changes(plan.settings, plan.cluster, rounded):
        try:
            smaller = Plan(settings, plan.checkpoint, cluster, min(plan.tokens, settings.max_tokens))
        except UserError:  # such as a number of ranks that does not divide the experts
            continue
        print(f"  {smaller.gpu_bytes['total'] / 1e9:8.1f} GB  {what}{'  <- fits' if smaller.fits else ''}")
        if smaller.fits:
            return


def opened(model: str) -> Checkpoint:
    """Returns the checkpoint of --model: a directory with weights, or a config.json or its directory. Raises UserError
    for another file, and if config.json is missing or invalid."""
    path = Path(model)
    if os.path.isdir(path) and any(path.glob("*.safetensors")):
        return Checkpoint(path)
    if os.path.isfile(path) and path.name != "config.json":
        raise UserError(f"--model {path}: give a model's directory or its config.json.")
    return BareCheckpoint(path)


def of_each_gpu(text: str) -> tuple[float, str]:
    """Parses --gpu-memory. Returns GB and the GPU's name, "" if none is given; for a GPU that comes in two sizes, the
    larger one. Raises UserError for an unknown name, or a size that is not positive or too large."""
    if sizes := [gpu.memory for gpu in GPUS if gpu.name == text.upper()]:
        return max(sizes), text.upper()
    try:
        memory = float(text)
    except ValueError:
        memory = math.nan
    if not 0 < memory <= MOST:
        names = ", ".join(dict.fromkeys(gpu.name for gpu in GPUS))
        raise UserError(f"--gpu-memory {text}: must be GB, more than 0 and at most {MOST}, or one of {names}.")
    return memory, ""


def loop_note(plan: Plan) -> str:
    """Returns a note on what a GPU costs that has no grouped products in hardware."""
    return (
        f"no grouped products in hardware: torch multiplies expert by expert, {plan.chosen.step.groups:,} launches a "
        "micro-batch, and the host waits for the GPU before each of the grouped products"
    )


def read_by(settings: Settings, argv: list[str]) -> dict[str, list[Any]]:
    """Returns the files that the plan reads, by flag, so that --json replaces none of them."""
    parser = Parser("", add_help=False)
    parser.add_settings(Recipe)
    recipes = parser.parse_known_args(argv)[0].recipe
    data = [source.path for source in settings.sources()]
    return {
        "--model": model_files(settings.model), "--data": data, "--recipe": recipes,
        "--ds-config": [settings.ds_config],
    }  # fmt: skip


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the job fits, 1 if it does not, 2 for an error that the user can fix."""
    parser = Parser(__doc__ or "", beside=(Settings, Recipe))
    parser.add_settings(PlanOptions)
    given, rest = parser.parse_known_args(arguments)
    options, settings = (
        PlanOptions(**{name: getattr(given, name) for name in PlanOptions.__dataclass_fields__}),
        parse(rest, ""),
    )
    check_ranges(options)
    memory, kind = of_each_gpu(options.gpu_memory)
    check_apart({"--json": options.json}, read_by(settings, rest))
    cluster = Cluster(nodes=options.nodes, gpus=options.gpus, memory=memory, kind=kind)
    checkpoint = opened(settings.model)
    found = search(settings, checkpoint, cluster) if options.search else []
    plan = found[0] if found else Plan(settings, checkpoint, cluster, settings.max_tokens)
    with suppress(NobodyReads):
        for other in found[:5]:
            print(
                f"{other.gpu_bytes['total'] / 1e9:6.1f} GB, {other.tokens_per_second:9,.0f} tokens/s at most: "
                f"{searched(other.settings)}"
            )
        if options.search and not found:
            print("no setting of method, micro-batch, checkpointing and expert parallelism fits")
        show(plan)
        if options.traffic:
            show_traffic(plan)
        if not plan.fits:
            advise(plan)
    if options.json:
        write("--json", Path(options.json), [json.dumps(plan.as_json(), indent=1)])
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
