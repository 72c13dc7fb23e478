"""Measures a model and its adapter in the training engine, for train/evaluate.py --model. It works with any number of
ranks and any expert parallelism, and keeps experts as they are stored.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoints.adapter_files import adapter_settings, check_adapter, trained_steps, weights_hash
from train.checkpoints.reader import Checkpoint
from train.checkpoints.resume import adapter_partitions, start_over
from train.claims.claim import Claim
from train.config.provenance import held_settings
from train.config.settings import Settings, ds_config
from train.data.documents import read_documents
from train.data.template import template_time
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.evaluation.generation import EngineAnswerer
from train.evaluation.judging import Asking, Item, evaluate
from train.evaluation.likelihood import Probes, Record, make_probes, measure
from train.evaluation.measures import at_step, identity
from train.evaluation.store import Records, read_measured
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.engine import DefaultExpertParallel, all_ranks, checked_expert_parallel, make_engine
from train.model.text_model import architecture, build, skeleton, text_config
from train.runtime.command import launched_as
from train.runtime.distributed import failing_together, start_distributed
from train.runtime.errors import UserError
from train.runtime.gpu import check_kernels
from train.runtime.outside import checked, read_json
from train.runtime.shown import size_shown

PROMPT_TOKENS = 10_000  # at most, in a scored text


@dataclass
class Measuring:
    """A model that is ready to be measured, before any weight is read."""

    settings: Settings
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    lora: LoRASettings
    expert_parallel: int
    ds_config: dict[str, Any]
    probes: Probes


def prepare_measuring(
    settings: Settings,
    claims: Sequence[Claim],
    documents: Sequence[str],
    ranks: int,
    default: DefaultExpertParallel = all_ranks,
) -> Measuring:
    """Checks model, adapter and questions before any weight is read. Of the settings, only model, adapter, method and
    those of the engine matter. documents: texts in the context of every question. default: the expert parallelism if
    the settings do not give it. Raises UserError for a mistake that the user can fix."""
    config = ds_config(settings, ranks)
    checkpoint = Checkpoint(settings.model)
    expert_parallel = checked_expert_parallel(settings, checkpoint, ranks, default)
    text = text_config(checkpoint)
    model = skeleton(text, ExpertGroup(expert_parallel))
    check_kernels(text)
    lora = LoRASettings(1, 1.0, 1, 0)  # without an adapter: LoRA weights with B = 0 add exactly nothing
    if settings.adapter:
        lora = adapter_settings(Path(settings.adapter))
        directory = Path(settings.adapter)
        check_adapter(directory, model, lora, architecture(checkpoint), checkpoint, settings.other_base)
    tokenizer = load_tokenizer(settings.model, template_time(settings.template_time))
    check_template_time(settings.adapter, tokenizer)
    held_out = read_documents(settings.held_out) if settings.held_out else []
    probes = make_probes(
        claims, held_out, tokenizer, settings.bos, PROMPT_TOKENS, text.vocab_size, documents, settings.by_layer
    )
    return Measuring(settings, checkpoint, tokenizer, lora, expert_parallel, config, probes)


def check_template_time(adapter: str, tokenizer: Tokenizer) -> None:
    """Raises UserError if the chat template asks for the time, and the adapter's training run gave it another time.
    adapter: its directory, or "" without one."""
    directories = Path(adapter).resolve().parents[:2]  # of RUN/adapter and of RUN/adapters/step-8
    held = next((path for d in directories if (path := d / "settings.yaml").is_file()), None)
    if not (adapter and tokenizer.clock and held):
        return
    then = held_settings(held)["settings"].get("template_time")
    if then and template_time(then) != tokenizer.clock:
        raise UserError(
            f"--template-time {tokenizer.clock.isoformat()}: in the run of --adapter {adapter} the chat template got "
            f"{then}; give --template-time {then}, so that questions are asked as in training."
        )


joined = functools.cache(start_distributed)  # once, however many models are measured


class Measured:
    """The model in the engine. All ranks must call each method together."""

    def __init__(self, measuring: Measuring):
        self.measuring, settings = measuring, measuring.settings
        device = joined(settings.timeout)
        model, self.loaded = build(
            measuring.checkpoint, settings.method, measuring.lora, settings.adapter, measuring.expert_parallel,
            measuring.ds_config, device,
        )  # fmt: skip
        self.engine = make_engine(model, settings, measuring.ds_config)
        if launched_as()[0] == 0:
            print(f"read {size_shown(self.loaded.bytes_read)} in {self.loaded.seconds:.1f} s (rank 0)", flush=True)
        self.of_base: list[Record] = []

    def takes(self, measuring: Measuring) -> bool:
        """Puts another adapter's LoRA weights in the place of these, and returns True; False if anything else differs,
        such as their ranks. Both must be about the same claims."""
        before, now = (dataclasses.replace(each.settings, adapter="") for each in (self.measuring, measuring))
        if before != now or measuring.lora != self.measuring.lora or not measuring.settings.adapter:
            return False
        with failing_together():
            weights = adapter_partitions(self.engine.module, Path(measuring.settings.adapter), measuring.lora)
        start_over(self.engine.module, self.engine.optimizer, weights)
        self.measuring = measuring
        return True

    def likelihoods(self) -> list[Record]:
        """Returns every record that needs no generation, on every rank."""
        return measure(self.measuring.probes, self.engine, self.measuring.settings.row_tokens)

    def likelihoods_of_base(self) -> list[Record]:
        """Returns the same records for the model without its adapter. They are measured once."""
        if not self.of_base:
            with self.engine.module.without_adapter():
                self.of_base = self.likelihoods()
        return self.of_base

    def answer(self, items: list[Item], records: Records | None, asking: Asking) -> None:
        """Answers the items that rank 0's records lack; the answers that need a judge stay without a verdict. records:
        None on the other ranks. Raises UserError as `evaluate` does."""
        answerer = EngineAnswerer(self.engine, self.measuring.tokenizer, asking.top_p or 1.0)
        if records is None:
            answerer.follow()
            return
        with answerer.leading():
            evaluate(items, answerer, None, records, asking)


def check_scored(records: Records, step: int, context: int, model: str, own: bool) -> None:
    """Raises UserError if the directory holds another model's scores at this step. own: the model is the adapter of the
    run whose directory it is. Then the run's own rows, which name no model, are this model's."""
    for row in _scored(records, step, context):
        if row.get("model") != model and not (own and "model" not in row):
            raise UserError(
                f"--output {records.directory}: holds scores after {step} steps of {row.get('model') or 'a run'}, "
                "not of this model. Give another directory, or the --step that this adapter was trained for."
            )


def keep(records: Records, found: list[Record], step: int, context: int, model: str) -> None:
    """Appends those of the found records that evaluation.jsonl does not hold yet."""
    held = {identity(row): row.keys() for row in _scored(records, step, context)}
    new = [{"step": step, **record, "context": context, "model": model} for record in found]
    # A row without layers or roles is measured again by one with them: of two rows the last one counts.
    more = {"layers", "roles"}
    lacking = [row for row in new if identity(row) not in held or (row.keys() & more) - held[identity(row)]]
    records.keep_others(lacking)


def _scored(records: Records, step: int, context: int) -> list[Record]:
    rows = at_step(read_measured(records.directory / "evaluation.jsonl"), step, context)
    return [row for row in rows if "verdict" not in row]


def identify(settings: Settings, checkpoint: Checkpoint) -> tuple[str, str]:
    """Returns the names in rows of the model without and with its adapter: the directory, and part of a hash of its
    content. Without an adapter both are the same."""
    base = f"{settings.model}@{checkpoint.fingerprint()[:12]}"
    if not settings.adapter:
        return base, base
    return base, f"{settings.adapter}@{weights_hash(Path(settings.adapter))[:12]} on {base}"


def steps_of(adapter: str, given: int) -> int:
    """Returns the number of optimizer steps that an adapter was trained for: as given or, for -1, from the summary of
    the run that it lies in. Without an adapter, -1 means 0. Raises UserError if an adapter is given 0 steps, or -1 and
    lies in no finished run."""
    if given == 0 and adapter:
        raise UserError(f"--step 0: means the base model; give the steps that --adapter {adapter} was trained for.")
    if given >= 0 or not adapter:
        return max(given, 0)
    if (trained := trained_steps(Path(adapter))) is not None:
        return trained
    summary = Path(adapter).resolve().parent / "summary.json"
    if not summary.is_file():
        raise UserError(
            f"--adapter {adapter}: is not in a finished run; give --step, the number of steps that it was trained for, "
            "as its figures are shown beside the base model's."
        )
    steps = read_json(summary)
    checked(steps, {"steps": int}, summary, "give --step, how many steps the adapter was trained for", needed=True)
    return int(steps["steps"])
