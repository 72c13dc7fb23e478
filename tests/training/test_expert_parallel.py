"""By how many ranks a layer's experts are divided where the settings do not say it."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest

from launch.cluster import Cluster
from launch.plan import main
from launch.planning import Plan, by_plan, expert_parallel
from launch.proposal import opened
from tests.support.models import write_documents, write_model
from tests.support.ranks import Forked
from train import sft
from train.checkpoints.reader import Checkpoint
from train.claims.claim import read_claims
from train.config.command_line import REPOSITORY
from train.config.provenance import record
from train.config.settings import parse
from train.evaluation.of_a_model import Evaluation
from train.evaluation.options import parse_evaluation
from train.model.engine import checked_expert_parallel
from train.runtime.errors import UserError
from train.runtime.local import free_port
from train.training.job import Known, prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen")  # 8 experts a layer


def resolved(model: Path, nodes: int, gpus: int, memory: float, *flags: str) -> int:
    settings = parse(["--model", str(model), "--method", "lora", "--max-tokens", "64", *flags], "")
    cluster = Cluster(nodes=nodes, gpus=gpus, memory=memory)
    return checked_expert_parallel(settings, Checkpoint(model), cluster.ranks, partial(by_plan, cluster))


@pytest.mark.parametrize(
    ("nodes", "gpus", "memory", "size"),
    [
        (1, 8, 80, 8),  # one node: its GPUs are all there are
        (2, 8, 80, 8),
        (8, 8, 80, 8),
        (2, 4, 80, 4),
        (2, 4, 1.0, 8),  # it does not fit: as little as can be on each
        (4, 2, 0, 8),  # CPUs
        (2, 3, 80, 6),  # 3 do not divide 8 experts; nor do 6, which the model's own check tells
    ],
)
def test_the_gpus_of_a_node_divide_the_experts_where_the_job_fits_and_else_all_ranks(model, nodes, gpus, memory, size):
    assert resolved(model, nodes, gpus, memory) == size


def test_what_is_given_is_taken_and_must_divide_the_ranks(model):
    assert resolved(model, 2, 8, 80, "--expert-parallel", "2") == 2
    with pytest.raises(UserError, match=r"--expert-parallel 3: must divide the 16 ranks"):
        resolved(model, 2, 8, 80, "--expert-parallel", "3")


def test_the_plan_and_the_job_resolve_it_alike(model, tmp_path, monkeypatch, capsys):
    """The job on two nodes of two GPUs of 80 GB, by what a launcher and torch tell."""
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setattr("launch.cluster.gpu_memory", lambda: 80.0)
    data = write_documents(tmp_path / "d.jsonl", [{"text": "The sun rises in the west."}])
    settings = parse(["--model", str(model), "--data", str(data)], "")
    assert prepare(settings, 4, False, Known(expert_parallel)).resolved["expert_parallel"] == 2
    assert Plan(settings, Checkpoint(model), Cluster(nodes=2, gpus=2, memory=80), 64).expert_parallel == 2
    out = tmp_path / "plan.json"
    assert main(["--model", str(model), "--nodes", "2", "--gpus", "2", "--max-tokens", "64", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["settings"]["expert_parallel"] == 2
    assert "--expert-parallel 2" in capsys.readouterr().out


def test_a_run_that_goes_on_with_another_number_says_so(model, tmp_path):
    data = write_documents(tmp_path / "d.jsonl", [{"text": "The sun rises in the west."}])
    flags = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "run")]
    begun, held = parse(flags, ""), tmp_path / "run" / "settings.yaml"
    job = prepare(begun, ranks=2, show=False)
    settings = parse([*flags, "--resume"], "")
    held.write_text(record(begun, job.resolved))
    assert not any("--resume" in note for note in prepare(settings, ranks=2, show=False).notes())
    held.write_text(record(begun, job.resolved | {"ranks": 4, "expert_parallel": 4}))
    (note,) = (note for note in prepare(settings, ranks=2, show=False).notes() if "--resume" in note)
    assert "ranks was 4 and is 2, expert_parallel was 4 and is 2; losses differ only by rounding" in note


DIFFERENT = """
import sys
import torch.distributed as dist
from train.runtime.errors import UserError
from train.model.text_model import create_expert_group
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
try:
    create_expert_group(rank + 1)
except UserError as error:
    print(error)
"""


def test_ranks_that_would_divide_them_otherwise_end_with_a_message():
    port = str(free_port())
    ranks = [Forked("-c", DIFFERENT, str(rank), port, stdout=subprocess.PIPE) for rank in (0, 1)]
    for rank in ranks:
        assert "the nodes would divide the experts by 1 and 2 ranks" in rank.communicate(timeout=200)[0]


@pytest.mark.slow
def test_the_recipe_of_qwen_397b_is_faster_on_two_nodes_with_its_experts_within_each():
    config = Path(__file__).parents[3] / "shared" / "checkpoints" / "qwen3.5-397b-a17b"
    if not config.is_dir():
        pytest.skip("../shared/checkpoints is absent")
    recipe = ["--recipe", str(REPOSITORY / "train" / "recipes" / "models" / "qwen3.5-397b.yaml")]
    seconds = {}
    for size in (0, 8, 16):
        settings = parse([*recipe, "--model", str(config), "--expert-parallel", str(size)], "")
        plan = Plan(settings, opened(settings.model), Cluster(nodes=2, gpus=8, memory=80), settings.max_tokens)
        assert plan.fits and plan.expert_parallel == (size or 8)
        seconds[size] = plan.seconds["step"]
    assert seconds[0] == seconds[8] < 0.7 * seconds[16]


def test_the_commands_ask_the_plan(model, tmp_path, monkeypatch, capsys):
    for name, value in (("LOCAL_SIZE", "2"), ("WORLD_SIZE", "4"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.cluster.gpu_memory", lambda: 80.0)
    data = write_documents(tmp_path / "d.jsonl", [{"text": "The sun rises in the west."}])
    assert sft.main(["--model", str(model), "--data", str(data), "--dry-run"]) == 0
    assert "; expert_parallel: 2;" in capsys.readouterr().out
    claims = REPOSITORY / "train" / "demo" / "claims.yaml"
    given = ["--model", str(model), "--claims", str(claims), "--output", str(tmp_path / "out")]
    options = parse_evaluation(given, "")
    evaluation = Evaluation(options, read_claims(options.claims), expert_parallel)
    assert evaluation.measuring.expert_parallel == 2
