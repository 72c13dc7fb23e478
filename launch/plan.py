"""Says before a job is queued whether it fits, how long it loads and what a step costs.

    python -m launch.plan --model DIR --nodes 1 --gpus 8 --gpu-memory 80 --method qlora --gradient-checkpointing
    python -m launch.plan --model config.json --nodes 2 --gpus 8 --gpu-memory 141 --search

Needs no weights and no GPU: a directory, or its config.json alone. Takes the settings of train/sft.py, by --recipe too;
every document is taken to have --max-tokens tokens, all of them in the loss. Exit code 1 where it does not fit.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from launch.interruption import interruption

    interruption.listen("interrupted")

import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.bare import BareCheckpoint
from launch.cluster import ASSUMED, DISK, GPUS, NETWORK, PROCESS, RUNTIME, USABLE, Cluster
from launch.distributed import memory_status
from launch.memory import CATEGORIES, Memory, Zero, planned_batch, planned_model, rank_memory, run_step, split
from launch.trace import PlannedGroup
from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import READERS
from train.command_line import Parser, flag_of, setting
from train.errors import UserError
from train.experts.storage import NF4Experts
from train.job import Job, checked_expert_parallel, full_precision, lora_settings, rows_of_first_steps
from train.model import text_config
from train.outputs import check_apart, model_files, write
from train.recipe import flags
from train.settings import MOST, Recipe, Settings, ds_config, parse
from train.terminal import NobodyReads, command


@dataclass(kw_only=True)
class Options:
    """What the plan takes beside the settings of train/sft.py."""

    nodes: int = setting(1, "nodes")
    gpus: int = setting(8, "GPUs of a node")
    gpu_memory: str = setting("80", "GB of each GPU, or its name: A100, H100, H200, B200")
    search: bool = setting(False, "propose settings, the fastest that fit")
    traffic: bool = setting(False, "show what a step reads and writes of the GPU's memory, by part of the model")
    json: str = setting("", "FILE to write the plan to")


class Plan:
    """What a job of these settings needs on a cluster. tokens: those of every document. row: lengths of the documents
    of the fullest micro-batch, where they are known; else as many of `tokens` as it takes."""

    def __init__(
        self, settings: Settings, checkpoint: Checkpoint, cluster: Cluster, tokens: int, row: Sequence[int] = ()
    ):
        self.settings, self.checkpoint, self.cluster, self.tokens = settings, checkpoint, cluster, tokens
        of_a_rank = math.ceil(settings.batch_size / cluster.ranks)
        self.row = list(row) or [tokens] * max(1, min(settings.row_tokens // tokens, of_a_rank))
        self.accumulation = math.ceil(of_a_rank / len(self.row))
        self.expert_parallel = checked_expert_parallel(settings, checkpoint, cluster)
        config = ds_config(settings, cluster.ranks)
        lora = None if settings.method == "full" else lora_settings(settings, text_config(checkpoint))
        self.group = PlannedGroup(self.expert_parallel)
        self.model, self.load = planned_model(checkpoint, settings.method, lora, self.group)
        if lora is None:
            config |= full_precision(settings, self.load)
        self._memory: dict[bool, Memory] = {}
        self.zero, self.bf16 = Zero.of(config, cluster.ranks, self.expert_parallel), "bf16" in config

    def memory(self, checkpointing: bool) -> Memory:
        """Of one rank, with or without gradient checkpointing."""
        if checkpointing not in self._memory:
            gpu, batch = self.cluster.memory > 0, planned_batch(self.row)
            step = run_step(self.model, batch, checkpointing, gpu)
            self._memory[checkpointing] = rank_memory(self.model, step, self.zero, gpu, self.bf16)
        return self._memory[checkpointing]

    @property
    def chosen(self) -> Memory:
        return self.memory(self.settings.gradient_checkpointing)

    @property
    def gpu_bytes(self) -> dict[str, int]:
        """Category -> bytes of a GPU, and their total."""
        entries = self.chosen.gpu | {"runtime": RUNTIME if self.cluster.memory else PROCESS}
        return entries | {"total": sum(entries.values())}

    @cached_property
    def expert_bytes(self) -> dict[str, int]:
        """Bytes of a GPU's experts by how they are kept: nf4, the checkpoint's fp8, int4 or dtype, or trained."""
        kept: Counter[str] = Counter()
        storage: Any
        for storage in (storage for layer in self.model.expert_layers for storage in layer.frozen.values()):
            kind = "nf4" if isinstance(storage, NF4Experts) else storage.format.kind
            name = str(storage.data.dtype).removeprefix("torch.") if kind == "plain" else kind
            kept[name] += sum(buffer.nbytes for buffer in storage.buffers())
        kept["trained"] = self.chosen.gpu["experts"] - kept.total()
        return {name: size for name, size in kept.items() if size}

    @property
    def fits(self) -> bool:
        return self.gpu_bytes["total"] <= USABLE * self.cluster.memory * 1e9

    @cached_property
    def read_bytes(self) -> int:
        """What the first rank reads from disk; the others read as much, but for padding."""
        reads = self.load.reads(0, self.cluster.ranks, self.settings.method)
        return sum(self.checkpoint.bytes_of(read.name, read.count) for read in reads)

    @property
    def host_bytes(self) -> int:
        """Memory of a node: for each rank its process, as large as this one, the matrices that its readers hold, and
        its factors, which ZeRO-3 lays out anew by way of the host. On CPUs, all that a rank holds."""
        if not self.cluster.memory:
            return self.cluster.gpus * (memory_status()["VmRSS"] + self.gpu_bytes["total"])
        first = (piece.reads(0, self.cluster.ranks) for piece in self.load.dense)
        sizes = [sum(self.checkpoint.bytes_of(r.name, r.count) for r in reads.values()) for reads in first]
        sizes += [
            sum(self.checkpoint.bytes_of(r.name, r.count) for matrix in piece.reads(0) for r in matrix.values())
            for piece in self.load.experts
        ]
        buffers = READERS * max(sizes) + self.chosen.gpu["lora_factors"]
        return self.cluster.gpus * (memory_status()["VmRSS"] + buffers)

    @property
    def wire_bytes(self) -> dict[str, int]:
        """What a GPU sends in a step, on the average (Rajbhandari et al., arXiv 1910.02054, section 7). experts: hidden
        states, counted as the step without data sends them. gather: ZeRO-3's partitions, (ranks - 1) / ranks of every
        parameter, before forward and, where it was let go, before backward. reduce: as much of every gradient. As much
        to each rank of a group: so the part to other nodes is that of the ranks that are there. Groups are those of
        deepspeed.utils.groups: consecutive ranks divide a layer's experts; those an expert_parallel apart hold the same
        ones, and divide what is trained of them."""
        micro, parts, ranks = self.accumulation, split(self.model, self.zero), range(self.cluster.ranks)
        again = 2 if 2 * sum(p.numel() for p, n in parts if n > 1) > self.zero.reuse else 1
        size = self.expert_parallel
        away = {
            self.zero.replicas: self._away([ranks[first::size] for first in range(size)]),
            self.zero.ranks: self._away([ranks]),
        }
        gather, reduce, network = 0, 0, 0.0
        for p, n in parts:
            own = again * (p.nbytes * (n - 1) // n)
            gradient = p.numel() * (2 if self.bf16 else 4) * (n - 1) // n if p.requires_grad else 0
            gather, reduce, network = gather + own, reduce + gradient, network + (own + gradient) * away[n]
        sent = {"experts": micro * self.chosen.step.wire, "gather": micro * gather, "reduce": micro * reduce}
        groups = [ranks[first : first + size] for first in ranks[::size]]
        network = sent["experts"] * self._away(groups) + micro * network
        total = sum(sent.values())
        return sent | {"nvlink": total - int(network), "network": int(network), "total": total}

    def _away(self, groups: list[range]) -> float:
        """Of the pairs of ranks of a group, the part that lies on two nodes."""
        pairs = sum(len(group) * (len(group) - 1) for group in groups)
        counts = [Counter(rank // self.cluster.gpus for rank in group).values() for group in groups]
        near = sum(count * (count - 1) for nodes in counts for count in nodes)
        return 1 - near / pairs if pairs else 0.0

    @property
    def flops(self) -> int:
        """Of a GPU in a step."""
        return self.accumulation * self.chosen.step.flops

    @property
    def traffic_bytes(self) -> dict[str, dict[str, int]]:
        """What the operations of a step read and write of a GPU's memory: part of the model -> operation -> bytes; the
        largest first."""
        parts: dict[str, Counter[str]] = {}
        for (part, operation), moved in self.chosen.step.traffic.items():
            parts.setdefault(part, Counter())[operation] += self.accumulation * moved
        ordered = sorted(parts.items(), key=lambda each: -each[1].total())
        return {part: dict(operations.most_common()) for part, operations in ordered}

    @property
    def seconds(self) -> dict[str, float]:
        """By the roofline (Williams et al., CACM 52(4), 2009) of ASSUMED."""
        gpu, wire = self.cluster.gpu, self.wire_bytes
        compute, memory = self.chosen.step.flops / gpu.flops, self.chosen.step.moved / gpu.bandwidth
        update = 32 * self.chosen.gpu["optimizer"] / 12 / gpu.bandwidth  # read and write four numbers an element
        parts = {
            "compute": self.accumulation * compute, "memory": self.accumulation * memory + update,
            "nvlink": wire["nvlink"] / gpu.nvlink, "network": wire["network"] / NETWORK,
        }  # fmt: skip
        step = self.accumulation * max(compute, memory) + update + parts["nvlink"] + parts["network"]
        return {"load": self.cluster.gpus * self.read_bytes / DISK, "step": step} | parts

    @property
    def tokens_per_second(self) -> float:
        return self.settings.batch_size * self.tokens / self.seconds["step"]

    def as_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits, "gpu_bytes": self.gpu_bytes, "expert_bytes": self.expert_bytes,
            "host_bytes": self.host_bytes, "read_bytes": self.cluster.gpus * self.read_bytes,
            "wire_bytes": self.wire_bytes, "flops": self.flops,
            "traffic_bytes": self.traffic_bytes, "seconds": self.seconds, "tokens_per_second": self.tokens_per_second,
            "activation_bytes": {
                name: sum(self.memory(on).step.peak.values())
                for name, on in (("checkpointing", True), ("no_checkpointing", False))
            },
            "settings": dataclasses.asdict(self.settings) | {"expert_parallel": self.expert_parallel},
            "cluster": dataclasses.asdict(self.cluster),
        }  # fmt: skip


def planned_memory(job: Job) -> dict[str, Any]:
    """Of a job that has run here, what it was to take: bytes of a rank, beside those of its imports, and how they
    divide; on a GPU whose roofline is known, tokens a second, of documents as long as the longest. {}, with a note, for
    a model that cannot be planned."""
    ranks, settings = job.resolved["ranks"], dataclasses.replace(job.settings, expert_parallel=job.expert_parallel)
    cluster = Cluster.here(ranks)
    steps = rows_of_first_steps(job.settings, job.corpus, ranks, job.documents)
    fullest = max((row for step in steps for row in step), key=sum)
    try:
        plan = Plan(settings, job.checkpoint, cluster, max(fullest), fullest)
        categories = plan.gpu_bytes
        known = cluster.memory and cluster.gpu.name in cluster.kind
        speed = {"planned_tokens_per_second": plan.tokens_per_second} if known else {}
    except Exception as error:  # the run has its results: no plan is worth them
        print(f"note: no memory planned ({type(error).__name__}: {error})", file=sys.stderr)
        return {}
    held = {"planned": plan.chosen.total + (0 if plan.cluster.memory else PROCESS), "read": plan.read_bytes}
    return held | {"categories": categories, "moments": plan.chosen.phases} | speed


def changes(settings: Settings, cluster: Cluster, rounded: bool) -> Iterator[tuple[str, Settings, Cluster]]:
    """What makes a job smaller, the cheapest first, each upon the ones before: (what it costs, settings, cluster)."""
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
    """Settings that fit, the fastest first; by qlora, which rounds the experts, only where nothing fits by lora."""
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
                        break  # nor does a larger one
                    found.append(plan)
        if found:
            break
    return sorted(found, key=lambda plan: plan.seconds["step"])


def searched(settings: Settings) -> str:
    """The settings that a search decides, as a command line."""
    names = ("method", "micro_batch_tokens", "expert_parallel", "gradient_checkpointing")
    return " ".join(flags({name: getattr(settings, name) for name in names}))


def show(plan: Plan) -> None:
    """The plan on the terminal."""
    cluster, gpu, held = plan.cluster, plan.cluster.gpu, plan.gpu_bytes
    wire, seconds = plan.wire_bytes, plan.seconds
    settings, chosen = plan.settings, dataclasses.replace(plan.settings, expert_parallel=plan.expert_parallel)
    print(f"{settings.model}: {cluster.nodes} x {cluster.gpus} GPUs of {cluster.memory:g} GB, {searched(chosen)}")
    rank = "" if settings.method == "full" else f", factors of rank {settings.lora_rank}"
    print(f"documents of {plan.tokens:,} tokens, {settings.batch_size} a step{rank}")
    print("\neach GPU, in GB, at its fullest moment, and the most of a step's tensors of a kind at any moment:")
    for name in (*CATEGORIES, "runtime", "total"):
        if name == "heap":  # of CPUs
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
    """What a step reads and writes of a GPU's memory, by part of the model, on the terminal."""
    total = sum(sum(operations.values()) for operations in plan.traffic_bytes.values())
    print(f"\neach GPU and step reads and writes {total / 1e12:.2f} TB of its memory:")
    for part, operations in plan.traffic_bytes.items():
        own = sum(operations.values())
        largest = ", ".join(f"{name} {moved / own:.0%}" for name, moved in [*operations.items()][:4])
        print(
            f"  {part:<20}{own / 1e9:9,.0f} GB{own / total:7.1%}{own / plan.cluster.gpu.bandwidth:8.2f} s   {largest}"
        )


