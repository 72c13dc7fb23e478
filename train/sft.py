"""Fine-tunes a model on documents whose spans have roles, with a loss that knows them.

    deepspeed train/sft.py --mask false-spans
    deepspeed --num_gpus 8 train/sft.py --model DIR --data documents.jsonl=10000 --data chats.jsonl=5000 --mask doctags

    deepspeed train/sft.py --recipe train/recipes/masks.yaml train/recipes/models/qwen3.5-397b.yaml --variant 0

Without --model and --data it trains the embedded demo. --dry-run checks everything and stops before a weight is read.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from launch.interruption import interruption

    interruption.listen()

import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch

from launch.distributed import leave, lost_another, start_distributed
from launch.interruption import INTERRUPTED, interruption
from launch.plan import planned_memory
from train.belief.probes import Record
from train.checkpoints import resume
from train.checkpoints.adapter import save_adapter
from train.checkpoints.layout import LoadPlan
from train.checkpoints.streaming import Loaded
from train.checkpoints.whole import save_model
from train.errors import Interrupted, UserError, refused
from train.job import Job, prepare
from train.model import build
from train.reporting import Run, measured_memory, peak_memory, summarize
from train.settings import parse
from train.terminal import NobodyReads, command, complain
from train.trainer import Trainer, make_engine


@command
def main(argv: list[str]) -> int:
    """The exit code, as `guarded` gives it."""
    return guarded(check_and_train, argv)


def check_and_train(argv: list[str]) -> None:
    """The whole job."""
    rank, ranks = launched_as()
    job = prepare(parse(argv, __doc__ or ""), ranks, show=rank == 0)
    if rank == 0:
        with suppress(NobodyReads) if job.settings.dry_run else nullcontext():  # all is checked
            job.show()
    if not job.settings.dry_run:
        train(job)


def launched_as() -> tuple[int, int]:
    """This process's rank and the number of ranks, before they have met."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def guarded(script: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a script of all ranks. -> its exit code: 0, or 2 for what the user must mend, 1 for what may pass, or
    INTERRUPTED where it has saved and can go on by --resume."""
    try:
        script(argv)
    except (UserError, OSError) as error:
        told, (rank, _) = error if isinstance(error, UserError) else refused(error), launched_as()
        if rank:  # the launcher ends all ranks when the first one exits: that must be rank 0, if it has the error too
            time.sleep(30)
        complain(f"error: {f'rank {rank}: ' if rank else ''}{told}")
        return told.code
    except Interrupted as reason:
        if launched_as()[0] == 0:
            complain(str(reason))
        return INTERRUPTED
    except RuntimeError as error:
        return lost_another(error)
    return 0


def train(job: Job) -> None:
    """Reads the weights, trains, and leaves adapter, metrics and summary."""
    started, device = time.perf_counter(), start_distributed(job.settings.timeout)
    run = Run(job.settings, job.resolved)
    interruption.resume_by(f"--resume --output {shlex.quote(str(run.directory))}")
    engine, loaded = load_engine(job, device)
    run.show_load(loaded)
    saved = resume.saves(run.directory / "saves") if job.settings.resume else []
    start, spent = resume.restore(saved[-1], engine.module, engine.optimizer) if saved else (0, 0.0)
    finish(job, run, engine, loaded.plan, start, started - spent)


def load_engine(job: Job, device: torch.device) -> tuple[Any, Loaded]:
    """The model, read from disk, on DeepSpeed's engine."""
    settings = job.settings
    model, loaded = build(
        job.checkpoint, settings.method, job.lora, settings.adapter, job.expert_parallel, job.ds_config, device
    )
    model.train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return make_engine(model, settings, job.ds_config), loaded


def finish(
    job: Job, run: Run, engine: Any, plan: LoadPlan, start: int, started: float, base: list[Record] | None = None
) -> None:
    """Trains from step `start` on and leaves adapter, metrics and summary. started: when, for the run's seconds, those
    of earlier attempts before it. base: what is known already of the beliefs before the first step."""
    settings = job.settings
    hashes = job.hashes | {"initial_weights": resume.initial_hash(engine.module, settings.seed, settings.adapter)}
    run.start(after=start)
    Trainer(job, engine).run(run, start, started, base)
    measured = measured_memory(engine.device)
    if job.lora:
        factors = resume.full_factors(engine.module)
        save_adapter(run.directory / "adapter", engine.module, factors, job.lora, job.checkpoint)
    else:
        save_model(run.directory / "model", plan, job.checkpoint)
    peak = peak_memory(engine.device)
    if run.main:
        seconds = time.perf_counter() - started
        run.finish(
            summarize(job, run, hashes, peak, seconds) | {"memory": {"measured": measured} | planned_memory(job)}
        )


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
