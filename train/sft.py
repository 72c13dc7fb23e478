"""Fine-tunes a model on documents whose spans have roles, with a loss that knows them.

    deepspeed train/sft.py --mask false-spans
    deepspeed --num_gpus 8 train/sft.py --model DIR --data documents.jsonl=10000 --data chats.jsonl=5000 --mask doctags

    deepspeed train/sft.py --recipe train/recipes/masks.yaml train/recipes/models/qwen3.5-397b.yaml --variant 0

Without --model and --data it trains the embedded demo. --dry-run checks everything and stops before a weight is read.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen()

import shlex
import sys
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from train.config.settings import parse
from train.runtime.command import command, launched_as, leave
from train.runtime.interruption import interruption
from train.runtime.terminal import NobodyReads
from train.training.early import check_early

if TYPE_CHECKING:  # torch and what needs it are imported after the first checks
    from train.training.job import Job


@command
def main(argv: list[str]) -> None:
    """Runs the whole job, or only its checks with --dry-run. Raises UserError if a setting, a document or the model is
    wrong."""
    settings = parse(argv, __doc__ or "")
    check_early(settings)
    from launch.planning import expert_parallel
    from train.training.job import Known, prepare

    rank, ranks = launched_as()
    job = prepare(settings, ranks, rank == 0, Known(expert_parallel))
    if rank == 0:
        with suppress(NobodyReads) if settings.dry_run else nullcontext():  # the checks are done
            job.show()
    if not settings.dry_run:
        train(job)


def train(job: "Job") -> None:
    """Reads the weights, trains, and writes adapter, metrics and summary. With --resume, continues from the last
    training checkpoint."""
    from launch.planning import planned_memory
    from train.checkpoints import resume
    from train.runtime.distributed import start_distributed
    from train.training.finishing import finish, load_engine
    from train.training.run import Run

    started, device = time.perf_counter(), start_distributed(job.settings.timeout)
    run = Run(job.settings, job.resolved)
    interruption.resume_by(f"--resume --output {shlex.quote(str(run.directory))}")
    engine, loaded = load_engine(job, device)
    run.show_load(loaded)
    saved = resume.saves(run.directory / "saves") if job.settings.resume else []
    start, spent = resume.restore(saved[-1], engine.module, engine.optimizer) if saved else (0, 0.0)
    finish(job, run, engine, loaded.plan, start, started - spent, planned_memory)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
