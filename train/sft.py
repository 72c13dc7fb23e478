"""Fine-tunes a model on documents whose spans have roles, with a loss that knows them.

    deepspeed train/sft.py --mask false-spans
    deepspeed --num_gpus 8 train/sft.py --model DIR --data documents.jsonl=10000 --data chats.jsonl=5000 --mask doctags

Without --model and --data it trains the embedded demo. --dry-run checks everything and stops before a weight is read.
"""

import logging
import os
import sys
import time
import warnings

from launch.distributed import start_distributed
from train.checkpoints import resume
from train.checkpoints.adapter import save_adapter
from train.checkpoints.whole import save_model
from train.errors import NonFiniteLoss, UserError
from train.job import Job, prepare
from train.model import build
from train.reporting import Run, peak_memory, summarize
from train.settings import parse
from train.trainer import Trainer, make_engine


def main(argv: list[str]) -> int:
    """The exit code: 0, or 2 for what the user can mend, or 1 for a loss that is not finite."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what DeepSpeed calls
    try:
        job = prepare(parse(argv, __doc__ or ""), ranks, show=rank == 0)
        if rank == 0:
            job.show()
        if not job.settings.dry_run:
            train(job)
    except (UserError, NonFiniteLoss) as error:
        if rank:  # the launcher ends all ranks when the first one exits: that must be rank 0, if it has the error too
            time.sleep(30)
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def train(job: Job) -> None:
    """Reads the weights, trains, and leaves adapter, metrics and summary."""
    started, settings = time.perf_counter(), job.settings
    device = start_distributed()
    run = Run(settings, job.resolved)

    model, loaded = build(
        job.checkpoint, settings.method, job.lora, settings.adapter, job.expert_parallel, job.ds_config, device
    )
    run.show_load(loaded)
    model.train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    engine = make_engine(model, settings, job.ds_config)

    saved = resume.saves(run.directory / "saves") if settings.resume else []
    start = resume.restore(saved[-1], model, engine.optimizer) if saved else 0
    run.start(after=start)
    Trainer(job, engine).run(run, start)

    if job.lora:
        save_adapter(run.directory / "adapter", model, resume.full_factors(model), job.lora, settings.model)
    else:
        save_model(run.directory / "model", loaded.plan, job.checkpoint)
    peak = peak_memory(device)
    if run.main:
        run.finish(summarize(job, run, peak, seconds=time.perf_counter() - started))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
