"""Hides log messages and warnings of libraries that do not help a user. Errors are still shown."""

import logging
import os
import warnings
from collections.abc import Callable

DRIVER = "/proc/driver/nvidia"  # exists on a machine with an NVIDIA GPU


def _no_gpu() -> bool:
    import torch  # imported here because commands that read no weights do not need it

    return not torch.cuda.is_available()


# By logger: whether a message is hidden. Errors are never hidden.
LEFT_OUT: dict[str, Callable[[str], bool]] = {
    "DeepSpeed": lambda message: True,  # such as the accelerator that it found
    "bitsandbytes.backends.cpu.ops": lambda message: "kernels-community" in message,  # it continues without them
    # Shown on a machine with a GPU, where the faster kernels are worth installing.
    "transformers.integrations.hub_kernels": lambda message: "reference PyTorch" in message and _no_gpu(),
}  # fmt: skip


def leave_out_noise() -> None:
    """Installs the filters for warnings and log messages. They also apply to libraries that are imported later."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for authors of code that calls torch
    if not os.path.exists(DRIVER):  # transformers imports flash-linear-attention, which is never called on a CPU
        warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    for name, left_out in LEFT_OUT.items():
        logging.getLogger(name).addFilter(_filter(left_out))


def _filter(left_out: Callable[[str], bool]) -> Callable[[logging.LogRecord], bool]:
    return lambda record: record.levelno >= logging.ERROR or not left_out(record.getMessage())
