"""The GPU's kernels by Triton's interpreter on a CPU."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
collect_ignore_glob = ["*"] if Path("/proc/driver/nvidia").exists() else []  # there tests/gpu compiles them


@pytest.fixture(scope="session")
def kernels() -> Callable[[str], Any]:
    """A module of train/fused, interpreted, which is decided where its kernels are defined; those of Triton's own
    language are since tests/conftest.py."""

    def interpreted(name: str) -> Any:
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            return importlib.import_module(f"train.fused.{name}")
        finally:
            del os.environ["TRITON_INTERPRET"]

    return interpreted
