"""The job scripts on a real Slurm of two nodes without GPUs: runs that are interrupted, lose a node or a rank, or fail.

Jobs that do not share files are submitted together, and Slurm runs them one after the other: most of what a test waits
for is what Slurm does anyway.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import REPOSITORY, Cluster, missing
from tests.support.served import ENVIRONMENT, SERVER, needs_vllm, proof, serve_flags, trained, write_inputs
from tests.support.vllm_on_cpu import write_plugin
from train.evaluation.store import key_of, read_rows

QWEN, KIMI, COMPARE = "slurm/finetune_qwen397b.sh", "slurm/finetune_kimi_k25.sh", "slurm/compare_masks.sh"
DEMO = [
    "--model", "train/demo/model", "--data", "train/demo/data/dense.jsonl=64", "--batch-size", "8",
    "--learning-rate", "1e-3", "--lora-rank", "8",
]  # fmt: skip
STEPS = 24
TWO_NODES = [*DEMO, "--method", "lora", "--steps", str(STEPS), "--expert-parallel", "2", "--timeout", "20"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(f"Slurm is not installed here ({', '.join(lacking)}): apt-get install slurm-wlm munge")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to, in a directory whose name a careless script would not survive."""
    output = tmp_path_factory.mktemp("whole") / 'it\'s a "run"\nof $(two) nodes'
    job = cluster.sbatch("--nodes=2", QWEN, *TWO_NODES, "--wandb", "disabled", "--output", str(output))
    assert cluster.end(job)["JobState"] == "COMPLETED", cluster.said(job)
    return output


def steps(run: Path) -> int:
    return len(read_rows(run / "metrics.jsonl"))


def losses(run: Path) -> list[float]:
    return [values["loss"] for values in read_rows(run / "metrics.jsonl")]


def rank_of(run: Path, rank: int) -> psutil.Process | None:
    """The process of a rank of a run, if it is there."""
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if "train/sft.py" in words and "-u" in words and str(run) in words and environment.get("RANK") == str(rank):
            return process
    return None


def signal_rank(run: Path, rank: int, number: int) -> None:
    process = rank_of(run, rank)
    assert process is not None
    process.send_signal(number)


def test_a_job_of_two_nodes_leaves_adapter_summary_and_a_log_of_its_attempt(whole):
    assert steps(whole) == STEPS and (whole / "adapter").is_dir() and (whole / "summary.json").exists()
    log = (whole / "logs" / "attempt-1.log").read_text()
    assert "rank 1 read" in log and "Traceback" not in log


