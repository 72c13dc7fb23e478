"""Loads a job's model, trains it and writes the results, for train/sft.py and for each run of train/compare.py."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.checkpoints import resume
from train.checkpoints.layout import LoadPlan
from train.checkpoints.streaming import Loaded
from train.checkpoints.whole import save_model
from train.evaluation.likelihood import Record
from train.model.engine import make_engine
from train.model.text_model import build
from train.runtime.distributed import from_first_rank
from train.training.job import Job
from train.training.metrics import measured_memory, peak_memory
from train.training.run import Run, summarize
from train.training.trainer import Trainer


def load_engine(job: Job, device: torch.device) -> tuple[Any, Loaded]:
    """Reads the job's model from disk. Returns it on DeepSpeed's engine, and a report of the load.

    All ranks must call it. Raises UserError for a checkpoint or an adapter that cannot be loaded.
    """
    settings = job.settings
    model, loaded = build(
        job.checkpoint, settings.method, job.lora, settings.adapter, job.expert_parallel, job.ds_config, device
    )
    model.train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return make_engine(model, settings, job.ds_config), loaded


def begin(job: Job, run: Run, engine: Any, used: bool = False) -> tuple[int, float]:
    """Puts the engine where the run begins or, with --resume, at its last training checkpoint. Returns the steps that
    are done, and the seconds that they took.

    used: the engine has trained another run. All ranks must call it. Raises UserError if a checkpoint cannot be read.
    """
    settings = job.settings
    saved = from_first_rank(resume.saves(run.directory / "saves") if settings.resume else [])
    if saved:
        return resume.restore(saved[-1], engine.module, engine.optimizer)
    if settings.carry_optimizer:  # of the phase before: weights, moments and AdamW's step count
        resume.restore(Path(settings.adapter), engine.module, engine.optimizer)
    elif used:
        resume.start_over(engine.module, engine.optimizer, initial_weights(job, engine))
    return 0, 0.0


def initial_weights(job: Job, engine: Any) -> dict[str, torch.Tensor]:
    """Returns this rank's partition [N] of every trained parameter before the run's first step, by name."""
    if job.settings.adapter:
        assert job.lora
        return resume.adapter_partitions(engine.module, Path(job.settings.adapter), job.lora)
    return resume.initial_partitions(engine.module, job.settings.seed)


def finish(
    job: Job, run: Run, engine: Any, plan: LoadPlan, start: int, started: float,
    planned: Callable[[Job], dict[str, Any]], base: list[Record] | None = None,
) -> None:  # fmt: skip
    """Trains from step `start` on and writes the adapter (or model), the metrics and the summary.

    started: start time by time.perf_counter(), minus the seconds of previous attempts; the summary counts from it.
    planned: returns what the summary keeps of the memory plan, next to the measured memory. base: beliefs before the
    first step, if they have already been measured.
    """
    settings = job.settings
    hashes = job.hashes | {"initial_weights": resume.initial_hash(engine.module, settings.seed, settings.adapter)}
    run.start(after=start)
    trainer = Trainer(job, engine)
    trainer.run(run, start, started, base)
    measured = measured_memory(engine.device)
    if job.lora:
        trainer.keep_adapter(run, run.directory / "adapter")
    else:
        save_model(run.directory / "model", plan, job.checkpoint)
    peak = peak_memory(engine.device)
    if run.main:
        seconds = time.perf_counter() - started
        run.finish(summarize(job, run, hashes, peak, seconds) | {"memory": {"measured": measured} | planned(job)})
