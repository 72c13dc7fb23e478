"""Two layers of each of the two models at real width, by tests/benchmarks/gpu.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize("model", ["qwen3.5-397b-a17b", "kimi-k2.5"])
def test_two_layers_of(tmp_path, figures, model):
    """The losses of the drawn weights fall. Memory is near the plan, where the kernels are those that it plans."""
    out = tmp_path / "row.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--models", model, "--json", str(out)])
    assert done.returncode == 0
    (row,) = json.loads(out.read_text())["rows"]
    figures[f"two layers of {model}"] = row
    assert row["losses"][-1] < row["losses"][0]
    if "fallback" not in (row["delta_rule"] or ""):
        assert row["measured_bytes"] == pytest.approx(row["planned_bytes"], rel=0.2)
