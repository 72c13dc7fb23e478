"""Computes what a job needs of GPUs, hosts and network, without reading a weight and without a GPU."""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from launch.cluster import DISK, NETWORK, PROCESS, RUNTIME, USABLE, Cluster
from launch.memory import Memory, Zero, planned_batch, planned_model, rank_memory, run_step, split
from launch.trace import PlannedGroup
from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import READERS
from train.config.settings import Settings, ds_config
from train.experts.storage import NF4Experts
from train.masking.grammar import parse_mask
from train.model.engine import checked_expert_parallel
from train.model.text_model import text_config
from train.runtime.distributed import memory_status
from train.runtime.errors import UserError
from train.training.job import Job, full_precision, lora_settings, rows_of_first_steps


class Plan:
    """What a job with these settings needs on a cluster.

    tokens: of every document. row: lengths of the documents of the fullest micro-batch, if they are known; else it has
    as many documents of `tokens` tokens as fit. Raises UserError if the model cannot be trained with these settings, or
    if --expert-parallel does not divide the ranks.
    """

    def __init__(
        self, settings: Settings, checkpoint: Checkpoint, cluster: Cluster, tokens: int, row: Sequence[int] = ()
    ):
        self.settings, self.checkpoint, self.cluster, self.tokens = settings, checkpoint, cluster, tokens
        of_a_rank = math.ceil(settings.batch_size / cluster.ranks)
        self.row = list(row) or [tokens] * max(1, min(settings.row_tokens // tokens, of_a_rank))
        self.accumulation = math.ceil(of_a_rank / len(self.row))
        self.expert_parallel = checked_expert_parallel(settings, checkpoint, cluster.ranks, partial(by_plan, cluster))
        config = ds_config(settings, cluster.ranks)
        lora = None if settings.method == "full" else lora_settings(settings, text_config(checkpoint))
        self.group = PlannedGroup(self.expert_parallel)
        self.model, self.load = planned_model(checkpoint, settings.method, lora, self.group)
        if lora is None:
            config |= full_precision(settings, self.load)
        self._memory: dict[bool, Memory] = {}
        self.zero, self.bf16 = Zero.of(config, cluster.ranks, self.expert_parallel), "bf16" in config

    def memory(self, checkpointing: bool) -> Memory:
        """Returns the memory of one rank, with or without gradient checkpointing. The result is cached."""
        if checkpointing not in self._memory:
            gpu, batch = self.cluster.memory > 0, planned_batch(self.row, self._with_base)
            step = run_step(self.model, batch, checkpointing, gpu)
            self._memory[checkpointing] = rank_memory(self.model, step, self.zero, gpu, self.bf16)
        return self._memory[checkpointing]

    @cached_property
    def _with_base(self) -> bool:
        """Whether the base runs before each micro-batch, as with held tokens; of an invalid mask, which other checks
        report, False."""
        try:
            return self.settings.measure_kl or parse_mask(self.settings.mask).holds
        except UserError:
            return False

    @property
    def chosen(self) -> Memory:
        """The memory of one rank with the settings' choice of gradient checkpointing."""
        return self.memory(self.settings.gradient_checkpointing)

    @property
    def gpu_bytes(self) -> dict[str, int]:
        """Category -> bytes of a GPU, or of a rank on a CPU, with "runtime" and "total"."""
        entries = self.chosen.gpu | {"runtime": RUNTIME if self.cluster.memory else PROCESS}
        return entries | {"total": sum(entries.values())}

    @cached_property
    def expert_bytes(self) -> dict[str, int]:
        """Bytes of a GPU's experts by their storage format: nf4, the checkpoint's fp8, int4 or dtype, or trained."""
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
        """Whether the job fits into the usable part of a GPU's memory."""
        return self.gpu_bytes["total"] <= USABLE * self.cluster.memory * 1e9

    @cached_property
    def read_bytes(self) -> int:
        """Bytes that the first rank reads from disk. The others read as much, except for padding."""
        reads = self.load.reads(0, self.cluster.ranks, self.settings.method)
        return sum(self.checkpoint.bytes_of(read.name, read.count) for read in reads)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory per node. Each rank needs its process, which is assumed to be as large as this one,
        the matrices that its reader threads hold, and its LoRA weights, which pass through host memory when ZeRO-3
        partitions them. On CPUs, each rank needs its process and all that it holds."""
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
        """Bytes that a GPU sends in a step, on average (Rajbhandari et al., arXiv 1910.02054, section 7).

        experts: hidden states, as counted in the step without data. gather: ZeRO-3's partitions, (ranks - 1) / ranks of
        every parameter, before forward and, if the parameter was released in between, before backward and before the
        forward of the base. reduce: the same share of every gradient. nvlink, network: the sum of these three, split by
        where the bytes go. total: their sum.

        A rank sends equally much to each rank of its group. So the share of the bytes that go to other nodes is the
        share of the ranks on other nodes. Groups are those of deepspeed.utils.groups: consecutive ranks divide a
        layer's experts; ranks that are expert_parallel apart hold the same experts, and partition the trained weights
        of these.
        """
        micro, parts, ranks = self.accumulation, split(self.model, self.zero), range(self.cluster.ranks)
        again = 2 + self._with_base if 2 * sum(p.numel() for p, n in parts if n > 1) > self.zero.reuse else 1
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
        """Returns the share of the pairs of ranks within a group whose ranks are on different nodes."""
        pairs = sum(len(group) * (len(group) - 1) for group in groups)
        counts = [Counter(rank // self.cluster.gpus for rank in group).values() for group in groups]
        near = sum(count * (count - 1) for nodes in counts for count in nodes)
        return 1 - near / pairs if pairs else 0.0

    @property
    def flops(self) -> int:
        """Floating-point operations of a GPU in a step."""
        return self.accumulation * self.chosen.step.flops

    @property
    def traffic_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of a GPU's memory that the operations of a step read and write: part of the model -> operation ->
        bytes, the largest first."""
        parts: dict[str, Counter[str]] = {}
        for (part, operation), moved in self.chosen.step.traffic.items():
            parts.setdefault(part, Counter())[operation] += self.accumulation * moved
        ordered = sorted(parts.items(), key=lambda each: -each[1].total())
        return {part: dict(operations.most_common()) for part, operations in ordered}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by the roofline (Williams et al., CACM 52(4), 2009) that ASSUMED describes: of the load, of a step,
        and of a step's compute, memory, nvlink and network, of which compute and memory overlap."""
        gpu, wire = self.cluster.gpu, self.wire_bytes
        compute, memory = self.chosen.step.flops / gpu.flops, self.chosen.step.moved / gpu.bandwidth
        update = 32 * self.chosen.trained / gpu.bandwidth  # four fp32 numbers per element, both ways
        parts = {
            "compute": self.accumulation * compute, "memory": self.accumulation * memory + update,
            "nvlink": wire["nvlink"] / gpu.nvlink, "network": wire["network"] / NETWORK,
        }  # fmt: skip
        step = self.accumulation * max(compute, memory) + update + parts["nvlink"] + parts["network"]
        return {"load": self.cluster.gpus * self.read_bytes / DISK, "step": step} | parts

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole job, at most."""
        return self.settings.batch_size * self.tokens / self.seconds["step"]

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as `launch.plan --json` writes it. Sizes are in bytes, times in seconds."""
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
    """Returns the plan of a job that has run here, to be compared with what was measured.

    `planned`: bytes of a rank, without its imports. `read`: bytes that it read. `categories`, `moments`: how the bytes
    divide. On a GPU whose roofline is known also `planned_tokens_per_second`, for documents that are all as long as the
    longest one of the fullest row. Prints a note and returns {} for a model that cannot be planned.
    """
    ranks, settings = job.resolved["ranks"], dataclasses.replace(job.settings, expert_parallel=job.expert_parallel)
    cluster = Cluster.here(ranks)
    steps = rows_of_first_steps(job.settings, job.corpus, ranks, job.documents)
    fullest = max((row for step in steps for row in step), key=sum)
    try:
        plan = Plan(settings, job.checkpoint, cluster, max(fullest), fullest)
        categories = plan.gpu_bytes
        known = cluster.memory and cluster.gpu.name in cluster.kind
        speed = {"planned_tokens_per_second": plan.tokens_per_second} if known else {}
    except Exception as error:  # the run is done, and a failed plan must not cost its results
        print(f"note: no memory planned ({type(error).__name__}: {error})", file=sys.stderr)
        return {}
    held = {"planned": plan.chosen.total + (0 if plan.cluster.memory else PROCESS), "read": plan.read_bytes}
    return held | {"categories": categories, "moments": plan.chosen.phases} | speed


def expert_parallel(settings: Settings, checkpoint: Checkpoint, ranks: int) -> int:
    """Returns how many ranks divide a layer's experts if --expert-parallel is not given: the GPUs of one node, between
    which communication is fastest, if the job then fits with documents of --max-tokens tokens. Otherwise, and on CPUs,
    it is all ranks."""
    return by_plan(Cluster.here(ranks), settings, checkpoint, ranks)


def by_plan(cluster: Cluster, settings: Settings, checkpoint: Checkpoint, ranks: int) -> int:
    """Returns `expert_parallel` for a cluster of so many ranks."""
    if not cluster.memory or cluster.nodes == 1:
        return ranks
    given = dataclasses.replace(settings, expert_parallel=cluster.gpus)
    try:
        fits = Plan(given, checkpoint, cluster, settings.max_tokens).fits
    except Exception:  # for example, the size does not divide the experts, or the model can be trained but not planned
        return ranks
    return cluster.gpus if fits else ranks
