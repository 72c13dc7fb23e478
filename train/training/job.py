"""Resolves and checks everything that a run needs, before any weight is read."""

import dataclasses
import hashlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.checkpoints import resume
from train.checkpoints.adapter_files import check_adapter
from train.checkpoints.layout import LoadPlan, plan_load
from train.checkpoints.reader import Checkpoint
from train.claims.claim import read_claims
from train.config.command_line import flag_of
from train.config.provenance import check_output
from train.config.settings import Settings, ds_config, steps_at
from train.corpus import Corpus, TokenizedFile, documents_taken, read_corpus
from train.data.batches import Sample, check_vocabulary, deal
from train.data.documents import read_documents
from train.data.template import template_time
from train.data.tokenizer import Tokenizer, clock_note, load_tokenizer
from train.evaluation.likelihood import Probes, make_probes
from train.evaluation.store import read_measured, read_metrics
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.masking.grammar import parse_mask
from train.masking.treatment import shortfall_note
from train.model.engine import DefaultExpertParallel, all_ranks, checked_expert_parallel
from train.model.text_model import architecture, count_trainable, skeleton, text_config
from train.runtime.errors import UserError
from train.runtime.gpu import check_kernels
from train.runtime.terminal import Terminal
from train.training.inputs import check_inputs, inputs, otherwise_notes
from train.training.tables import token_table

FIRST_STEPS = 100  # whose rows stand for those of all steps


