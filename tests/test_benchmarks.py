"""The benchmarks run, at small sizes, and print what their documentation names. Nothing here looks at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def rows(tmp_path: Path, name: str, *flags: str) -> list[dict[str, Any]]:
    out = tmp_path / "rows.json"
    script = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", str(out), *flags]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_experts(tmp_path):
    (row,) = rows(tmp_path, "experts", "--experts", "16", "--rounds", "1")
    assert row["experts"] == 16
    assert {"speedup_over_peft", "time_over_floor", "memory_over_peft"} <= row.keys()


@pytest.mark.slow
def test_step_puts_on_the_wire_what_the_routing_says(tmp_path):
    (row,) = rows(tmp_path, "step", "--ranks", "2", "--experts", "16", "--tokens", "64")
    assert (row["ranks"], row["experts"], row["tokens"]) == (2, 16, 64)
    assert row["wire_bytes"] == row["wire_bytes_theory"] > 0 and row["speedup_over_zero3"] > 0


@pytest.mark.slow
def test_merge(tmp_path):
    bf16, same = rows(tmp_path, "merge", "--layouts", "kimi", "--experts", "2", "--rounds", "1")
    assert (bf16["to"], same["to"]) == ("bf16", "same")
    assert same["written_bytes"] == pytest.approx(same["read_bytes"], rel=1e-3)  # but for spaces in headers
    assert same["written_bytes"] < bf16["written_bytes"]
    assert all(row["written_bytes_per_second"] > 0 and row["peak_bytes"] > 0 for row in (bf16, same))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["qwen3.5", "kimi"])
def test_load_reads_what_it_keeps(tmp_path, layout):
    (row,) = rows(tmp_path, "load", "--layouts", layout, "--experts", "2", "--rounds", "1")
    assert row["layout"] == layout and row["bytes_read_per_rank"] == row["bytes_kept_per_rank"]
    assert row["share_bytes"] == max(row["bytes_kept_per_rank"]) and len(row["peak_bytes_per_rank"]) == 2
    assert row["time_over_transformers"] > 0
