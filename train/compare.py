"""Trains variants that differ in what the loss does with which spans, from the same start on the same tokens, measures
what each model believes, and leaves one report.

    deepspeed train/compare.py --masks none doctags doctags,false-spans --claims claim.yaml --data documents.jsonl
    deepspeed train/compare.py --recipe train/recipes/demo.yaml --output runs/comparison
    python train/compare.py --runs runs/array-1 runs/array-2 ... --output runs/comparison    # of finished runs

With --runs, a --recipe names the variants, the baseline and the placebo. A recipe is YAML (train/config/recipe.py):

    settings: {model: DIR, steps: 625, data: [documents.jsonl=10000], claims: [claim.yaml]}
    variants:
      all of it: {mask: none}                     # the first is what the others are compared with; or baseline: NAME
      doctag out: {mask: doctags}
      false out: {mask: "doctags,false-spans"}
    seeds: 3

Takes every setting of train/sft.py; variants share all that --masks or the recipe does not vary. The base is read once.
Interrupted, the same command with --resume goes on with the variant it was in.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen()

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launch.planning import expert_parallel, planned_memory
from train.checkpoints import resume
from train.comparison.outcome import check_free, report
from train.comparison.units import LEAST_UNITS
from train.comparison.variants import ComparisonPlan, parse_comparison
from train.config.provenance import held_wandb_id
from train.config.settings import Settings, check_numbers
from train.evaluation.measures import at_step
from train.evaluation.store import read_measured
from train.runtime.distributed import from_first_rank, guarded, launched_as, leave, start_distributed
from train.runtime.errors import UserError
from train.runtime.interruption import interruption
from train.runtime.terminal import command
from train.training.finishing import finish, load_engine
from train.training.job import Job, Known, prepare
from train.training.metrics import reset_peak_memory
from train.training.run import Run


@command
def main(argv: list[str]) -> int:
    """Returns the exit code of `guarded`."""
    return guarded(compare, argv)


def compare(argv: list[str]) -> None:
    """Checks every run before a weight is read, then trains the runs and compares them. With --runs, only compares.
    Raises UserError if a setting, a document, a claim or the model is wrong."""
    rank, ranks = launched_as()
    plan = parse_comparison(argv, __doc__ or "")
    if plan.shared.wandb != "disabled":
        held_wandb_id(plan.output)
    if plan.finished:
        if rank == 0:
            check_free(plan.output, plan.finished.values())
            report(plan, plan.finished)
        return
    device = start_distributed(plan.shared.timeout)
    plan = replace(plan, output=from_first_rank(plan.output))  # its default contains the time of each rank
    known = Known(expert_parallel)
    runs = checked_runs(plan, ranks, rank == 0, known)
    if plan.shared.dry_run:
        return
    interruption.resume_by(f"--resume --output {shlex.quote(str(plan.output))}")
    train_all(list(runs.values()), ranks, device, known)
    if rank == 0:
        report(plan, {name: Path(settings.output) for name, settings in runs.items()})


def checked_runs(plan: ComparisonPlan, ranks: int, show: bool, known: Known) -> dict[tuple[str, int], Settings]:
    """Checks every run. Returns (variant, seed) -> settings of the run, in the order of the seeds and then of the
    variants.

    show: prints notes and counts. known: receives what the runs share, so that documents are tokenized once. Raises
    UserError, which names variant and seed, if the settings of a run are wrong or --output holds a comparison already.
    """
    checked: dict[tuple[str, int], Settings] = {}
    told: set[str] = set()
    if show and (few := len(plan.seeds)) < LEAST_UNITS:
        print(f"note: {few} seed{'s' * (few > 1)}: the report will have intervals, but no verdict below {LEAST_UNITS}")
    for seed in plan.seeds:
        budget: int | None = None
        for variant in sorted(plan.variants, key=lambda variant: variant.name != plan.baseline):  # the baseline first
            with named(f"variant {variant.name!r}, seed {seed}"):
                settings = replace(variant.settings(seed, plan.output), wandb_group=plan.shared.group())
                started = (Path(settings.output) / "settings.yaml").exists()
                if started and not plan.shared.resume:
                    raise UserError(
                        f"--output {plan.output}: holds a comparison already. Give another, or --resume to go on."
                    )
                if plan.match_trained_tokens:
                    counted = prepare(replace(settings, output="", resume=False), ranks, False, known)
                    budget = budget or targets_in_loss(counted)
                    settings = replace(settings, steps=matching_steps(counted, budget))
                    check_numbers(settings)
                settings = replace(settings, resume=started)
                job = prepare(settings, ranks, show, known)
            _check_claims(plan, job)
            if show:
                trained = targets_in_loss(job)
                missed = f", {trained - budget:+,} against the baseline" if budget else ""
                print(f"{variant.name}, seed {seed}: {job.steps} steps, {trained:,} targets in the loss{missed}")
                print(*(f"{note}\n" for note in job.notes() if note not in told), sep="", end="")
                told |= {*job.notes()}
            checked[variant.name, seed] = settings
    return {(variant.name, seed): checked[variant.name, seed] for seed in plan.seeds for variant in plan.variants}


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
        raise UserError(
            f"--placebo {unknown[0]}: no belief in such a claim is measured; claims are {', '.join(sorted(measured))}."
        )
    if not measured - set(plan.placebo):
        raise UserError(
            "--claims: hold no claim beside the placebo whose belief can be scored. Give likelihood templates."
        )


def trained_by_step(job: Job, documents: int) -> np.ndarray:
    """Returns [steps]: the cumulative number of targets in the loss, trained or with unlikelihood, after each step over
    the first `documents` documents. The last step may have fewer documents than --batch-size."""
    size = job.settings.batch_size
    counts = [job.corpus.counts[number] for number in job.corpus.order.documents(0, documents)]
    in_loss = [count["all", "trained"] + count["all", "unlikelihood"] for count in counts]
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


def train_all(runs: list[Settings], ranks: int, device: torch.device, known: Known) -> None:
    """Trains the runs that are not finished, one after the other on one engine. The results of each run are the same as
    from train/sft.py alone. Runs on every rank."""
    rank = launched_as()[0]
    waiting = from_first_rank([s for s in runs if not (Path(s.output) / "summary.json").exists()])
    base = from_first_rank(next((found for settings in runs if (found := _base_records(settings))), None))
    engine: Any = None
    given: dict[str, Tensor] | None = None  # LoRA weights of --adapter
    loads: list[dict[str, float]] = []
    began = time.perf_counter()
    for number, settings in enumerate(waiting):
        interruption.release()
        job, started = prepare(settings, ranks, False, known), time.perf_counter()
        dist.barrier()  # before rank 0 writes the directory in Run, all ranks must have read it in prepare
        if rank == 0:
            left = (started - began) / number * (len(waiting) - number) / 60 if number else 0
            eta = f", about {left:.0f} min left" if number else ""
            print(f"run {number + 1} of {len(waiting)}: {Path(settings.output).name}{eta}", flush=True)
        run = Run(settings, job.resolved)
        if engine is None:
            engine, loaded = load_engine(job, device)
            run.show_load(loaded)
            given = resume.initial_partitions(engine.module, None) if settings.adapter else None
        loads = run.loads = loads or run.loads
        saved = from_first_rank(resume.saves(run.directory / "saves") if settings.resume else [])
        if saved:
            start, spent = resume.restore(saved[-1], engine.module, engine.optimizer)
        else:
            start, spent, initial = 0, 0.0, given or resume.initial_partitions(engine.module, settings.seed)
            resume.start_over(engine.module, engine.optimizer, initial)
        if not reset_peak_memory(device) and not number and rank == 0:
            print("note: this system cannot forget a peak of memory: each run's is that of all runs before it too")
        with named(f"run {run.directory.name}"):
            finish(job, run, engine, loaded.plan, start, started - spent, planned_memory, base)
        dist.barrier()
        base = base or from_first_rank(_base_records(settings))


def _base_records(settings: Settings) -> list[dict[str, Any]] | None:
    """Returns what a finished run itself measured before its first step, which is the same for all runs; None if the
    run is not finished."""
    records = read_measured(Path(settings.output) / "evaluation.jsonl")
    if not (Path(settings.output) / "summary.json").exists():
        return None
    return [
        {k: v for k, v in record.items() if k != "step"}
        for record in at_step(records, 0)
        if not record.keys() & {"verdict", "model"}
    ]


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
