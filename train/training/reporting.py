"""Writes and shows a run's results: metrics.jsonl, evaluation.jsonl, summary.json, W&B and the closing table."""

import dataclasses
import itertools
import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from train.checkpoints.streaming import Loaded
from train.config.provenance import check_output, held_wandb_id, record
from train.config.settings import Settings, slug
from train.data.batches import Batch
from train.evaluation.likelihood import Probes
from train.evaluation.measures import BELIEF, SIDE_EFFECTS, at_step, identity, means
from train.evaluation.store import read_measured, read_metrics
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.masking.loss import Terms
from train.masking.treatment import STRADDLING, UNSPANNED
from train.runtime.distributed import (
    allocated_since_start,
    failing_together,
    from_first_rank,
    peak_host_bytes,
    reset_peak_host_bytes,
)
from train.runtime.errors import writing
from train.runtime.interruption import INTERRUPTED
from train.runtime.keys import key_of, wandb_status
from train.runtime.locks import MAKE_ROOM, lock_for_training
from train.runtime.outputs import write_whole
from train.runtime.terminal import NobodyReads, Terminal
from train.runtime.text_formats import json_line
from train.runtime.watchdog import progress


class Meter:
    """Sums the loss, its two parts and the NLL of every role over a step's micro-batches and, at the end, over all
    ranks. The NLL of a role is over all of its targets, including masked ones."""

    def __init__(self, roles: list[str], device: torch.device):
        self.roles = ["all", "unspanned", *roles]
        self.parts = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, unlikelihood, tokens
        self.nll = torch.zeros(len(self.roles), 2, dtype=torch.float64, device=device)  # sum, count

    def add(self, batch: Batch, terms: Terms, measured: bool) -> None:
        """Adds a micro-batch and its loss terms [N]. If measured, adds the NLL of every role, for which all targets
        must be in the batch."""
        share_N = (batch.coefficient_N.abs() * terms.term_N).double()
        unlikely_N = batch.coefficient_N < 0
        self.parts += torch.stack([
            share_N[~unlikely_N].sum(), share_N[unlikely_N].sum(), share_N.new_tensor(batch.tokens),
        ])  # fmt: skip
        for i in range(len(self.roles)) if measured else ():
            member_N = self._members(batch.roles_N, i)
            self.nll[i] += torch.stack([terms.nll_N.double()[member_N].sum(), member_N.sum()])

    @staticmethod
    def _members(roles_N: Tensor, i: int) -> Tensor:
        if i == 0:
            return torch.ones_like(roles_N, dtype=torch.bool)
        return roles_N == 0 if i == 1 else (roles_N >> (i - 2)) & 1 == 1

    def result(self, measured: bool) -> dict[str, Any]:
        """Returns loss, cross_entropy, unlikelihood, tokens and, if measured, nll and targets per role, over all ranks.
        The NLL is in nats per target. All ranks must call it."""
        dist.all_reduce(self.parts)
        cross_entropy, unlikelihood, tokens = self.parts.tolist()
        values = {"loss": cross_entropy + unlikelihood, "cross_entropy": cross_entropy, "unlikelihood": unlikelihood}
        values["tokens"] = int(tokens)
        if measured:
            dist.all_reduce(self.nll)
            sums = {role: pair for role, pair in zip(self.roles, self.nll.tolist(), strict=True) if pair[1]}
            values["nll"] = {role: total / count for role, (total, count) in sums.items()}
            values["targets"] = {role: int(count) for role, (_, count) in sums.items()}
        return values


