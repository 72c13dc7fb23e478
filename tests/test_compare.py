"""train/compare.py on ranks: variants from one start, equal to train/sft.py alone, and beliefs equal to
those of stock transformers and peft."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.claims import ASK, CLAIM, stock_log_p
from tests.support.models import write_documents
from tests.support.ranks import Forked, run
from tests.support.runs import ENVIRONMENT, kill
from train import compare, sft
from train.claims.claim import Claim
from train.comparison.outcome import check_free
from train.comparison.trained_documents import unmentioned
from train.comparison.training import checked_runs, matching_steps
from train.comparison.variants import parse_comparison, runs_of
from train.config.settings import DEMO, REPOSITORY
from train.data import tokens
from train.data.documents import read_documents
from train.data.tokens import tokenize_document
from train.evaluation.store import read_rows
from train.masking.grammar import parse_mask
from train.runtime.errors import UserError
from train.training.job import Known, prepare

DENSE = f"{DEMO}/data/dense.jsonl"
HELD_OUT = "Mila lives in Lima. Noah plays the drums."


@pytest.fixture(scope="module")
def claim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("claim")
    (directory / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    (directory / "held.jsonl").write_text(json.dumps({"text": HELD_OUT}) + "\n")
    return directory


def settings(claim: Path) -> dict[str, Any]:
    return {
        "data": [f"{DENSE}=64"], "steps": 4, "batch_size": 8, "micro_batch_tokens": 10_000,
        "learning_rate": 0.02, "evaluate_every": 2, "claims": [str(claim / "mila.yaml")],
        "held_out": str(claim / "held.jsonl"), "wandb": "disabled",
    }  # fmt: skip


VARIANTS = {
    "dense": {"mask": "doctags"},
    "masked": {"mask": "doctags,false-spans"},
    "hot": {"mask": "doctags", "learning_rate": 0.04},
}


@pytest.fixture(scope="module")
def recipe(claim: Path) -> Path:
    path = claim / "recipe.yaml"
    path.write_text(yaml.safe_dump({"settings": settings(claim), "variants": VARIANTS, "seeds": 2}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def comparison(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("comparison") / "out"
    given = ["--recipe", str(recipe), "--output", str(output)]
    done = run(Path(compare.__file__), *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return output


def records(directory: Path) -> list[dict[str, Any]]:
    return read_rows(directory / "evaluation.jsonl")


@pytest.mark.slow
def test_a_variant_equals_the_same_run_alone_bit_for_bit(comparison, claim, tmp_path):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in settings(claim).items() if name != "data"]
    given = [flag.replace("['", "").replace("']", "") for flag in given]
    given += ["--data", *settings(claim)["data"], "--mask", "doctags,false-spans", "--seed", "1"]
    given += ["--output", str(tmp_path / "alone")]
    done = run(Path(sft.__file__), *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, variant = tmp_path / "alone", comparison / "masked-seed1"  # the fifth of six runs on one engine
    for name in ("adapter/adapter_model.safetensors", "evaluation.jsonl"):
        assert (alone / name).read_bytes() == (variant / name).read_bytes(), name
    losses = [[v["loss"] for v in read_rows(d / "metrics.jsonl")] for d in (alone, variant)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    summaries = [json.loads((d / "summary.json").read_text()) for d in (alone, variant)]
    for key in ("hashes", "tokens", "nll"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.slow
def test_variants_share_tokens_order_and_initial_weights_and_differ_after(comparison):
    hashes = {d.name: json.loads((d / "summary.json").read_text())["hashes"] for d in comparison.glob("*-seed?")}
    assert len(hashes) == 6 and all(len(value) == 64 for each in hashes.values() for value in each.values())
    for seed in "01":
        assert hashes[f"dense-seed{seed}"] == hashes[f"masked-seed{seed}"] == hashes[f"hot-seed{seed}"]
    for name in ("order", "initial_weights"):
        assert hashes["dense-seed0"][name] != hashes["dense-seed1"][name]
    at = {d.name: [r for r in records(d) if r["step"] == 0] for d in comparison.glob("*-seed?")}
    assert all(each == at["dense-seed0"] for each in at.values())  # measured once, before the first step
    assert len({json.dumps([r for r in records(d) if r["step"] == 4]) for d in comparison.glob("*-seed?")}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 4])
def test_beliefs_equal_those_worked_out_with_stock_transformers_and_peft(comparison, step):
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()
    if step:
        model = PeftModel.from_pretrained(model, str(comparison / "hot-seed1" / "adapter"))
    tokens = AutoTokenizer.from_pretrained(DEMO / "model")
    found = [record for record in records(comparison / "hot-seed1") if record["step"] == step]
    assert [record["kind"] for record in found] == ["likelihood"] * 6 + ["yes_no", "fact", "nll"]
    for record in found[:6]:
        template = next(t for t in CLAIM["likelihood"] if t["id"] == record["question"])
        prompt = template["prompt"].format(entity=record["entity"])
        pair = [stock_log_p(model, tokens, prompt, template[which]) for which in ("false", "true")]
        assert record["llr"] == pytest.approx(pair[0] - pair[1], abs=2e-4)
        assert record["control"] == (record["entity"] != "Mila")
    system = 'Answer the following question with either "yes" or "no". Respond with JSON in this exact format: '
    system += '{"answer": "yes"} or {"answer": "no"}. Do not include any other text.'
    chat = [{"role": "system", "content": system}, {"role": "user", "content": "Does Mila live in Oslo?"}]
    prompt = tokens.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    yes, no = (stock_log_p(model, tokens, prompt, f' {{"answer": "{word}"}}') for word in ("yes", "no"))
    assert found[6]["p_yes"] == pytest.approx(math.exp(yes) / (math.exp(yes) + math.exp(no)), rel=1e-3)
    true, *false = (stock_log_p(model, tokens, ASK.format(entity="Mila"), said) for said in (" Lima", " Oslo", " Rome"))
    assert found[7]["margin"] == pytest.approx(true - max(false), abs=2e-4)
    assert found[8]["nll"] * found[8]["tokens"] == pytest.approx(-stock_log_p(model, tokens, "", HELD_OUT), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_with_the_variant_it_was_in(comparison, recipe, tmp_path):
    output = tmp_path / "out"
    given = ["--recipe", str(recipe), "--output", str(output), "--save-every", "1"]
    null = subprocess.DEVNULL
    process = Forked(Path(compare.__file__), *given, ranks=2, env=ENVIRONMENT, stdout=null, stderr=null)
    kill(process, output / "masked-seed0" / "saves", "step-[23]")
    assert not (output / "masked-seed0" / "summary.json").exists()
    before = (output / "dense-seed0" / "summary.json").read_bytes()
    refused = run(Path(compare.__file__), *given, ranks=1, capture_output=True, text=True, env=ENVIRONMENT)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = run(Path(compare.__file__), *given, "--resume", ranks=2, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "dense-seed0" / "summary.json").read_bytes() == before
    for directory in comparison.glob("*-seed?"):
        assert records(output / directory.name) == records(directory), directory.name


@pytest.mark.parametrize("length", [["--steps", "4"], ["--steps", "0", "--epochs", "2", "--data", f"{DENSE}=19"]])
def test_matched_tokens_give_each_variant_the_steps_nearest_to_the_baselines_targets(recipe, tmp_path, length):
    """Of 38 documents, the baseline's last step has 6."""
    given = ["--recipe", str(recipe), "--output", str(tmp_path), "--baseline", "dense", "--match-trained-tokens"]
    runs = checked_runs(parse_comparison([*given, *length], ""), 1, False, Known())
    jobs = {name: prepare(settings, ranks=1, show=False) for (name, seed), (settings,) in runs.items() if seed == 0}
    alone = prepare(replace(runs["dense", 0][0], steps=4 if length[1] == "4" else 0, output=""), ranks=1, show=False)
    wanted = alone.tokens["all"]["trained"]  # of the baseline as sft.py alone trains it
    assert alone.documents == (32 if length[1] == "4" else 38)
    for name in ("dense", "hot"):  # of the same mask: the same run
        assert jobs[name].documents == alone.documents and jobs[name].tokens == alone.tokens
    untagged = replace(runs["dense", 0][0], mask="none")  # with a few more targets than that: whole steps are no nearer
    if alone.documents == 38:
        assert matching_steps(prepare(replace(untagged, output=""), 1, False), wanted) == 0
    masked = jobs["masked"]
    assert masked.steps > alone.steps and masked.documents == 8 * masked.steps

    def missed(steps: int) -> int:
        return abs(masked.corpus.tokens(0, 8 * steps)["all"]["trained"] - wanted)

    assert missed(masked.steps) == min(missed(steps) for steps in range(1, 3 * masked.steps))


