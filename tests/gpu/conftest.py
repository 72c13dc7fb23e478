"""What the tests of a GPU share: they are skipped without one, and leave their figures in one JSON file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train.config.provenance import versions

FIGURES = Path(os.environ.get("GPU_JSON") or "runs/gpu.json")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch can use (torch.cuda.is_available() is False)")
    return torch.device("cuda", 0)


@pytest.fixture
def figures(gpu: torch.device) -> Iterator[dict[str, Any]]:
    """What is measured, by part; written after each test, beside what earlier ones have left of the same card."""
    card: dict[str, Any] = {"card": torch.cuda.get_device_name(gpu), "versions": versions()}
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    found = (kept if kept.get("card") == card["card"] else {}) | card
    yield found
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
