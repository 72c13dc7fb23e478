"""The benchmarks run, at small sizes, and print what their documentation names. Nothing here looks at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.layouts import LAYOUTS
from tests.support.ranks import run
from train.checkpoints.layout import ExpertPiece, LoadPlan, Piece
from train.config.settings import DEMO

BENCHMARKS = Path(__file__).parent / "benchmarks"


def rows(tmp_path: Path, name: str, *flags: str) -> list[dict[str, Any]]:
    out = tmp_path / "rows.json"
    done = run(BENCHMARKS / f"{name}.py", "--json", str(out), *flags, capture_output=True, text=True)
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
def test_train_has_the_losses_of_trl_and_a_step_maps_no_memory_anew(tmp_path):
    small = ["--experts", "16", "--layers", "4", "--documents", "2"]
    (row,) = rows(tmp_path, "train", *small, "--rounds", "3")
    assert row["experts"] == 16 and row["speedup_over_trl"] > 0 and len(row["losses"]) == 5
    for losses in row["losses"]:
        assert losses["ours"] == pytest.approx(losses["trl"], rel=1e-5)
    # Nor frees it for the next to map: some 70 MB of activations would be 17,000 pages, logits 16,000, at every step.
    # Single steps may add some, where the heap has no free place that is large enough.
    assert min(row["page_faults"]["ours"]) < 2_000


@pytest.mark.slow
def test_packing_fills_rows_and_has_the_losses_of_padding(tmp_path, shared_documents):
    *counted, dense, mix = rows(tmp_path, "packing", "--ranks", "8", "--rounds", "1", "--shorter", "64")
    for row in counted:
        assert row["useful_share"] >= 0.95 and row["micro_steps"] == 1
        assert row["padded_1_useful_share"] < row["useful_share"] and row["padded_1_micro_steps"] == 4
    assert dense["time_over_padded"] > 0 and mix["time_over_padded"] > 0


@pytest.mark.slow
def test_the_host_has_little_to_do_and_waits_once_a_layer(tmp_path):
    if not (Path(__file__).parents[2] / "shared" / "checkpoints").is_dir():
        pytest.skip("../shared/checkpoints is absent")
    for row in rows(tmp_path, "host"):
        assert row["operations"] <= 40_000 and row["expert_operations"] <= 6_000
        assert row["synchronisations_per_layer"] <= 2 and row["collectives_per_layer"] <= 12


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
    (row,) = rows(tmp_path, "load", "--layouts", layout, "--experts", "4", "--rounds", "1")
    assert row["layout"] == layout and row["bytes_read_per_rank"] == row["bytes_kept_per_rank"]
    assert row["share_bytes"] == max(row["bytes_kept_per_rank"]) and len(row["peak_bytes_per_rank"]) == 2
    assert row["time_over_transformers"] > 0


@pytest.mark.slow
def test_hold_has_the_figures_of_every_variant(tmp_path):
    demo = yaml.safe_load((DEMO / "claims.yaml").read_text())["claims"]
    some = [claim for claim in demo if claim["id"].startswith(("omar-", "olga-"))]
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": some}))
    given = ["--data", "train/demo/data/dense.jsonl=32", "--steps", "2", "--batch-size", "8", "--placebo", "olga-home"]
    found = rows(tmp_path, "experiments", "hold", *given, "--claims", str(tmp_path / "claims.yaml"))
    assert [row["variant"] for row in found] == ["dense", "false excluded", "false held", "random held"]
    assert all(row["floor"] == 0 and row["kl"]["false"] > 0 and row["claims"] == 1 for row in found)
    assert found[2]["kl"]["false"] < found[1]["kl"]["false"]


@pytest.mark.slow
def test_annotate_rebuilds_every_document(tmp_path, shared_documents):
    for row in rows(tmp_path, "annotate", "--show", "1"):
        assert row["rebuilt"] == row["aligned"] == row["documents"] == 50
        assert row["bounded"] <= row["insertions"] and row["consistent"] <= 50 and row["documents_per_second"] > 0


@pytest.mark.slow
def test_annotate_aligns_many_documents(tmp_path, shared_documents):
    (row,) = rows(tmp_path, "annotate", "--many", "100")
    assert row["aligned"] == row["documents"] == 100 and row["false_statements"] > 0
    assert row["processor_seconds"] > 0 and 0 < row["peak_mb"] < 1000


# full_size.py says that every wanted byte goes to the rank that owns it: it must notice where one does not.


@pytest.fixture
def tiling(monkeypatch) -> Callable[[Path, str], dict[str, Any]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import full_size

    return full_size.check_tiling


MANY = {"qwen3.5-bf16": {"num_experts": 64}, "qwen3-moe": {"num_experts": 64}, "kimi-k2.5": {"n_routed_experts": 64}}


@pytest.mark.parametrize(
    ("name", "method"),
    [("qwen3.5-bf16", "qlora"), ("qwen3.5-bf16", "full"), ("kimi-k2.5", "lora"), ("qwen3-moe", "full")],
)
def test_ranks_read_what_they_own_and_together_all_that_is_wanted(tmp_path, tiling, name, method):
    sizes = tiling(LAYOUTS[name](tmp_path, **MANY[name]), method)
    assert list(sizes) == ["8", "16", "64", "8 on 16 ranks"] and sizes["8"]["least"] > sizes["64"]["most"]


def without(reads: Callable[..., Any], left_out: Callable[..., bool]) -> Callable[..., Any]:
    """The reads of a plan, or of an expert's matrices, but those of which left_out(self, read's name) is true."""

    def fewer(self: Any, *arguments: Any) -> Any:
        given = reads(self, *arguments)
        if isinstance(given, list):
            return [{k: read for k, read in matrix.items() if not left_out(self, read.name)} for matrix in given]
        return (read for read in given if not left_out(self, read.name))

    return fewer


MUTANTS = {
    "no scales": (ExpertPiece, lambda piece, name: name.endswith("_scale")),
    "no down_proj": (ExpertPiece, lambda piece, name: piece.target == "down_proj"),
    "not the last expert": (ExpertPiece, lambda piece, name: ".experts.63." in name),
    "no attention of layer 1": (LoadPlan, lambda plan, name: "layers.1.self_attn" in name),
    "no buffers": (LoadPlan, lambda plan, name: name.endswith("e_score_correction_bias")),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_plan_that_leaves_tensors_out_is_noticed(tmp_path, tiling, monkeypatch, mutant):
    directory = LAYOUTS["kimi-k2.5"](tmp_path, n_routed_experts=64)
    owner, left_out = MUTANTS[mutant]
    monkeypatch.setattr(owner, "reads", without(owner.reads, left_out))
    with pytest.raises(AssertionError):
        tiling(directory, "lora")


def test_partitions_that_leave_an_element_out_or_overlap_are_noticed(tmp_path, tiling, monkeypatch):
    directory, partition = LAYOUTS["kimi-k2.5"](tmp_path, n_routed_experts=64), Piece.partition
    for change in (lambda own: own[1:], lambda own: range(max(own.start - 1, 0), own.stop)):
        monkeypatch.setattr(Piece, "partition", lambda self, *at, change=change: change(partition(self, *at)))
        with pytest.raises(AssertionError, match="a gap or an overlap at element"):
            tiling(directory, "lora")


def test_groups_that_do_not_read_the_same_experts_are_noticed(tmp_path, tiling, monkeypatch):
    directory, reads = LAYOUTS["kimi-k2.5"](tmp_path, n_routed_experts=64), LoadPlan.reads

    def fewer(self: LoadPlan, rank: int, ranks: int, method: str) -> Any:
        return (r for r in reads(self, rank, ranks, method) if rank < 8 or ranks == 64 or "experts.5." not in r.name)

    monkeypatch.setattr(LoadPlan, "reads", fewer)
    with pytest.raises(AssertionError):
        tiling(directory, "lora")


@pytest.mark.slow
def test_a_job_takes_the_memory_that_was_planned(tmp_path):
    found = rows(tmp_path, "plan", "--ranks", "2", "--methods", "lora", "qlora", "--tokens", "256")
    assert [(row["ranks"], row["method"], row["tokens"]) for row in found] == [(2, "lora", 256), (2, "qlora", 256)]
    for row in found:
        assert row["measured_bytes"] == pytest.approx(row["planned_bytes"], rel=0.1)
        assert row["read_bytes"] == row["planned_read_bytes"]
