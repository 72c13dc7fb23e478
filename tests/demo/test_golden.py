"""Golden losses: the demo's first steps must not change unless someone means it."""

from pathlib import Path

import pytest

from launch.local import run
from train import sft
from train.demo.recipe import flags
from train.reporting import read_metrics

GOLDEN: dict[str, list[float]] = {}


@pytest.mark.slow
@pytest.mark.parametrize("mask", GOLDEN)
def test_the_demo_starts_with_the_losses_it_always_had(tmp_path, mask):
    given = [*flags("dense"), "--mask", mask, "--steps", "3", "--wandb", "disabled", "--output", str(tmp_path / "run")]
    done = run(Path(sft.__file__), *given, ranks=2, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [values["loss"] for values in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses == pytest.approx(GOLDEN[mask], rel=1e-5)