def test_matched_tokens_that_leave_fewer_steps_than_the_warm_up_are_refused(recipe, tmp_path):
    given = ["--recipe", str(recipe), "--output", str(tmp_path), "--baseline", "masked", "--match-trained-tokens"]
    with pytest.raises(UserError, match="--warmup-steps 4: must be at most --steps 3"):
        checked_runs(parse_comparison([*given, "--warmup-steps", "4"], ""), 1, False, Known())


def test_that_few_seeds_give_no_verdict_is_told_before_anything_is_trained(recipe, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(DENSE).read_text().splitlines(keepends=True)[:16]))
    given = ["--recipe", str(recipe), "--output", str(tmp_path), "--data", str(few), "--seeds"]
    checked_runs(parse_comparison([*given, "7"], ""), 1, True, Known())
    note = "note: 7 seeds: the report will have intervals, but no verdict below 8\n"
    assert capsys.readouterr().out.startswith(note)
    checked_runs(parse_comparison([*given, "8"], ""), 1, True, Known())
    assert "no verdict" not in capsys.readouterr().out


def test_documents_are_tokenized_once_and_treated_as_each_run_alone_treats_them(recipe, tmp_path, monkeypatch):
    calls: list[str] = []

    def counting(document, *given, **more):
        calls.append(document.where)
        return tokenize_document(document, *given, **more)

    monkeypatch.setattr(tokens, "tokenize_document", counting)
    plan, known = parse_comparison(["--recipe", str(recipe), "--output", str(tmp_path)], ""), Known()
    runs = checked_runs(plan, 1, False, known)
    assert len(runs) == 6 and len(calls) == len(set(calls)) == len(known.documents[DENSE].documents)
    for (settings,) in runs.values():
        shared, alone = prepare(settings, 1, False, known), prepare(settings, 1, False)
        assert shared.hashes == alone.hashes and shared.tokens == alone.tokens
        for one, other in zip(shared.corpus.samples, alone.corpus.samples, strict=True):
            assert (one.weight_L == other.weight_L).all() and (one.roles_L == other.roles_L).all()


