"""A model and its adapter measured in the training engine: any number of ranks and expert parallelism, experts as they
are stored. What train/evaluate.py does with --model.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.cluster import Cluster
from launch.distributed import start_distributed
from train.belief.claims import Claim
from train.belief.generation import EngineAnswerer
from train.belief.judge import Asking, Item, evaluate
from train.belief.probes import Probes, Record, make_probes, measure
from train.belief.records import Records, read_measured
from train.belief.values import LEAST_AUC, MEASURES, at_step, identity
from train.checkpoints.adapter import adapter_settings, check_adapter
from train.checkpoints.reader import Checkpoint
from train.checkpoints.resume import initial_partitions, start_over
from train.data.documents import read_documents
from train.data.tokenizer import Tokenizer, load_tokenizer, template_time
from train.errors import UserError
from train.experts.dispatch import ExpertGroup
from train.gpu import check_kernels
from train.job import checked_expert_parallel
from train.lora import LoRASettings
from train.model import architecture, build, skeleton, text_config
from train.outside import checked, read_json
from train.provenance import held_settings
from train.settings import Settings, ds_config
from train.trainer import make_engine

PROMPT_TOKENS = 10_000  # of a scored text at most
SCORED = ("shift", "preference", "yes_no", "facts_truth", "facts_neighbouring", "facts_unrelated", "nll_change")


@dataclass
class Measuring:
    """A model that can be measured, before any weight is read."""

    settings: Settings
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    lora: LoRASettings
    expert_parallel: int
    ds_config: dict[str, Any]
    probes: Probes


def prepare_measuring(settings: Settings, claims: Sequence[Claim], documents: Sequence[str], ranks: int) -> Measuring:
    """Checks model, adapter and questions. Of the settings count model, adapter, method and those of the engine.
    documents: texts in the context of every question. UserError for what the user can mend."""
    config = ds_config(settings, ranks)
    checkpoint = Checkpoint(settings.model)
    expert_parallel = checked_expert_parallel(settings, checkpoint, Cluster.here(ranks))
    text = text_config(checkpoint)
    model = skeleton(text, ExpertGroup(expert_parallel))
    check_kernels(text)
    lora = LoRASettings(1, 1.0, 1, 0)  # without an adapter: factors whose B is zero add exactly nothing
    if settings.adapter:
        lora = adapter_settings(Path(settings.adapter))
        check_adapter(Path(settings.adapter), model, lora, architecture(checkpoint), checkpoint)
    tokenizer = load_tokenizer(settings.model, template_time(settings.template_time))
    check_template_time(settings.adapter, tokenizer)
    held_out = read_documents(settings.held_out) if settings.held_out else []
    probes = make_probes(claims, held_out, tokenizer, settings.bos, PROMPT_TOKENS, text.vocab_size, documents)
    return Measuring(settings, checkpoint, tokenizer, lora, expert_parallel, config, probes)


def check_template_time(adapter: str, tokenizer: Tokenizer) -> None:
    """UserError where the adapter's run told a template that asks for the time another one."""
    held = Path(adapter).resolve().parent / "settings.yaml"
    if not (adapter and tokenizer.clock and held.is_file()):
        return
    then = held_settings(held)["settings"].get("template_time")
    if then and template_time(then) != tokenizer.clock:
        raise UserError(
            f"--template-time {tokenizer.clock.isoformat()}: in the run of --adapter {adapter} the chat template was "
            f"told {then}; give --template-time {then}, so that questions are asked as in training."
        )


joined = functools.cache(start_distributed)  # once, for as many models as are measured


