"""A run's directory and terminal: metrics.jsonl, evaluation.jsonl, summary.json, and what is shown at the end."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.checkpoints.streaming import Loaded
from train.config.provenance import check_output, record
from train.config.settings import Settings, slug
from train.evaluation.likelihood import Probes
from train.evaluation.measures import at_step, identity
from train.evaluation.store import StoredRow, read_measured, read_metrics
from train.runtime.distributed import failing_together, from_first_rank
from train.runtime.errors import writing
from train.runtime.interruption import INTERRUPTED
from train.runtime.keys import wandb_status
from train.runtime.locks import MAKE_ROOM, lock_for_training
from train.runtime.outputs import write_whole
from train.runtime.shown import size_shown
from train.runtime.terminal import NobodyReads, Terminal
from train.runtime.text_formats import json_line
from train.runtime.watchdog import progress
from train.training.lineage import base_rows_of
from train.training.tables import belief_table, closing_table
from train.training.tracking import belief_curves, flat, init_wandb, with_histograms


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
        self.base: list[StoredRow] = []
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
                f"rank {rank} read {size_shown(read)} in {seconds:.1f} s ({size_shown(read / seconds)}/s), "
                f"peak of host memory {size_shown(load['peak_host_bytes'])}"
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
            print(
                f"resuming after step {after}"
                if after
                else "no complete training checkpoint yet: starting at the first step"
            )
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
                self.wandb.log(with_histograms(rows[step]), step=step)
            if step in measured:
                self.wandb.log(belief_curves(records, step, self._base()), step=step)

    def log(self, values: dict[str, Any]) -> None:
        """Appends one step's values to metrics.jsonl and sends them to W&B. Does nothing except on rank 0."""
        if not self.main:
            return
        with writing(self.metrics), self.metrics.open("a") as file:
            file.write(json_line(values) + "\n")
        self._tell_wandb(lambda run: run.log(with_histograms(values), step=values["step"]))

    def lacks(self, step: int, probes: Probes) -> bool:
        """Returns whether evaluation.jsonl lacks a part of the measurement after `step` steps. All ranks must call it.
        Raises UserError if the file is damaged."""
        whole = self.main and {identity(record) for record, _ in probes.records} <= self._measured(step)
        return not from_first_rank(whole)

    def _measured(self, step: int) -> set[tuple[Any, ...]]:
        """Returns what the run itself has measured after `step` steps, without the rows of train/evaluate.py."""
        rows = (row for row in read_measured(self.evaluation) if not row.keys() & {"verdict", "model"})
        return {identity(row) for row in at_step(rows, step)}

    def _base(self) -> list[StoredRow]:
        """Returns what was measured of the base model, before the first phase of this run."""
        self.base = self.base or base_rows_of(self.directory)
        return self.base

    def log_evaluation(self, step: int, records: list[dict[str, Any]]) -> None:
        """Appends the records of a measurement to evaluation.jsonl, except those that it already holds, and sends their
        means to W&B, one curve per claim. Does nothing except on rank 0."""
        if not self.main:
            return
        held = self._measured(step)
        new = [{"step": step, **record} for record in records if identity(record) not in held]
        with writing(self.evaluation), self.evaluation.open("a") as file:
            file.write("".join(json_line(record) + "\n" for record in new))
        curves = belief_curves(read_measured(self.evaluation), step, self._base())
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
            print(f"W&B cannot be reached for now ({wandb_status(error)}); metrics.jsonl is still written.")
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
        Terminal().print(closing_table(summary))
        if (floor := summary["kl_floor"]) is not None:
            print(
                f"KL at the first step, where model and base are the same: {floor:.2g} nats per target. This is "
                "rounding; a KL of that size is no drift."
            )
        if belief := belief_table(read_measured(self.evaluation), self._base()):
            Terminal().print(belief)
        if planned := summary["memory"].get("planned"):
            measured = summary["memory"]["measured"]
            told = f"memory of a rank: {size_shown(planned)} planned (python -m launch.plan), {size_shown(measured)} "
            # On a CPU the whole process is measured, including memory that libraries and the heap keep. That part does
            # not grow with the job, so no ratio to the plan is shown.
            gpu = torch.cuda.is_available()
            print(
                told
                + (
                    f"measured ({measured / planned - 1:+.0%})"
                    if gpu
                    else "measured, including memory kept by libraries"
                )
            )
        if summary["steps"] < summary["steps_of_schedule"]:
            print(
                f"--stop-after: ended after {summary['steps']} of the {summary['steps_of_schedule']} steps of the "
                "schedule; --resume without it trains the others"
            )
        left = "model/ (safetensors)" if self.settings.method == "full" else "adapter/ (PEFT)"
        print(
            f"{summary['wall_seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s, "
            f"{size_shown(summary['peak_memory_bytes'])} at most on a rank.\n"
            f"In {self.directory}: {left}, metrics.jsonl, summary.json, settings.yaml"
        )


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


def summarize(job: Any, run: Run, hashes: dict[str, str], peak: int, seconds: float) -> dict[str, Any]:
    """Returns the content of a finished job's summary.json. peak: bytes, the highest of any rank. Raises UserError if
    metrics.jsonl is damaged."""
    metrics = read_metrics(run.metrics)
    measured: dict[str, dict[str, dict[str, float | None]]] = {"nll": {}, "kl": {}}
    for values in metrics:
        for name, own in measured.items():
            for role, value in (values.get(name) or {}).items():
                own.setdefault(role, {"first": value})["last"] = value
    tokens = sum(values["tokens"] for values in metrics)
    spent = sum(values["tokens"] / values["tokens_per_second"] for values in metrics if values["tokens_per_second"])
    return {
        "mask": job.settings.mask, "steps": job.stop, "steps_of_schedule": job.steps, "tokens": job.tokens, **measured,
        "kl_floor": None if job.settings.adapter else (metrics[0].get("kl") or {}).get("all"),
        "loss": {"first": metrics[0]["loss"], "last": metrics[-1]["loss"]},
        "documents": job.corpus.documents, "dropped": job.corpus.dropped,
        "findings": job.corpus.findings.summary(), "hashes": hashes,
        "random_shortfall": job.random_shortfall,
        "tokens_per_second": tokens / spent if spent else 0.0,
        "peak_memory_bytes": peak, "wall_seconds": seconds, "load": run.loads,
    }  # fmt: skip
