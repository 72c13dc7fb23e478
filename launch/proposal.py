"""Prints the plan of a job, and proposes settings that fit."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from launch.cluster import ASSUMED, USABLE, Cluster
from launch.config_only import BareCheckpoint
from launch.memory import CATEGORIES
from launch.planning import Plan
from train.checkpoints.reader import Checkpoint
from train.config.command_line import flag_of
from train.config.settings import Settings
from train.runtime.errors import UserError
from train.runtime.shown import size_shown


def changes(settings: Settings, cluster: Cluster, rounded: bool) -> Iterator[tuple[str, Settings, Cluster]]:
    """Yields changes that make a job smaller, the cheapest first, as (the change and its cost, settings, cluster). Each
    one comes on top of those before. rounded: whether qlora would quantize the experts further; else it is left out."""
    now = settings
    if not now.gradient_checkpointing:
        now = dataclasses.replace(now, gradient_checkpointing=True)
        yield "--gradient-checkpointing: one more forward pass, the same losses", now, cluster
    while now.row_tokens > now.max_tokens:
        now = dataclasses.replace(now, micro_batch_tokens=max(now.max_tokens, now.row_tokens // 2))
        yield f"--micro-batch-tokens {now.micro_batch_tokens}: more micro-batches, the same losses", now, cluster
    if now.expert_parallel not in (0, cluster.ranks):
        now = dataclasses.replace(now, expert_parallel=0)
        yield "no --expert-parallel: a node's ranks, or all ranks, divide the experts, the same losses", now, cluster
    methods = {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(now.method, [])
    for method in methods if rounded else methods[:-1]:
        now = dataclasses.replace(now, method=method)
        cost = "LoRA weights are trained instead of all weights" if method == "lora" else "experts rounded to NF4"
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
    values = {flag_of(name): getattr(settings, name) for name in names}
    return " ".join(
        flag if value is True else f"{flag} {value}" for flag, value in values.items() if value is not False
    )


def show(plan: Plan) -> None:
    """Prints the plan."""
    cluster, gpu, held = plan.cluster, plan.cluster.gpu, plan.gpu_bytes
    wire, seconds = plan.wire_bytes, plan.seconds
    settings, chosen = plan.settings, dataclasses.replace(plan.settings, expert_parallel=plan.expert_parallel)
    print(f"{settings.model}: {cluster.nodes} x {cluster.gpus} GPUs of {cluster.memory:g} GB, {searched(chosen)}")
    rank = "" if settings.method == "full" else f", LoRA rank {settings.lora_rank}"
    print(f"documents of {plan.tokens:,} tokens, {settings.batch_size} per step{rank}")
    print("\nper GPU, in GB: each kind at the peak, and the largest amount of a kind of step tensors at any moment:")
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
        print(f"  step tensors {name} checkpointing: {peak / 1e9:.2f}, of which {kept / 1e9:.2f} kept for backward")
    print(
        f"\nper node: {size_shown(plan.host_bytes)} of host memory, {size_shown(cluster.gpus * plan.read_bytes)} "
        f"read in {seconds['load']:.0f} s"
        f"\nper GPU and step: {plan.flops / 1e12:.1f} TFLOP; sends {size_shown(wire['nvlink'])} over NVLink and "
        f"{size_shown(wire['network'])} over the network (experts {size_shown(wire['experts'])}, gathered "
        f"{size_shown(wire['gather'])}, gradients {size_shown(wire['reduce'])})"
        f"\na step of {plan.settings.batch_size} documents on {gpu.name}s takes at least {seconds['step']:.2f} s "
        f"(compute {seconds['compute']:.2f}, memory {seconds['memory']:.2f}, NVLink {seconds['nvlink']:.2f}, network "
        f"{seconds['network']:.2f}): at most {plan.tokens_per_second:,.0f} tokens/s\n\n{ASSUMED}"
    )
    if not gpu.grouped:
        print(f"{gpu.name}: {loop_note(plan)}; the time above does not include this\n")
    print(f"{'fits' if plan.fits else 'does NOT fit'} into {USABLE * cluster.memory:.1f} GB of {cluster.memory:g}")


def show_traffic(plan: Plan) -> None:
    """Prints how much of a GPU's memory a step reads and writes, by part of the model."""
    total = sum(sum(operations.values()) for operations in plan.traffic_bytes.values())
    print(f"\nper GPU, a step reads and writes {total / 1e12:.2f} TB of GPU memory:")
    for part, operations in plan.traffic_bytes.items():
        own = sum(operations.values())
        largest = ", ".join(f"{name} {moved / own:.0%}" for name, moved in [*operations.items()][:4])
        print(
            f"  {part:<20}{own / 1e9:9,.0f} GB{own / total:7.1%}{own / plan.cluster.gpu.bandwidth:8.2f} s   {largest}"
        )


def advise(plan: Plan) -> None:
    """Prints changes that make a job smaller until it fits, the cheapest first, each on top of those before."""
    print("\nto make it fit, the cheapest change first, each on top of those before:")
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
    if config.json is missing or invalid."""
    path = Path(model)
    if os.path.isdir(path) and any(path.glob("*.safetensors")):
        return Checkpoint(path)
    return BareCheckpoint(path)


def loop_note(plan: Plan) -> str:
    """Returns a note on the cost of a GPU without grouped products in hardware."""
    return (
        f"no grouped products in hardware: torch multiplies expert by expert, {plan.chosen.step.groups:,} launches per "
        "micro-batch, and the host waits for the GPU before each of the grouped products"
    )