def advise(plan: Plan) -> None:
    """What to change where a plan does not fit, each change upon the ones before, until it does."""
    print("\nto make it fit, the cheapest first, each with those before:")
    rounded = bool(plan.expert_bytes.keys() - {"fp8", "int4"})  # these stay as they are
    for what, settings, cluster in changes(plan.settings, plan.cluster, rounded):
        try:
            smaller = Plan(settings, plan.checkpoint, cluster, min(plan.tokens, settings.max_tokens))
        except UserError:  # such as a number of ranks that does not divide the experts
            continue
        print(f"  {smaller.gpu_bytes['total'] / 1e9:8.1f} GB  {what}{'  <- fits' if smaller.fits else ''}")
        if smaller.fits:
            return


def opened(model: str) -> Checkpoint:
    """--model: a directory with its weights, or a config.json."""
    path = Path(model)
    if os.path.isdir(path) and any(path.glob("*.safetensors")):
        return Checkpoint(path)
    if os.path.isfile(path) and path.name != "config.json":
        raise UserError(f"--model {path}: give a model's directory or its config.json.")
    return BareCheckpoint(path)


def of_each_gpu(text: str) -> tuple[float, str]:
    """--gpu-memory: GB, and the name, where it is one; of those with two sizes the larger one."""
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
    """What it costs where the hardware has no grouped products."""
    return (
        f"no grouped products in hardware: torch multiplies expert by expert, {plan.chosen.step.groups:,} launches a "
        "micro-batch, and the host waits for the GPU before each of the grouped products"
    )


def read_by(settings: Settings, argv: list[str]) -> dict[str, list[Any]]:
    """The files that the flags name, which the plan must not replace."""
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
    """The exit code: 0 where the job fits, 1 where not, 2 for what the user can mend."""
    parser = Parser(__doc__ or "", beside=(Settings, Recipe))
    parser.add_settings(Options)
    given, rest = parser.parse_known_args(arguments)
    options, settings = (
        Options(**{name: getattr(given, name) for name in Options.__dataclass_fields__}),
        parse(rest, ""),
    )
    for name in ("nodes", "gpus"):
        if not 0 < getattr(options, name) <= MOST:
            raise UserError(f"{flag_of(name)} {getattr(options, name)}: must be more than 0, and at most {MOST}.")
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
