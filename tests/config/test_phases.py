"""Recipes with phases: the runs that they stand for, what they hand on, and what is refused."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from train.comparison.variants import parse_comparison
from train.config.phases import parse_phases, phase_directory
from train.config.settings import parse
from train.runtime.errors import UserError

TWO = """
settings: {data: [a.jsonl=8], steps: 10, learning_rate: 0.01, schedule: SCHEDULE, claims: [c.yaml]}
variants:
  held, then free:
    mask: doctags
    phases:
      held: {mask: "doctags,false-spans=hold"}
      free: {data: [b.jsonl=4], steps: 6, learning_rate: 0.02, OPTIMIZER, PIECE}
  held, then gone:
    mask: doctags
    phases:
      held: {mask: "doctags,false-spans=hold"}
      gone: {steps: 6, optimizer: reset, schedule: restart}
      end: {steps: 2, optimizer: carry, schedule: restart}
  plain: {mask: doctags}
"""


def recipe(tmp: Path, schedule: str = "constant", optimizer: str = "reset", piece: str = "restart") -> str:
    text = TWO.replace("SCHEDULE", schedule).replace("OPTIMIZER", f"optimizer: {optimizer}")
    (tmp / "r.yaml").write_text(text.replace("PIECE", f"schedule: {piece}"))
    return str(tmp / "r.yaml")


def test_phases_are_runs_of_which_each_continues_the_one_before_and_shared_ones_are_one_run(tmp_path):
    plan = parse_comparison(["--recipe", recipe(tmp_path), "--output", "out", "--seed", "3"], "")
    free, gone, plain = (plan.runs(variant, 3) for variant in plan.variants)
    assert [run.output for run in free] == ["out/phases/held-seed3", "out/held--then-free-seed3"]
    names = ["out/phases/held-seed3", "out/phases/held+gone-seed3", "out/held--then-gone-seed3"]
    assert [run.output for run in gone] == names
    assert [(run.after, run.carry_optimizer) for run in gone] == [("", False), (names[0], False), (names[1], True)]
    assert asdict(free[0]) == asdict(gone[0])
    assert [(run.mask, run.data, run.steps, run.learning_rate) for run in free] == [
        ("doctags,false-spans=hold", ["a.jsonl=8"], 10, 0.01), ("doctags", ["b.jsonl=4"], 6, 0.02),
    ]  # fmt: skip
    assert len(plain) == 1 and plain[0].output == "out/plain-seed3" and not plain[0].after


def test_a_variant_that_is_another_ones_first_phase_is_that_run(tmp_path):
    text = Path(recipe(tmp_path)).read_text() + '  held: {phases: {held: {mask: "doctags,false-spans=hold"}}}\n'
    (tmp_path / "r.yaml").write_text(text)
    plan = parse_comparison(["--recipe", str(tmp_path / "r.yaml"), "--output", "out"], "")
    chains = {variant.name: plan.runs(variant, 0) for variant in plan.variants}
    assert chains["held, then free"][0].output == chains["held"][0].output == "out/held-seed0"
    assert chains["held, then free"][1].after == "out/held-seed0"


@pytest.mark.parametrize(
    ("schedule", "piece", "expected"),
    [
        ("linear", "restart", [(0, 0), (0, 0)]),
        ("linear", "continue", [(0, 16), (10, 16)]),
        ("cosine", "continue", [(0, 16), (10, 16)]),
        ("constant", "continue", [(0, 0), (10, 0)]),  # its end plays no part, so that phases can be shared
    ],
)
def test_phases_whose_schedule_continues_are_pieces_of_one(tmp_path, schedule, piece, expected):
    given = ["--recipe", recipe(tmp_path, schedule, piece=piece), "--variant", "0"]
    name, phases = parse_phases(given, "")
    assert name == "held, then free" and [*phases] == ["held", "free"]
    assert [(each.schedule_from, each.schedule_to) for each in phases.values()] == expected
    assert parse(given, "") == replace(phases["held"], schedule_to=0)  # what plans a job plans its first phase


def test_variants_whose_phase_of_one_name_differs_are_refused_with_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"both have the phase held, .* schedule_to is 16 in one and 0 in the other"):
        parse_comparison(["--recipe", recipe(tmp_path, "linear", piece="continue")], "")
    text = Path(recipe(tmp_path)).read_text().replace('"doctags,false-spans=hold"', "none", 1)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"'held, then free' and 'held, then gone': .* mask is 'none' in one and"):
        parse_comparison(["--recipe", str(tmp_path / "r.yaml")], "")
    with pytest.raises(UserError, match="--match-trained-tokens: phases and doses decide the steps"):
        parse_comparison(["--recipe", recipe(tmp_path), "--match-trained-tokens"], "")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("{}", "phases: must be a mapping of names to settings"),
        ("[none]", "phases: must be a mapping of names to settings"),
        ("{a: {mask: none}, b: {mask: none}}", "b: optimizer is not given; every phase after the first must say"),
        ("{a: {}, b: {optimizer: reset}}", "b: schedule is not given; .*schedule: restart or schedule: continue"),
        (
            "{a: {}, b: {optimizer: keep, schedule: restart}}",
            "b: optimizer is keep; .*optimizer: reset or optimizer: carry",
        ),
        ("{a: {optimizer: reset}}", "a: optimizer says what the phase before hands on; the first phase has none"),
        ("{a: {lora_rank: 3}}", "a: lora_rank cannot differ between phases; put it under settings"),
        ("{a: {}, b: {optimizer: reset, schedule: continue}}", "continue makes a and b pieces .* give steps for each"),
        ("{a: {steps: fast}}", "a: steps must be a whole number, not 'fast'"),
        ("{a: {}, b: {optimiser: carry}}", "b: optimiser is not a setting of a phase; did you mean optimizer"),
        ("{a: 3}", "a must be a mapping of settings, not 3"),
    ],
)
def test_phases_that_are_wrong_are_told_with_the_fix(tmp_path, phases, message):
    (tmp_path / "r.yaml").write_text(f"variants: {{plain: {{mask: none}}, two: {{phases: {phases}}}}}")
    with pytest.raises(UserError, match=message):
        parse_phases(["--recipe", str(tmp_path / "r.yaml"), "--variant", "two"], "")


@pytest.mark.parametrize("flag", [["--mask", "none"], ["--steps", "4"], ["--data", "c.jsonl"]])
def test_what_phases_differ_in_is_not_taken_from_the_command_line(tmp_path, flag):
    with pytest.raises(UserError, match=rf"{flag[0]}: is what the variants differ in"):
        parse_phases(["--recipe", recipe(tmp_path), "--variant", "0", *flag], "")


def test_a_run_to_continue_must_be_finished_and_have_what_is_carried(tmp_path):
    from train.training.early import continued

    settings = parse(["--after", str(tmp_path / "run"), "--carry-optimizer"], "")
    with pytest.raises(UserError, match=r"--after .*run: no finished run is there"):
        continued(settings)
    (tmp_path / "run" / "saves").mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text('{"steps": 9}')
    with pytest.raises(UserError, match=r"has no training checkpoint of its end .*Leave out --carry-optimizer"):
        continued(settings)
    for name in ("step-9", "step-10"):
        (tmp_path / "run" / "saves" / name).mkdir()
        (tmp_path / "run" / "saves" / name / "state.safetensors").touch()
    assert continued(settings).adapter == str(tmp_path / "run" / "saves" / "step-9")
    assert continued(parse(["--after", str(tmp_path / "run")], "")).adapter == str(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match="--carry-optimizer: has no effect without --after"):
        parse(["--carry-optimizer"], "")
    with pytest.raises(UserError, match="--adapter, --after: both say"):
        parse(["--after", "a", "--adapter", "b"], "")


def test_phases_that_would_share_a_directory_are_refused_and_long_names_are_cut(tmp_path):
    text = """
settings: {data: [a.jsonl], steps: 3, claims: [c.yaml]}
variants:
  a: {phases: {held (1): {mask: none}, free: {optimizer: reset, schedule: restart}}}
  b: {phases: {"held [1]": {mask: doctags}, free: {optimizer: reset, schedule: restart}}}
"""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"phases held \(1\) and held \[1\]: would have the same directory; rename one"):
        parse_comparison(["--recipe", str(tmp_path / "r.yaml")], "")
    assert phase_directory(Path("o"), ("a", "b"), 0) != phase_directory(Path("o"), ("a-b",), 0)
    assert len(phase_directory(Path("o"), ("n" * 60,) * 9, 0).name) < 150
    with pytest.raises(UserError, match="--stop-after: of which phase is not said"):
        parse_phases(["--recipe", recipe(tmp_path), "--variant", "0", "--stop-after", "2"], "")
