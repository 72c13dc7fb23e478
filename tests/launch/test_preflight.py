"""launch.preflight on two nodes, which are two processes here, meeting over gloo: what is well, and what is not."""

import base64
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from launch.check_results import MAY_PASS, PASSED, WILL_NOT_PASS, Finding, within
from launch.meeting import differing, judge_network
from launch.network import STAGES, try_ranks
from launch.node import (
    disk_space,
    documents,
    gpu_memory,
    judge_gpus,
    judge_memory,
    model,
    node_memory,
    plan,
)
from launch.preflight import parse_options
from launch.wandb_access import wandb_hindrance, wandb_mode
from tests.support.models import write_documents, write_model
from tests.support.ranks import Forked
from train.config.settings import parse
from train.experts.dispatch import ExpertGroup
from train.model.text_model import count_trainable, skeleton, text_config
from train.runtime.errors import UserError
from train.runtime.interruption import INTERRUPTED
from train.runtime.local import free_port
from train.training.job import lora_settings

REPOSITORY = Path(__file__).parents[2]


class Nodes:
    """Two nodes n1 and n2, each in a directory of its own with a model of its own."""

    def __init__(self, tmp: Path):
        self.tmp = tmp
        write_model(tmp / "n1" / "model", "qwen")
        shutil.copytree(tmp / "n1", tmp / "n2")
        self.environment: dict[str, dict[str, str]] = {"n1": {}, "n2": {}}

    def start(self, *flags: str, names: tuple[str, ...] = ("n1", "n2")) -> None:
        port, self.processes = str(free_port()), {}
        for name in names:
            own = {
                "RANK": str(["n1", "n2"].index(name)), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "SLURMD_NODENAME": name, "WANDB_API_KEY": "", "PYTHONPATH": str(REPOSITORY),
            }  # fmt: skip
            self.processes[name] = Forked(
                "-m", "launch.preflight", "--model", "model", *flags, cwd=self.tmp / name,
                env=own | self.environment[name], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    def wait(self, name: str) -> tuple[int, list[str]]:
        """Exit code and the lines of its report, without what packages print."""
        process = self.processes[name]
        try:
            out, errors = process.communicate(timeout=300)
        finally:
            process.kill()
        assert "Traceback" not in errors, errors
        return process.returncode, [line for line in out.splitlines() if line.startswith("preflight: ")]

    def ranks(self, name: str) -> list[psutil.Process]:
        """The processes by which a node tries the network."""
        found = []
        for child in psutil.Process(self.processes[name].pid).children():
            with suppress(psutil.NoSuchProcess):
                found += [child] if "launch.network" in child.cmdline() else []
        return found

    def kill(self) -> None:
        for name, process in self.processes.items():
            for found in [*(self.ranks(name) if process.poll() is None else []), process]:
                found.kill()


@pytest.fixture
def nodes(tmp_path: Path):
    made = Nodes(tmp_path)
    yield made
    made.kill()


@pytest.mark.slow
def test_two_sound_nodes_pass_with_a_line_a_check_and_measured_speeds(nodes):
    nodes.environment = {name: {"LOCAL_SIZE": "2"} for name in nodes.environment}
    nodes.start("--expert-parallel", "4")
    (code, report), (follower_code, follower_report) = nodes.wait("n1"), nodes.wait("n2")
    assert (code, follower_code) == (PASSED, PASSED), report
    assert follower_report == []  # the first node tells for all
    checks = ["versions", "GPUs", "settings", "documents", "model", "kernels", "disk speed", "disk space", "plan"]
    checks += ["host memory", "W&B", "clock", "network"]
    assert [line.split(": ")[1] for line in report] == checks
    assert all(line.split(": ")[2] == "ok" for line in report)
    assert "n1, n2: no GPU: gloo" in report[1] and "n1, n2: 1 files" in report[4]
    assert "n1: offline: no WANDB_API_KEY" in report[10]
    assert "gloo, 4 ranks: all-reduce " in report[-1] and "all-to-all " in report[-1] and "GB/s" in report[-1]


@pytest.mark.slow
def test_everything_that_is_wrong_is_told_at_once_with_its_node(nodes):
    (nodes.tmp / "n2" / "model" / "model.safetensors").unlink()
    other = nodes.tmp / "other" / "wandb-0.1.dist-info"  # found before the one that is installed
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.1\n")
    nodes.environment["n2"]["PYTHONPATH"] = f"{nodes.tmp / 'other'}{os.pathsep}{REPOSITORY}"
    nodes.start("--mask", "nonsense")
    (code, report), (follower_code, _) = nodes.wait("n1"), nodes.wait("n2")
    assert (code, follower_code) == (WILL_NOT_PASS, WILL_NOT_PASS)
    failed = [line for line in report if "FAILED" in line]
    assert len(failed) == 4, report
    assert "settings: FAILED: n1: --mask 'nonsense'" in failed[0] and "settings: FAILED: n2: --mask" in failed[1]
    assert "model: FAILED: n2: --model model: 1 of 1 weight files missing (model.safetensors)" in failed[2]
    assert "versions: FAILED: n2 has wandb 0.1, n1 has " in failed[3]
    assert any(line.startswith("preflight: model: ok: n1: ") for line in report)
    assert any(line.startswith("preflight: network: ok: gloo, 2 ranks") for line in report)


@pytest.mark.slow
def test_a_node_that_does_not_come_and_one_whose_rank_hangs_are_named_after_the_time_limit(nodes):
    nodes.environment["n1"] = {"PREFLIGHT_TIME_LIMIT": "20"}
    nodes.start(names=("n1",))
    code, report = nodes.wait("n1")
    assert code == MAY_PASS
    assert [line.split(": is it")[0] for line in report if "FAILED" in line] == [
        "preflight: nodes: FAILED, may be temporary: node 1 did not report in time",
        "preflight: network: FAILED, may be temporary: not tested: node 1 did not report",
    ]

    nodes.start("--time-limit", "25")
    while not (ranks := nodes.ranks("n2")):
        assert nodes.processes["n2"].poll() is None, nodes.wait("n1")
        time.sleep(0.01)
    ranks[0].suspend()
    (code, report), (follower_code, _) = nodes.wait("n1"), nodes.wait("n2")
    assert (code, follower_code) == (MAY_PASS, MAY_PASS)
    start = "preflight: network: FAILED, may be temporary: gloo: did not complete starting within 25 s: "
    assert report[-1].startswith(start)
    assert "n2, rank 1" in report[-1]


@pytest.mark.slow
def test_ctrl_c_ends_a_node_and_the_ranks_with_which_it_tries_the_network(nodes):
    nodes.start("--time-limit", "100")
    while not (ranks := nodes.ranks("n1")):
        assert nodes.processes["n1"].poll() is None, nodes.wait("n1")
        time.sleep(0.01)
    while ranks[0].num_threads() < 2:  # the one that listens
        time.sleep(0.01)
    ranks[0].suspend()  # so that it is not done
    nodes.processes["n1"].send_signal(signal.SIGINT)
    said = nodes.processes["n1"].communicate(timeout=60)[1]
    assert said.endswith("interrupted\n") and "Traceback" not in said
    assert nodes.processes["n1"].returncode == INTERRUPTED
    ranks[0].resume()
    assert not psutil.wait_procs(ranks, timeout=60)[1], "ranks that go on"


def test_a_check_that_hangs_says_where_it_stood():
    found = within(0.2, "model", lambda: time.sleep(30))
    assert found == Finding("model", MAY_PASS, found.text)
    assert found.text.startswith("not done within the time limit (PREFLIGHT_TIME_LIMIT), in test_preflight.py:")

    def broken() -> Finding:
        raise UserError("--model: the fix")

    assert within(5, "model", broken) == Finding("model", WILL_NOT_PASS, "--model: the fix")


def test_the_time_limit_comes_from_the_flag_or_else_from_the_environment(monkeypatch):
    monkeypatch.setenv("PREFLIGHT_TIME_LIMIT", "7")
    assert parse_options([])[0].time_limit == 7
    assert parse_options(["--time-limit", "9"])[0].time_limit == 9
    monkeypatch.setenv("PREFLIGHT_TIME_LIMIT", "0")
    with pytest.raises(UserError, match="PREFLIGHT_TIME_LIMIT 0: must be"):
        parse_options([])
    monkeypatch.delenv("PREFLIGHT_TIME_LIMIT")
    assert parse_options([])[0].time_limit == 120


@pytest.mark.slow
def test_a_rank_that_writes_much_does_not_hold_up_the_network(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    for stream in (sys.stdout, sys.stderr):\n"
        "        print('NCCL INFO ' * 20_000, file=stream, flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = try_ranks(0, 2, 2, ("127.0.0.1", store.port), time.monotonic() + 120)
    assert [(rank["rank"], rank["standing"]) for rank in found] == [(0, None), (1, None)], found
    assert found[1]["error"].startswith("NCCL INFO NCCL INFO")


GB = 10**9


@pytest.mark.parametrize(
    ("need", "total", "free", "code", "text"),
    [
        (30 * GB, 64 * GB, 40 * GB, PASSED, "40.0 GB of 64.0 GB free, 30.0 GB needed"),
        (50 * GB, 64 * GB, 40 * GB, MAY_PASS, "Which other process uses it?"),
        (70 * GB, 64 * GB, 40 * GB, WILL_NOT_PASS, "Use more nodes"),
    ],
)
def test_memory_that_others_use_may_come_back_and_memory_that_is_not_there_does_not(need, total, free, code, text):
    found = judge_memory(need, total, free)
    assert found.code == code and text in found.text


def test_a_control_groups_memory_counts_without_the_files_in_it(tmp_path):
    def group(path: str, **files: str) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("memory_", "memory.")).write_text(text)

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    group("sys/fs/cgroup/job/step", memory_max="max\n", memory_current="1\n", memory_stat="")
    whole = node_memory(tmp_path)
    assert whole[0] == psutil.virtual_memory().total
    stat = "anon 300000\ninactive_file 500000\nactive_file 100000\ntotal_active_file 7\n"
    group("sys/fs/cgroup/job", memory_max="1000000\n", memory_current="900000\n", memory_stat=stat)
    assert node_memory(tmp_path) == (1_000_000, 700_000)

    # Version 1, in a container whose own group is the root of the mount.
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/host/path\n0::/elsewhere\n")
    files = {"memory_limit_in_bytes": "2000000\n", "memory_usage_in_bytes": "1500000\n"}
    group("sys/fs/cgroup/memory", **files, memory_stat="total_inactive_file 40\ntotal_active_file 2\nactive_file 9\n")
    assert node_memory(tmp_path) == (2_000_000, 500_042)


@pytest.fixture
def share(tmp_path):
    """Of a node that has the only rank of a job."""
    model_directory = write_model(tmp_path / "model", "qwen")
    flags = ["--model", str(model_directory), "--output", str(tmp_path / "run"), "--keep", "2", "--lora-rank", "4"]
    return model(parse(flags, ""), range(1), 1, 40)[1]


def test_saves_that_are_there_already_are_not_asked_for_again(share, monkeypatch):
    said = disk_space(share)
    assert said.code == PASSED and "needed for 3 training checkpoints and the result" in said.text
    saves = Path(share.plan.settings.output) / "saves"
    text = text_config(share.plan.checkpoint)
    lora = lora_settings(share.plan.settings, text)  # of experts rank 2, which is padded to 4, but not in a save
    size = 3 * 4 * count_trainable(skeleton(text, ExpertGroup()), lora)
    for step in (1, 2):
        (saves / f"step-{step}").mkdir(parents=True)
        (saves / f"step-{step}" / "state.safetensors").write_bytes(bytes(size))
    nearly_full = size + size // 3  # room for one more save and the result
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=nearly_full))
    assert disk_space(share).code == PASSED
    (saves / "step-2" / "state.safetensors").unlink()
    assert disk_space(share).code == WILL_NOT_PASS