class Measured:
    """The model on the engine. All ranks do all of this together."""

    def __init__(self, measuring: Measuring):
        self.measuring, settings = measuring, measuring.settings
        device = joined(settings.timeout)
        model, self.loaded = build(
            measuring.checkpoint, settings.method, measuring.lora, settings.adapter, measuring.expert_parallel,
            measuring.ds_config, device,
        )  # fmt: skip
        self.engine = make_engine(model, settings, measuring.ds_config)

    def likelihoods(self) -> list[Record]:
        """Every record that needs no generation."""
        return measure(self.measuring.probes, self.engine, self.measuring.settings.row_tokens)

    def likelihoods_of_base(self) -> list[Record]:
        """Those of the model without its adapter, which is put back."""
        adapter = initial_partitions(self.engine.module, None)
        start_over(self.engine.module, self.engine.optimizer, initial_partitions(self.engine.module, seed=0))
        found = self.likelihoods()
        start_over(self.engine.module, self.engine.optimizer, adapter)
        return found

    def answer(self, items: list[Item], records: Records | None, asking: Asking) -> None:
        """Has the items answered that rank 0's records lack. records: None on the other ranks."""
        answerer = EngineAnswerer(self.engine, self.measuring.tokenizer, asking.top_p or 1.0)
        if records is None:
            answerer.follow()
            return
        with answerer.leading():
            evaluate(items, answerer, None, records, asking)


def check_scored(records: Records, step: int, context: int, model: str, own: bool) -> None:
    """UserError where the directory holds scores of this step that another model had. own: the model is the adapter of
    the run whose directory it is, so that what the run itself has measured, without a model's name, is this model's."""
    for row in _scored(records, step, context):
        if row.get("model") != model and not (own and "model" not in row):
            raise UserError(
                f"--output {records.directory}: holds scores after {step} steps of {row.get('model') or 'a run'}, "
                "not of this model. Give another directory, or the --step that this adapter was trained for."
            )


def keep(records: Records, found: list[Record], step: int, context: int, model: str) -> None:
    """Appends the records that the file does not hold yet."""
    held = {identity(row) for row in _scored(records, step, context)}
    new = [{"step": step, **record, "context": context, "model": model} for record in found]
    records.keep_others([row for row in new if identity(row) not in held])


def _scored(records: Records, step: int, context: int) -> list[Record]:
    rows = at_step(read_measured(records.directory / "evaluation.jsonl"), step, context)
    return [row for row in rows if "verdict" not in row]


def identify(settings: Settings, checkpoint: Checkpoint) -> tuple[str, str]:
    """The model without and with its adapter, as rows name them: directory and a part of a hash of its content."""
    base = f"{settings.model}@{checkpoint.fingerprint()[:12]}"
    if not settings.adapter:
        return base, base
    weights = (Path(settings.adapter) / "adapter_model.safetensors").read_bytes()
    return base, f"{settings.adapter}@{hashlib.sha256(weights).hexdigest()[:12]} on {base}"


def steps_of(adapter: str, given: int) -> int:
    """The steps that an adapter was trained for: as given or, for -1, as the run says that it lies in."""
    if given == 0 and adapter:
        raise UserError(f"--step 0: is the base model; give the steps that --adapter {adapter} was trained for.")
    if given >= 0 or not adapter:
        return max(given, 0)
    summary = Path(adapter).resolve().parent / "summary.json"
    if not summary.is_file():
        raise UserError(
            f"--adapter {adapter}: lies in no finished run; give --step, how many steps it was trained for, as its "
            "figures stand beside the base model's."
        )
    steps = read_json(summary)
    checked(steps, {"steps": int}, summary, "give --step, how many steps the adapter was trained for", needed=True)
    return int(steps["steps"])


def table_of_means(found: dict[str, dict[str, float]]) -> Table:
    """For the terminal."""
    table = Table(title="By likelihood: means over a claim's questions", title_justify="left")
    for column in ("measure", "unit", "claim", "mean"):
        table.add_column(column, justify="right" if column == "mean" else "left")
    for name, figures in found.items():
        for claim, value in figures.items():
            unit = MEASURES[name].unit if name in MEASURES else "%" if claim == "yes_rate" else ""
            low = " (below 0.8: yes/no answers are UNINFORMATIVE)" if claim == "auc" and value < LEAST_AUC else ""
            table.add_row(name, unit, claim or "all", f"{value:.2f}{low}")
    return table
