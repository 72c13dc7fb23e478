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
from dataclasses import replace

from train.config.phases import Phases, parse_phases, phase_named, runs_in_order
from train.config.settings import Settings, slug
from train.runtime.command import command, launched_as, leave
from train.runtime.interruption import interruption
from train.runtime.terminal import NobodyReads
from train.training.early import check_early, continued


@command
def main(argv: list[str]) -> None:
    """Runs the whole job, or only its checks with --dry-run. Raises UserError if a setting, a document or the model is
    wrong."""
    variant, phases = parse_phases(argv, __doc__ or "")
    somewhere = {name: replace(each, output=each.output or "runs/variant") for name, each in phases.items()}
    for number, (name, settings) in enumerate(zip(phases, runs_in_order(somewhere), strict=True)):
        with phase_named(name):
            place = settings.output if phases[name].output else ""
            check_early(replace(continued(settings, later=number > 0), output=place))
    if len(phases) > 1:
        train_phases(variant, phases)
    else:
        train(continued(next(iter(phases.values()))))


def train(settings: Settings) -> None:
    """Checks the run with its documents and model, reads the weights, trains, and writes adapter, metrics and summary.
    With --resume, continues from the last training checkpoint."""
    from launch.planning import expert_parallel, planned_memory
    from train.runtime.distributed import start_distributed
    from train.training.finishing import begin, finish, load_engine
    from train.training.job import Known, prepare
    from train.training.run import Run

    rank, ranks = launched_as()
    job = prepare(settings, ranks, rank == 0, Known(expert_parallel))
    if rank == 0:
        with suppress(NobodyReads) if settings.dry_run else nullcontext():  # the checks are done
            job.show()
    if settings.dry_run:
        return
    started, device = time.perf_counter(), start_distributed(settings.timeout)
    run = Run(settings, job.resolved)
    interruption.resume_by(f"--resume --output {shlex.quote(str(run.directory))}")
    engine, loaded = load_engine(job, device)
    run.show_load(loaded)
    start, spent = begin(job, run, engine)
    finish(job, run, engine, loaded.plan, start, started - spent, planned_memory)


def train_phases(variant: str, phases: Phases) -> None:
    """Checks all phases of the variant, and trains those that are not finished, one after the other."""
    from launch.planning import expert_parallel, planned_memory
    from train.comparison.training import train_all
    from train.runtime.distributed import from_first_rank, start_distributed
    from train.training.job import Known, prepare

    (rank, ranks), known = launched_as(), Known(expert_parallel)
    first = next(iter(phases.values()))
    output = first.output or f"runs/{slug(variant)}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not first.dry_run:
        device = start_distributed(first.timeout)
        output = from_first_rank(output)  # its default contains the time of each rank
    runs = runs_in_order({name: replace(each, output=output) for name, each in phases.items()})
    for number, (name, settings) in enumerate(zip(phases, runs, strict=True)):
        with phase_named(name):
            job = prepare(continued(settings, later=number > 0), ranks, rank == 0, known)
        if rank == 0:
            with suppress(NobodyReads) if settings.dry_run else nullcontext():
                after = f", after {settings.after}" if settings.after else ""
                carried = ", with its optimizer's state" if settings.carry_optimizer else ""
                print(f"phase {number + 1} of {len(runs)}: {name}{after}{carried}")
                job.show()
    if not first.dry_run:
        interruption.resume_by(f"--resume --output {shlex.quote(output)}")
        train_all(runs, ranks, device, known, planned_memory)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
