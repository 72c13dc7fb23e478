"""A run with everything resolved and checked, before any weight is read."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import plan_load
from train.data.corpus import Corpus, read_corpus
from train.data.tokenizer import load_tokenizer
from train.errors import UserError
from train.experts.dispatch import ExpertGroup
from train.lora import LoRASettings
from train.model import count_trainable, skeleton, text_config
from train.reporting import console, token_table
from train.settings import Settings, check_output, ds_config


@dataclass
class Job:
    """What a run will do. documents: how many of the corpus's endless stream it takes. accumulation: micro-batches of a
    step on each rank. resolved: what settings.yaml and --dry-run show beside the settings."""

    settings: Settings
    corpus: Corpus
    checkpoint: Checkpoint
    lora: LoRASettings
    expert_parallel: int
    steps: int
    documents: int
    accumulation: int
    ds_config: dict[str, Any]
    resolved: dict[str, Any]

    @property
    def tokens(self) -> dict[str, dict[str, int]]:
        """role -> targets by treatment, over all steps."""
        return self.corpus.tokens(0, self.documents)

    def show(self) -> None:
        """Settings and targets per role on the terminal."""
        terminal, lines = console(), dataclasses.asdict(self.settings) | self.resolved
        terminal.print(*(f"{name}: {value}" for name, value in lines.items()), sep="\n", highlight=False, markup=False)
        if not self.settings.expert_lora_rank:
            print(
                f"--expert-lora-rank not given: {self.lora.expert_rank}, that is max(1, lora-rank / experts per token)"
            )
        terminal.print(token_table(self.tokens, f"targets over {self.steps} steps, --mask {self.settings.mask}"))


def prepare(settings: Settings, ranks: int, show: bool) -> Job:
    """Checks everything that a user can get wrong; UserError says what. show: progress on the terminal."""
    check_output(settings)
    checkpoint = Checkpoint(settings.model)
    corpus = read_corpus(settings, load_tokenizer(settings.model), show)
    accumulation = math.ceil(settings.batch_size / (ranks * settings.micro_batch_size))
    config = ds_config(settings, ranks, accumulation)

    text = text_config(checkpoint)
    expert_parallel = settings.expert_parallel or ranks
    if ranks % expert_parallel:
        raise UserError(
            f"--expert-parallel {expert_parallel}: must divide the {ranks} ranks into groups of equal size."
        )
    active = getattr(text, "num_experts_per_tok", None) or 1
    expert_rank = settings.expert_lora_rank or max(1, settings.lora_rank // active)
    lora = LoRASettings(settings.lora_rank, settings.lora_alpha, expert_rank, settings.seed, settings.lora_lm_head)
    model = skeleton(text, ExpertGroup(expert_parallel))
    plan = plan_load(model, checkpoint)

    documents = settings.steps * settings.batch_size or corpus.order.epoch_length * settings.epochs
    steps = math.ceil(documents / settings.batch_size)
    resolved = {
        "ranks": ranks, "expert_parallel": expert_parallel, "steps": steps, "micro_batches_per_step": accumulation,
        "expert_lora_rank": expert_rank, "documents": corpus.documents, "roles": corpus.roles,
        "trainable_parameters": count_trainable(model, lora), "left_out_tensors": len(plan.left_out),
        "wandb_group": settings.group(),
    }  # fmt: skip
    return Job(
        settings, corpus, checkpoint, lora, expert_parallel, steps, documents, accumulation, config, resolved
    )  # fmt: skip
