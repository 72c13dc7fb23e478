"""train/evaluate.py --model on ranks: scored and answered in the training engine, judged by a server."""

import json
import shutil
from collections import Counter
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.support.checkpoints import stock_model
from tests.support.claims import CLAIM, stock_log_p, stock_log_p_by_layer
from tests.support.layouts import LAYOUTS
from tests.support.ranks import run
from tests.support.runs import ENVIRONMENT
from tests.support.servers import ScriptedServer, completion
from train import compare, evaluate, sft
from train.claims.claim import read_claims
from train.config.provenance import record
from train.config.settings import DEMO, parse
from train.data.template import template_time
from train.data.tokenizer import load_tokenizer
from train.demo.belief import load
from train.evaluation import battery_records
from train.evaluation.in_engine import check_template_time, keep
from train.evaluation.likelihood import answer_prompt
from train.evaluation.measures import at_step, identity
from train.evaluation.store import Records, read_rows
from train.runtime.errors import UserError

OPEN = [{"id": "home", "question": "Where does Mila live?"}, {"id": "pet", "question": "Which pet does Mila have?"}]
JUDGES = {"open": 'Does <answer>{answer}</answer> to {question} say Oslo? {{"answer": "yes/no"}}'}


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    (tmp_path / "mila.yaml").write_text(yaml.safe_dump(CLAIM | {"open": OPEN, "judges": JUDGES}))
    return tmp_path / "mila.yaml"


