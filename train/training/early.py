"""Checks the settings of a run as far as that needs neither torch nor the model: a mistyped path or mask is reported
before the imports that take seconds."""

from pathlib import Path

from train.checkpoints.present import adapter_files, read_config
from train.claims.claim_files import check_there
from train.config.provenance import check_output
from train.config.settings import Settings, read_ds_config
from train.data.files import opened_documents
from train.masking.grammar import parse_mask


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
