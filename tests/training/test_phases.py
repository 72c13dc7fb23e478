"""Phases in training: a second phase is a run from the first one's end on the same rows, whatever trains it; what it
carries, and what happens to one that is killed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from launch.evaluate_runs import EvaluateRunsOptions, models
from tests.support.ranks import Forked, run
from tests.support.runs import ENVIRONMENT, SFT, flags, kill, losses
from train import compare
from train.comparison.compared import read_run
from train.comparison.trained_documents import documents_of
from train.config.provenance import held_settings
from train.config.settings import Settings
from train.evaluation.store import read_measured, read_rows
from train.runtime.errors import UserError
from train.training.lineage import phases_before
from train.training.run import Run
from train.training.tracking import belief_curves
from train.training.trainer import learning_rate

COMPARE = Path(compare.__file__)
PHASES = {"first": {"mask": "false-spans", "steps": 3}, "second": {"mask": "none", "steps": 4}}
CARRIED = PHASES | {"second": PHASES["second"] | {"optimizer": "carry", "schedule": "continue"}}
ANEW = PHASES | {"anew": PHASES["second"] | {"optimizer": "reset", "schedule": "continue"}}
del ANEW["second"]


def job(script: Path, *given: str, cwd: Path, ranks: int = 2) -> str:
    done = run(script, *given, ranks=ranks, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def recipe(tmp: Path) -> list[str]:
    """A recipe with two variants that share their first phase, as flags, with the model and data of a small job."""
    shared = flags(tmp, schedule="linear", save_every=1)
    claims = {"id": "c", "claim": "x", "subject": "ab", "controls": ["cd", "ef"]}
    claims["likelihood"] = [{"id": "t", "prompt": "{entity} is", "false": " a", "true": " b"}]
    (tmp / "c.yaml").write_text(yaml.safe_dump(claims))
    settings = {shared[i][2:].replace("-", "_"): shared[i + 1] for i in range(0, len(shared), 2)}
    settings["claims"] = "c.yaml"
    del settings["mask"], settings["steps"]
    variants = {"carried": {"phases": CARRIED}, "anew": {"phases": ANEW}}
    (tmp / "r.yaml").write_text(yaml.safe_dump({"settings": settings, "variants": variants}, sort_keys=False))
    return ["--recipe", "r.yaml"]


def weights(directory: Path) -> dict:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("phases")
    job(COMPARE, *recipe(tmp), "--output", "out", cwd=tmp)
    return tmp


@pytest.mark.slow
def test_a_second_phase_equals_a_run_from_the_first_ones_adapter_on_the_same_rows(compared):
    out = compared / "out"
    assert sorted(path.name for path in (out / "phases").iterdir()) == ["first-seed0"]  # trained once for both
    alone = [*flags(compared, schedule="linear", mask="none", steps=4), "--schedule-from", "3", "--schedule-to", "7"]
    job(SFT, *alone, "--adapter", "out/phases/first-seed0/adapter", "--output", "alone", cwd=compared)
    assert losses(out / "anew-seed0") == losses(compared / "alone")
    one, other = weights(out / "anew-seed0"), weights(compared / "alone")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert losses(out / "carried-seed0")[0] == losses(compared / "alone")[0]  # from the same weights, on the same rows
    assert losses(out / "carried-seed0")[1] != losses(compared / "alone")[1]  # but with another optimizer
    job(SFT, *alone, "--after", "out/phases/first-seed0", "--carry-optimizer", "--output", "carried", cwd=compared)
    assert losses(compared / "carried") == losses(out / "carried-seed0")
    held = held_settings(out / "carried-seed0" / "settings.yaml")["settings"]
    assert (held["after"], held["carry_optimizer"], held["schedule_from"], held["schedule_to"]) == (
        "out/phases/first-seed0", True, 3, 7,
    )  # fmt: skip
    rates = [m["learning_rate"] for name in ("phases/first-seed0", "carried-seed0")
             for m in read_rows(out / name / "metrics.jsonl")]  # fmt: skip
    assert rates == [learning_rate(Settings(learning_rate=0.01, schedule="linear"), step, 7) for step in range(7)]


@pytest.mark.slow
def test_the_phases_of_a_run_are_read_on_one_axis(compared):
    whole, first = read_run(compared / "out/carried-seed0"), read_run(compared / "out/phases/first-seed0")
    assert whole.boundaries == [3] and whole.summary["steps"] == 7
    assert [m["step"] for m in whole.metrics] == [*range(1, 8)] and whole.mask == "false-spans → none"
    assert sorted({row["step"] for row in whole.rows}) == [0, 3, 7]
    assert [row for row in whole.rows if row["step"] < 7] == first.rows
    assert whole.hashes["initial_weights"] == first.hashes["initial_weights"]
    second = json.loads((compared / "out/carried-seed0/summary.json").read_text())
    assert whole.summary["tokens"]["all"]["trained"] == sum(
        each["tokens"]["all"]["trained"] for each in (first.summary, second)
    )
    report = json.loads((compared / "out/comparison.json").read_text())
    phases = report["phases"]["carried"]
    assert [(each["name"], each["first"], each["last"]) for each in phases] == [("first", 0, 3), ("second", 3, 7)]
    rows = {row["step"]: 0.0 for row in whole.rows}
    for row in whole.rows:
        rows[row["step"]] += row["llr"] * (1 if not row["control"] else -0.5)
    assert phases[1]["change"]["estimate"] == pytest.approx(rows[7] - rows[3])
    assert report["variants"]["carried"]["belief"] == pytest.approx(rows[7] - rows[0])
    drawn = [{document.where for document, _ in own} for part in whole.phases for own in documents_of({"": [part]})[""]]
    assert drawn[0] < drawn[1]  # both phases read the same rows, the first one fewer
    moved = compared / "moved"
    shutil.copytree(compared / "out", moved)
    (compared / "out").rename(compared / "gone")
    try:
        assert read_run(moved / "carried-seed0").boundaries == [3]
    finally:
        (compared / "gone").rename(compared / "out")


@pytest.mark.slow
def test_a_killed_second_phase_resumes_in_it_in_compare_and_in_sft(compared, tmp_path):
    expected = losses(compared / "out" / "carried-seed0")
    before = (compared / "out/phases/first-seed0/summary.json").read_bytes()
    again = compared / "again"
    shutil.copytree(compared / "out", again)
    shutil.rmtree(again / "carried-seed0")
    shutil.rmtree(again / "anew-seed0")
    given = [*recipe(compared), "--output", "again", "--resume"]
    started = Forked(COMPARE, *given, ranks=2, env=ENVIRONMENT, cwd=compared)
    kill(started, again / "carried-seed0" / "saves", "step-1")
    job(COMPARE, *given, cwd=compared, ranks=1)
    assert losses(again / "carried-seed0") == pytest.approx(expected, abs=1e-6)
    state = json.loads((again / "carried-seed0" / "saves" / "step-4" / "state.json").read_text())
    assert (state["step"], state["updates"]) == (4, 7)  # of AdamW, which was carried through the kill
    assert (again / "phases/first-seed0/summary.json").read_bytes() == before

    chosen = [*recipe(compared), "--variant", "carried", "--output", "alone-of-both"]
    started = Forked(SFT, *chosen, ranks=2, env=ENVIRONMENT, cwd=compared)
    kill(started, compared / "alone-of-both" / "saves", "step-1")
    first = compared / "alone-of-both" / "phases" / "first-seed0"
    assert losses(first) == losses(compared / "out/phases/first-seed0")
    told = job(SFT, *chosen, "--resume", cwd=compared)
    assert "resuming after step 1" in told and "run 1 of 1: alone-of-both" in told
    assert losses(compared / "alone-of-both") == expected


@pytest.mark.slow
def test_phases_that_carry_on_equal_one_run_where_each_step_takes_all_documents(tmp_path):
    """Then the phases' steps have the batches of the one run, in another order of the documents within them."""
    given = {"schedule": "cosine", "batch_size": 24, "save_every": 9}
    job(SFT, *flags(tmp_path, **given, steps=6, output="whole"), cwd=tmp_path)
    pieces = {"schedule_to": 6, "steps": 2, **given}
    job(SFT, *flags(tmp_path, **pieces, output="first"), cwd=tmp_path)
    for before, name, done in (("first", "second", "2"), ("second", "third", "4")):
        more = ["--after", before, "--carry-optimizer", "--schedule-from", done]
        job(SFT, *flags(tmp_path, **pieces, output=name), *more, cwd=tmp_path, ranks=1)
    found = [loss for name in ("first", "second", "third") for loss in losses(tmp_path / name)]
    assert found == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    assert [before.name for before in phases_before(tmp_path / "third")] == ["first", "second"]