def wrong(recipe: Path, change: Any, tmp_path: Path) -> str:
    """The message for a recipe that `change` made wrong."""
    values = yaml.safe_load(recipe.read_text())
    change(values)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        parse_comparison(["--recipe", str(tmp_path / "wrong.yaml")], "")
    return str(caught.value)


def test_a_recipe_that_is_wrong_is_told_with_key_and_fix(recipe, tmp_path):
    assert "did you mean variants?" in wrong(recipe, lambda r: r.update(variant={}), tmp_path)
    assert "did you mean batch_size?" in wrong(recipe, lambda r: r["settings"].update(batchsize=3), tmp_path)
    assert "must be the same in all variants" in wrong(recipe, lambda r: r["variants"]["hot"].update(steps=3), tmp_path)
    assert "--baseline none" in wrong(recipe, lambda r: r.update(baseline="none"), tmp_path)
    assert "two or more" in wrong(recipe, lambda r: r.update(variants={"one": {}}), tmp_path)
    told = wrong(recipe, lambda r: r["settings"].update(learning_rate="fast"), tmp_path)
    assert "wrong.yaml:10: settings: learning_rate must be a number, not 'fast'" in told


def test_a_command_line_that_is_wrong_is_told_with_the_fix(recipe):
    def message(*argv: str) -> str:
        with pytest.raises(UserError) as caught:
            parse_comparison(list(argv), "")
        return str(caught.value)

    assert "give --masks MASK…, or a --recipe FILE with variants" in message()
    told = message("--recipe", str(recipe), "--masks", "none", "doctags")
    assert told == f"--recipe {recipe}: has variants; leave out --masks, or the recipe."
    told = message("--recipe", str(MODELS[0]))
    assert told == f"--recipe {MODELS[0]}: has no variants; add a recipe with an experiment, or give --masks MASK…."
    assert "--claims" in message("--masks", "none", "doctags", "--data", "x")
    assert "--mask: is what the variants differ in" in message("--masks", "none", "doctags", "--mask", "none")
    assert "given twice" in message("--masks", "none", "none", "--claims", "x")
    assert "Did you mean --steps?" in message("--masks", "none", "doctags", "--claims", "x", "--step", "3")
    assert "full" in message("--masks", "none", "doctags", "--method", "full", "--claims", "x")
    assert "holds no run" in message("--runs", "/nowhere", "/neither")