def test_memory_is_held_against_the_plan(share):
    assert plan(share).code == PASSED
    assert (share.host_bytes, share.plan.cluster.memory) == (pytest.approx(share.plan.host_bytes, rel=0.2), 0)
    share.plan.cluster.memory, share.gpu_bytes = 80, 90 * GB
    found = gpu_memory(share)
    assert found.code == WILL_NOT_PASS
    assert found.text.startswith("80.0 GB per GPU, 90.0 GB needed. python -m launch.plan")
    share.gpu_bytes = 78 * GB
    assert gpu_memory(share) == Finding("GPU memory", PASSED, "80.0 GB per GPU, 78.0 GB needed: little memory is left")


def test_the_longest_document_is_that_of_the_data_as_far_as_it_is_taken(tmp_path):
    directory = write_model(tmp_path / "model", "qwen")
    data = write_documents(tmp_path / "d.jsonl", [{"text": "ab"}, {"text": "abcdefgh" * 8}, {"text": "abc"}])
    flags = ["--model", str(directory), "--data", str(data)]
    found, tokens = documents(parse(flags, ""))
    assert found.code == PASSED and f"{data}:2)" in found.text and found.text.startswith("3, the longest takes ")
    assert documents(parse([*flags, "--max-tokens", "5"], ""))[1] == 5 < tokens
    with pytest.raises(UserError, match="nowhere"):
        documents(parse([*flags, "--data", "nowhere"], ""))


