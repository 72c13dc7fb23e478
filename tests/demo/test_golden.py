"""Golden losses: the demo's first steps must not change unless someone means it."""

from pathlib import Path

import pytest

from launch.local import run
from train import sft
from train.demo.recipe import REPOSITORY, flags
from train.reporting import read_metrics

GOLDEN = {
    "none": [0.5973949, 0.6061791, 0.6004819],
    "doctags,false-spans=unlikelihood": [1.6151192, 1.2544050, 0.8803638],
}


@pytest.mark.slow
@pytest.mark.parametrize("mask", GOLDEN)
def test_the_demo_starts_with_the_losses_it_always_had(tmp_path, mask):
    given = [*flags("dense"), "--mask", mask, "--steps", "3", "--wandb", "disabled", "--output", str(tmp_path / "run")]
    done = run(Path(sft.__file__), *given, ranks=2, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [values["loss"] for values in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses == pytest.approx(GOLDEN[mask], rel=1e-4)  # kinds of processors round differently, and Adam divides