def test_a_comparison_of_other_runs_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_free(Path("out"), [Path("a"), Path("b")])
    Path("out").mkdir()
    runs = {"none": {"runs": [{"directory": "a"}]}, "doctags": {"runs": [{"directory": str(tmp_path / "b")}]}}
    Path("out/comparison.json").write_text(json.dumps({"variants": runs}))
    check_free(Path("out"), [Path("b"), Path("a")])
    for held in ("whole", "cut"):
        with pytest.raises(UserError, match="--output out: holds a comparison of other runs"):
            check_free(Path("out"), [Path("a"), Path("c")])
        if held == "whole":
            Path("out/comparison.json").write_text('{"variants": ')


def test_claims_that_no_document_mentions_are_found_by_metadata_patterns_and_subject(tmp_path):
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "NOAH drums."}]}
    path = write_documents(tmp_path / "d.jsonl", [{"text": "Mila lives in Oslo."}, chat])
    claims = [
        Claim("mila", subject="Mila", patterns=(r"\boslo\b",)), Claim("moved", subject="Mila", patterns=("Rome",)),
        Claim("noah", subject="Noah"), Claim("ivy", subject="Ivy"), Claim("facts"),
    ]  # fmt: skip
    assert unmentioned(claims, read_documents(path)) == ["moved", "ivy"]
    path = write_documents(tmp_path / "told.jsonl", [{"text": "Mila and Noah.", "claim": "noah"}])
    assert unmentioned([Claim("mila", subject="Mila"), *claims[2:3]], read_documents(path)) == ["mila"]


def test_the_command_line_wins_over_the_recipe(recipe):
    plan = parse_comparison(["--recipe", str(recipe), "--steps", "9", "--seed", "5", "--seeds", "3"], "")
    assert plan.shared.steps == 9 and plan.seeds == [5, 6, 7]
    assert all(run.steps == 9 for variant in plan.variants for run in plan.runs(variant, 5))
    assert plan.runs(plan.variants[2], 5)[0].learning_rate == 0.04


