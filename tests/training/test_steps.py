"""A run that stops early and resumes equals the whole run to the bit; adapters kept on the way have their steps, and
any of them, or a training checkpoint, is an --adapter."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.models import write_documents
from tests.support.ranks import run
from tests.support.runs import ENVIRONMENT, SFT, flags, losses
from train import merge
from train.checkpoints.adapter_files import trained_steps
from train.config.settings import steps_at
from train.evaluation.store import read_rows
from train.runtime.errors import UserError

AT = "1,2,5"


def train(tmp: Path, output: str, *more: str, **changes: object) -> Path:
    given = [*flags(tmp, **changes, output=tmp / output, held_out=tmp / "held.jsonl"), *more]
    done = run(SFT, *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (tmp / output / "terminal").write_text(done.stdout)
    return tmp / output


@pytest.mark.slow
def test_pieces_are_one_run_to_the_bit_and_every_adapter_that_is_kept_can_be_used(tmp_path):
    write_documents(tmp_path / "held.jsonl", [{"text": "abc defg h"}])
    whole = train(tmp_path, "whole", adapters_at=AT, evaluate_at="3", keep=9, save_every=2)
    pieces = train(tmp_path, "pieces", adapters_at=AT, stop_after=2)
    first = json.loads((pieces / "summary.json").read_text())
    assert (first["steps"], first["steps_of_schedule"]) == (2, 6)
    assert [path.name for path in sorted((pieces / "adapters").iterdir())] == ["step-1", "step-2"]
    train(tmp_path, "pieces", "--resume", adapters_at="4,5", stop_after=5)
    train(tmp_path, "pieces", "--resume", adapters_at="1,3")
    assert "the run is past step 3, whose adapter was not kept" in (pieces / "terminal").read_text()
    assert losses(pieces) == losses(whole)
    rates = [[m["learning_rate"] for m in read_rows(path / "metrics.jsonl")] for path in (whole, pieces)]
    assert rates[0] == rates[1]
    for name in ("adapter", "adapters/step-1", "adapters/step-2", "adapters/step-5"):
        weights = [(path / name / "adapter_model.safetensors").read_bytes() for path in (whole, pieces)]
        assert weights[0] == weights[1], name
    ends = [json.loads((path / "summary.json").read_text()) for path in (whole, pieces)]
    assert ends[0]["tokens"] == ends[1]["tokens"] and ends[0]["hashes"] == ends[1]["hashes"]
    assert {row["step"] for row in read_rows(whole / "evaluation.jsonl", ["step"])} == {0, 3, 6}

    assert trained_steps(whole / "adapters" / "step-5") == 5 and trained_steps(whole / "saves" / "step-4") == 4
    merged = {}
    for name in ("adapter", "adapters/step-2", "saves/step-2", "saves/step-6"):
        output = tmp_path / f"merged {name.replace('/', ' ')}"
        given = ["--model", str(tmp_path / "qwen"), "--adapter", str(whole / name), "--output", str(output)]
        assert merge.main(given) == 0
        merged[name] = load_file(output / "model.safetensors")
    for one, other in ("adapter", "saves/step-6"), ("adapters/step-2", "saves/step-2"):
        assert all(value.equal(merged[other][name]) for name, value in merged[one].items())
    assert any(not value.equal(merged["adapter"][name]) for name, value in merged["saves/step-2"].items())
    continued = [
        train(tmp_path, f"from {name[:5]}", adapter=whole / name, steps=2) for name in ("adapter", "saves/step-6")
    ]
    assert losses(continued[0]) == losses(continued[1])


def test_steps_are_numbers_or_evenly_spaced_by_ratio():
    assert steps_at("--adapters-at", "", 100) == frozenset()
    assert steps_at("--adapters-at", "8, 1,2", 8) == {1, 2, 8}
    assert steps_at("--adapters-at", "log:4", 1000) == {1, 10, 100, 1000}
    assert steps_at("--adapters-at", "log:15", 625) == {1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 99, 157, 249, 395, 625}
    for wrong in ("0", "9", "1,,2", "log:1", "log:x", "2-4", "log:"):
        with pytest.raises(UserError, match=rf"--adapters-at {wrong}: '.*' is not a step from 1 to 8"):
            steps_at("--adapters-at", wrong, 8)