@dataclass
class Job:
    """What a run will do.

    steps: of the whole schedule. stop: the step after which this attempt ends. documents: how many documents the whole
    schedule takes from the corpus's endless stream. evaluate_at, adapters_at: steps after which beliefs are measured
    and adapters kept. probes: what is measured for --claims
    and --held-out. resolved: what settings.yaml shows next to the settings.
    """

    settings: Settings
    corpus: Corpus
    checkpoint: Checkpoint
    lora: LoRASettings | None
    expert_parallel: int
    steps: int
    stop: int
    documents: int
    evaluate_at: frozenset[int]
    adapters_at: frozenset[int]
    probes: Probes | None
    ds_config: dict[str, Any]
    resolved: dict[str, Any]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what runs must share in order to differ only in their masks: the documents' tokens and which of
        them are targets, the order of the documents over all steps, the base model, and the questions that it is asked.
        """
        return self.resolved["hashes"]

    @property
    def tokens(self) -> dict[str, dict[str, int]]:
        """role -> number of targets by treatment, up to the last step of this attempt."""
        return self.corpus.tokens(0, self.documents_until(self.stop))

    def documents_until(self, step: int) -> int:
        """Returns how many documents the first `step` steps take."""
        return min(step * self.settings.batch_size, self.documents)

    @property
    def random_shortfall(self) -> int:
        """The number of targets that `random:` mask entries could not place, up to the last step of this attempt."""
        numbers = self.corpus.order.documents(0, self.documents_until(self.stop))
        return sum(self.corpus.counts[number]["all", "random_shortfall"] for number in numbers)

    def notes(self) -> list[str]:
        """Returns the notes for the user on the tokens, the questions and the resumed run."""
        notes = otherwise_notes(self.settings, self.resolved)
        notes += [*self.corpus.findings.lines(), *(self.probes.notes() if self.probes else ())]
        if self.resolved["template_clock"]:
            notes.append(clock_note(self.resolved["template_clock"]))
        if self.random_shortfall:
            notes.append(shortfall_note(self.random_shortfall))
        return notes

    def show(self) -> None:
        """Prints the settings that are not the default, what the job resolves to, the notes and the targets per role on
        the terminal."""
        terminal = Terminal()
        terminal.print(changed_settings(self.settings), *self._resolved_lines(), sep="\n")
        if self.lora and self.resolved["expert_lora_rank"] and not self.settings.expert_lora_rank:
            print(
                f"--expert-lora-rank not given: {self.lora.expert_rank}, that is max(1, lora-rank / experts per token)"
            )
        print(*(f"{note}\n" for note in self.notes()), sep="", end="")
        terminal.print(token_table(self.tokens, f"targets over {self.stop} steps, --mask {self.settings.mask}"))
        if self.settings.dry_run:
            print("A run writes all settings, and hashes of all that it reads, into its settings.yaml.")

    def _resolved_lines(self) -> list[str]:
        """Returns the values of `resolved` in a few lines, without the files that the run reads and without what is
        empty. Hashes are cut."""
        resolved = self.resolved
        names = ["steps", "ranks", "expert_parallel", "micro_batches_per_step", "trainable_parameters"]
        names += [name for name in ("expert_lora_rank", "left_out_tensors") if resolved[name]]
        names += ["wandb_group"] if self.settings.wandb != "disabled" else []
        numbers = {name: f"{value:,}" if isinstance(value := resolved[name], int) else value for name in names}
        documents = ", ".join(f"{count:,} {what}" for what, count in resolved["documents"].items())
        hashes = ", ".join(f"{name} {value[:12]}" for name, value in resolved["hashes"].items())
        return [
            "; ".join(f"{name}: {value}" for name, value in numbers.items()),
            f"documents: {documents}; roles: {', '.join(resolved['roles']) or 'none'}",
            f"hashes: {hashes}",
        ]


def changed_settings(settings: Settings) -> str:
    """Returns as text, and as flags, the settings besides --dry-run that are not the default. --after stands for the
    --adapter that it gives."""
    default, words = Settings(), []
    settings = dataclasses.replace(settings, adapter="") if settings.after else settings
    for name, value in dataclasses.asdict(settings).items():
        if value != getattr(default, name) and name != "dry_run":
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [flag_of(name), *(shlex.quote(str(each)) for each in values)]
    return f"settings, all others at their defaults: {' '.join(words)}" if words else "settings: all at their defaults"


@dataclass
class Known:
    """Results of preparing a run that all runs of a comparison share. These runs differ only in mask, loss norm,
    learning rate, seed, steps and data.

    default_expert_parallel: decides where --expert-parallel is not given. documents: path -> its tokenized documents.
    adapters: those that were checked.
    base: the model's checkpoint, text configuration, skeleton and load plan, its tokenizer, the probes, and how many
    ranks divide a layer's experts.
    """

    default_expert_parallel: DefaultExpertParallel = all_ranks
    documents: dict[str, TokenizedFile] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    base: tuple[Checkpoint, Any, Any, LoadPlan, Tokenizer, Probes | None, int] | None = None


def prepare(settings: Settings, ranks: int, show: bool, known: Known | None = None) -> Job:
    """Checks everything that a user can get wrong, and returns the job. Raises UserError for the first mistake.

    show: shows progress on the terminal. known: results from other runs of the same comparison, to which missing ones
    are added.
    """
    known = known or Known()
    check_output(settings)
    config = ds_config(settings, ranks)

    known.base = known.base or _base(settings, ranks, known.default_expert_parallel)
    checkpoint, text, model, plan, tokenizer, probes, expert_parallel = known.base
    lora = None if settings.method == "full" else lora_settings(settings, text)
    if settings.method == "qlora":  # imported here, so that its memory is not counted as the job's
        import bitsandbytes  # noqa: F401
    if lora is None:
        _check_without_base(settings)
        config |= full_precision(settings, plan)
    elif settings.adapter and settings.adapter not in known.adapters:
        check_adapter(Path(settings.adapter), model, lora, architecture(checkpoint), checkpoint, settings.other_base)
        known.adapters.add(settings.adapter)
    corpus = read_corpus(settings, tokenizer, show, known.documents)
    check_vocabulary(corpus.samples, text.vocab_size, f"--model {settings.model}")
    if settings.resume:
        check_progress(Path(settings.output))

    documents = documents_taken(settings, corpus.order)
    steps = math.ceil(documents / settings.batch_size)
    evaluate_at = steps_at("--evaluate-at", settings.evaluate_at, steps)
    adapters_at = steps_at("--adapters-at", settings.adapters_at, steps)
    _check_steps(settings, steps, probes)
    rows = rows_of_first_steps(settings, corpus, ranks, documents)
    resolved: dict[str, Any] = {
        "ranks": ranks, "expert_parallel": expert_parallel, "steps": steps,
        "micro_batches_per_step": round(sum(map(len, rows)) / (ranks * len(rows)), 2),
        "documents": corpus.documents, "roles": corpus.roles,
        "expert_lora_rank": lora.expert_rank if lora and plan.experts else None,
        "trainable_parameters": count_trainable(model, lora), "left_out_tensors": plan.left_out,
        "wandb_group": settings.group(), "inputs": inputs(settings, checkpoint),
        "hashes": {
            "tokens": _hash_of_tokens(corpus.samples),
            "order": hashlib.sha256(corpus.order.documents(0, documents).astype("<i8").tobytes()).hexdigest(),
            "base_model": checkpoint.fingerprint(), "questions": _hash_of_tokens(probes.texts if probes else ()),
        },
        "template_clock": tokenizer.clock.isoformat() if tokenizer.clock else None,
    }  # fmt: skip
    check_inputs(settings, resolved)
    return Job(
        settings, corpus, checkpoint, lora, expert_parallel, steps, settings.stop_after or steps, documents,
        evaluate_at, adapters_at, probes, config, resolved,
    )  # fmt: skip


def _check_steps(settings: Settings, steps: int, probes: Probes | None) -> None:
    """Raises UserError for settings that do not go with the number of steps, or with what is measured at them."""
    if settings.evaluate_at and not probes:
        raise UserError("--evaluate-at: has no effect without --claims or --held-out; give one of them.")
    if settings.stop_after > steps:
        raise UserError(
            f"--stop-after {settings.stop_after}: the schedule has only {steps} steps; give at most {steps}."
        )
    if 0 < settings.schedule_to < settings.schedule_from + steps:
        raise UserError(
            f"--schedule-to {settings.schedule_to}: the run's {steps} steps after --schedule-from "
            f"{settings.schedule_from} end at {settings.schedule_from + steps}; give at least that, or 0."
        )


def _check_without_base(settings: Settings) -> None:
    """Raises UserError for settings that need what the base predicts, which --method full does not have."""
    if settings.measure_kl or parse_mask(settings.mask).holds:
        flag = "--measure-kl" if settings.measure_kl else f"--mask {settings.mask}"
        raise UserError(
            f"{flag}: asks what the base predicts, which is the model with its LoRA weights off; --method full has "
            "none. Give --method lora or qlora, or leave it out."
        )


def check_progress(run: Path) -> None:
    """Raises UserError if a file that the run to resume has left is damaged. The resumed run would otherwise fail, at
    its very end."""
    resume.check(run / "saves")
    read_measured(run / "evaluation.jsonl")
    if not read_metrics(run / "metrics.jsonl") and (saved := resume.saves(run / "saves")):
        raise UserError(
            f"{run}/metrics.jsonl: has no row, though the run resumes from {saved[-1].name}; restore the file, or "
            "start a new run."
        )


def rows_of_first_steps(settings: Settings, corpus: Corpus, ranks: int, documents: int) -> list[list[list[int]]]:
    """Returns, for each of the first FIRST_STEPS steps, its packed rows (`ranks` per micro-step) as lists of the
    lengths of their documents in tokens."""
    size = settings.batch_size
    out = []
    for start in range(0, min(documents, FIRST_STEPS * size), size):
        numbers = corpus.order.documents(start, min(start + size, documents))
        lengths = [len(corpus.samples[number].ids_L) for number in numbers]
        dealt = deal(lengths, ranks, settings.row_tokens)
        out.append([[lengths[i] for i in row] for micro_step in dealt for row in micro_step])
    return out


def _hash_of_tokens(samples: Sequence[Sample]) -> str:
    """Returns the SHA-256 of the token ids and of which of them are targets."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids_L).to_bytes(8) + sample.ids_L.tobytes() + sample.target_L.tobytes())
    return digest.hexdigest()