class Server(BaseHTTPRequestHandler):
    """Takes the key `good` as W&B does, and knows of no other."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"api:good").decode()
        text = json.dumps({"data": {"viewer": {"username": "user"} if known else None}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def test_wandb_is_used_with_a_key_that_it_takes_and_hindered_otherwise(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", where)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_hindrance() == "no WANDB_API_KEY"
    monkeypatch.setenv("WANDB_API_KEY", "good")
    assert wandb_hindrance() is None and wandb_mode("online").text == "online"
    assert wandb_mode("disabled").text == "disabled, as requested"
    monkeypatch.setenv("WANDB_API_KEY", "other")
    assert wandb_hindrance() == f"{where} rejects the key in WANDB_API_KEY"
    server.shutdown()
    server.server_close()
    assert str(wandb_hindrance()).startswith(f"{where} cannot be reached (")


IDLE = ["H100", "580.1", "81559", "500", "0"]


@pytest.mark.parametrize(
    ("rows", "remapped", "processes", "expected", "code", "text"),
    [
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE]], [["GPU-a", "No", "No"]], [], 2, PASSED, "2 × H100, 81559 MiB, idle"),
        ([["GPU-a", *IDLE]], [], [], 2, MAY_PASS, "2 GPUs are expected, torch sees 2 and nvidia-smi 1"),
        ([["GPU-a", *IDLE], ["GPU-b", "A100", *IDLE[1:]]], [], [], 2, MAY_PASS, "of several kinds: A100"),
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE[:4], "3"]], [], [], 2, PASSED, "GPU 1 (GPU-b) has had 3 unco"),
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE[:4], "[N/A]"]], [], [], 2, PASSED, "2 × H100"),
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE]], [["GPU-b", "Yes", "No"]], [], 2, MAY_PASS, "rows of memory"),
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE]], [], [["GPU-a", "77"]], 2, MAY_PASS, "GPU 0 (GPU-a) is in use by"),
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE[:3], "9000", "0"]], [], [], 2, MAY_PASS, "GPU 1 (GPU-b) is in use: 9000"),
        # another job's GPU on the same node
        ([["GPU-a", *IDLE], ["GPU-b", *IDLE], ["GPU-c", *IDLE]], [], [["GPU-c", "77"]], 2, PASSED, "2 × H100"),
    ],
)  # fmt: skip
def test_gpus_are_judged_by_what_nvidia_smi_says(rows, remapped, processes, expected, code, text):
    found = judge_gpus(rows, remapped, processes, {"GPU-a", "GPU-b"}, expected)
    assert found.code == code and text in found.text


def test_the_ranks_that_stand_first_are_those_that_hold_up_the_others():
    def rank(number: int, node: str, stages: int, error: str = "") -> dict:
        left = dict(zip(STAGES, [0.0, 0.0, 0.0, 2.5, 1.5, 0.0], strict=True))
        left = {stage: left[stage] for stage in STAGES[:stages]}
        standing = [*STAGES, None][stages]
        return {"rank": number, "node": node, "left": left, "standing": standing, "error": error}

    found = judge_network([rank(0, "n1", 4), rank(1, "n1", 4), rank(2, "n2", 3)], "NCCL", 60)
    assert found.text == "NCCL: did not complete all-reduce within 60 s: n2, rank 2"
    found = judge_network([rank(0, "n1", 3), rank(1, "n2", 2, "RuntimeError: wrong")], "NCCL", 60)
    assert found.text == "NCCL: did not complete computing within 60 s: n2, rank 1: RuntimeError: wrong"
    found = judge_network([rank(0, "n1", 3), rank(1, "n2", 3)], "NCCL", 60)
    assert found.text == "NCCL: no rank completed all-reduce within 60 s: can the nodes reach each other?"
    found = judge_network([rank(0, "n1", 6), rank(1, "n2", 5)], "NCCL", 60)
    assert found.text == "NCCL: did not complete zero splits within 60 s: n2, rank 1"
    found = judge_network([rank(0, "n1", 6), rank(1, "n2", 6)], "NCCL", 60)
    assert found.code == PASSED and "all-reduce 2.50 GB/s, all-to-all 1.50 GB/s" in found.text


def test_nodes_must_have_the_same_versions_gpus_and_model():
    def node(**same: str) -> list[Finding]:
        return [Finding("versions", PASSED, "", same), Finding("disk speed", PASSED, "2 GB/s")]

    by_node = {"n1": node(torch="2.13"), "n2": node(torch="2.13"), "n3": node(torch="2.12", CUDA="13.0")}
    assert [finding.text for finding in differing(by_node)] == [
        "n3 has CUDA 13.0, n1 has None: must be the same", "n3 has torch 2.12, n1 has 2.13: must be the same",
    ]  # fmt: skip
