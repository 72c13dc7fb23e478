"""Keeps off the terminal what libraries say that tells a user nothing; their errors are still shown."""

import logging
import os
import warnings
from collections.abc import Callable

DRIVER = "/proc/driver/nvidia"  # there where a GPU is


def _no_gpu() -> bool:
    import torch  # here: commands that read no weights do without it

    return not torch.cuda.is_available()


# By logger: what is left out, of records that are no errors.
LEFT_OUT: dict[str, Callable[[str], bool]] = {
    "DeepSpeed": lambda message: True,  # such as which accelerator it found
    "bitsandbytes.backends.cpu.ops": lambda message: "kernels-community" in message,  # it goes on without
    # Where a GPU is, the faster kernels are worth their installation.
    "transformers.integrations.hub_kernels": lambda message: "reference PyTorch" in message and _no_gpu(),
}  # fmt: skip


def leave_out_noise() -> None:
    """Holds for libraries that are imported later, too."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for who writes what calls torch
    if not os.path.exists(DRIVER):  # flash-linear-attention, which transformers imports, and nobody calls on a CPU
        warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    for name, left_out in LEFT_OUT.items():
        logging.getLogger(name).addFilter(_filter(left_out))


def _filter(left_out: Callable[[str], bool]) -> Callable[[logging.LogRecord], bool]:
    return lambda record: record.levelno >= logging.ERROR or not left_out(record.getMessage())
