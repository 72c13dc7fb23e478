"""What libraries say is shown where it says something to a user."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from train import sft
from train.runtime import noise


@pytest.mark.parametrize(
    ("logger", "level", "message", "shown"),
    [
        ("DeepSpeed", logging.WARNING, "Setting accelerator to CPU.", False),
        ("DeepSpeed", logging.ERROR, "out of memory", True),
        ("bitsandbytes.backends.cpu.ops", logging.WARNING, "Failed to load from kernels-community: no kernels", False),
        ("bitsandbytes.backends.cpu.ops", logging.WARNING, "weights are not what they should be", True),
        ("transformers.integrations.hub_kernels", logging.WARNING, "cannot be loaded", True),
    ],
)
def test_noise_is_left_out_and_errors_are_shown(logger, level, message, shown):
    record = logging.LogRecord(logger, level, "", 0, message, None, None)
    assert bool(logging.getLogger(logger).filter(record)) is shown


@pytest.mark.parametrize("gpu", [False, True])
def test_slow_kernels_are_spoken_of_where_a_gpu_would_run_faster_ones(monkeypatch, gpu):
    monkeypatch.setattr(noise, "_no_gpu", lambda: not gpu)
    said = "`f` is falling back to its reference PyTorch implementation because `causal_conv1d` is not installed."
    record = logging.LogRecord("", logging.WARNING, "", 0, said, None, None)
    assert bool(logging.getLogger("transformers.integrations.hub_kernels").filter(record)) is gpu


@pytest.mark.parametrize("gpu", [False, True])
def test_that_triton_does_not_run_is_told_where_a_gpu_is(monkeypatch, tmp_path, gpu):
    monkeypatch.setattr(noise, "DRIVER", str(tmp_path if gpu else tmp_path / "absent"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        noise.leave_out_noise()
        warnings.warn("Triton is not supported on current platform, roll back to CPU.", stacklevel=1)
    assert bool(seen) is gpu


def test_a_command_says_nothing_but_its_own():
    command = [sys.executable, Path(sft.__file__), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: sft.py") and not done.stderr