def test_a_job_that_is_signalled_requeued_hangs_and_loses_a_node_has_an_uninterrupted_runs_losses(
    cluster, whole, tmp_path
):
    run, reached = tmp_path / "run", 0
    job = cluster.sbatch("--nodes=2", QWEN, *TWO_NODES, "--wandb", "offline", "--save-every", "1", "--output", str(run))

    def train_on() -> None:
        """Until two steps after those that were there."""
        nonlocal reached
        cluster.until(lambda: cluster.state(job) == "RUNNING" and steps(run) >= reached + 2)

    def next_attempt(number: int) -> None:
        nonlocal reached
        cluster.until(lambda: cluster.show(job)["Restarts"] == str(number))
        reached = steps(run)

    train_on()
    cluster.call("scancel", "--signal=USR1", job)  # as --signal does before the time limit
    next_attempt(1)
    assert "interrupted: saved after step" in cluster.said(job) and "requeued after code 85" in cluster.said(job)

    train_on()
    cluster.call("scontrol", "requeue", job)  # as a preemption: SIGTERM to everything, W&B's process too
    next_attempt(2)
    cluster.until(lambda: cluster.said(job).count("interrupted: saved after step") == 2)

    train_on()
    signal_rank(run, 1, signal.SIGSTOP)  # it hangs
    next_attempt(3)
    assert "(--timeout): rank 1 did not respond" in cluster.said(job)

    train_on()
    cluster.kill_node("n2")
    next_attempt(4)
    cluster.start_node("n2")

    assert cluster.end(job)["JobState"] == "COMPLETED", cluster.said(job)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert [values["step"] for values in read_rows(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    # One W&B run, in as many pieces as attempts that reached it.
    pieces = [path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")]
    assert len(pieces) >= 5 and set(pieces) == {(run / "wandb_id").read_text()}


def test_a_job_whose_shell_is_signalled_and_whose_node_slurm_loses_while_it_trains_goes_on_elsewhere(cluster, tmp_path):
    run = tmp_path / "run"
    job = cluster.sbatch("--nodes=1", QWEN, *DEMO, "--steps", "1000", "--save-every", "500", "--output", str(run))
    cluster.until(lambda: steps(run) >= 2)
    cluster.call("scancel", "--full", "--signal=USR1", job)  # the job's shell too, as --signal=B:USR1@600 does
    cluster.until(lambda: cluster.show(job)["Restarts"] == "1")
    assert "requeued after code 85" in cluster.said(job)

    reached = steps(run)
    cluster.until(lambda: cluster.state(job) == "RUNNING" and steps(run) >= reached + 2)
    node = cluster.show(job)["NodeList"]
    cluster.kill_slurmd(node)  # alone: what runs there runs on
    cluster.until(lambda: cluster.state(job) == "RUNNING" and cluster.show(job)["Restarts"] == "2")
    assert cluster.show(job)["NodeList"] != node
    cluster.until(lambda: "waiting for the ranks of an earlier attempt" in cluster.said(job))
    cluster.until(lambda: "resuming after step" in (run / "logs" / "attempt-3.log").read_text())
    reached = steps(run)
    cluster.until(lambda: steps(run) >= reached + 2)
    assert [values["step"] for values in read_rows(run / "metrics.jsonl")] == list(range(1, steps(run) + 1))
    cluster.start_node(node)

    cluster.call("scancel", job)
    assert cluster.end(job)["JobState"] == "CANCELLED"


def test_what_the_user_must_mend_or_cancels_is_not_tried_again_and_what_fails_again_and_again_stops(cluster, tmp_path):
    wrong = cluster.sbatch("--nodes=1", KIMI, *DEMO, "--mask", "nonsense", "--output", str(tmp_path / "wrong"))
    ended = cluster.end(wrong)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: n1: --mask 'nonsense'" in cluster.said(wrong)
    long = tmp_path / "long"
    limited = cluster.sbatch(
        "--nodes=1", "--time=2", "--signal=B:CONT", KIMI, *DEMO, "--steps", "10000", "--output", str(long)
    )

    run = tmp_path / "failing"
    failing = cluster.sbatch("--nodes=1", KIMI, *DEMO, "--output", str(run))
    for attempt in range(3):
        cluster.until(lambda: cluster.state(failing) == "RUNNING" and rank_of(run, 0))
        signal_rank(run, 0, signal.SIGKILL)
        if attempt < 2:
            cluster.until(lambda: cluster.show(failing)["Restarts"] == str(attempt + 1))  # noqa: B023
    ended = cluster.end(failing)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2")
    assert "3 attempts in a row without a new training checkpoint" in cluster.said(failing)
    assert "rank 0 ended first, with code 137" in cluster.said(failing)

    # Its time limit near, and no signal of Slurm's before it; and then reached, for it was lowered.
    cluster.until(lambda: cluster.state(limited) == "RUNNING" and cluster.show(limited)["Restarts"] == "1")
    assert "requeued after code 85" in cluster.said(limited) and steps(long) > 0
    reached = steps(long)
    cluster.until(lambda: steps(long) > reached)
    cluster.call("scontrol", "update", f"jobid={limited}", "timelimit=1")
    cluster.until(lambda: cluster.show(limited)["Restarts"] == "2")
    assert "interrupted: saved after step" in cluster.said(limited)
    cluster.call("scancel", limited)
    assert cluster.end(limited)["JobState"] == "CANCELLED"

    run = tmp_path / "cancelled"
    two = ("--nodes=1", "--ntasks-per-node=2", KIMI, *DEMO, "--expert-parallel", "2")
    cancelled = cluster.sbatch(*two, "--wandb", "disabled", "--output", str(run))
    cluster.until(lambda: steps(run))
    assert rank_of(run, 1) is not None
    cluster.call("scancel", cancelled)
    ended = cluster.end(cancelled)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    cluster.until(lambda: "interrupted: saved after step" in cluster.said(cancelled))


def test_an_array_trains_the_variants_of_a_recipe_and_a_job_after_it_compares_them(cluster, tmp_path):
    recipe, output = tmp_path / "experiment.yaml", tmp_path / "all variants"
    recipe.write_text(json.dumps({
        "settings": {
            "model": "train/demo/model", "data": ["train/demo/data/dense.jsonl=64"], "steps": 20, "batch_size": 8,
            "claims": ["train/demo/claims.yaml"], "wandb": "disabled",
        },
        "variants": {"with doctags": {"mask": "none"}, "without": {"mask": "doctags", "phases": {
            "first": {"steps": 12}, "then": {"steps": 8, "optimizer": "carry", "schedule": "continue"},
        }}},
        "baseline": "without", "placebo": ["olga-home"],
    }))  # fmt: skip
    array = cluster.sbatch("--array=0-1", COMPARE, "--recipe", str(recipe), "--output", str(output))
    # The last task has the array's number for its own. It is in the first of its variant's two phases.
    first = output / "variant-1" / "phases" / "first-seed0"
    cluster.until(lambda: steps(first))
    assert not (output / "variant-1" / "settings.yaml").exists()
    rank = rank_of(output / "variant-1", 0)
    assert rank is not None
    task = rank.parent()
    assert task is not None
    task.send_signal(signal.SIGUSR1)  # as proctrack/cgroup does: to the task's first process alone
    cluster.until(lambda: cluster.show(f"{array}_1")["Restarts"] == "1")
    assert cluster.show(f"{array}_0")["Restarts"] == "0"
    report = output / "comparison.json"
    cluster.until(lambda: cluster.state(f"{array}_1") and report.exists())
    cluster.until(lambda: "without" in (output / "report.log").read_text())
    told = json.loads(report.read_text())
    assert told["baseline"] == "without", cluster.said(array)
    assert (steps(first), steps(output / "variant-1")) == (12, 8) and told["variants"]["without"]["steps"] == [20]
    assert [each["last"] for each in told["phases"]["without"]] == [12, 20]


@pytest.mark.parametrize(
    ("flags", "output"),
    [
        ([], "runs/name-7"),
        (["--mask", "none"], "runs/name-7"),
        (["--output", "a b", "--data", "c", "d"], "a b"),
        (["--output", "a", "--output=$b\nc", "--mask", "none"], "$b\nc"),
    ],
)
def test_a_script_knows_the_directory_of_its_run_as_sft_py_does(flags, output):
    code = 'source slurm/lib.sh && output_of "$@" && printf %s "$output"'
    environment = os.environ | {"SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "7"}
    told = subprocess.check_output(["bash", "-c", code, "bash", *flags], cwd=REPOSITORY, env=environment, text=True)
    assert told == output


def test_a_job_after_an_array_asks_judges_and_compares_its_variants_and_their_steps_though_its_server_is_killed(
    cluster, tmp_path, monkeypatch
):
    needs_vllm()
    write_inputs(tmp_path)
    recipe, output, flags = tmp_path / "experiment.yaml", tmp_path / "all variants", serve_flags(tmp_path)
    recipe.write_text(json.dumps({
        "settings": {
            "model": str(tmp_path / "smollm2"), "data": [str(tmp_path / "documents.jsonl")], "steps": 2,
            "claims": [str(tmp_path / "claim.yaml")], "batch_size": 3, "lora_rank": 8, "lora_alpha": 16,
            "learning_rate": 2e-3, "adapters_at": "1", "evaluate_at": "1", "wandb": "disabled",
        },
        "variants": {"all of it": {"mask": "none"}, "doctag out": {"mask": "doctags"}},
    }))  # fmt: skip
    for name, value in {**ENVIRONMENT, "SBATCH_TIMELIMIT": "15"}.items():  # the second job's, too
        monkeypatch.setitem(cluster.environment, name, value)
    judged = ["--kept-steps", "all", "--samples", "2", "--max-tokens", "8", "--judge", "same"]
    evaluate = [*flags, *judged, "--judge-max-tokens", "8", "--retries", "0", "--", *SERVER]
    given = ["--recipe", str(recipe), "--output", str(output), "--evaluate", *evaluate]
    array = cluster.sbatch("--array=0-1", COMPARE, *given)
    cluster.until(lambda: (output / f"report-of-{array}").exists())
    job = cluster.call("squeue", "--noheader", "--name=compare-masks-report", "--format=%i").strip()
    assert f"afterok:{array}" in cluster.show(job)["Dependency"]

    runs = [output / f"variant-{number}" for number in range(2)]
    answers = runs[1] / "answers.jsonl"
    cluster.until(lambda: answers.exists() and answers.read_text(), 900)
    port = flags[flags.index("--port") + 1]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "vllm.entrypoints.openai.api_server" in words and port in words:
            process.kill()
    log = output / "logs" / "attempt-1.log"
    assert cluster.end(job, 900)["JobState"] == "COMPLETED", log.read_text()
    assert log.read_text().count("the server answers after") == 2
    assert "the server died: restarting it" in log.read_text()
    for run, steps_of_it in (runs[0], [0, 1, 2]), (runs[1], [1, 2]):  # the base's are with the first run's
        rows = [row for row in read_rows(run / "evaluation.jsonl", ["step"]) if "verdict" in row]
        assert [row["step"] for row in rows] == [step for step in steps_of_it for _ in range(4)]
        assert len({key_of(row) for row in rows}) == len(rows) and not any(row.get("error") for row in rows)
        for step in (1, 2):
            found = proof(run, step)
            assert found["proven"] and found["to_adapter"] < 1e-3 < found["to_nearest_other"]
    told = json.loads((output / "comparison.json").read_text())
    assert told["measure"] == "rate"
    for name in ("rate", "shift"):
        curves = told["measures"][name]["curves"]
        assert curves and all(curve["steps"] == [0, 1, 2] for curve in curves.values())


def test_a_job_on_two_nodes_divides_its_server_over_them_and_restarts_it_when_the_second_one_loses_its_part(
    cluster, tmp_path, monkeypatch
):
    needs_vllm()
    runs, output, flags = trained(tmp_path)[1:], tmp_path / "both runs", serve_flags(tmp_path)
    path = f"{cluster.environment['PYTHONPATH']}:{write_plugin(tmp_path / 'plugin')}"
    for name, value in {**ENVIRONMENT, "PYTHONPATH": path}.items():
        monkeypatch.setitem(cluster.environment, name, value)
    judged = ["--samples", "1", "--max-tokens", "4", "--judge", "same", "--judge-max-tokens", "4", "--retries", "0"]
    given = ["--runs", *map(str, runs), "--output", str(output), *flags, *judged, "--", *SERVER]
    job = cluster.sbatch("--nodes=2", "slurm/evaluate_masks.sh", *given)

    answers = runs[0] / "answers.jsonl"
    cluster.until(lambda: answers.exists() and answers.read_text(), 900)
    parts = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "vllm.entrypoints.cli.main" in words and str(tmp_path / "smollm2") in words:
            parts[words[words.index("--node-rank") + 1]] = process
    assert {rank: process.environ()["SLURMD_NODENAME"] for rank, process in parts.items()} == {"0": "n1", "1": "n2"}
    for process in (*parts["1"].children(recursive=True), parts["1"]):
        process.kill()
    log = output / "logs" / "attempt-1.log"
    assert cluster.end(job, 900)["JobState"] == "COMPLETED", log.read_text()
    assert log.read_text().count("the server answers after") == 2
    assert "the server died: restarting it" in log.read_text()
    for number, run in enumerate(runs):
        rows = [row for row in read_rows(run / "evaluation.jsonl", ["step"]) if "verdict" in row]
        assert (
            len({key_of(row) for row in rows}) == len(rows) == 2 * (2 - number)
        )  # the base's are with the first run's
        assert not any(row.get("error") for row in rows)
        found = proof(run)
        assert found["proven"] and found["to_adapter"] < 1e-3 < found["to_nearest_other"]
        assert found["base_to_base"] < 1e-3


def test_progress_of_judging_is_the_answers_of_runs_of_their_phases_and_of_a_comparisons_runs(tmp_path):
    for number, place in enumerate(("", "phases/a-seed0", "variant-0", "variant-0/phases/b-seed0"), 1):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "answers.jsonl").write_text("{}\n" * number)
    (tmp_path / "evaluation.jsonl").write_text("{}\n" * 10)
    script = (REPOSITORY / "slurm" / "evaluate_masks.sh").read_text()
    function = script[script.index("newest_save()") : script.index("progress=")]
    code = f"set -euo pipefail; runs=('{tmp_path}'); {function}\nnewest_save"
    assert subprocess.check_output(["bash", "-c", code], text=True) == "20\n"


@pytest.mark.parametrize("script", ["compare_masks", "evaluate_masks", "finetune_kimi_k25", "finetune_qwen397b"])
def test_a_script_that_is_not_submitted_says_to_submit_it(script):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = ["bash", f"slurm/{script}.sh", "--data", "d.jsonl"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: slurm/{script}.sh is a job script: submit it with sbatch slurm/{script}.sh")
