"""The plan: a step without data makes the tensors that the step makes, and the command says what follows from them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from launch.cluster import Cluster
from launch.memory import planned_batch, planned_model, run_step
from launch.parts import REST
from launch.plan import main
from launch.planning import Plan
from launch.proposal import opened
from launch.trace import PlannedGroup, Trace
from tests.support.models import write_model
from train.checkpoints.reader import Checkpoint
from train.config.settings import parse
from train.layers.lora import LoRASettings

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
LORA = LoRASettings(rank=4, alpha=8.0, expert_rank=4, seed=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "method", "held"),
    [
        *[("qwen", "lora", False), ("qwen", "full", False), ("deepseek", "lora", False), ("dense", "lora", False)],
        *[("qwen", "lora", True), ("dense", "lora", True)],
    ],
)
def test_a_step_without_data_makes_the_tensors_of_the_step(tmp_path, family, method, held, checkpointing):
    checkpoint, batch = Checkpoint(write_model(tmp_path / "model", family)), planned_batch([48, 47], held)
    model, _ = planned_model(checkpoint, method, LORA if method == "lora" else None, PlannedGroup())
    planned = run_step(model, batch, checkpointing, gpu=False)

    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(0, 0.02, generator=generator)
    trace = Trace([*model.parameters(), *model.buffers()])
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    with trace:
        terms = model(batch)
        kept = trace.total
        terms.loss.backward()
    assert hooks
    assert kept == pytest.approx(planned.kept, rel=0.02, abs=2_000 * held)  # indices of its tokens
    assert trace.most == pytest.approx(sum(planned.peak.values()), rel=0.02)


@pytest.mark.parametrize("held", [False, True])
def test_a_deep_model_is_planned_from_two_depths(tmp_path, held):
    sizes = {"num_hidden_layers": 12, "layer_types": ["linear_attention", "full_attention"] * 6}
    checkpoint = Checkpoint(write_model(tmp_path / "deep", "qwen", **sizes))
    batch = planned_batch([32], held)
    model, _ = planned_model(checkpoint, "lora", LORA, PlannedGroup(2))
    extended = run_step(model, batch, True, gpu=True)
    from launch.memory import _run_layers

    whole = _run_layers(model, batch, True, gpu=True)
    assert (extended.kept, extended.flops, extended.wire) == (whole.kept, whole.flops, whole.wire)
    assert sum(extended.peak.values()) == pytest.approx(sum(whole.peak.values()), rel=0.01)


@pytest.mark.parametrize("family", ["qwen", "deepseek"])
def test_what_a_step_moves_is_told_by_part_of_the_model_in_forward_and_backward(tmp_path, capsys, family):
    directory, out = write_model(tmp_path / "model", family, dtype=torch.bfloat16), tmp_path / "plan.json"
    given = ["--model", str(directory), "--gpus", "2", "--max-tokens", "64", "--batch-size", "4", "--traffic"]
    assert main([*given, "--gradient-checkpointing", "--json", str(out)]) == 0
    traffic = json.loads(out.read_text())["traffic_bytes"]
    settings = parse(["--model", str(directory), "--max-tokens", "64", "--batch-size", "4"], "")
    settings = dataclasses.replace(settings, gradient_checkpointing=True)
    plan = Plan(settings, opened(settings.model), Cluster(nodes=1, gpus=2, memory=80), 64)
    assert sum(sum(part.values()) for part in traffic.values()) == plan.accumulation * plan.chosen.step.moved
    layers = {"delta rule layers"} if family == "qwen" else set()
    assert {*traffic} == {
        "experts",
        "loss",
        "embedding",
        "norms",
        "attention layers",
        "router",
        "dense MLPs",
    } | layers | {REST}
    for operation, part in {
        "_grouped_mm": "experts", "gated_backward": "experts", "rms_norm": "norms", "rms_norm_backward": "norms",
        "_scaled_dot_product_efficient_attention_backward": "attention layers", "loss_terms": "loss",
    }.items():  # fmt: skip
        assert [name for name, operations in traffic.items() if operation in operations] == [part]
    assert "  experts   " in capsys.readouterr().out


def test_the_recipe_of_qwen3_5_397b_has_less_than_six_and_a_half_seconds_of_memory_traffic(shared_checkpoints):
    recipe = str(RECIPES / "models" / "qwen3.5-397b.yaml")
    settings = parse(["--recipe", recipe, "--model", str(shared_checkpoints / "qwen3.5-397b-a17b")], "")
    plan = Plan(settings, opened(settings.model), Cluster(nodes=1, gpus=8, memory=80), settings.max_tokens)
    assert plan.seconds["memory"] == pytest.approx(6.26, rel=0.01) and plan.seconds["compute"] > 4.7


def test_a_config_alone_gives_the_plan_of_the_checkpoint(tmp_path):
    directory = write_model(tmp_path / "model", "qwen", dtype=torch.bfloat16)
    (tmp_path / "bare").mkdir()
    config = tmp_path / "bare" / "config.json"
    config.write_text((directory / "config.json").read_text())
    settings = parse(["--model", str(directory), "--method", "lora", "--max-tokens", "64"], "")
    cluster = Cluster(nodes=1, gpus=2, memory=80)
    whole, bare = (Plan(settings, opened(str(path)), cluster, 64) for path in (directory, config))
    assert bare.gpu_bytes == whole.gpu_bytes and bare.read_bytes == whole.read_bytes > 0
    assert bare.wire_bytes == whole.wire_bytes


@pytest.mark.parametrize(("method", "kind"), [("lora", "bfloat16"), ("qlora", "nf4"), ("full", "trained")])
def test_experts_are_told_by_how_they_are_kept(tmp_path, method, kind):
    settings = parse(["--model", str(write_model(tmp_path / "model", "qwen", dtype=torch.bfloat16))], "")
    settings = dataclasses.replace(settings, method=method)
    plan = Plan(settings, opened(settings.model), Cluster(nodes=1, gpus=2, memory=80), 32)
    assert plan.expert_bytes == {kind: plan.gpu_bytes["experts"]}


def test_the_plan_takes_a_recipe_as_the_job_does(tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    text = f"settings: {{model: {json.dumps(str(write_model(tmp_path / 'model', 'qwen')))}, method: full}}\n"
    recipe.write_text(text + "variants: {a: {mask: none}, b: {mask: doctags}}\n")
    common = ["--recipe", str(recipe), "--variant", "1", "--max-tokens", "64", "--gpus", "2", "--json", str(out)]
    assert main(common) == 0
    settings = json.loads(out.read_text())["settings"]
    assert (settings["method"], settings["mask"], settings["max_tokens"]) == ("full", "doctags", 64)


def test_the_command_writes_what_it_says_and_advises_where_it_does_not_fit(tmp_path, capsys):
    directory, out = write_model(tmp_path / "model", "qwen"), tmp_path / "plan.json"
    common = ["--model", str(directory), "--gpus", "2", "--max-tokens", "64", "--batch-size", "8", "--json", str(out)]
    common += ["--micro-batch-tokens", "256"]
    assert main([*common, "--gpu-memory", "80"]) == 0
    plan = json.loads(out.read_text())
    assert {"fits", "gpu_bytes", "host_bytes", "wire_bytes", "seconds"} <= plan.keys() and plan["fits"]
    entries = dict(plan["gpu_bytes"])
    assert entries.pop("total") == sum(entries.values()) and entries["experts"] > 0
    assert plan["wire_bytes"]["network"] == 0 < plan["wire_bytes"]["nvlink"]

    assert main([*common, "--gpu-memory", "2.107"]) == 1
    shown = capsys.readouterr().out
    assert "does NOT fit" in shown and shown.index("--gradient-checkpointing:") < shown.index(
        "--micro-batch-tokens 128"
    )
    assert main([*common, "--search"]) == 0

    config = (directory / "config.json").read_bytes()
    assert main([*common, "--json", str(directory / "config.json")]) == 2
    assert "config.json: is --model itself, which would be lost" in capsys.readouterr().err
    assert (directory / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    ("nodes", "gpus", "expert_parallel", "experts", "replicas", "dense"),
    [
        (1, 4, 2, 0, 0, 0),  # one node: nothing leaves it
        (2, 2, 2, 0, 1, 2 / 3),  # experts divided within a node: who holds the same ones is on the other node
        (2, 2, 4, 2 / 3, 0, 2 / 3),  # across nodes: one copy of each expert, and nobody to share gradients with
        (2, 4, 2, 0, 2 / 3, 4 / 7),  # two groups a node: of the other three with the same experts, two are away
        (4, 2, 4, 2 / 3, 1, 6 / 7),  # groups of two nodes, two of them
        (2, 2, 1, 0, 2 / 3, 2 / 3),  # experts not divided: their factors are shared by all, as all else
    ],
)
def test_what_leaves_a_node_follows_from_where_the_ranks_of_each_group_are(
    tmp_path, nodes, gpus, expert_parallel, experts, replicas, dense
):
    flags = ["--model", str(write_model(tmp_path / "model", "qwen")), "--expert-parallel", str(expert_parallel)]
    settings = parse([*flags, "--method", "lora", "--batch-size", "8", "--max-tokens", "32"], "")
    plan = Plan(settings, opened(settings.model), Cluster(nodes=nodes, gpus=gpus, memory=80), 32)
    wire, ranks = plan.wire_bytes, nodes * gpus
    of_experts = {id(p) for layer in plan.model.expert_layers for p in layer.parameters()}
    shared = {True: 0.0, False: 0.0}  # bytes gathered, and of gradients, of experts' LoRA weights and of all else
    for p in plan.model.parameters():
        n = ranks // expert_parallel if id(p) in of_experts else ranks
        shared[id(p) in of_experts] += (n - 1) / n * (p.nbytes + 4 * p.numel() * p.requires_grad)
    steps = 8 // ranks
    assert wire["gather"] + wire["reduce"] == pytest.approx(steps * sum(shared.values()), rel=1e-3)
    wanted = wire["experts"] * experts + steps * (shared[True] * replicas + shared[False] * dense)
    assert wire["network"] == pytest.approx(wanted, rel=1e-3)
    assert wire["network"] + wire["nvlink"] == wire["total"] == wire["experts"] + wire["gather"] + wire["reduce"]


def test_a_search_passes_over_ranks_that_do_not_divide_the_experts(tmp_path, capsys):
    directory = write_model(tmp_path / "model", "qwen")
    common = ["--model", str(directory), "--gpu-memory", "80", "--max-tokens", "64", "--batch-size", "12", "--search"]
    assert main([*common, "--nodes", "3", "--gpus", "2"]) == 0  # 8 experts: not by 6 ranks, but by 2
    proposed = [line for line in capsys.readouterr().out.splitlines() if "tokens/s at most" in line]
    assert proposed and all("--expert-parallel 2" in line for line in proposed)
    assert main([*common, "--nodes", "1", "--gpus", "3"]) == 2
    assert "must divide the model's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "kind", "name", "size"),
    [
        (80, "", "H100", 80), (40, "", "A100", 40), (141, "", "H200", 141), (192, "", "B200", 192),
        (85.0, "NVIDIA A100-SXM4-80GB", "A100", 80), (42.4, "NVIDIA A100-PCIE-40GB", "A100", 40),
        (85.0, "NVIDIA H100 80GB HBM3", "H100", 80), (80, "A100", "A100", 80), (25.3, "an unknown one", "A100", 40),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_name_and_else_by_its_memory(memory, kind, name, size):
    gpu = Cluster(nodes=1, gpus=8, memory=memory, kind=kind).gpu
    assert (gpu.name, gpu.memory, gpu.grouped) == (name, size, name != "A100")


def test_a_plan_says_what_a_gpu_without_grouped_products_costs(tmp_path, capsys):
    """Two layers of 4 experts a rank. LoRA's grouped products of each of their two weights: 2 in the forward pass and 4
    in backward; with checkpointing 2 more of the first and 1 of the second, whose output is not needed."""
    common = ["--model", str(write_model(tmp_path / "model", "qwen")), "--method", "lora", "--gpus", "2"]
    common += ["--max-tokens", "64"]
    for name, launches in (("A100", 2 * 4 * 2 * 6), ("a100", 2 * 4 * 2 * 6), ("40", 2 * 4 * 2 * 6), ("H100", 0)):
        assert main([*common, "--gpu-memory", name]) == 0
        told = f"A100: no grouped products in hardware: torch multiplies expert by expert, {launches:,} launches"
        assert (told in capsys.readouterr().out) == (launches > 0)
    assert main([*common, "--gpu-memory", "A100", "--gradient-checkpointing"]) == 0
    assert f"{2 * 4 * (2 * 6 + 3)} launches per micro-batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    [
        ["--nodes", "0"],
        ["--gpu-memory", "A101"],
        ["--gpu-memory", "nan"],
        ["--model", "nowhere"],
        ["--expert-parallel", "3"],
    ],
)
def test_what_is_wrong_is_told(flag, capsys):
    assert main(["--gpus", "2", *flag]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag[0]}")


def test_a_mask_that_holds_tokens_is_planned_with_a_pass_of_the_base(tmp_path):
    directory = write_model(tmp_path / "model", "qwen", dtype=torch.bfloat16)
    given = ["--model", str(directory), "--max-tokens", "64", "--batch-size", "4", "--gradient-checkpointing"]
    plans = [
        Plan(parse([*given, *flags], ""), Checkpoint(directory), Cluster(nodes=1, gpus=2, memory=80), 64)
        for flags in ([], ["--mask", "false-spans=hold"], ["--measure-kl"], ["--mask", "nonsense"])
    ]
    plain, held, measured, invalid = (plan.chosen for plan in plans)
    # two forwards and a backward, and one forward more, without LoRA weights
    assert 1.1 < held.step.flops / plain.step.flops < 4 / 3
    assert held.gpu["logits"] >= plain.gpu["logits"] and held.step.wire > plain.step.wire
    assert (measured.step.flops, invalid.step.flops) == (held.step.flops, plain.step.flops)
