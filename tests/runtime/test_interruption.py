"""Runs that receive a shutdown request at the worst moments, and resume."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.claims import CLAIM
from tests.support.ranks import Forked, run
from tests.support.runs import ENVIRONMENT, SFT, flags, losses
from tests.support.wandb_files import history
from train.config.settings import REPOSITORY
from train.evaluation.store import read_rows
from train.runtime.interruption import INTERRUPTED
from train.runtime.local import deepspeed_command, free_port

WORKER = Path(__file__).with_name("troubled_worker.py")
LISTENS = """if __name__ == '__main__':
    from train.runtime.interruption import interruption
    interruption.listen("""
LISTENER = Path(__file__).with_name("listener.py")


@pytest.mark.slow
def test_a_run_told_to_end_in_a_step_or_where_claims_are_due_saves_and_the_next_attempt_does_what_is_left(tmp_path):
    (tmp_path / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    given = flags(tmp_path, claims=tmp_path / "mila.yaml", evaluate_every=2, wandb="offline", batch_size=24)
    given += ["--max-tokens", "256"]  # two micro-batches a step

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
        assert f"interrupted: saved after step {step}; continue with --resume --output " in done.stderr
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
    assert "no rank has made progress for 10 s (--timeout): rank 1 kept the others waiting." in done.stderr
    assert "in tests/runtime/troubled_worker.py" in done.stderr and "in hang" in done.stderr


def listener(*arguments: str, **options: Any) -> tuple[subprocess.Popen, int]:
    """tests/runtime/listener.py, listening, and the process that listens."""
    process = subprocess.Popen(
        [sys.executable, LISTENER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("listening"):
        assert line, "ended without a word"
    return process, int(line.split()[1])


def test_a_first_signal_ends_a_process_at_once_or_where_it_looks_and_a_second_one_at_once():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        process, _ = listener("at once")
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "interrupted: nothing to save yet; start it again\n"
        assert process.returncode == INTERRUPTED
    for number, again in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process, _ = listener("held")
        process.send_signal(number)
        while "shutdown requested" not in (line := process.stdout.readline()):
            assert line, "ended without a word"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0].endswith(
            "interrupted again: progress since the last training checkpoint is lost\n"
        )
        assert process.returncode == again
    process, _ = listener("raises")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "raised\n" and process.returncode == 0


def test_what_a_line_names_is_shown_by_codes_and_the_signals_are_heard_whatever_it_holds():
    process, _ = listener("at once", env=os.environ | {"LINE": "interrupted: \x1b[2Jx\udcff"})
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].endswith("interrupted: \\x1b[2Jx\\udcff\n")
    assert process.returncode == INTERRUPTED


def test_under_slurm_a_second_notice_is_no_second_signal():
    process, _ = listener("held", env=os.environ | {"SLURM_JOB_ID": "7"})
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_what_a_launcher_passes_on_is_no_second_signal_until_it_passes_on_another():
    process, rank = listener("held", "PASS")
    os.kill(rank, signal.SIGINT)  # as the terminal's, which reaches both
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "interrupted again" in process.communicate(timeout=60)[0] and process.returncode == 143


def test_a_process_whose_launcher_is_gone_is_told_to_end():
    process, rank = listener("at once", "PASS")
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert said == "\nthe launcher is gone\ninterrupted: nothing to save yet; start it again\n"
    for _ in range(300):  # it has said its last word, and is about to leave
        if gone(rank):
            break
        time.sleep(0.1)
    assert gone(rank)


def gone(process: int) -> bool:
    """Whether a process has ended, whoever is to collect its exit code."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_background_job_that_ignores_the_terminal_hears_a_signal_that_is_sent_to_it():
    process, _ = listener("at once", preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED


def test_a_closed_terminal_is_one_signal_and_none_for_a_job_of_nohup():
    process, _ = listener("held", preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL))
    for _ in range(2):  # the kernel's and the shell's
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    assert process.communicate(timeout=60)[0].count("shutdown requested") == 1
    process, _ = listener("at once", preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED


def test_every_script_listens_before_it_imports_what_takes_long():
    scripts = [path for path in (REPOSITORY / "train").glob("*.py") if "__main__" in path.read_text()]
    scripts += [REPOSITORY / "launch" / name for name in ("plan.py", "dashboard.py", "preflight.py", "network.py")]
    assert {"sft.py", "compare.py", "evaluate.py", "annotate.py", "merge.py"} <= {path.name for path in scripts}
    for path in scripts:
        docstring, first, *_ = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr) and ast.unparse(first).startswith(LISTENS), path


class Started:
    """A long job, by deepspeed or torchrun on two ranks, or by python alone, which is a fork, in a process group of its
    own."""

    def __init__(self, tmp: Path, name: str, **options: Any):
        self.output, self.log = tmp / name, tmp / f"{name}.log"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        command = deepspeed_command(SFT, ranks=2) if name == "deepspeed" else [sys.executable, *torchrun, str(SFT)]
        given = flags(tmp, steps=10_000, output=self.output)
        self.process: Any
        with self.log.open("w") as log:
            streams = {"stdout": log, "stderr": log} | options
            if name == "python":
                self.process = Forked(SFT, *given, env=ENVIRONMENT, **streams)
            else:
                self.process = subprocess.Popen(
                    [*command, *given], start_new_session=True, env=os.environ | ENVIRONMENT, **streams
                )

    def steps(self) -> int:
        metrics = self.output / "metrics.jsonl"
        return len(read_rows(metrics)) if metrics.exists() else 0

    def trains(self) -> None:
        """Until it has done two steps."""
        deadline = time.monotonic() + 300
        while self.steps() < 2 and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.steps() >= 2, self.log.read_text()[-3000:]
        self.all = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def said(self) -> str:
        """What is on its terminal once all of its processes have ended."""
        self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(self.all, timeout=60)
        for process in alive:
            process.kill()
        assert not alive, "ranks that train on"
        return self.log.read_text()

    def saved(self) -> str:
        """The line that says so, of the last step that it has done."""
        assert [path.name for path in (self.output / "saves").iterdir()] == [f"step-{self.steps()}"]
        return f"interrupted: saved after step {self.steps()}; continue with --resume --output {self.output}\n"


@pytest.mark.slow
def test_ctrl_c_makes_a_run_save_whatever_started_it(tmp_path):
    """To the process group, as a terminal does. DeepSpeed's runner ignores it here, as docs/cluster.md says."""
    ignoring = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    jobs = {"python": Started(tmp_path, "python"), "deepspeed": Started(tmp_path, "deepspeed", preexec_fn=ignoring)}
    for job in jobs.values():
        job.trains()
        os.killpg(job.process.pid, signal.SIGINT)
    for name, job in jobs.items():
        said = job.said()
        assert job.saved() in said and "Traceback" not in said
        assert job.process.returncode == (INTERRUPTED if name == "python" else 1)


@pytest.mark.slow
def test_ranks_whose_launcher_is_told_to_end_or_is_killed_and_a_run_whose_terminal_is_gone_save_and_end(tmp_path):
    jobs = {name: Started(tmp_path, name) for name in ("torchrun", "deepspeed")}
    alone = Started(tmp_path, "python", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    alone.trains()
    alone.process.stdout.close()
    alone.said()
    assert alone.saved() and alone.process.returncode == INTERRUPTED
    for name, job in jobs.items():
        job.trains()
        job.process.send_signal(signal.SIGTERM if name == "deepspeed" else signal.SIGKILL)
    for job in jobs.values():
        said = job.said()
        assert job.saved() in said and "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_makes_a_comparison_save_the_variant_that_it_is_in(tmp_path):
    (tmp_path / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    output, log = tmp_path / "out", tmp_path / "log"
    given = flags(tmp_path, claims=tmp_path / "mila.yaml", steps=10_000, output=output)
    at = given.index("--mask")
    given[at : at + 2] = ["--masks", "none", "doctags"]
    with log.open("w") as file:
        process = Forked(REPOSITORY / "train" / "compare.py", *given, env=ENVIRONMENT, stdout=file, stderr=file)
    while not [path for path in output.glob("*/metrics.jsonl") if len(read_rows(path)) > 1]:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == INTERRUPTED
    (save,) = output.glob("*/saves/step-*")
    assert log.read_text().endswith(
        f"interrupted: saved after step {save.name.removeprefix('step-')}; continue with --resume --output {output}\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line"),
    [
        (["train/merge.py"], "interrupted: complete shards are kept; run the same command again to continue\n"),
        (["-m", "launch.preflight"], "interrupted\n"),
    ],
)
def test_ctrl_c_ends_a_command_that_imports_with_one_line(script, line):
    process = subprocess.Popen([sys.executable, *script], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    while psutil.Process(process.pid).num_threads() < 2:  # the one that listens
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == line and process.returncode == INTERRUPTED
