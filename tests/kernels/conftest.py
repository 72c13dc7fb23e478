"""The GPU's kernels by Triton's interpreter on a CPU."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")


@pytest.fixture(scope="session")
def kernels() -> Callable[[str], Any]:
    """A module of train/kernels, interpreted, which is decided where its kernels are defined; those of Triton's own
    language are since tests/conftest.py."""

    def interpreted(name: str) -> Any:
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            return importlib.import_module(f"train.kernels.{name}")
        finally:
            del os.environ["TRITON_INTERPRET"]

    return interpreted
