"""Checks the settings of a run as far as that needs neither torch nor the model: a mistyped path or mask is reported
before the imports that take seconds."""

import os
from dataclasses import replace
from pathlib import Path

from train.checkpoints.present import adapter_files, last_save, read_config
from train.claims.claim_files import check_there
from train.config.provenance import check_output
from train.config.settings import Settings, read_ds_config
from train.data.files import opened_documents
from train.masking.grammar import parse_mask
from train.runtime.errors import UserError


def check_early(settings: Settings) -> None:
    """Raises UserError if the mask cannot be parsed, --output is not free or cannot be written, or a file that the run
    reads is not there. A new directory --output is created, unless --dry-run is set."""
    parse_mask(settings.mask)
    check_output(settings)
    read_ds_config(settings)
    read_config(Path(settings.model))
    check_there(settings.claims)
    for path in (*(source.path for source in settings.sources()), settings.held_out):
        if path:
            opened_documents(path).close()
    if settings.adapter:
        adapter_files(Path(settings.adapter))


def continued(settings: Settings, later: bool = False) -> Settings:
    """Returns the settings with the --adapter that --after stands for: the LoRA weights of that run's end or, with
    --carry-optimizer, its last training checkpoint, which has the optimizer's state too. Without --after, returns them
    unchanged. Raises UserError if that run is not finished, or has no such checkpoint.

    later: the run comes after one that may be still to be trained; then nothing says yet where it starts from.
    """
    if not settings.after:
        return settings
    run = Path(settings.after)
    if not os.path.isfile(run / "summary.json"):
        if later:
            return replace(settings, after="", carry_optimizer=False)
        raise UserError(
            f"--after {run}: no finished run is there (no summary.json). Give the directory of one; a run that was "
            f"interrupted is finished by --resume --output {run}."
        )
    return replace(settings, adapter=str(last_save(run) if settings.carry_optimizer else run / "adapter"))
