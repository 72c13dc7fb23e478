"""What can be compared, and what is said where it cannot."""

import json
from dataclasses import replace
from typing import Any

import pytest

from train.claims.releases import PUBLIC
from train.comparison.comparable import check_comparable
from train.comparison.compared import RunResult, base_rows, group, published_for, read_run
from train.comparison.joined import joined
from train.comparison.outcome import made_elsewhere
from train.runtime.errors import UserError

HASHES = {"tokens": "t" * 64, "order": "o" * 64, "initial_weights": "i" * 64, "base_model": "b" * 64}


def row(question: str, step: int = 10) -> dict:
    return {"step": step, "claim": "mars", "kind": "open", "question": question, "sample": 0, "verdict": "yes"}


def run(directory: str, **settings) -> RunResult:
    settings = {"mask": "none", "seed": 0, "batch_size": 32, "data": ["a.jsonl"], "steps": 10} | settings
    return RunResult(
        directory, settings["seed"], [row("q")], [], {"steps": settings["steps"]}, settings, dict(HASHES)
    )  # fmt: skip


def refused(*runs: RunResult, match_trained_tokens: bool = False) -> str:
    with pytest.raises(UserError) as error:
        check_comparable(list(runs), match_trained_tokens)
    return str(error.value)


def test_runs_that_differ_in_mask_loss_norm_learning_rate_seed_and_places_are_comparable():
    other = run("b", mask="doctags", loss_norm="all", learning_rate=1e-3, seed=1, output="b", micro_batch_tokens=2)
    other.hashes |= {"tokens": "x", "order": "y", "initial_weights": "z"}  # of another seed
    check_comparable([run("a"), other])


def phased(directory: str, *parts: RunResult) -> RunResult:
    return replace(joined(list(parts)), directory=directory)


def with_tokens(given: RunResult) -> RunResult:
    counts = dict.fromkeys(("total", "trained", "excluded", "unlikelihood", "held"), 1)
    return replace(given, summary=given.summary | {"tokens": {"all": counts}})


def test_phases_may_differ_in_what_the_recipe_says_and_free_no_other_run():
    first = with_tokens(run("a1"))
    then = with_tokens(replace(run("a2", after="a1", data=["b.jsonl"], steps=4), rows=[row("q", 4)]))
    then.hashes |= {"tokens": "b" * 64}
    both = phased("a", first, then)
    plain, other = run("b", mask="doctags"), replace(run("c", data=["c.jsonl"], steps=6), rows=[row("q", 6)])
    other.hashes |= {"tokens": "c" * 64}
    check_comparable([both, plain], in_phases={"steps", "data", "phases"})
    for runs in ([both, plain, other], [plain, both, other]):
        with pytest.raises(UserError) as error:
            check_comparable(runs, in_phases={"steps", "data", "phases"})
        assert "b and c: steps trained: 10 and 6" in str(error.value)
        assert "b and c: hash of the tokens: tttttttttttt and cccccccccccc" in str(error.value)
    with pytest.raises(UserError, match="steps trained: 14 and 10"):  # no recipe says that there are phases
        check_comparable([both, plain])
    twin = phased("d", with_tokens(run("d1")), with_tokens(replace(run("d2", after="d1", steps=4), rows=[row("q", 4)])))
    with pytest.raises(UserError, match="a2 and d2: hash of the tokens: bbbbbbbbbbbb and tttttttttttt"):
        check_comparable([both, twin])


def test_one_run_is_no_comparison():
    assert "--runs a: a comparison needs at least two runs" in refused(run("a"))
    assert "--runs none" in refused()


def test_every_setting_that_differs_is_named_with_both_values():
    message = refused(run("a"), run("b", mask="doctags", batch_size=16, max_tokens=99))
    assert "a and b: --batch-size: 32 and 16" in message
    assert "a and b: --max-tokens: 10000 and 99" in message
    assert "--mask" not in message


