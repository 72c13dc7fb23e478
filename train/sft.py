"""Fine-tunes a model on documents whose spans have roles, with a loss that knows them.

    deepspeed train/sft.py --mask false-spans
    deepspeed --num_gpus 8 train/sft.py --model DIR --data documents.jsonl=10000 --data chats.jsonl=5000 --mask doctags

Without --model and --data it trains the embedded demo. --dry-run checks everything and stops before a weight is read.
"""

import dataclasses
import logging
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.data.corpus import Corpus, read_corpus
from train.data.tokenizer import load_tokenizer
from train.errors import NonFiniteLoss, UserError
from train.settings import FREE_ON_RESUME, Settings, ds_config, parse, record


@dataclass
class Job:
    """A run with everything resolved, before any weight is read."""

    settings: Settings
    corpus: Corpus
    checkpoint: Any
    lora: Any
    expert_parallel: int
    steps: int
    accumulation: int
    ds_config: dict[str, Any]
    resolved: dict[str, Any]


def prepare(settings: Settings, ranks: int, show: bool) -> Job:
    """Checks everything that a user can get wrong. UserError says what."""
    from train.checkpoints.reader import Checkpoint
    from train.checkpoints.streaming import plan_load
    from train.experts.dispatch import ExpertGroup
    from train.lora import LoRASettings
    from train.model import count_trainable, skeleton, text_config

    check_output(settings)
    checkpoint = Checkpoint(settings.model)
    corpus = read_corpus(settings, load_tokenizer(settings.model), show)
    accumulation = math.ceil(settings.batch_size / (ranks * settings.micro_batch_size))
    config = ds_config(settings, ranks, accumulation)

    text = text_config(checkpoint)
    active = getattr(text, "num_experts_per_tok", None) or 1
    expert_parallel = settings.expert_parallel or ranks
    if ranks % expert_parallel:
        raise UserError(
            f"--expert-parallel {expert_parallel}: must divide the {ranks} ranks into groups of equal size."
        )
    expert_rank = settings.expert_lora_rank or max(1, settings.lora_rank // active)
    lora = LoRASettings(settings.lora_rank, settings.lora_alpha, expert_rank, settings.seed, settings.lora_lm_head)
    model = skeleton(text, ExpertGroup(expert_parallel))
    plan = plan_load(model, checkpoint)
    steps = settings.steps or math.ceil(corpus.order.epoch_length * settings.epochs / settings.batch_size)
    resolved = {
        "ranks": ranks, "expert_parallel": expert_parallel, "steps": steps, "micro_batches_per_step": accumulation,
        "expert_lora_rank": expert_rank, "documents": corpus.documents, "roles": corpus.roles,
        "trainable_parameters": count_trainable(model, lora), "left_out_tensors": len(plan.left_out),
        "wandb_group": settings.group(),
    }  # fmt: skip
    return Job(settings, corpus, checkpoint, lora, expert_parallel, steps, accumulation, config, resolved)


def check_output(settings: Settings) -> None:
    """--output must be free, or with --resume hold a run of the same settings."""
    if not settings.output:
        return
    directory = Path(settings.output)
    held = directory / "settings.yaml"
    if not held.exists():
        if settings.resume:
            raise UserError(
                f"--resume: --output {directory} holds no run (no settings.yaml). Leave out --resume to start."
            )
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--output {directory}: is a file; give a directory.")
        return
    if not settings.resume:
        raise UserError(
            f"--output {directory}: holds another run. Give another directory, or --resume to go on with that run."
        )
    before, now = (yaml.safe_load(text)["settings"] for text in (held.read_text(), record(settings, {})))
    for name in now.keys() - FREE_ON_RESUME:
        if before.get(name) != now[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {now[name]}: the run in {directory} has {before.get(name)}; a resumed run "
                "must have the same settings. Give the same, or another --output without --resume."
            )


def tokens_of(job: Job) -> dict[str, dict[str, int]]:
    """Targets per role and treatment over all steps of the run."""
    stop = job.steps * job.settings.batch_size
    return job.corpus.tokens(0, stop if job.settings.steps else job.corpus.order.epoch_length * job.settings.epochs)


def show_plan(job: Job) -> None:
    """Settings and tokens per role on the terminal."""
    from train.reporting import console, token_table

    terminal = console()
    lines = dataclasses.asdict(job.settings) | job.resolved
    terminal.print(*(f"{name}: {value}" for name, value in lines.items()), sep="\n", highlight=False, markup=False)
    if not job.settings.expert_lora_rank:
        print(f"--expert-lora-rank not given: {job.lora.expert_rank}, that is max(1, lora-rank / experts per token)")
    terminal.print(token_table(tokens_of(job), f"targets over {job.steps} steps, --mask {job.settings.mask}"))


def start_distributed() -> None:
    """One process group for all; gloo where there is no GPU, with the cores divided among the ranks."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    for name, alone in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, alone)
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)


def make_directory(job: Job) -> Path:
    """Rank 0 creates the run's directory with settings.yaml; every rank learns its name."""
    import torch.distributed as dist

    settings, chosen = job.settings, [""]
    if dist.get_rank() == 0:
        slug = "".join(c if c.isalnum() else "-" for c in settings.mask)
        directory = Path(settings.output or f"runs/{slug}-{time.strftime('%Y%m%d-%H%M%S')}")
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "settings.yaml").exists():
            (directory / "settings.yaml").write_text(record(settings, job.resolved))
        chosen[0] = str(directory)
    dist.broadcast_object_list(chosen)
    directory = Path(chosen[0])
    if dist.get_rank():  # the terminal is rank 0's
        log = directory / "logs"
        log.mkdir(exist_ok=True)
        file = os.open(log / f"rank-{dist.get_rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
    return directory


def train(job: Job) -> None:
    """Reads the weights, trains, and leaves adapter, metrics and summary."""
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from train.checkpoints import resume
    from train.checkpoints.adapter import save_adapter
    from train.model import build
    from train.reporting import Run, closing_table, console, nll_change, peak_memory, read_metrics
    from train.trainer import Trainer, make_engine

    started, settings = time.perf_counter(), job.settings
    start_distributed()
    directory = make_directory(job)
    main = dist.get_rank() == 0
    if main:
        show_plan(job)
    device = torch.device(get_accelerator().current_device_name())
    model = build(job.checkpoint, job.lora, job.expert_parallel, job.ds_config, device)
    model.train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    engine = make_engine(model, settings, job.ds_config)
    saved = resume.saves(directory / "saves") if settings.resume else []
    start = resume.restore(saved[-1], model, engine.optimizer)["step"] if saved else 0
    if main and settings.resume:
        print(f"going on after step {start}" if start else "no complete save yet: starting at the first step")

    config = dataclasses.asdict(settings) | job.resolved
    run = Run(settings, directory, config, keep_until=start)
    trainer = Trainer(settings, job.corpus, engine, job.steps, job.accumulation)
    trainer.run(run, start)
    factors = resume.full_factors(model)
    peak = peak_memory(device)
    if not main:
        return
    save_adapter(directory / "adapter", model, factors, job.lora, settings.model)
    metrics = read_metrics(directory / "metrics.jsonl")
    seconds, tokens = time.perf_counter() - started, sum(m["tokens"] for m in metrics)
    summary = {
        "mask": settings.mask, "steps": job.steps, "tokens": tokens_of(job), "nll": nll_change(metrics),
        "documents": job.corpus.documents,
        "random_shortfall": sum(count["all", "random_shortfall"] for count in job.corpus.counts),
        "loss": {"first": metrics[0]["loss"], "last": metrics[-1]["loss"]},
        "tokens_per_second": tokens / sum(m["tokens"] / m["tokens_per_second"] for m in metrics),
        "peak_memory_bytes": peak, "wall_seconds": seconds,
    }  # fmt: skip
    run.finish(summary)
    console().print(closing_table(summary))
    print(f"{seconds:.0f} s, {summary['tokens_per_second']:.0f} tokens/s, {peak / 1e9:.2f} GB at most on a rank.")
    print(f"In {directory}: adapter/ (PEFT), metrics.jsonl, summary.json, settings.yaml")


def main(argv: list[str]) -> int:
    """The exit code: 0, or 2 for what the user can mend, or 1 for a loss that is not finite."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what DeepSpeed calls
    try:
        settings = parse(argv, __doc__ or "")
        job = prepare(settings, ranks, show=rank == 0)
        if settings.dry_run:
            if rank == 0:
                show_plan(job)
        else:
            train(job)
    except (UserError, NonFiniteLoss) as error:
        if rank:
            time.sleep(30)  # the launcher ends all ranks when the first one exits: that must be the one that prints
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
