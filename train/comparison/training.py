"""Checks and trains the runs of a comparison, from the same start on the same tokens."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from train.comparison.units import LEAST_UNITS
from train.comparison.variants import ComparisonPlan
from train.config.settings import Settings, check_numbers
from train.evaluation.likelihood import Record
from train.evaluation.measures import at_step
from train.evaluation.store import read_measured
from train.runtime.command import launched_as
from train.runtime.distributed import failing_together, from_first_rank
from train.runtime.errors import UserError
from train.runtime.interruption import interruption
from train.runtime.outside import read_json
from train.runtime.similar import similar
from train.training.early import continued
from train.training.finishing import begin, finish, load_engine
from train.training.job import Job, Known, prepare
from train.training.metrics import reset_peak_memory
from train.training.run import Run


def checked_runs(plan: ComparisonPlan, ranks: int, show: bool, known: Known) -> dict[tuple[str, int], list[Settings]]:
    """Checks every run. Returns (variant, seed) -> settings of its runs, one for each phase, in the order of the seeds
    and then of the variants.

    show: prints notes and counts. known: receives what the runs share, so that documents are tokenized once. Raises
    UserError, which names variant and seed, if the settings of a run are wrong or --output holds a comparison already.
    """
    checked: dict[tuple[str, int], list[Settings]] = {}
    told: set[str] = set()
    if show and (few := len(plan.seeds)) < LEAST_UNITS:
        print(f"note: {few} seed{'s' * (few > 1)}: the report will have intervals, but no verdict below {LEAST_UNITS}")
    for seed in plan.seeds:
        budget: int | None = None
        seen: set[str] = set()
        for variant in sorted(plan.variants, key=lambda variant: variant.name != plan.baseline):  # the baseline first
            with named(f"variant {variant.name!r}, seed {seed}"):
                runs = plan.runs(variant, seed)
                if plan.match_trained_tokens:
                    counted = prepare(replace(runs[0], output="", resume=False), ranks, False, known)
                    budget = budget or targets_in_loss(counted)
                    runs = [replace(runs[0], steps=matching_steps(counted, budget))]
                    check_numbers(runs[0])
            for number, settings in enumerate(runs):
                phase = variant.names[number] if variant.names else ""
                if settings.output in seen:  # a phase that an earlier variant shares
                    continue
                seen.add(settings.output)
                with named(f"variant {variant.name!r}, {f'phase {phase!r}, ' if phase else ''}seed {seed}"):
                    job = prepare(continued(settings, later=number > 0), ranks, show, known)
                _check_claims(plan, job)
                if show:
                    trained = targets_in_loss(job)
                    missed = f", {trained - budget:+,} against the baseline" if budget else ""
                    name = f"{variant.name}: {phase}" if phase else variant.name
                    print(f"{name}, seed {seed}: {job.steps} steps, {trained:,} targets in the loss{missed}")
                    print(*(f"{note}\n" for note in job.notes() if note not in told), sep="", end="")
                    told |= {*job.notes()}
            checked[variant.name, seed] = runs
    return {(variant.name, seed): checked[variant.name, seed] for seed in plan.seeds for variant in plan.variants}


def in_training_order(runs: Iterable[list[Settings]]) -> list[Settings]:
    """Returns the runs of variants in an order in which each comes after the run that it continues; a phase that
    several variants share is there once."""
    return list({settings.output: settings for phases in runs for settings in phases}.values())


@contextmanager
def named(what: str) -> Iterator[None]:
    """Inside the context, puts the name before the message of a UserError."""
    try:
        yield
    except UserError as error:
        error.args = (f"{what}: {error}",)
        raise


def _check_claims(plan: ComparisonPlan, job: Job) -> None:
    records = [record for record, _ in job.probes.records] if job.probes else []
    measured = {record["claim"] for record in records if record["kind"] in ("likelihood", "yes_no")}
    if unknown := [claim for claim in plan.placebo if claim not in measured]:
        near = similar(unknown[0], measured)
        raise UserError(
            f"--placebo {unknown[0]}: is no claim that has a measure of belief; these have one: "
            f"{', '.join(sorted(measured))}." + (f" Did you mean {near}?" if near else "")
        )
    if not measured - set(plan.placebo):
        raise UserError("--claims: no claim besides the placebo has a measure of belief. Give likelihood templates.")


def trained_by_step(job: Job, documents: int) -> np.ndarray:
    """Returns [steps]: the cumulative number of targets in the loss, whatever their term, after each step over
    the first `documents` documents. The last step may have fewer documents than --batch-size."""
    size = job.settings.batch_size
    counts = [job.corpus.counts[number] for number in job.corpus.order.documents(0, documents)]
    in_loss = [count["all", "total"] - count["all", "excluded"] for count in counts]
    return np.cumsum(np.add.reduceat(in_loss, range(0, len(in_loss), size)))


def targets_in_loss(job: Job) -> int:
    """Returns the number of targets in the loss over all steps of the job, including a partial last step."""
    return int(trained_by_step(job, job.documents)[-1])


def matching_steps(job: Job, budget: int) -> int:
    """Returns the --steps with which the number of targets in the loss is nearest to the budget. If no number is nearer
    than the job's own, returns the job's setting, which is 0 for --epochs: these may end in a partial step, and --steps
    are whole steps."""
    steps = job.steps
    while (sums := trained_by_step(job, steps * job.settings.batch_size))[-1] < budget:
        steps *= 2
    missed = np.abs(sums - budget)
    return int(missed.argmin()) + 1 if missed.min() < abs(targets_in_loss(job) - budget) else job.settings.steps


def train_all(
    runs: list[Settings], ranks: int, device: torch.device, known: Known, planned: Callable[[Job], dict[str, Any]]
) -> None:
    """Trains the runs that are not finished, one after the other on one engine; a run comes after the one that it
    continues (--after). The results of each run are the same as from train/sft.py alone. Runs on every rank. planned:
    as in `finish`."""
    rank = launched_as()[0]
    waiting = from_first_rank([settings for settings in runs if not _finished(settings)])
    if rank == 0 and not waiting:
        print("all runs are finished: there is nothing to train")
    engine: Any = None
    loads: list[dict[str, float]] = []
    began = time.perf_counter()
    for number, settings in enumerate(waiting):
        interruption.release()
        with failing_together():  # one rank looks, as a network file system may show others an older directory
            begins = continued(settings) if rank == 0 else None
        job, started = prepare(from_first_rank(begins), ranks, False, known), time.perf_counter()
        dist.barrier()  # before rank 0 writes the directory in Run, all ranks must have read it in prepare
        if rank == 0:
            left = (started - began) / number * (len(waiting) - number) / 60 if number else 0
            eta = f", about {left:.0f} min left" if number else ""
            print(f"run {number + 1} of {len(waiting)}: {Path(settings.output).name}{eta}", flush=True)
        run, used = Run(job.settings, job.resolved), engine is not None
        if not used:
            engine, loaded = load_engine(job, device)
            run.show_load(loaded)
        loads = run.loads = loads or run.loads
        start, spent = begin(job, run, engine, used)
        before = from_first_rank(_measured_before(settings, runs) if rank == 0 else None)
        if not reset_peak_memory(device) and not number and rank == 0:
            print("note: this system cannot reset the memory peak: each run reports the peak of all runs so far")
        with named(f"run {run.directory.name}"):
            finish(job, run, engine, loaded.plan, start, started - spent, planned, before)
        dist.barrier()


def _finished(settings: Settings) -> bool:
    """Whether a run has a summary of as many steps as it is to have: all of its schedule, or --stop-after."""
    path = Path(settings.output) / "summary.json"
    if not path.exists():
        return False
    summary = read_json(path)
    done, whole = summary.get("steps", 0), summary.get("steps_of_schedule", 0)
    return bool(done >= min(settings.stop_after or whole, whole))


def _measured_before(settings: Settings, runs: list[Settings]) -> list[Record] | None:
    """Returns the beliefs before a run's first step, if they were measured: at the end of the run that it continues, or
    at step 0 of any other finished run that begins as it does."""
    if settings.after:
        return _records(Path(settings.after), read_json(Path(settings.after) / "summary.json")["steps"])
    finished = (Path(each.output) for each in runs if not each.after)
    return next((_records(run, 0) for run in finished if (run / "summary.json").exists()), None)


def _records(run: Path, step: int) -> list[Record]:
    """Returns what a run itself measured after `step` steps, without the rows of train/evaluate.py."""
    rows = at_step(read_measured(run / "evaluation.jsonl"), step)
    return [{k: v for k, v in row.items() if k != "step"} for row in rows if not row.keys() & {"verdict", "model"}]