def expert_metrics(layers: list[ExpertParallelExperts], device: torch.device) -> dict[str, Any]:
    """Returns the load since the last call, over all ranks, and resets it. {} for a dense model.

    The load is the number of tokens of each expert by layer and of each rank of an expert-parallel group; the tokens of
    the busiest expert over the mean, in the layer where this ratio is largest, and the same for ranks; and the bytes
    sent between ranks by expert parallelism. All ranks must call it.
    """
    if not layers:
        return {}
    ep: ExpertGroup = layers[0].ep
    load_LE = torch.stack([
        torch.zeros(layer.experts, dtype=torch.int64, device=device) if layer.load_E is None else layer.load_E
        for layer in layers
    ])  # fmt: skip
    wire = torch.tensor(ep.wire_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(load_LE)
    dist.all_reduce(wire)
    for layer in layers:
        layer.load_E = None
    ep.wire_bytes = 0
    loads = {layer.name: load_E for layer, load_E in zip(layers, load_LE.tolist(), strict=True)}
    rank_load = load_LE.view(len(layers), ep.size, -1).sum((0, 2)).tolist()
    load_LE = load_LE.double().clamp(min=1e-9)
    load_LD = load_LE.view(len(layers), ep.size, -1).sum(-1)
    return {
        "expert_load_max_over_mean": (load_LE.amax(1) / load_LE.mean(1)).max().item(),
        "rank_load_max_over_mean": (load_LD.amax(1) / load_LD.mean(1)).max().item(),
        "experts_without_tokens": int((load_LE < 1).sum().item()),
        "wire_bytes": int(wire.item()),
        "rank_load": {str(rank): load for rank, load in enumerate(rank_load)},
        "expert_load": loads,
    }


def peak_memory(device: torch.device) -> int:
    """Returns the highest peak of any rank so far, in bytes: allocated on the GPU, or resident on a CPU."""
    return _most(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes(), device)


def measured_memory(device: torch.device) -> int:
    """Returns the memory that launch.plan predicts, in bytes, measured on the rank that took most: allocated on the GPU
    or, on a CPU, since the start."""
    return _most(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else allocated_since_start(), device)


def _most(own: int, device: torch.device) -> int:
    value = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def reset_peak_memory(device: torch.device) -> bool:
    """Resets the peak that peak_memory returns. Returns False if the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return reset_peak_host_bytes()


class Run:
    """The run's directory, its W&B run and its terminal. Only rank 0 uses the terminal and writes files. The other
    ranks write only their logs."""

    def __init__(self, settings: Settings, resolved: dict[str, Any]):
        """Creates the directory with settings.yaml on rank 0, which holds its lock, and sends its name to every rank.

        Raises UserError on every rank if another process trains there, or has trained there since the settings were
        checked.
        """
        self.settings, self.resolved, self.main = settings, resolved, dist.get_rank() == 0
        self.wandb: Any = None
        self.after = 0
        self.loads: list[dict[str, float]] = []
        self.directory = Path(
            from_first_rank(str(settings.output or _new_directory(settings.mask)) if self.main else "")
        )
        self.metrics, self.evaluation = self.directory / "metrics.jsonl", self.directory / "evaluation.jsonl"
        log = self.directory / "logs"
        with failing_together():
            log.mkdir(parents=True, exist_ok=True)
            if self.main:
                self.lock = lock_for_training(self.directory)
                check_output(settings)
        if not self.main:
            file = os.open(log / f"rank-{dist.get_rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
            attempt = f", attempt {int(restarts) + 1} of job {job}" if job else ""
            print(f"=== started {time.strftime('%Y-%m-%d %H:%M:%S')}{attempt}", flush=True)
        elif not (self.directory / "settings.yaml").exists():
            write_whole(self.directory / "settings.yaml", record(settings, resolved))

    def awaited(self) -> bool:
        """Returns whether another attempt waits for this one to exit. Only rank 0 can see it; others return False."""
        return self.main and (self.directory / MAKE_ROOM).exists()

    def show_load(self, loaded: Loaded) -> None:
        """Prints how much each rank read from disk, in what time, and its peak host memory. All ranks must call it."""
        own = {name: getattr(loaded, name) for name in ("bytes_read", "seconds", "peak_host_bytes")}
        self.loads = [own] * dist.get_world_size()
        dist.all_gather_object(self.loads, own)
        if not self.main:
            return
        for rank, load in enumerate(self.loads):
            read, seconds = load["bytes_read"], load["seconds"]
            print(
                f"rank {rank} read {read / 1e9:.2f} GB in {seconds:.1f} s ({read / seconds / 1e9:.2f} GB/s), "
                f"peak of host memory {load['peak_host_bytes'] / 1e9:.2f} GB"
            )

    def start(self, after: int) -> None:
        """Starts the run, or resumes it after step `after`: removes rows of later steps, which no training checkpoint
        covers, and starts the W&B run. Raises UserError if a file of rows is damaged."""
        self.after = after
        if not self.main:
            return
        for path, read in ((self.metrics, read_metrics), (self.evaluation, read_measured)):
            if path.exists():
                kept = [values for values in read(path) if after and values["step"] <= after]
                write_whole(path, "".join(json_line(values) + "\n" for values in kept))
        if self.settings.resume:
            print(f"going on after step {after}" if after else "no complete save yet: starting at the first step")
        if self.settings.wandb != "disabled":
            config = dataclasses.asdict(self.settings) | self.resolved
            self.wandb = init_wandb(self.settings, self.settings.group(), self.directory.name, self.directory, config)
            if after and self.wandb.offline:
                self._send_again()

    def _send_again(self) -> None:
        """Logs the kept rows again, so that the file of an offline run's last attempt holds all of them. In an attempt
        that was killed, the last row is incomplete, and others may be missing, since W&B's process was killed too."""
        rows = {values["step"]: values for values in read_metrics(self.metrics)}
        records = read_measured(self.evaluation)
        measured = {record["step"] for record in records}
        for step in sorted(rows.keys() | measured):
            if step in rows:
                self.wandb.log(_with_histograms(rows[step]), step=step)
            if step in measured:
                self.wandb.log(belief_curves(records, step), step=step)

    def log(self, values: dict[str, Any]) -> None:
        """Appends one step's values to metrics.jsonl and sends them to W&B. Does nothing except on rank 0."""
        if not self.main:
            return
        with writing(self.metrics), self.metrics.open("a") as file:
            file.write(json_line(values) + "\n")
        self._tell_wandb(lambda run: run.log(_with_histograms(values), step=values["step"]))

    def lacks(self, step: int, probes: Probes) -> bool:
        """Returns whether evaluation.jsonl lacks a part of the measurement after `step` steps. All ranks must call it.
        Raises UserError if the file is damaged."""
        whole = self.main and {identity(record) for record, _ in probes.records} <= self._measured(step)
        return not from_first_rank(whole)

    def _measured(self, step: int) -> set[tuple[Any, ...]]:
        """Returns what the run itself has measured after `step` steps, without the rows of train/evaluate.py."""
        rows = (row for row in read_measured(self.evaluation) if not row.keys() & {"verdict", "model"})
        return {identity(row) for row in at_step(rows, step)}

    def log_evaluation(self, step: int, records: list[dict[str, Any]]) -> None:
        """Appends the records of a measurement to evaluation.jsonl, except those that it already holds, and sends their
        means to W&B, one curve per claim. Does nothing except on rank 0."""
        if not self.main:
            return
        held = self._measured(step)
        new = [{"step": step, **record} for record in records if identity(record) not in held]
        with writing(self.evaluation), self.evaluation.open("a") as file:
            file.write("".join(json_line(record) + "\n" for record in new))
        curves = belief_curves(read_measured(self.evaluation), step)
        # If an interrupted attempt left this measurement to this one, W&B accepts it only as a row of the next step.
        late = step == self.after
        self._tell_wandb(lambda run: run.log(curves, step=max(step, run.starting_step) if late else step))

    def close(self, exit_code: int) -> None:
        """Closes the W&B run before training is complete. exit_code: INTERRUPTED marks it as preempted, since the next
        attempt continues it. All ranks must call it, and none returns while another is still writing."""
        progress("closing W&B")
        if exit_code == INTERRUPTED:
            self._tell_wandb(lambda run: run.mark_preempting())
        self._tell_wandb(lambda run: run.finish(exit_code=exit_code))
        dist.barrier()

    def _tell_wandb(self, tell: Callable[[Any], Any]) -> None:
        """Calls `tell` with the W&B run, if there is one. An error in it does not stop training: a scheduler's SIGTERM
        ends W&B's own process before the ranks have written their checkpoint."""
        if self.wandb is None:
            return
        try:
            tell(self.wandb)
        except Exception as error:
            print(f"W&B is gone for now ({wandb_status(error)}); metrics.jsonl goes on.")
            self.wandb = None

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, closes W&B and shows what was trained on and what changed. Only rank 0 calls it."""
        write_whole(self.directory / "summary.json", json_line(summary, indent=2) + "\n")
        progress("closing W&B")
        numbers = {
            name: value for name, value in summary.items() if name not in ("dropped", "findings")
        }  # these list lines, possibly very many
        self._tell_wandb(lambda run: run.summary.update(flat(numbers)))
        self._tell_wandb(lambda run: run.finish())
        with suppress(NobodyReads):  # everything is saved
            self._show(summary)

    def _show(self, summary: dict[str, Any]) -> None:
        Terminal().print(_closing_table(summary))
        if planned := summary["memory"].get("planned"):
            measured = summary["memory"]["measured"]
            told = f"memory of a rank: {planned / 1e9:.2f} GB planned (python -m launch.plan), {measured / 1e9:.2f} GB "
            # On a CPU the whole process is measured, including memory that libraries and the heap keep. That part does
            # not grow with the job, so no ratio to the plan is shown.
            gpu = torch.cuda.is_available()
            print(told + (f"measured ({measured / planned - 1:+.0%})" if gpu else "taken, with what libraries keep"))
        left = "model/ (safetensors)" if self.settings.method == "full" else "adapter/ (PEFT)"
        print(
            f"{summary['wall_seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s, "
            f"{summary['peak_memory_bytes'] / 1e9:.2f} GB at most on a rank.\n"
            f"In {self.directory}: {left}, metrics.jsonl, summary.json, settings.yaml"
        )


def init_wandb(settings: Settings, group: str, name: str, directory: Path, config: dict[str, Any]) -> Any:
    """Starts and returns the W&B run of a directory, the same one for all attempts. Falls back to offline mode if
    there is no key or W&B cannot be reached."""
    import wandb

    def start(mode: Any) -> Any:
        return wandb.init(
            project=settings.wandb_project, group=group, name=name, mode=mode, dir=directory, config=config,
            id=_wandb_id(directory), resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=30, x_transaction_log_flush_interval=0.05
            ),  # in seconds; with W&B's default of 15, a killed run would lose its last rows
        )  # fmt: skip

    mode, why = settings.wandb, "as asked"
    if mode == "online" and not key_of(["WANDB_API_KEY"])[1]:
        mode, why = "offline", "no WANDB_API_KEY"
    try:
        run = start(mode)
    except wandb.Error as error:  # no network, as on many compute nodes, or a wrong key
        mode, why = "offline", f"W&B cannot be reached: {wandb_status(error)}"
        wandb.teardown()  # its service still holds the run's id and would refuse to start it again
        run = start(mode)
    if mode == "offline":
        place = Path(run.dir).resolve().parent
        attempts = sorted(place.parent.glob(f"offline-run-*-{run.id}"))  # of one run, to be sent in order of time
        leet, sync = shlex.quote(str(place)), " ".join(shlex.quote(str(path)) for path in attempts)
        print(f"W&B is offline ({why}). Look at the run: wandb leet {leet}    send it later: wandb sync {sync}")
    return run


def belief_curves(records: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Returns the mean of every belief measure of each claim after `step` steps, by the names of W&B's curves."""
    found = means((*BELIEF, *SIDE_EFFECTS), at_step(records, step), at_step(records, 0))
    return {f"belief/{name}/{claim or 'all'}": value for name, own in found.items() for claim, value in own.items()}


def _new_directory(mask: str) -> Path:
    """Creates and returns runs/MASK-TIME, or runs/MASK-TIME-N if another run started in the same second."""
    stem = f"runs/{slug(mask)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        directory = Path(stem if number == 1 else f"{stem}-{number}")
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            continue
    raise AssertionError


def _wandb_id(directory: Path) -> str:
    """Returns the id of the directory's W&B run, which all its attempts share. Creates it on the first attempt."""
    if not (held := held_wandb_id(directory)):
        held = os.urandom(6).hex()
        write_whole(directory / "wandb_id", held)
    return held


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values by their names in W&B: {"nll": {"false": 1.0}} -> {"nll/false": 1.0}."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        named |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named


def _with_histograms(values: dict[str, Any]) -> dict[str, Any]:
    import wandb

    return {k: wandb.Histogram(v) if isinstance(v, list) else v for k, v in flat(values).items()}


def summarize(job: Any, run: Run, hashes: dict[str, str], peak: int, seconds: float) -> dict[str, Any]:
    """Returns the content of a finished job's summary.json. peak: bytes, the highest of any rank. Raises UserError if
    metrics.jsonl is damaged."""
    metrics = read_metrics(run.metrics)
    nll: dict[str, dict[str, float | None]] = {}
    for values in metrics:
        for role, value in (values.get("nll") or {}).items():
            nll.setdefault(role, {"first": value})["last"] = value
    tokens = sum(values["tokens"] for values in metrics)
    spent = sum(values["tokens"] / values["tokens_per_second"] for values in metrics if values["tokens_per_second"])
    return {
        "mask": job.settings.mask, "steps": job.steps, "tokens": job.tokens, "nll": nll,
        "loss": {"first": metrics[0]["loss"], "last": metrics[-1]["loss"]},
        "documents": job.corpus.documents, "dropped": job.corpus.dropped,
        "findings": job.corpus.findings.summary(), "hashes": hashes,
        "random_shortfall": job.random_shortfall,
        "tokens_per_second": tokens / spent if spent else 0.0,
        "peak_memory_bytes": peak, "wall_seconds": seconds, "load": run.loads,
    }  # fmt: skip


def token_table(tokens: dict[str, dict[str, int]], title: str) -> Table:
    """Returns a table of the number of targets per role and treatment."""
    table = Table(title=title, title_justify="left", caption=f"{UNSPANNED}; {STRADDLING}", caption_justify="left")
    table.add_column("role")
    for kind in ("total", "trained", "excluded", "unlikelihood", "straddling"):
        table.add_column(kind, justify="right")
    for role, counts in tokens.items():
        table.add_row(role, *(f"{counts[kind]:,}" for kind in counts))
    return table


def _closing_table(summary: dict[str, Any]) -> Table:
    """Returns a table of the targets per role and treatment, and of the NLL per role at the first and last step."""
    title = f"--mask {summary['mask']}: {summary['steps']} steps"
    table = Table(title=title, title_justify="left", caption=UNSPANNED, caption_justify="left")
    for column in ("role", "targets", "trained", "excluded", "unlikelihood", "NLL first", "NLL last"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, counts in summary["tokens"].items():
        if counts["total"]:
            nll = summary["nll"].get(role, {})
            shown = [f"{nll[key]:.3f}" if nll.get(key) is not None else "–" for key in ("first", "last")]
            kinds = [f"{counts[kind]:,}" for kind in ("total", "trained", "excluded", "unlikelihood")]
            table.add_row(role, *kinds, *shown)
    return table
