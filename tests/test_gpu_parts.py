"""What tests/gpu has a GPU do, at sizes for a CPU: so that it does not run for the first time on a card."""

import json
from pathlib import Path

import pytest
import torch

from launch import launches
from launch.agreement import Wrong
from tests.gpu import parts, training
from tests.gpu.launches import figures as measured
from tests.support.ranks import run
from train.experts.products import GroupedLinear

CPU, FP32 = torch.device("cpu"), torch.float32
DOCUMENTS = [70, 33, 3, 1]


def test_kernels_at_the_callers_sizes():
    figures = [
        parts.attention(CPU, FP32, DOCUMENTS, 4, 2, 16, 16), parts.attention(CPU, FP32, DOCUMENTS, 2, 2, 24, 16),
        parts.convolution(CPU, FP32, DOCUMENTS, 8), parts.delta_rule(CPU, FP32, DOCUMENTS, 2, 4, 16),
        parts.experts(CPU, FP32, "nf4", 4, 64, 256, 60), parts.experts(CPU, FP32, "int4", 4, 64, 64, 60),
    ]  # fmt: skip
    figures += [measured(CPU, launches.norm(CPU, FP32, kind), []) for kind in launches.NORMS]
    for case in (launches.activation, launches.exchange, launches.sums, launches.loss):
        figures.append(measured(CPU, case(CPU, FP32), []))
    assert all(each["error"] < 2e-5 and each["forward_backward_ms"] > 0 for each in figures)
    for each in (parts.int4(CPU, 2, 8, 64), parts.fp8(CPU, 2, 130, 140), parts.nf4_together(CPU, FP32, 2, 128, 128)):
        assert each["gigabytes_per_second"] > 0


def test_experts_that_are_computed_wrongly_are_noticed(monkeypatch):
    right = GroupedLinear.apply
    monkeypatch.setattr(GroupedLinear, "apply", lambda *given: right(*given) * 1.001)
    with pytest.raises(Wrong, match="int4 experts is off by"):
        parts.experts(CPU, FP32, "int4", 4, 64, 64, 60)


def test_without_a_gpu_each_test_of_tests_gpu_is_skipped_with_the_reason(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    here = Path(__file__).parent / "gpu"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    done = run(*words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    *_, last = done.stdout.splitlines()
    assert "skipped" in last and "passed" not in last and "failed" not in last
    assert "there is no GPU that torch can use (torch.cuda.is_available() is False)" in done.stdout


@pytest.mark.slow
def test_two_layers_are_measured_on_a_cpu_at_small_widths(tmp_path):
    out = tmp_path / "rows.json"
    script = Path(__file__).parent / "benchmarks" / "gpu.py"
    done = run(script, "--tiny", "--tokens", "200", "--json", str(out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    qwen, kimi = json.loads(out.read_text())["rows"]
    for row in (qwen, kimi):
        assert sum(row["documents"]) == 200 and len(row["documents"]) == 6
        assert row["losses"][-1] < row["losses"][0] and row["flops"] > 0 and row["planned_bytes"] > 0
        assert sum(row["share_of_time"].values()) == pytest.approx(1)
        assert all(row["share_of_time"][kind] > 0 for kind in ("experts", "attention", "dispatch", "loss", "other"))
    assert qwen["share_of_time"]["delta rule"] > 0 == kimi["share_of_time"]["delta rule"]
    assert qwen["delta_rule"] and kimi["delta_rule"] is None


@pytest.mark.slow
def test_a_tiny_model_trains_in_bf16_as_in_fp32_and_goes_on_from_a_save(tmp_path):
    found = training.compare(tmp_path, "qwen", "qlora", 20, start=run)
    assert {name: len(found[name]) for name in ("bf16", "resumed", "fp32")} == dict(bf16=20, resumed=20, fp32=20)
    assert 0 < training.check(found)["bf16"] < 0.01
    if not torch.cuda.is_available():
        assert found["resumed"] == found["bf16"]
    for name, wrong in (("bf16", 1.03), ("resumed", 1.02)):
        with pytest.raises(AssertionError):
            training.check(found | {name: [loss * wrong for loss in found[name]]})