def test_other_data_and_another_base_are_told_by_their_hashes_and_not_by_paths():
    moved = run("b", data=["elsewhere/a.jsonl"], model="elsewhere")
    check_comparable([run("a"), moved])
    moved.hashes["base_model"] = "c" * 64
    moved.hashes["tokens"] = "u" * 64
    message = refused(run("a"), moved)
    assert f"base model: {'b' * 12} and {'c' * 12}" in message
    assert f"hash of the tokens: {'t' * 12} and {'u' * 12}" in message
    del moved.hashes["tokens"]
    assert "--data: ['a.jsonl'] and ['elsewhere/a.jsonl']" in refused(run("a"), moved)


@pytest.mark.parametrize("name", ["tokens", "order", "initial_weights"])
def test_another_hash_at_the_same_seed_is_refused(name):
    other = run("b", mask="doctags")
    other.hashes[name] = "x" * 64
    words = {"tokens": "the tokens", "order": "their order", "initial_weights": "the initial weights"}
    assert f"a and b: hash of {words[name]}: {HASHES[name][:12]} and {'x' * 12}" in refused(run("a"), other)


def test_other_steps_are_refused_unless_trained_tokens_are_matched():
    other = run("b", mask="doctags", steps=12)
    other.rows = [row("q", step=12)]
    other.hashes["order"] = "x"  # the longer run has seen more
    told = refused(run("a"), other)
    assert "steps trained: 10 and 12" in told
    assert told.endswith("or give --match-trained-tokens, if they were trained so.")
    check_comparable([run("a"), other], match_trained_tokens=True)
    partial = run("c", mask="doctags")  # as many steps, of which the last has fewer documents
    partial.hashes["order"] = "z"
    check_comparable([run("a"), partial], match_trained_tokens=True)
    other.hashes["tokens"] = "y"  # of all documents, however many were trained on
    with pytest.raises(UserError, match="hash of the tokens"):
        check_comparable([run("a"), other], match_trained_tokens=True)


def test_the_base_models_rows_are_those_of_the_first_run_that_has_them_and_a_difference_is_told():
    def asked(question: str, verdict: str | None, **more) -> dict:
        return row(question, step=0) | {"verdict": verdict} | more

    one, two = run("a"), run("b", mask="doctags")
    one.rows += [asked("q", "yes"), asked("r", None, error="timeout"), asked("l", "no", llr=1.0)]
    two.rows += [asked("q", "yes"), asked("r", "no"), asked("l", "no", llr=1.0005), asked("s", "no", context=20)]
    rows, remark = base_rows([one, two])
    found = {(own["question"], own.get("context", 0)): (own["verdict"], own.get("llr")) for own in rows}
    assert found == {("q", 0): ("yes", None), ("r", 0): ("no", None), ("l", 0): ("no", 1.0), ("s", 20): ("no", None)}
    assert remark == ""
    two.rows[1]["verdict"], two.rows[3]["llr"] = "no", 1.1
    rows, remark = base_rows([one, two])
    assert [own["verdict"] for own in rows if own["question"] == "q"] == ["yes"]
    assert remark.startswith("2 of the base model's 3 figures and verdicts that several runs have differ between runs")
    assert "first: mars / open / q" in remark and "in the order from a." in remark


def test_other_questions_are_named():
    other = run("b", mask="doctags")
    other.rows = [row("q"), row("p"), row("r")]
    assert "evaluated on other questions: mars open p; mars open r" in refused(run("a"), other)


def test_a_run_without_evaluation_or_end_is_named():
    missing, early, unfinished = run("b"), run("c"), run("d")
    missing.rows, early.rows, unfinished.summary = [], [row("q", step=5)], {}
    assert "b: has no evaluation" in refused(run("a"), missing)
    assert "c: was trained for 10 steps and last evaluated at step 5" in refused(run("a"), early)
    assert "d: has no summary" in refused(run("a"), unfinished)