def _base(
    settings: Settings, ranks: int, default: DefaultExpertParallel
) -> tuple[Checkpoint, Any, Any, LoadPlan, Tokenizer, Probes | None, int]:
    checkpoint = Checkpoint(settings.model)
    text = text_config(checkpoint)
    expert_parallel = checked_expert_parallel(settings, checkpoint, ranks, default)
    model = skeleton(text, ExpertGroup(expert_parallel))
    plan = plan_load(model, checkpoint)
    check_kernels(text)
    tokenizer = load_tokenizer(settings.model, template_time(settings.template_time))
    probes = _probes(settings, tokenizer, text.vocab_size)
    return checkpoint, text, model, plan, tokenizer, probes, expert_parallel


def _probes(settings: Settings, tokenizer: Tokenizer, vocabulary: int) -> Probes | None:
    held_out = read_documents(settings.held_out) if settings.held_out else []
    if not settings.claims and not held_out:
        return None
    claims = read_claims(settings.claims) if settings.claims else []
    return make_probes(
        claims, held_out, tokenizer, settings.bos, settings.max_tokens, vocabulary, by_layer=settings.by_layer
    )


def lora_settings(settings: Settings, text: Any) -> LoRASettings:
    """Returns the LoRA settings for a model with this text configuration. Without --expert-lora-rank, the rank on each
    expert is max(1, lora-rank / experts per token)."""
    active = getattr(text, "num_experts_per_tok", None) or 1
    expert_rank = settings.expert_lora_rank or max(1, settings.lora_rank // active)
    return LoRASettings(
        settings.lora_rank, settings.lora_alpha, expert_rank, settings.seed, settings.lora_lm_head, settings.rslora
    )


def full_precision(settings: Settings, plan: LoadPlan) -> dict[str, Any]:
    """Returns what --method full adds to DeepSpeed's configuration. Raises UserError for a quantized checkpoint.

    F32 checkpoints are trained in F32. BF16 checkpoints are trained in BF16 with fp32 master weights in the optimizer.
    Their few F32 weights are rounded to BF16, but buffers stay F32.
    """
    where = f"--method full --model {settings.model}"
    pieces: list[Any] = [*plan.dense, *plan.experts]
    if quantized := next((piece.format.kind for piece in pieces if piece.format.kind != "plain"), None):
        raise UserError(
            f"{where}: holds {quantized} weights, which cannot be trained themselves. Turn it into BF16 first "
            "(python train/merge.py --model DIR --output DIR), or train LoRA weights: --method lora."
        )
    return {"bf16": {"enabled": True}} if plan.dtype == torch.bfloat16 else {}