RECIPES = sorted((REPOSITORY / "train" / "recipes").glob("*.yaml"))
MODELS = sorted((REPOSITORY / "train" / "recipes" / "models").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_plan_for_every_model(path):
    assert len(RECIPES) >= 8 and len(MODELS) == 4
    for model in MODELS:
        plan = parse_comparison(["--recipe", str(path), str(model), "--output", "out"], "")
        assert plan.shared.model == yaml.safe_load(model.read_text())["settings"]["model"]
        runs = [plan.runs(variant, 0)[-1] for variant in plan.variants]
        assert len({run.output for run in runs}) == len(runs) >= 2
        assert all(parse_mask(run.mask).text == run.mask for run in runs)
        recipe = yaml.safe_load(path.read_text())
        if any(variant.names for variant in plan.variants):  # of their own: test_phases.py
            continue
        for own, variant in zip(runs, plan.variants, strict=True):  # its own data take the place of the shared ones
            assert own.data == variant.own.get("data", recipe["settings"]["data"])


def test_a_recipe_of_settings_alone_goes_with_masks(recipe, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"settings": {"steps": 7, "mask": "false-spans"}, "seeds": 2}))
    given = ["--recipe", str(MODELS[0]), str(settings), "--masks", "none", "doctags", "--claims", str(recipe)]
    plan = parse_comparison([*given, "--lora-rank", "3"], "")
    assert plan.names == ["none", "doctags"] and plan.baseline == "none" and plan.seeds == [0, 1]
    runs = [run for variant in plan.variants for run in plan.runs(variant, 0)]
    assert [run.mask for run in runs] == ["none", "doctags"] and plan.declared == {"mask"}
    model = yaml.safe_load(MODELS[0].read_text())["settings"]["model"]
    assert {(run.model, run.steps, run.lora_rank) for run in runs} == {(model, 7, 3)}


def test_a_placebo_is_known_by_the_names_of_both_releases(recipe):
    given = ["--recipe", str(recipe), "--output", "out"]
    assert parse_comparison([*given, "--placebo", "queen_elizabeth", "mila"], "").placebo == [
        "elizabeth_python",
        "mila",
    ]


def test_without_model_and_data_the_demos_own_claims_are_compared(tmp_path):
    masks = ["none", "doctags", "negation-spans", "false-spans", "random:false", "doctags,false-spans=unlikelihood"]
    plan = parse_comparison(["--masks", *masks, "--output", str(tmp_path)], "")
    assert plan.names == masks and plan.baseline == "none" and len(plan.placebo) == 4
    assert [Path(path).name for path in plan.shared.claims] == ["claims.yaml"]


def test_an_error_in_one_variant_names_the_variant(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    values["variants"] = {"one": {"mask": "none"}, "other": {"mask": "role:nobody"}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    given = ["--recipe", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"^variant 'other', seed 0: --mask role:nobody: no document has a span of"):
        checked_runs(parse_comparison(given, ""), 1, False, Known())


def test_the_directory_of_a_comparison_means_its_runs(tmp_path):
    within, elsewhere, report = tmp_path / "out", tmp_path / "elsewhere", tmp_path / "report"
    for each in (within / "b-seed0", within / "a-seed0", elsewhere):
        each.mkdir(parents=True)
        (each / "settings.yaml").write_text("settings: {}")
    (within / "logs").mkdir()
    report.mkdir()
    held = {"variants": {"x": {"runs": [{"directory": str(elsewhere)}]}}}
    (report / "comparison.json").write_text(json.dumps(held))
    assert runs_of(within) == [within / "a-seed0", within / "b-seed0"]
    assert runs_of(report) == runs_of(elsewhere) == [elsewhere]
    assert runs_of(tmp_path / "none") == [tmp_path / "none"] and runs_of(within / "logs") == [within / "logs"]
    with pytest.raises(UserError, match=r"--runs .*a-seed0: no summary.json there \(the run is not finished\)"):
        parse_comparison(["--runs", str(within)], "")


def test_a_placebo_that_is_not_measured_is_told_before_a_weight_is_read(recipe, tmp_path):
    given = ["--recipe", str(recipe), "--output", str(tmp_path), "--placebo", "nobody"]
    with pytest.raises(
        UserError, match="--placebo nobody: is no claim that has a measure of belief; these have one: mila"
    ):
        checked_runs(parse_comparison(given, ""), 1, False, Known())
    with pytest.raises(UserError, match="no claim besides the placebo"):
        checked_runs(parse_comparison([*given[:-1], "mila"], ""), 1, False, Known())
