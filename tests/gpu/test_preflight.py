"""launch.preflight on this node, with its GPUs."""

import subprocess
import sys

from tests.support.models import write_model


def test_preflight_passes_here(tmp_path, figures):
    """But for the GPUs themselves, which these very tests may be using."""
    write_model(tmp_path / "model", "qwen", hidden_size=64, linear_key_head_dim=32, linear_value_head_dim=32)
    command = [sys.executable, "-m", "launch.preflight", "--model", str(tmp_path / "model"), "--wandb", "disabled"]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True)
    report = [line.removeprefix("preflight: ") for line in done.stdout.splitlines() if line.startswith("preflight: ")]
    figures["preflight"] = report
    failed = [line for line in report if "FAILED" in line and not (line.startswith("GPUs") and "in use" in line)]
    assert not failed and report, done.stdout + done.stderr[-2000:]
    (computing,) = (line for line in report if line.startswith("computing: ok: "))
    assert "grouped products, NF4, INT4, packed attention, packed convolution, packed delta rule" in computing
