"""The training loop on the DeepSpeed engine."""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from train.checkpoints import resume
from train.checkpoints.adapter import save_adapter
from train.checkpoints.present import kept_adapter
from train.config.settings import Settings
from train.data.batches import Batch, micro_batches
from train.evaluation.likelihood import Probes, Record, measure
from train.evaluation.measures import identity
from train.evaluation.proof_by_engine import measured_proof, write_proof
from train.model.text_model import LanguageModel
from train.runtime.distributed import anywhere
from train.runtime.errors import Interrupted, NonFiniteLoss, UserError, writing
from train.runtime.interruption import INTERRUPTED, interruption
from train.runtime.watchdog import progress
from train.training.job import Job
from train.training.metrics import Meter, expert_metrics, peak_memory
from train.training.run import Run

SAVE_SECONDS = 15 * 60  # between training checkpoints without --save-every


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Returns the learning rate of step 0, 1, …, steps-1 of a run: linear warm-up from 0, then constant, linear or
    cosine to 0 (reached after the last step). With --schedule-from and --schedule-to, the run is a piece of a longer
    schedule."""
    place, end = settings.schedule_from + step, settings.schedule_to or settings.schedule_from + steps
    if place < settings.warmup_steps:
        return settings.learning_rate * (place + 1) / settings.warmup_steps
    done = (place - settings.warmup_steps) / max(1, end - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
    return settings.learning_rate * factor


class Trainer:
    """Runs the steps of a job. What a step needs depends only on the job and the step's number."""

    def __init__(self, job: Job, engine: Any):
        self.job, self.settings, self.corpus, self.engine = job, job.settings, job.corpus, engine
        self.probes = job.probes or Probes([], [])
        self.model: LanguageModel = engine.module
        self.device, self.ranks, self.rank = engine.device, dist.get_world_size(), dist.get_rank()

    def batches(self, step: int, measure: bool = False) -> list[Batch]:
        """Returns this rank's micro-batches of a step, with what `measure` needs. Every rank has the same number."""
        size, norm = self.settings.batch_size, self.settings.loss_norm
        numbers = self.corpus.order.documents(step * size, min((step + 1) * size, self.job.documents))
        samples = [self.corpus.samples[number] for number in numbers]
        kl = measure and self.settings.measure_kl
        return micro_batches(samples, norm, self.ranks, self.rank, self.settings.row_tokens, measure_kl=kl)

    def step(self, step: int, measure: bool) -> dict[str, Any]:
        """Runs one optimizer step and returns its metrics over all ranks, with the NLL of every role if `measure`, and
        its divergence from the base where that is known.

        Raises Interrupted, before anything is updated, if a shutdown of any rank is requested before the last
        micro-batch is done. Raises NonFiniteLoss (a UserError) on every rank for a loss or gradient that is not finite.
        """
        started, meter = time.perf_counter(), Meter(self.corpus.roles, self.device)
        rate = learning_rate(self.settings, step, self.job.steps)
        for group in self.engine.optimizer.optimizer.param_groups:
            group["lr"] = rate
        batches = self.batches(step, measure)
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number + 1 == len(batches))
            progress(f"micro-batch {number + 1} of step {step + 1}")
            batch = (batch if measure else batch.in_loss()).to(self.device)
            terms = self.engine(batch)
            self._check(terms.loss.detach(), step, batch)
            # The engine averages gradients over the ranks; the loss is a sum with a global denominator.
            self.engine.backward(terms.loss * self.ranks, scale_wrt_gas=False)
            meter.add(batch, terms, measure)
            self.engine.step()
        values = {"step": step + 1, **meter.result(measure), "learning_rate": rate}
        norm = self.engine.get_global_grad_norm()
        values["grad_norm"] = norm.item() if isinstance(norm, torch.Tensor) else float(norm)
        if not math.isfinite(values["grad_norm"]):  # the same on every rank
            raise NonFiniteLoss(f"the gradient of step {step + 1} is not finite, and the update was applied.")
        values["tokens_per_second"] = values["tokens"] / (time.perf_counter() - started)
        if measure:
            done = self.corpus.tokens(0, self.job.documents_until(step + 1))
            values["trained"] = {role: counts["trained"] for role, counts in done.items() if counts["total"]}
            values["peak_memory_bytes"] = peak_memory(self.device)
            values |= expert_metrics(self.model.expert_layers, self.device)
        return values

    def _check(self, loss: torch.Tensor, step: int, batch: Batch) -> None:
        told = torch.tensor(interruption.told, device=self.device)
        broken, stop = anywhere(torch.stack([~torch.isfinite(loss), told]))  # if one sees it, all must stop
        if stop:
            raise Interrupted(f"interrupted: in step {step + 1}")
        if not broken:
            return
        seen: list[Any] = [None] * self.ranks
        dist.all_gather_object(seen, (loss.item(), batch.names))
        culprits = [
            f"rank {rank}: {value} on {', '.join(names)}"
            for rank, (value, names) in enumerate(seen)
            if not math.isfinite(value)
        ]
        raise NonFiniteLoss(
            f"the loss of step {step + 1} is not finite ({'; '.join(culprits)}). Nothing was updated in this step. "
            "Look at these documents."
        )

    def run(self, run: Run, start: int, started: float, base: list[Record] | None = None) -> None:
        """Trains to the end, or to --stop-after. Logs every step, measures beliefs every --evaluate-every steps and at
        --evaluate-at, keeps adapters at --adapters-at, and writes a training checkpoint every --save-every steps.

        started: start time by time.perf_counter(), from which the run's seconds count. base: beliefs before the first
        step, if they have already been measured.

        Raises Interrupted if a shutdown of any rank is requested, after writing a checkpoint of the last complete step.
        A measurement that is then due is left to the next attempt. Raises NonFiniteLoss as `step` does.
        """
        self.done = self.saved = start
        self.started, self.saved_at = started, time.monotonic()
        if self.measures_after(start) and run.lacks(start, self.probes):
            self.evaluate(run, start, None if start else base)
        if start > self.job.stop:
            raise UserError(f"--stop-after {self.job.stop}: the run is already at step {start}; give more, or none.")
        self._note_what_is_past(run, start)
        interruption.hold()
        with tqdm(total=self.job.stop, initial=start, desc="training", unit="step", disable=self.rank != 0) as bar:
            try:
                for step in range(start, self.job.stop):
                    self._step_and_show(run, step, bar)
                    self._save_or_stop(run)
                    if self.measures_after(self.done):
                        self.evaluate(run, self.done)
            except Interrupted:
                bar.close()
                raise self._made_room(run) from None

    def _step_and_show(self, run: Run, step: int, bar: Any) -> None:
        last = step + 1 == self.job.stop
        try:
            values = self.step(step, measure=step == 0 or last or (step + 1) % self.settings.log_every == 0)
        except NonFiniteLoss as error:  # on every rank
            run.close(exit_code=2)
            raise NonFiniteLoss(f"{error} {_advice(run)}") from None
        self.done = step + 1
        run.log(values)
        if self.done in self.job.adapters_at:
            self.keep_adapter(run, kept_adapter(run.directory, self.done))
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:.0f} tokens/s", refresh=False)
        bar.update()

    def _save_or_stop(self, run: Run) -> None:
        """Writes a training checkpoint if one is due. Rank 0's clock decides for all ranks. Raises Interrupted if a
        shutdown of any rank is requested, or another attempt waits for this one to exit."""
        every = self.settings.save_every
        late = self.rank == 0 and not every and time.monotonic() - self.saved_at >= SAVE_SECONDS
        told = interruption.told or run.awaited()
        due, stop = anywhere(torch.tensor([late, told], device=self.device))
        if stop:
            raise Interrupted(f"interrupted: after step {self.done}")
        if due or self.done == self.job.stop or (every and self.done % every == 0):
            self.save(run)

    def _made_room(self, run: Run) -> Interrupted:
        """Writes a training checkpoint of the last step if there is none yet, and returns the exception to raise."""
        if self.done > self.saved:
            self.save(run)
        line = interruption.saved(self.done) if self.done else interruption.line
        run.close(INTERRUPTED)
        return Interrupted(line)

    def save(self, run: Run) -> None:
        """Writes a training checkpoint of the state after the last step. All ranks must call it."""
        seconds = time.perf_counter() - self.started
        with writing(run.directory / "saves"):
            resume.save(
                run.directory / "saves", self.model, self.engine.optimizer, self.done, self.settings.keep, seconds
            )
        self.saved, self.saved_at = self.done, time.monotonic()

    def measures_after(self, step: int) -> bool:
        """Returns whether beliefs are to be measured after `step` steps."""
        every = self.settings.evaluate_every
        due = step in {0, self.job.stop, *self.job.evaluate_at} or (every > 0 and step % every == 0)
        return due and bool(self.probes.records)

    def keep_adapter(self, run: Run, directory: Path) -> None:
        """Writes the adapter as it is after the last step into `directory`. All ranks must call it."""
        assert self.job.lora
        proof = measured_proof(self.corpus.samples, self.engine, self.settings.row_tokens)
        factors = resume.full_factors(self.model)
        save_adapter(directory, self.model, factors, self.job.lora, self.job.checkpoint, self.done)
        if proof and self.rank == 0:
            write_proof(directory, proof)

    def _note_what_is_past(self, run: Run, start: int) -> None:
        """Prints a note on steps of --adapters-at and --evaluate-at that the run is past without their results."""
        lost = [s for s in self.job.adapters_at if s <= start and not kept_adapter(run.directory, s).is_dir()]
        unmeasured = [s for s in sorted(self.job.evaluate_at) if s < start and run.lacks(s, self.probes)]
        for flag, steps, what in (
            ("--adapters-at", lost, "whose adapter was not kept"),
            ("--evaluate-at", unmeasured, "after which nothing was measured"),
        ):
            if steps and self.rank == 0:
                print(f"note: {flag}: the run is past step {', '.join(map(str, sorted(steps)))}, {what}")

    def evaluate(self, run: Run, step: int, known: list[Record] | None = None) -> None:
        """Measures the claims of --claims and the NLL of --held-out after `step` steps, and logs them. `known` replaces
        the measurement, if it has all of it. All ranks must call it."""
        wanted = {identity(record) for record, _ in self.probes.records}
        if not known or not wanted <= {identity(record) for record in known}:
            known = measure(self.probes, self.engine, self.settings.row_tokens)
        run.log_evaluation(step, known)


def _advice(run: Run) -> str:
    """Returns what to change when the loss is not finite, and where the last training checkpoint is."""
    saved = resume.saves(run.directory / "saves")
    last = (
        f"resumes from the last training checkpoint, {saved[-1]},"
        if saved
        else "starts again, as there is no checkpoint yet,"
    )
    return (
        "Start a new run with a lower --learning-rate, or without the cause; --resume "
        f"{last} and fails in the same way unless the cause was temporary."
    )
