"""Creates the DeepSpeed engine of a model, and decides how many ranks divide its experts."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from train.checkpoints import resume
from train.checkpoints.reader import Checkpoint
from train.config.settings import Settings
from train.model.text_model import LanguageModel
from train.runtime.errors import UserError

DefaultExpertParallel = Callable[[Settings, Checkpoint, int], int]
"""(settings, checkpoint, ranks) -> how many ranks divide a layer's experts where --expert-parallel is not given."""


def all_ranks(settings: Settings, checkpoint: Checkpoint, ranks: int) -> int:
    """Returns the number of all ranks, the default where no memory plan decides."""
    return ranks


def checked_expert_parallel(
    settings: Settings, checkpoint: Checkpoint, ranks: int, default: DefaultExpertParallel = all_ranks
) -> int:
    """Returns how many ranks divide a layer's experts. Raises UserError if `ranks` is not a multiple of it."""
    size = settings.expert_parallel or default(settings, checkpoint, ranks)
    if ranks % size:
        raise UserError(
            f"--expert-parallel {size}: must divide the {ranks} ranks into equal groups. Give a divisor, or "
            "another number of ranks: deepspeed --num_gpus N, or sbatch --nodes=N."
        )
    return size


def make_engine(model: LanguageModel, settings: Settings, config: dict[str, Any]) -> Any:
    """Returns DeepSpeed's ZeRO-3 engine of the model, with AdamW over the trained parameters."""
    parameters = list(resume.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
