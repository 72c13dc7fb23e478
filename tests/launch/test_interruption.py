"""Runs that are told to end at their worst moments, and go on."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.interruption import INTERRUPTED
from launch.local import run
from tests.test_compare import CLAIM, ENVIRONMENT
from tests.test_sft import SFT, flags, losses
from tests.test_tracking import history
from train.belief.records import read_rows

WORKER = Path(__file__).with_name("troubled_worker.py")


@pytest.mark.slow
def test_a_run_told_to_end_in_a_step_or_where_claims_are_due_saves_and_the_next_attempt_does_what_is_left(tmp_path):
    (tmp_path / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    given = flags(tmp_path, claims=tmp_path / "mila.yaml", evaluate_every=2, wandb="offline")

    def attempt(*script: str, output: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
        return run(
            *script, *given, "--output", str(tmp_path / output), ranks=2, capture_output=True, text=True,
            env=ENVIRONMENT | environment, cwd=tmp_path,
        )  # fmt: skip

    done = attempt(str(SFT), output="whole", environment={})
    assert done.returncode == 0, done.stderr[-3000:]
    whole, told = tmp_path / "whole", tmp_path / "told"

    cases = [("in 3", 2, {0, 2}), ("measuring 4", 4, {0, 2}), ("after 6", 6, {0, 2, 4})]  # 6: the last one
    for number, (when, step, measured) in enumerate(cases):
        resume = ["--resume"] if number else []
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(number)}
        done = attempt(str(WORKER), "sft", when, *resume, output="told", environment=slurm)
        assert done.returncode == INTERRUPTED, done.stderr[-3000:]
        assert f"interrupted: saved after step {step}; go on with --resume --output " in done.stderr
        assert "Traceback" not in done.stderr + (told / "logs" / "rank-1.log").read_text()
        assert {row["step"] for row in read_rows(told / "evaluation.jsonl")} == measured
        # As often as rank 0's clock says, which it does in all steps here.
        assert sorted(path.name for path in (told / "saves").iterdir()) == [f"step-{step - 1}", f"step-{step}"]
    state = told / "saves" / "step-6" / "state.json"
    assert json.loads(state.read_text())["seconds"] > 0
    state.write_text(json.dumps({"step": 6, "seconds": 10_000.0}))
    with (told / "evaluation.jsonl").open("a") as file:  # of an attempt that was killed while it wrote this
        file.write((whole / "evaluation.jsonl").read_text().splitlines(keepends=True)[-8])  # the first of 8
        file.write('{"step": 6, "cl')
    done = attempt(str(SFT), "--resume", output="told", environment={})
    assert done.returncode == 0, done.stderr[-3000:]

    assert losses(told) == losses(whole)
    for name in ("evaluation.jsonl", "adapter/adapter_model.safetensors"):
        assert (told / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((told / "summary.json").read_text())["wall_seconds"] > 10_000
    log = (told / "logs" / "rank-1.log").read_text()
    assert log.count("=== started 20") == 4
    assert ", attempt 1 of job 7\n" in log and ", attempt 2 of job 7\n" in log
    curves = [history(max((d / "wandb").glob("offline-run-*/run-*.wandb"))) for d in (whole, told)]
    beliefs = [
        {step: {k: v for k, v in row.items() if k.startswith("belief/")} for step, row in each.items()}
        for each in curves
    ]
    assert beliefs[0] == beliefs[1] and {step for step, row in beliefs[0].items() if row} == {0, 2, 4, 6}


@pytest.mark.slow
def test_a_rank_that_hangs_in_an_evaluation_ends_it_and_is_named(tmp_path):
    (tmp_path / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    model = flags(tmp_path)[1]
    given = ["--model", model, "--claims", str(tmp_path / "mila.yaml"), "--output", str(tmp_path / "out")]
    done = run(
        WORKER, "evaluate", "hangs", *given, "--timeout", "10", ranks=2, capture_output=True, text=True,
        env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no rank has got on for 10 s (--timeout): rank 1 kept the others waiting." in done.stderr
    assert "in tests/launch/troubled_worker.py" in done.stderr and "in hang" in done.stderr