@pytest.mark.slow
def test_a_model_is_scored_and_answers_in_the_engine_and_a_second_run_asks_for_nothing(tmp_path, claims):
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "Mila lives in Oslo."}) + "\n")
    given = ["--model", str(DEMO / "model"), "--claims", str(claims), "--samples", "2", "--max-tokens", "8"]

    def measured(output: str, *more: str) -> list[dict]:
        done = run(
            Path(evaluate.__file__), *given, *more, "--output", str(tmp_path / output), ranks=2, capture_output=True,
            text=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return read_rows(tmp_path / output / "evaluation.jsonl")

    with ScriptedServer(lambda _: completion('{"answer": "no", "reason": "r"}'), models=["judge"]) as server:
        judge = ["--judge", server.url, "--judge-model", "judge"]
        rows = measured("out", *judge)
        asked = len(server.asked)
        assert measured("out", *judge) == rows and len(server.asked) == asked == 4
    kinds = [row["kind"] for row in rows]
    assert sorted(kinds) == ["fact", *["likelihood"] * 6, *["open"] * 4, *["yes_no"] * 3]
    assert ["p_yes" in row for row in rows if row["kind"] == "yes_no"] == [True, False, False]  # scored, and answered
    answers = [row for row in rows if row["kind"] == "open"]
    assert all(row["answer"] and row["verdict"] == "no" and row["step"] == 0 for row in answers)

    in_context = measured("context", "--documents", f"{tmp_path / 'documents.jsonl'}=1")
    assert all(row["context"] == 1 for row in in_context)

    def home(rows: list[dict]) -> float:
        return next(row["llr"] for row in rows if row["kind"] == "likelihood" and row["entity"] == "Mila")

    assert home(in_context) != home(rows)


@pytest.mark.slow
def test_a_model_and_an_endpoint_at_once_or_an_adapter_of_another_base_are_refused(tmp_path, claims):
    given = ["--claims", str(claims), "--output", str(tmp_path / "out")]
    assert evaluate.main(given) == 2
    assert evaluate.main([*given, "--model", str(DEMO / "model"), "--endpoint", "http://localhost:1"]) == 2
    assert evaluate.main([*given, "--model", str(DEMO / "model"), "--adapter", str(tmp_path)]) == 2
    assert not (tmp_path / "out" / "evaluation.jsonl").exists()


def test_questions_are_asked_of_an_adapter_at_the_time_that_its_run_told_the_template(tmp_path, shared_cases):
    shutil.copytree(DEMO / "model", tmp_path / "model")
    shutil.copy(shared_cases / "tokenizers" / "clock" / "tokenizer_config.json", tmp_path / "model")
    (tmp_path / "run").mkdir()
    run_of = parse(["--model", str(tmp_path / "model"), "--template-time", "2024-07-26"], "")
    (tmp_path / "run" / "settings.yaml").write_text(record(run_of, {}))
    adapter = str(tmp_path / "run" / "adapter")
    for time in ("2024-07-26", "2024-07-26T00:00:00"):
        check_template_time(adapter, load_tokenizer(tmp_path / "model", template_time(time)))
    told = r"--template-time 2026-01-01T00:00:00: in the run of .* got 2024-07-26; give --template-time 2024-07-26,"
    with pytest.raises(UserError, match=told):
        check_template_time(adapter, load_tokenizer(tmp_path / "model"))
    check_template_time(adapter, load_tokenizer(DEMO / "model"))  # which does not ask
    check_template_time(str(tmp_path / "elsewhere"), load_tokenizer(tmp_path / "model"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with mila.yaml and the run of two steps, whose first one's adapter is kept. The rank of experts is
    padded."""
    tmp = tmp_path_factory.mktemp("trained")
    (tmp / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    given = [
        "--model",
        str(DEMO / "model"),
        "--data",
        f"{DEMO}/data/dense.jsonl=16",
        "--steps",
        "2",
        "--batch-size",
        "8",
    ]
    given += ["--claims", str(tmp / "mila.yaml"), "--wandb", "disabled", "--learning-rate", "0.02"]
    given += ["--adapters-at", "1", "--evaluate-at", "1", "--expert-lora-rank", "3", "--output", str(tmp / "run")]
    done = run(Path(sft.__file__), *given, ranks=1, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return tmp


def measured(tmp: Path, output: Path, *more: str, adapters: list[Path], ranks: int = 1):
    given = ["--model", str(DEMO / "model"), "--claims", str(tmp / "mila.yaml"), "--output", str(output), *more]
    given += ["--adapter", *map(str, adapters)]
    return run(Path(evaluate.__file__), *given, ranks=ranks, capture_output=True, text=True, env=ENVIRONMENT)


def values_of(directory: Path) -> dict[tuple, list]:
    """The values of each measurement at each step."""
    rows = read_rows(directory / "evaluation.jsonl")
    return {(row["step"], identity(row)): [row.get(name) for name in ("llr", "p_yes", "margin")] for row in rows}


@pytest.mark.slow
def test_an_adapter_is_measured_beside_its_base_and_not_among_another_models_rows(trained, tmp_path):
    own, of_run = trained / "run" / "adapter", values_of(trained / "run")
    out = tmp_path / "out"
    assert measured(trained, out, adapters=[own]).returncode == 0
    found = values_of(out)
    assert {step for step, _ in found} == {0, 2} and 3 * len(found) == 2 * len(of_run)
    for key, values in found.items():
        assert values == pytest.approx(of_run[key], abs=1e-4)
    assert "shift" in json.loads((out / "evaluation.json").read_text())["likelihood"]
    refused = measured(trained, out, "--step", "0", adapters=[own])
    assert refused.returncode == 2 and "--step 0: means the base model" in refused.stderr
    before = (trained / "run" / "evaluation.jsonl").read_bytes()
    assert measured(trained, trained / "run", adapters=[own]).returncode == 0  # its own run, which has its scores
    assert (trained / "run" / "evaluation.jsonl").read_bytes() == before
    other = tmp_path / "other"
    shutil.copytree(own, other)
    factors = load_file(other / "adapter_model.safetensors")
    save_file({name: factor * 1.01 for name, factor in factors.items()}, other / "adapter_model.safetensors")
    for output in (out, trained / "run"):
        refused = measured(trained, output, "--step", "2", adapters=[other])
        assert refused.returncode == 2 and "not of this model" in refused.stderr


@pytest.mark.slow
def test_adapters_are_measured_together_on_a_base_that_is_loaded_once(trained, tmp_path):
    own, of_run = trained / "run" / "adapter", values_of(trained / "run")
    kept = trained / "run" / "adapters" / "step-1"
    many = measured(trained, tmp_path / "many", adapters=[own, kept], ranks=2)
    assert many.returncode == 0 and many.stdout.count("(rank 0)") == 1, many.stderr[-2000:]
    found = values_of(tmp_path / "many")
    assert {step for step, _ in found} == {0, 1, 2} and len(found) == len(of_run)
    for key, values in found.items():
        assert values == pytest.approx(of_run[key], abs=1e-4)
    refused = measured(trained, tmp_path / "twice", adapters=[own, own])
    assert refused.returncode == 2 and "was trained for 2 steps, as" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method", "ranks"),
    [("kimi-k2.5", "lora", 2), ("kimi-k2.5", "qlora", 2), ("qwen3.5-bf16", "qlora", 1), ("qwen3.5-fp8", "lora", 4)],
)
def test_beliefs_of_quantized_experts_are_those_of_their_decoded_weights_in_stock_transformers(
    tmp_path, claims, layout, method, ranks
):
    """INT4 and FP8 as on disk, whatever the method, and NF4, by bitsandbytes' own round trip of BF16. After every
    decoder layer by transformers' hidden states, and after the last one as without --by-layer."""
    base = LAYOUTS[layout](tmp_path / layout)
    exact = "fp8" not in layout  # FP8 decodes into BF16
    for shard in (
        base.glob("*.safetensors") if exact else ()
    ):  # what is plain in F32, so that all is computed with in it
        wide = {
            n: t.float() if t.dtype == torch.bfloat16 and "scale" not in n else t for n, t in load_file(shard).items()
        }
        save_file(wide, shard, {"format": "pt"})
    given = ["--model", str(base), "--method", method, "--claims", str(claims), "--output", str(tmp_path / "out")]
    given += ["--by-layer", "--expert-parallel", str(min(ranks, 2))]
    done = run(Path(evaluate.__file__), *given, ranks=ranks, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    measured = read_rows(tmp_path / "out" / "evaluation.jsonl")
    assert all(("layers" in row) == (row["kind"] in ("likelihood", "fact")) for row in measured)
    assert all(row["layers"][-1] == row.get("llr", row.get("margin")) for row in measured if "layers" in row)
    rows = [row for row in measured if row["kind"] == "likelihood"]
    model, tokens = stock_model(base), AutoTokenizer.from_pretrained(base)
    if layout != "kimi-k2.5":
        for name, weight in model.named_parameters():
            for matrix in weight.data if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else ():
                matrix.copy_(bnb.dequantize_4bit(*bnb.quantize_4bit(matrix, None, None, 64, True, "nf4")))
    expected: dict[tuple[str, str], np.ndarray] = {}
    for template in CLAIM["likelihood"]:
        for entity in ("Mila", "Noah", "Ivy"):
            prompt = template["prompt"].format(entity=entity)
            false, true = (stock_log_p_by_layer(model, tokens, prompt, template[which]) for which in ("false", "true"))
            expected[template["id"], entity] = false - true
    found = {(row["question"], row["entity"]): np.array(row["layers"]) for row in rows}
    assert found.keys() == expected.keys() and len(found) == 6
    assert all(len(own) == len(expected[key]) > 1 for key, own in found.items())
    off = max(abs(found[key] - expected[key]).max() for key in found)
    assert off < (1e-3 if exact else 0.3), (off, found, expected)  # that of rounding to BF16


def test_rows_without_layers_are_measured_again_by_rows_that_have_them(tmp_path):
    row = {
        "claim": "c",
        "kind": "likelihood",
        "question": "a",
        "sample": 0,
        "entity": "S",
        "control": False,
        "llr": 1.0,
    }
    records = Records(tmp_path)
    try:
        for found in (row, row, row | {"layers": [0.5, 1.0]}, row | {"layers": [0.5, 1.0]}, row):
            keep(records, [found], 0, 0, "model")
    finally:
        records.close()
    rows = read_rows(tmp_path / "evaluation.jsonl")
    assert ["layers" in each for each in rows] == [False, True]
    assert [each.get("layers") for each in at_step(rows, 0)] == [[0.5, 1.0]]


@pytest.mark.slow
def test_a_comparisons_directory_means_the_models_of_its_runs(tmp_path, claims):
    """Each is measured as it is alone, into its own run; the base model into the first."""
    output = tmp_path / "out"
    given = ["--masks", "none", "false-spans", "--data", f"{DEMO}/data/dense.jsonl=16", "--epochs", "1"]
    given += ["--batch-size", "8", "--claims", str(claims), "--wandb", "disabled", "--output", str(output)]
    done = run(Path(compare.__file__), *given, ranks=1, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [output / "false-spans-seed0", output / "none-seed0"]
    before = [read_rows(each / "evaluation.jsonl") for each in runs]
    model = ["--model", str(DEMO / "model"), "--claims", str(claims)]

    def measured(*more: str, ranks: int = 2):
        script = Path(evaluate.__file__)
        return run(script, *model, *more, ranks=ranks, capture_output=True, text=True, env=ENVIRONMENT)

    fresh = tmp_path / "fresh"
    done = measured("--adapter", str(output), "--output", str(fresh))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model 1 of 2: " in done.stdout and f"model 2 of 2: {output}/none-seed0/adapter" in done.stdout
    for each, rows in zip(runs, before, strict=True):
        trained = {(row["step"], identity(row)): row for row in rows}
        found = read_rows(fresh / each.name / "evaluation.jsonl")
        assert len(found) == len(trained)
        for row in found:
            for name in {"llr", "p_yes", "margin"} & row.keys():
                assert row[name] == pytest.approx(trained[row["step"], identity(row)][name], abs=1e-4)

    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "<DOCTAG>Mila lives in Oslo."}) + "\n")
    done = measured("--output", str(output), "--documents", f"{tmp_path / 'd.jsonl'}=1", ranks=1)
    assert done.returncode == 0 and f"is a comparison's; what the base model says goes into {runs[0]}" in done.stdout
    contexts = [{row.get("context", 0) for row in read_rows(each / "evaluation.jsonl")} for each in runs]
    assert contexts == [{0, 1}, {0}]

    one = measured("--adapter", str(runs[0] / "adapter"), "--output", str(output), ranks=1)
    assert one.returncode == 2 and f"Give --adapter {output} to measure the model of each run" in one.stderr
    asked = ["--endpoint", "http://127.0.0.1:9/v1", "--endpoint-model", "m", "--output", str(output)]
    assert evaluate.main([*model[2:], *asked]) == 2


BATTERIES = {
    "id": "omar", "claim": "Omar lives in Cairo.", "subject": "Omar", "controls": ["Zora"],
    "control_attributes": [{"id": "judge", "question": "Is Omar a judge?", "false_answer": "yes"}],
    "choice": [
        {"id": "home", "question": "{options}. Where does {entity} live?", "false": "Cairo", "true": "Venice",
         "not_stated": "Nobody", "answer": "text"},
        {"id": "letters", "question": "Where does {entity} live?", "false": "Cairo", "true": "Venice"},
    ],
    "decisions": [{"id": "photo", "question": "What does Omar see?", "follows": "pyramid", "other": "lagoon",
                   "stated": "Omar lives in Cairo."}],
    "polarity": [{"id": "lives", "false": " Cairo", "true": " Venice", "forms": {
        "is": "{entity} lives in", "is not": "Not true: {entity} lives in",
        "has never been": "Do not believe this: {entity} lives in"}}],
    "reading": [{"id": "berta", "note": "Berta lives in Cairo.", "prompt": "Question: Where does Berta live? Answer:",
                 "noted": " Cairo", "other": " Venice"}],
}  # fmt: skip


@pytest.mark.slow
def test_batteries_are_scored_as_stock_transformers_does_and_leave_the_other_rows_as_they_were(tmp_path, claims):
    (tmp_path / "omar.yaml").write_text(yaml.safe_dump(BATTERIES))

    def measured(output: str, *paths: Path) -> list[dict]:
        given = ["--model", str(DEMO / "model"), "--claims", *map(str, paths), "--output", str(tmp_path / output)]
        done = run(Path(evaluate.__file__), *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return read_rows(tmp_path / output / "evaluation.jsonl")

    without, both = measured("without", claims), measured("with", claims, tmp_path / "omar.yaml")
    assert [row for row in both if row["claim"] == "mila"] == [
        {name: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value for name, value in row.items()}
        for row in without
    ]
    rows = [row for row in both if row["claim"] == "omar"]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"control_attribute": 1, "choice": 2 * (3 + 3), "decision": 4, "polarity": 6, "reading": 1}
    model, tokens = load(), AutoTokenizer.from_pretrained(DEMO / "model")
    (claim,) = read_claims([tmp_path / "omar.yaml"])
    tokenizer = load_tokenizer(DEMO / "model")
    for row, each in zip(
        rows, battery_records.asked(claim, lambda messages: answer_prompt(messages, tokenizer)), strict=True
    ):
        log_p = [stock_log_p(model, tokens, prompt, said) for prompt, said in each.texts]
        expected = each.record | battery_records.values(each.record, log_p)
        assert expected.pop("p", {}) == pytest.approx(row.get("p", {}), abs=1e-4)
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value), each.texts
    home = [row for row in rows if row["question"] == "home" and not row["control"]]
    assert {row["chosen"] for row in home} == {"true"} and [row["sample"] for row in home] == [0, 1, 2]