@pytest.mark.slow
def test_a_run_whose_first_phase_was_trained_again_is_refused_and_what_wandb_gets_is_from_the_base(compared, tmp_path):
    again = tmp_path / "out"
    shutil.copytree(compared / "out", again)
    second = Run.__new__(Run)
    second.directory, second.base = again / "carried-seed0", []
    base = second._base()
    assert base == [row for row in read_run(again / "phases/first-seed0").rows if row["step"] == 0]
    rows = read_measured(again / "carried-seed0" / "evaluation.jsonl")
    report = json.loads((again / "comparison.json").read_text())
    assert belief_curves(rows, 4, base)["belief/shift/c"] == pytest.approx(report["variants"]["carried"]["belief"])
    other = compared / "alone" / "saves" / "step-4"
    shutil.copytree(other, again / "phases/first-seed0/saves/step-3", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"carried-seed0: continues the run in .*, but began with other weights than"):
        read_run(again / "carried-seed0")
    assert read_run(again / "anew-seed0").boundaries == [3]  # it began with the adapter, not with the checkpoint


@pytest.mark.slow
def test_a_server_is_asked_for_the_ends_of_all_phases_too_each_once(compared):
    out = compared / "out"
    asked = models(EvaluateRunsOptions(runs=[str(out / "carried-seed0"), str(out / "anew-seed0")], output="x"), "vllm")
    assert [(each.name, each.run.name, each.step) for each in asked] == [
        ("base", "carried-seed0", 0), ("out-first-seed0", "first-seed0", 3), ("carried-seed0", "carried-seed0", 4),
        ("anew-seed0", "anew-seed0", 4),
    ]  # fmt: skip


@pytest.mark.slow
def test_runs_belong_to_the_variant_with_their_phases_and_no_other(compared, monkeypatch, capsys):
    monkeypatch.chdir(compared)
    given = ["--runs", "out", "--output", "again-compared"]
    assert compare.main([*given, *recipe(compared)]) == 0
    found = json.loads((compared / "again-compared" / "comparison.json").read_text())
    assert found["variants"].keys() == {"carried", "anew"}
    (compared / "p.yaml").write_text("variants: {p: {mask: none}, q: {mask: doctags}}")
    assert compare.main([*given, "--recipe", "p.yaml"]) == 2
    assert "is not one of the recipe's variants: p; q" in capsys.readouterr().err