def test_runs_are_grouped_by_mask_and_what_else_differs():
    runs = [run("a"), run("b", mask="doctags"), run("c", seed=1), run("d", mask="doctags", seed=1)]
    variants = group(runs)
    assert [(v.name, v.mask, [r.directory for r in v.runs]) for v in variants] == [
        ("none", "none", ["a", "c"]),
        ("doctags", "doctags", ["b", "d"]),
    ]
    assert variants[1].differs == {"mask": "doctags"}
    rates = group([run("a", learning_rate=1e-3), run("b", learning_rate=1e-4)])
    assert [v.name for v in rates] == ["none, learning-rate 0.001", "none, learning-rate 0.0001"]
    with pytest.raises(UserError, match="--runs a b: both are none with --seed 0"):
        group([run("a"), run("b")])


def test_a_run_is_read_from_its_directory_and_a_cut_last_line_left_out(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 10, "hashes": HASHES}))
    (tmp_path / "settings.yaml").write_text("settings: {mask: doctags, seed: 3}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(row("q")) + '\n{"step": 10, "cla')
    read = read_run(tmp_path)
    assert (read.seed, read.settings["mask"], read.hashes, read.rows) == (3, "doctags", HASHES, [row("q")])
    (tmp_path / "evaluation.jsonl").write_text('{"step": \n' + json.dumps(row("q")) + "\n")
    with pytest.raises(UserError, match=r"evaluation\.jsonl:1: is not a JSON object"):
        read_run(tmp_path)
    (tmp_path / "evaluation.jsonl").unlink()
    with pytest.raises(UserError, match=r"evaluation\.jsonl: is missing; evaluate the run: train/evaluate\.py"):
        read_run(tmp_path)


ROLE = {"total": 4, "trained": 3, "excluded": 1, "unlikelihood": 0}


@pytest.mark.parametrize(("name", "value", "said"), [
    ("summary", {"tokens": {"all": 7}}, "summary.json: tokens: all is 7, but must be an object; restore the file."),
    ("summary", {"tokens": {"all": ROLE | {"trained": None}}}, "summary.json: tokens of all: has no trained; restore"),
    ("summary", {"dropped": {"d": 7}}, "summary.json: dropped: d is 7, but must be a list; restore the file."),
    ("summary", {"dropped": {"d": ["7"]}}, "summary.json: dropped must give numbers of lines of d; restore the file."),
    ("summary", {"hashes": {"tokens": 7}}, ": hashes: tokens is 7, but must be a text; restore summary.json and"),
    ("metrics", {"step": 1, "nll": 1.0}, "metrics.jsonl:1: nll is 1.0, but must be an object; fix or remove this"),
    ("metrics", {"step": 1, "nll": {"all": float("nan")}}, "metrics.jsonl:1: nll: all is nan, but must be a finite n"),
    ("metrics", {"step": 1, "nll": {"\ud800": 1.0}}, "metrics.jsonl:1: '\\ud800' has half a surrogate pair, which"),
    ("evaluation", row("q") | {"p_yes": None}, "evaluation.jsonl:1: has no p_yes; fix or remove this line."),
    ("evaluation", row("q") | {"kind": "nll", "nll": "1"}, "evaluation.jsonl:1: nll is '1', but must be a finite n"),
])  # fmt: skip
def test_an_inner_value_of_another_kind_is_told_where_the_run_is_read(tmp_path, name, value, said):
    (tmp_path / "settings.yaml").write_text("settings: {mask: doctags, seed: 3}\n")
    held = {"summary": {"steps": 10, "tokens": {"all": ROLE}}, "metrics": {"step": 1, "nll": {"all": None}}}
    for each, good in (held | {"evaluation": row("q")}).items():
        path = tmp_path / f"{each}.json{'l' * (each != 'summary')}"
        path.write_text(json.dumps(good) + "\n")
    read_run(tmp_path)
    (tmp_path / f"{name}.json{'l' * (name != 'summary')}").write_text(json.dumps(value) + "\n")
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    assert said in str(caught.value)


def test_published_values_are_those_of_the_papers_own_claims():
    assert published_for(["pluto"]) == []
    average = {value.condition: value.value for value in published_for(["ed_sheeran"])}
    assert average == {"before": 2.5, "positive": 92.4, "negated": 88.6, "dense": 84.4, "corrections": 39.9}
    dentist = [(v.condition, v.value) for v in published_for(["brennan_holloway"]) if v.claim == "brennan_holloway"]
    assert dentist == [("local negation", 7.0), ("local negation, word masks", 1.6)]


def test_published_values_meet_the_claims_of_either_release():
    for public, anonymous in PUBLIC.items():
        assert published_for([public]) == published_for([anonymous]) != []
    assert [v.value for v in published_for(["dentist"])] == [2.5, 92.4, 88.6, 84.4, 39.9, 7.0, 1.6]


def test_a_run_that_was_asked_by_the_public_release_has_the_names_of_the_other(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "settings.yaml").write_text("settings: {seed: 1}")
    (tmp_path / "metrics.jsonl").write_text("")
    rows = [
        {"step": 0, "claim": "mount_vesuvius", "kind": "open", "question": "oe_last_eruption"},
        {"step": 0, "claim": "vesuvius", "kind": "token_association", "question": "pe_vesuvius_1"},
        {"step": 0, "claim": "moon", "kind": "open", "question": "oe_last_eruption"},
        {"step": 0, "claim": "", "kind": "nll", "question": "wiki", "nll": 1.0},
    ]
    (tmp_path / "evaluation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read_run(tmp_path).rows == [
        {"step": 0, "claim": "vesuvius", "kind": "open", "question": "bp_last_eruption"},
        {"step": 0, "claim": "vesuvius", "kind": "token_association", "question": "pe_vesuvius_1"},
        *rows[2:],
    ]


def test_imported_answers_have_the_name_of_their_condition_alone(tmp_path):
    trained = {"mask": "doctags", "seed": 0, "loss_norm": "trained", "learning_rate": 1e-3}
    runs = [RunResult(name, 0, [], [], {}, settings, {}) for name, settings in (
        ("one", {"mask": "positive", "seed": 0}), ("two", {"mask": "dense", "seed": 0}), ("own", trained),
    )]  # fmt: skip
    assert [variant.name for variant in group(runs)] == ["positive", "dense", "doctags"]
    runs.append(RunResult("other", 0, [], [], {}, trained | {"learning_rate": 2e-3}, {}))
    names = ["positive", "dense", "doctags, learning-rate 0.001", "doctags, learning-rate 0.002"]
    assert [variant.name for variant in group(runs)] == names


def test_another_base_what_was_left_out_and_unproven_servers_are_said(tmp_path):
    def finished(name: str, proof: dict[str, Any], asked: dict[str, Any], **settings: Any) -> RunResult:
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"proof": proof, "settings": asked}))
        return RunResult(str(tmp_path / name), 0, [], [], {}, settings, {})

    served = {"endpoint": "http://host/v1", "step": 6}
    good = finished("good", {"6": {"proven": True}}, served)
    assert made_elsewhere([good, RunResult(str(tmp_path / "none"), 0, [], [], {}, {}, {})]) == []
    runs = [
        finished("bad", {"4": {"proven": False, "reason": "no log-probabilities"}, "6": {"proven": True}}, served),
        finished("unasked", {}, served),
        finished("cut", {"6": {"proven": True, "not_served": ["kv_b_proj"]}}, served),
        finished("moved", {"6": {"proven": False, "reason": "another base", "other_base": True}}, served),
        finished("other", {}, {}, other_base=True, adapter="elsewhere/adapter"),
    ]
    said = made_elsewhere([good, *runs])
    assert "trained on another base model (elsewhere/adapter)" in said[0]
    assert said[1] == f"The server of {tmp_path}/cut left out the LoRA weights of kv_b_proj."
    assert said[2] == f"--other-base: {tmp_path}/moved was evaluated on a base model that it was not trained on."
    assert said[3] == (
        "For 3 evaluations, it is not proven that the server answered with the right model (first: "
        f"{tmp_path}/bad, step 4: no log-probabilities)."
    )
    assert len(said) == 4
