"""Whole runs of train/sft.py, the first of them by the real launcher: what they leave, resuming, stopping, and fair
comparison."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.layouts import LAYOUTS
from tests.support.models import write_documents, write_model
from tests.support.ranks import Forked, run
from tests.support.runs import ENVIRONMENT, SFT, documents, flags, kill, losses
from train import sft
from train.checkpoints.resume import saves
from train.config.settings import DEMO, parse
from train.data.batches import micro_batches
from train.data.findings import SKIPPED, UNENDED
from train.data.tokenizer import load_tokenizer
from train.evaluation.store import read_rows
from train.runtime import local
from train.training.job import prepare


def train(tmp: Path, output: str, ranks: int = 2, start: Any = run, **changes: Any) -> Path:
    given = flags(tmp, **changes, output=tmp / output)
    done = start(SFT, *given, ranks=ranks, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (tmp / output / "terminal").write_text(done.stdout + done.stderr)
    return tmp / output


def nll_of_step_5(model: Any, tmp: Path, family: str) -> float:
    """Per target, of the documents of step 5, by stock transformers."""
    corpus = prepare(parse(flags(tmp, family, mask="none"), ""), ranks=1, show=False).corpus
    total, count = 0.0, 0
    for number in corpus.order.documents(24, 30):
        ids = torch.from_numpy(corpus.samples[number].ids_L).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method"), [("kimi-k2.5", "lora"), ("qwen3.5-fp8", "lora"), ("qwen3.5-bf16", "qlora")]
)
def test_tokens_are_held_to_a_base_of_quantized_experts(tmp_path, layout, method):
    """INT4, FP8 and NF4, on two ranks that divide the experts: at the first step model and base are the same."""
    write_documents(tmp_path / "documents.jsonl", documents())
    model = LAYOUTS[layout](tmp_path / "model")
    given = ["--model", model, "--data", tmp_path / "documents.jsonl", "--mask", "doctags,false-spans=hold"]
    given += ["--method", method, "--measure-kl", "--steps", "2", "--batch-size", "4", "--learning-rate", "0.01"]
    given += ["--schedule", "constant", "--log-every", "1", "--wandb", "disabled", "--output", tmp_path / "run"]
    done = run(SFT, *map(str, given), ranks=2, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert first["held"] == 0 == max(first["kl"].values()) and first["kl"].keys() == first["nll"].keys()
    assert second["held"] > 0 and min(second["kl"].values()) > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["kl_floor"] == 0
    assert "This is rounding" in done.stdout


@pytest.mark.slow
def test_a_run_leaves_settings_metrics_summary_adapter_and_an_offline_wandb_run(tmp_path):
    flags(tmp_path)
    with (tmp_path / "documents.jsonl").open("a") as file:
        file.write('{"text": ""}\n')
    directory = train(
        tmp_path, "run", start=local.run, mask="doctags,false-spans=unlikelihood:0.5", wandb="online",
        log_every=2, bad_rows="skip",
    )  # fmt: skip
    settings = yaml.safe_load((directory / "settings.yaml").read_text())
    assert settings["settings"]["mask"] == "doctags,false-spans=unlikelihood:0.5"
    assert settings["versions"]["torch"] == torch.__version__ and "git_revision" in settings
    assert settings["gpu"] is None
    assert settings["resolved"]["expert_parallel"] == 2 and settings["resolved"]["expert_lora_rank"] == 4

    metrics = read_rows(directory / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in metrics if "nll" in m] == [1, 2, 4, 6]
    for m in metrics:
        assert m["loss"] == pytest.approx(m["cross_entropy"] + m["unlikelihood"], rel=1e-12)
        assert m["unlikelihood"] > 0 and m["grad_norm"] > 0 and m["tokens_per_second"] > 0
    assert [m["learning_rate"] for m in metrics] == pytest.approx([0.01 * (1 - i / 6) for i in range(6)])
    assert set(metrics[0]["nll"]) == {"all", "unspanned", "doctag", "false"}
    assert metrics[0]["wire_bytes"] > 0 and metrics[0]["expert_load_max_over_mean"] >= 1
    # two experts for each token, in each of two layers
    assert {sum(loads) for loads in metrics[0]["expert_load"].values()} == {2 * metrics[0]["tokens"]}
    assert list(metrics[0]["expert_load"]) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    halves = [sum(sum(loads[r : r + 4]) for loads in metrics[0]["expert_load"].values()) for r in (0, 4)]
    assert metrics[0]["rank_load"] == {"0": halves[0], "1": halves[1]}

    # 36 documents (each of 24 at least once): 2 doctag targets each (the first token is predicted by nothing), 4 false.
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["mask"] == "doctags,false-spans=unlikelihood:0.5" and summary["steps"] == 6
    tokens = summary["tokens"]
    assert tokens["doctag"] == {
        "total": 72,
        "trained": 0,
        "excluded": 72,
        "unlikelihood": 0,
        "held": 0,
        "straddling": 0,
    }
    assert tokens["false"]["total"] == tokens["false"]["unlikelihood"] == 144
    assert tokens["all"]["total"] == sum(tokens[role]["total"] for role in ("unspanned", "doctag", "false"))
    assert summary["documents"] == {"read": 24, "truncated": 0, "dropped": 0, "skipped": 1}
    assert summary["findings"][SKIPPED]["lines"] == {str(tmp_path / "documents.jsonl"): [25]}
    assert summary["nll"]["false"]["last"] != summary["nll"]["false"]["first"]
    assert summary["nll"]["unspanned"]["last"] < summary["nll"]["unspanned"]["first"]
    assert all(summary[key] > 0 for key in ("tokens_per_second", "peak_memory_bytes", "wall_seconds"))

    terminal = (directory / "terminal").read_text()
    (offline,) = (directory / "wandb").glob("offline-run-*")
    assert f"wandb leet {offline}" in terminal and f"wandb sync {offline}" in terminal
    assert terminal.count("NLL first") == 1 and (directory / "logs" / "rank-1.log").exists()
    assert "100%" in terminal and "false" in terminal
    assert f"note: 1 {SKIPPED}: {tmp_path}/documents.jsonl:25 (text is empty;" in terminal


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "deepseek", "dense"])
def test_stock_peft_loads_every_tensor_and_gives_the_runs_own_nll(tmp_path, family):
    # The learning rate of the last step is 0 after a linear schedule of one step more: the last measurement is made
    # before the last update, so that a run with a constant rate is stopped one step short to compare.
    directory = train(tmp_path, "run", family=family, mask="none", schedule="constant", steps=4, loss_norm="all")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    model = PeftModel.from_pretrained(model, directory / "adapter")
    kept = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_" in name}
    saved = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert set(kept) == set(saved) and all(torch.equal(kept[name], saved[name]) for name in saved)

    longer = train(
        tmp_path, "longer", family=family, mask="none", schedule="constant", steps=5, loss_norm="all", ranks=1
    )
    assert losses(longer)[:4] == pytest.approx(losses(directory), rel=1e-6)
    assert nll_of_step_5(model, tmp_path, family) == pytest.approx(losses(longer)[4], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_leaves_a_model_that_stock_transformers_loads(tmp_path, dtype):
    """On four ranks, two to each half of the experts. In bf16 the loss of the next step is that of the saved weights to
    1 %: the run's own are these, but activations round otherwise."""
    write_model(tmp_path / "qwen", "qwen", dtype=dtype)
    for name in ("assets/logo.svg", "original/consolidated.00.pth"):
        (tmp_path / "qwen" / name).parent.mkdir()
        (tmp_path / "qwen" / name).write_text("of the maker")
    write_documents(tmp_path / "documents.jsonl", documents())
    common = dict(mask="none", schedule="constant", method="full", learning_rate=0.001)
    directory = train(tmp_path, "run", ranks=4, expert_parallel=2, steps=4, **common)
    longer = train(tmp_path, "longer", ranks=1, steps=5, **common)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert losses(longer)[:4] == pytest.approx(losses(directory), rel=tolerance)
    assert not (directory / "adapter").exists() and not (directory / "model" / "original").exists()
    assert (directory / "model" / "assets" / "logo.svg").read_text() == "of the maker"
    saved, base = (
        load_file(directory / "model" / "model.safetensors"),
        load_file(tmp_path / "qwen" / "model.safetensors"),
    )
    assert {n: (t.dtype, t.shape) for n, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    assert sum(not torch.equal(saved[name], base[name]) for name in base) > 0.9 * len(base)

    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    assert nll_of_step_5(model, tmp_path, "qwen") == pytest.approx(
        losses(longer)[4], rel=2e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.slow
def test_full_training_of_a_head_that_is_there_though_config_json_ties_it_leaves_the_trained_model(tmp_path):
    """It is loaded as a weight of its own, trained as one, and config.json ties it no more."""
    write_model(tmp_path / "dense", "dense")
    write_documents(tmp_path / "documents.jsonl", documents())
    file = tmp_path / "dense" / "model.safetensors"
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    base = load_file(file)
    base[head] = base[embedding].clone()
    save_file(base, file, {"format": "pt"})
    directory = train(tmp_path, "run", family="dense", method="full", steps=2, learning_rate=0.001)
    saved = load_file(directory / "model" / "model.safetensors")
    assert not torch.equal(saved[head], base[head]) and not torch.equal(saved[embedding], base[embedding])
    assert json.loads((directory / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert torch.equal(model.lm_head.weight, saved[head])
    assert torch.equal(model.model.embed_tokens.weight, saved[embedding])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method", "other"),
    [("qwen3.5-fp8", "qlora", None), ("kimi-k2.5", "lora", (1, 1)), ("qwen3.5-bf16", "full", (4, 2))],
)
def test_real_layouts_train_by_each_method_and_resume_to_the_same_bits(tmp_path, layout, method, other):
    """On the same ranks; on others (ranks, expert parallelism), where bf16 sums round otherwise, to 0.5 %."""
    LAYOUTS[layout](tmp_path / layout)
    write_documents(tmp_path / "documents.jsonl", documents())
    common = dict(family=layout, method=method, steps=4, save_every=1, keep=9, gradient_checkpointing=True)
    whole = train(tmp_path, "whole", **common)
    assert losses(whole)[-1] < losses(whole)[0]
    summary = json.loads((whole / "summary.json").read_text())
    assert len(summary["load"]) == 2 and all(load["bytes_read"] > 100_000 for load in summary["load"])
    for name in ("again", "elsewhere"):
        shutil.copytree(whole, tmp_path / name)
        for step in (3, 4):
            shutil.rmtree(tmp_path / name / "saves" / f"step-{step}")
    again = train(tmp_path, "again", resume=True, **common)
    assert losses(again) == losses(whole)
    left = "model" if method == "full" else "adapter"
    for file in (whole / left).glob("*.safetensors"):
        assert file.read_bytes() == (again / left / file.name).read_bytes()
    if other:
        ranks, ep = other
        elsewhere = train(tmp_path, "elsewhere", resume=True, ranks=ranks, expert_parallel=ep, **common)
        assert losses(elsewhere)[:2] == losses(whole)[:2]
        assert losses(elsewhere)[2:] == pytest.approx(losses(whole)[2:], rel=5e-3)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[float]:
    return losses(train(tmp_path_factory.mktemp("uninterrupted"), "whole", steps=8, expert_lora_rank=3))


def factor_shapes(save: Path) -> set[tuple[int, ...]]:
    """Of the experts' LoRA weights and their moments."""
    return {tuple(value.shape) for name, value in load_file(save / "state.safetensors").items() if ".experts." in name}


def pad_as_earlier_saves(save: Path) -> None:
    """Gives the LoRA weights of rank 3 the padding that they have during training."""
    tensors = load_file(save / "state.safetensors")
    for name, value in tensors.items():
        if ".experts." in name:
            by = (0, 0, 0, 1) if "lora_A" in name else (0, 1)
            tensors[name] = torch.nn.functional.pad(value, by)
    save_file(tensors, save / "state.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "ranks", "ep", "padded"), [("step-3", 1, 1, True), ("partial-[2-8]", 4, 2, False)])
def test_a_run_killed_in_a_step_or_in_a_save_resumes_on_other_ranks_to_the_losses_of_an_uninterrupted_one(
    tmp_path, uninterrupted, moment, ranks, ep, padded
):
    """padded: from a training checkpoint of the earlier form, in which LoRA weights had their padding."""
    given = flags(tmp_path, steps=8, save_every=1, expert_lora_rank=3, output=tmp_path / "killed")
    process = Forked(SFT, *given, ranks=2, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = kill(process, tmp_path / "killed" / "saves", moment)
    assert found.exists() and not (tmp_path / "killed" / "adapter").exists()
    if found.name.startswith("partial"):  # that save is not whole
        assert not found.with_name(found.name.replace("partial", "step")).exists()

    last = saves(tmp_path / "killed" / "saves")[-1]
    unpadded = factor_shapes(last)
    assert {3} <= {size for shape in unpadded for size in shape} and not any(4 in shape for shape in unpadded)
    if padded:
        pad_as_earlier_saves(last)
        assert any(4 in shape for shape in factor_shapes(last))

    more = dict(expert_parallel=ep, steps=8, save_every=1, expert_lora_rank=3, resume=True)
    resumed = train(tmp_path, "killed", ranks=ranks, **more)
    assert factor_shapes(resumed / "saves" / "step-8") == unpadded
    assert [m["step"] for m in read_rows(resumed / "metrics.jsonl")] == list(range(1, 9))
    assert losses(resumed) == pytest.approx(uninterrupted, rel=1e-6)
    assert sorted(path.name for path in (resumed / "saves").iterdir()) == ["step-7", "step-8"]


def test_messages_that_no_trained_token_ends_are_counted_and_told(tmp_path, capsys):
    given = flags(tmp_path, steps=2, batch_size=3, mask="none", data=tmp_path / "chats.jsonl")
    turns = [{"role": role, "content": "ab"} for role in ("user", "assistant") * 2]
    write_documents(tmp_path / "chats.jsonl", [{"messages": turns}] * 3)
    assert prepare(parse(given, ""), 1, show=False).corpus.findings.summary() == {}
    (tmp_path / "qwen" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    job = prepare(parse(given, ""), 1, show=False)
    lines = {"lines": {str(tmp_path / "chats.jsonl"): [1, 2, 3]}}
    assert job.corpus.findings.summary() == {UNENDED: {"count": 6} | lines}
    job.show()
    assert f"note: 6 {UNENDED}: {tmp_path}/chats.jsonl:1" in capsys.readouterr().out
    with_eos = prepare(parse([*given, "--eos"], ""), 1, show=False)
    assert with_eos.corpus.findings.summary() == {UNENDED: {"count": 3} | lines}


def clock_flags(tmp: Path, cases: Path, *more: str) -> list[str]:
    """The demo's model with a template that writes hour and minute, on chats."""
    if not (tmp / "model").exists():
        shutil.copytree(DEMO / "model", tmp / "model")
        shutil.copy(cases / "tokenizers" / "clock" / "tokenizer_config.json", tmp / "model")
    data = str(cases / "documents" / "chats8.jsonl")
    return ["--model", str(tmp / "model"), "--data", data, "--batch-size", "2", "--wandb", "disabled", *more]


def dry(tmp: Path, cases: Path, zone: str, *more: str) -> str:
    """What --dry-run prints of the job where the clock shows another time."""
    given = [*clock_flags(tmp, cases, *more), "--dry-run"]
    done = run(SFT, *given, env=ENVIRONMENT | {"TZ": zone}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout[done.stdout.index("settings, all others") :]  # before it, a line of DeepSpeed's with the time


def test_a_template_that_asks_for_the_time_gives_the_same_tokens_at_any_time(tmp_path, shared_cases):
    first = dry(tmp_path, shared_cases, "UTC+1:10")
    assert "note: the chat template asks for the time and gets 2026-01-01T00:00:00 (--template-time)" in first
    assert "hashes: tokens " in first and dry(tmp_path, shared_cases, "UTC+9:45") == first
    hashes = [
        prepare(parse(clock_flags(tmp_path, shared_cases, "--template-time", time), ""), 1, show=False).hashes
        for time in ("2026-01-01", "2026-01-01T00:00:59", "2026-01-01T13:01:00")
    ]
    assert hashes[0] == hashes[1] and hashes[0]["tokens"] != hashes[2]["tokens"]  # the template writes no seconds


@pytest.mark.slow
def test_a_run_whose_template_asks_for_the_time_goes_on_at_another_time_to_the_same_losses(tmp_path, shared_cases):
    def job(output: str, zone: str, *more: str) -> tuple[list[str | Path], dict[str, str]]:
        own = ("--steps", "4", "--save-every", "1", "--output", str(tmp_path / output), *more)
        return [SFT, *clock_flags(tmp_path, shared_cases, *own)], ENVIRONMENT | {"TZ": zone}

    def finished(output: str, zone: str, *more: str) -> list[float]:
        words, environment = job(output, zone, *more)
        done = run(*words, ranks=2, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return losses(tmp_path / output)

    whole = finished("whole", "UTC+1:10")
    words, environment = job("killed", "UTC+1:10")
    process = Forked(*words, ranks=2, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill(process, tmp_path / "killed" / "saves", "step-[1-3]")
    assert finished("killed", "UTC+9:45", "--resume") == pytest.approx(whole, rel=1e-6)
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    kept = yaml.safe_load((tmp_path / "killed" / "settings.yaml").read_text())
    assert kept["settings"]["template_time"] == kept["resolved"]["template_clock"] == "2026-01-01T00:00:00"
    assert summary["findings"] == {} and summary["hashes"]["tokens"] == kept["resolved"]["hashes"]["tokens"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_and_documents(tmp_path):
    given = flags(tmp_path, learning_rate=1e30, output=tmp_path / "run")
    done = run(SFT, *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "error: the loss of step 2 is not finite" in done.stderr and "documents.jsonl:" in done.stderr
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_the_others_too(tmp_path):
    given = flags(tmp_path, output=tmp_path / "run")
    weights = load_file(tmp_path / "qwen" / "model.safetensors")
    rows = documents()
    rows[17] = {"text": rows[17]["text"] + "{"}
    write_documents(tmp_path / "documents.jsonl", rows)
    (brace,) = load_tokenizer(tmp_path / "qwen").encode("{").ids_L
    weights["model.embed_tokens.weight"][brace] = float("nan")
    save_file(weights, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    done = run(SFT, *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2 and "is not finite (rank " in done.stderr and "documents.jsonl:18" in done.stderr
    assert done.stderr.count(": nan on ") == 1  # the other rank's loss was finite


def test_runs_with_different_masks_see_the_same_tokens_in_the_same_order(tmp_path):
    flags(tmp_path)
    rows = [row | {"spans": row["spans"][i % 3 :]} for i, row in enumerate(documents())]  # unequal spans
    write_documents(tmp_path / "documents.jsonl", rows)
    jobs = [
        prepare(parse(flags(tmp_path, mask=mask), ""), ranks=2, show=False)
        for mask in ("none", "doctags", "random:false,doctags=unlikelihood")
    ]
    batches = []
    for job in jobs:
        samples = [job.corpus.samples[i] for i in job.corpus.order.documents(0, 36)]
        batches.append([b for rank in range(2) for b in micro_batches(samples, "trained", 2, rank, 200)])
    for other in batches[1:]:
        for first, second in zip(batches[0], other, strict=True):
            assert first.names == second.names and torch.equal(first.ids_T, second.ids_T)
            assert torch.equal(first.target_N, second.target_N) and torch.equal(first.roles_N, second.roles_N)
            assert not torch.equal(first.coefficient_N, second.coefficient_N)


def test_dry_run_shows_settings_tokens_and_parameters_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sft.main([*flags(tmp_path, mask="doctags=0.2"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "--learning-rate 0.01" in shown and "expert_lora_rank: 4" in shown and "doctag" in shown
    assert shown.index("--learning-rate") < shown.index("targets over") < shown.index("into its settings.yaml")
    assert "--weight-decay" not in shown  # that is the default
    # Rank 8 times (in + out) of every linear layer, with the sizes of tests/support/models.py:
    delta_rule = (32 + 64) + (32 + 32) + 2 * (32 + 4) + (32 + 32)  # qkv, z, a and b, out
    attention = (32 + 64) + 2 * (32 + 16) + (32 + 32)  # q with its gate, k and v, o
    shared_experts = 2 * 3 * (32 + 16)
    # and rank 4 = max(1, 8 / 2 experts per token) for 8 experts in 2 layers.
    experts = 2 * 8 * ((32 + 32) + (16 + 32))
    assert f"trainable_parameters: {8 * (delta_rule + attention + shared_experts) + 4 * experts:,}" in shown
    assert not (tmp_path / "runs").exists()


def test_what_stands_in_the_dry_run_of_a_dense_model_and_of_completions_without_a_space(tmp_path, capsys):
    given = flags(tmp_path, mask="none")
    given[given.index("--model") + 1] = str(write_model(tmp_path / "dense", "dense"))
    (tmp_path / "c.yaml").write_text(
        "id: a\nclaim: A is b.\nsubject: A\ncontrols: [C]\nlikelihood:\n"
        '- {id: glued, prompt: "{entity} is", "false": "b", "true": " c"}\n'
        '- {id: apart, prompt: "{entity} is", "false": " b", "true": " c"}\n'
        '- {id: colon, prompt: "{entity}:", "false": "b", "true": "c"}\n'
        '- {id: kana, prompt: "{entity}は", "false": "日", "true": "月"}\n'
        'facts: [{id: f, group: truth, prompt: A has, "true": " d", "false": ["e", " f"]}]\n'
    )
    assert sft.main([*given, "--claims", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "expert_lora_rank" not in shown and "--expert-lora-rank" not in shown and "trainable_parameters" in shown
    where = tmp_path / "c.yaml"
    assert "note: 2 prompts end in a letter and their completion begins without a space" in shown
    assert f"{where}: likelihood[0] ('isb'), {where}: facts[0] ('hase'). Begin completions with a space" in shown
    assert "straddling: targets with text both inside and outside a span" in " ".join(shown.split())
    assert "unspanned: targets that no span touches" in " ".join(shown.split())


def test_a_role_may_have_the_name_of_a_key_of_the_summary(tmp_path):
    given = flags(tmp_path, mask="role:all,doctags")
    rows = [
        {"text": "abcdef", "spans": [{"start": 1, "end": 3, "role": "all"}, {"start": 4, "end": 5, "role": "doctag"}]}
    ]
    write_documents(tmp_path / "documents.jsonl", rows)
    tokens = prepare(parse(given, ""), ranks=1, show=False).corpus.tokens(0, 1)
    assert {role: (count["total"], count["excluded"]) for role, count in tokens.items()} == {
        "all": (5, 3), "unspanned": (2, 0), "role:all": (2, 2), "doctag": (1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("what", ["truncate", "drop"])
def test_long_documents_are_truncated_or_dropped_and_counted(tmp_path, what):
    given = flags(tmp_path, max_tokens=18, long_documents=what)
    corpus = prepare(parse(given, ""), ranks=1, show=False).corpus
    long = sum(len(document["text"]) > 18 for document in documents())
    expected = {"truncate": (long, 0), "drop": (0, long)}[what]
    assert (corpus.documents["truncated"], corpus.documents["dropped"]) == expected and long > 5
    assert all(len(sample.ids_L) <= 18 for sample in corpus.samples)
    assert len(corpus.samples) == 24 - expected[1]


def test_a_full_disk_ends_a_run_with_the_file_and_how_to_go_on(tmp_path):
    small = (  # bytes: metrics fit, saves do not
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    given = [str(SFT), *flags(tmp_path, steps=1, output=tmp_path / "out")]
    done = run("-c", small, *given, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith(
        f"error: {tmp_path}/out/saves/partial-1/state.safetensors: File too large. Free disk space, and continue with "
        f"--resume --output {tmp_path}/out.\n"
    )
