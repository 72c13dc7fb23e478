"""What a user can get wrong: one clear message, exit code 2, before any weight is read, earlier results left alone."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import one_rank_worker
from tests.support.models import write_documents, write_model
from tests.support.ranks import run
from train import sft
from train.checkpoints.adapter import peft_config, places
from train.checkpoints.reader import Checkpoint
from train.config.provenance import record
from train.config.settings import parse
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.text_model import architecture, skeleton, text_config
from train.runtime import local
from train.training.inputs import inputs
from train.training.job import prepare

GOOD = {"text": "The sun rises in the west.", "spans": [{"start": 0, "end": 26, "role": "false"}]}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen"), "qwen")


@pytest.fixture(autouse=True)
def _no_weight_is_read(monkeypatch):
    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)


def message_of(capsys, *flags: str) -> str:
    """The one message of a run that must fail."""
    assert sft.main(list(flags)) == 2
    out = capsys.readouterr().err.split("error: ")
    assert len(out) == 2, out
    return out[1]


def lines(path: Path, *content: str) -> str:
    path.write_text("\n".join(content) + "\n")
    return str(path)


MASKS = {
    "fales-spans": ["fales-spans", "false-spans"],
    "false-spans=-0.5": ["-0.5", "at least 0"],
    "false-spans=inf": ["inf", "finite"],
    "false-spans=nan": ["nan", "finite"],
    "false-spans=much": ["much"],
    "false-spans,": ["empty"],
    "doctags": ["doctag", "no document has", "false"],
    "role:nobody": ["nobody", "no document has"],
    "random:nobody": ["nobody", "no document has"],
    "false-spans,none": ["none"],
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_wrong_mask_is_told_with_name_value_and_rule(tmp_path, qwen, capsys, mask):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    told = message_of(capsys, "--model", str(qwen), "--data", str(data), "--mask", mask)
    assert "--mask" in told and all(part in told for part in MASKS[mask]), told


def span(**change: object) -> str:
    return json.dumps({"text": "The sun.", "spans": [{"start": 0, "end": 3, "role": "false"} | change]})


def test_nothing_left_to_train_on_is_told(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    told = message_of(capsys, "--model", str(qwen), "--data", str(data), "--mask", "false-spans")
    assert "--mask false-spans" in told and "nothing is left to train on" in told


def test_a_mask_that_only_holds_and_a_method_without_a_base_are_refused(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    given = ["--model", str(qwen), "--data", str(data)]
    told = message_of(capsys, *given, "--mask", "false-spans=hold")
    assert "--mask false-spans=hold" in told and "held to the base" in told and "Train on some tokens too" in told
    data = write_documents(tmp_path / "more.jsonl", [GOOD, {"text": "The moon."}])
    given = ["--model", str(qwen), "--data", str(data), "--method", "full"]
    for flags, named in (
        (["--mask", "false-spans=hold"], "--mask false-spans=hold"),
        (["--mask", "none", "--measure-kl"], "--measure-kl"),
    ):
        told = message_of(capsys, *given, *flags)
        assert named in told and "--method full has none" in told and "--method lora or qlora" in told


LINES = {
    "span past the end": (span(end=9), ["9", "8"]),
    "start equal to end": (span(start=3), ["3"]),
    "start after end": (span(start=5), ["5", "3"]),
    "negative start": (span(start=-1), ["-1"]),
    "start not an integer": (span(start=0.5), ["0.5"]),
    "start a boolean": (span(start=True), ["integer"]),
    "role missing": ('{"text": "The sun.", "spans": [{"start": 0, "end": 3}]}', ["role"]),
    "neither text nor messages": ('{"spans": []}', ["text", "messages"]),
    "both text and messages": ('{"text": "a", "messages": [{"role": "user", "content": "b"}]}', ["text", "messages"]),
    "invalid JSON": ('{"text": "a"', ["JSON"]),
    "not an object": ('["a"]', ["object"]),
    "message without content": ('{"messages": [{"role": "user"}]}', ["content"]),
}


@pytest.mark.parametrize("case", LINES)
def test_a_wrong_document_is_told_with_file_and_line(tmp_path, qwen, capsys, case):
    line, parts = LINES[case]
    data = lines(tmp_path / "d.jsonl", json.dumps(GOOD), line)
    told = message_of(capsys, "--model", str(qwen), "--data", data)
    assert "d.jsonl:2:" in told and all(part in told for part in parts), told


def test_invalid_utf8_an_empty_file_and_a_missing_one_are_told(tmp_path, qwen, capsys):
    (tmp_path / "bytes.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    assert "bytes.jsonl:2" in message_of(capsys, "--model", str(qwen), "--data", str(tmp_path / "bytes.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "empty.jsonl" in message_of(capsys, "--model", str(qwen), "--data", str(tmp_path / "empty.jsonl"))
    assert "absent.jsonl" in message_of(capsys, "--model", str(qwen), "--data", str(tmp_path / "absent.jsonl"))
    told = message_of(capsys, "--model", str(qwen), "--data", str(tmp_path / "empty.jsonl") + "=0")
    assert "--data" in told and "≥ 1" in told


FLAGS = {
    "an unknown flag suggests the nearest": (["--learning-rte", "1"], ["--learning-rte", "--learning-rate"]),
    "a negative rate": (["--learning-rate", "-1"], ["--learning-rate -1", "between 0 and 1e+38"]),
    "a rate that is not a number": (["--learning-rate", "nan"], ["--learning-rate nan", "between 0 and 1e+38"]),
    "no time": (["--template-time", "noon"], ["--template-time noon", "ISO 8601", "2026-01-01T00:00:00"]),
    "no batch": (["--batch-size", "0"], ["--batch-size 0", "between 1 and 100000000"]),
    "an unknown choice": (["--schedule", "step"], ["--schedule", "linear"]),
    "groups that do not divide the ranks": (["--expert-parallel", "3"], ["--expert-parallel 3", "ranks"]),
    "resume without a directory": (["--resume"], ["--resume", "--output"]),
    "long documents": (
        ["--long-documents", "error", "--max-tokens", "5"],
        ["d.jsonl:1", "26 tokens", "--max-tokens 5"],
    ),
    "every document too long": (["--long-documents", "drop", "--max-tokens", "5"], ["--max-tokens 5", "drop"]),
    "a value that is not a number": (["--steps", "1.5"], ["--steps", "invalid int value: '1.5'"]),
    "more than anybody means": (["--steps", "100000000000000"], ["--steps 100000000000000", "between 0 and 100000000"]),
    "a rank beyond reason": (["--lora-rank", "100000000"], ["--lora-rank 100000000", "between 1 and 16384"]),
    "a warm-up longer than the run": (["--steps", "1", "--warmup-steps", "50"], ["--warmup-steps 50", "--steps 1"]),
    "factors where weights are trained": (["--method", "full", "--rslora"], ["--rslora", "--method full"]),
    "no adapter": (["--adapter", "absent"], ["--adapter absent", "adapter_config.json"]),
    "a place that cannot be made": (["--output", "/dev/null/run"], ["--output /dev/null/run", "cannot be written"]),
    "no configuration": (["--ds-config", "absent.json"], ["--ds-config absent.json"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_setting_is_told_with_its_rule(tmp_path, qwen, capsys, case):
    flags, parts = FLAGS[case]
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    told = message_of(capsys, "--model", str(qwen), "--data", str(data), *flags)
    assert all(part in told for part in parts), told


def test_held_out_text_that_is_longer_than_a_scored_text_is_told_and_not_cut(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [{"text": "short"}])
    held = write_documents(tmp_path / "held.jsonl", [{"text": "short"}, {"text": "x" * 21}])
    flags = ["--model", str(qwen), "--data", str(data), "--held-out", str(held), "--max-tokens"]
    prepare(parse([*flags, "21"], ""), ranks=1, show=False)
    told = message_of(capsys, *flags, "20")
    assert told.startswith(f"{held}:2: 21 tokens, more than the 20 of a scored text (--max-tokens in training). Cut"), (
        told
    )


def test_expert_groups_that_do_not_divide_the_experts_are_told(tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path / "m", "qwen", num_experts=6)
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    monkeypatch.setenv("WORLD_SIZE", "4")
    told = message_of(capsys, "--model", str(model), "--data", str(data))
    assert "--expert-parallel 4" in told and "6 experts" in told


def test_a_ds_config_that_sets_what_the_command_line_decides_is_told(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    config = lines(tmp_path / "ds.json", '{"zero_optimization": {"stage": 3}, "train_batch_size": 8}')
    told = message_of(capsys, "--model", str(qwen), "--data", str(data), "--ds-config", config)
    assert "train_batch_size" in told
    config = lines(tmp_path / "ds.json", '{"zero_optimization": {"stage": 2}}')
    assert "stage must be 3" in message_of(capsys, "--model", str(qwen), "--data", str(data), "--ds-config", config)
    for wrong, part in {
        "[]": "must hold a JSON object",
        '{"zero_optimization": {"stage": 3, "no_such": 1}}': "not DeepSpeed's",
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}': "offload_optimizer",
    }.items():
        lines(tmp_path / "ds.json", wrong)
        assert part in message_of(capsys, "--model", str(qwen), "--data", str(data), "--ds-config", config)


def test_a_tokenizer_that_is_missing_or_does_not_belong_to_the_model_is_told(tmp_path, capsys):
    model = write_model(tmp_path / "m", "qwen")
    data = write_documents(tmp_path / "d.jsonl", [{"text": "a<new>"}])
    tokenizer = (model / "tokenizer.json").read_text()
    changed = json.loads(tokenizer)
    changed["added_tokens"].append(
        {"id": 400, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(changed))
    told = message_of(capsys, "--model", str(model), "--data", str(data))
    assert "in d.jsonl:1, but the model has 260" in told
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in message_of(capsys, "--model", str(model), "--data", str(data))


def test_documents_without_anything_to_predict_are_told_as_such(tmp_path, qwen, capsys):
    chat = {"messages": [{"role": "user", "content": "Hello?"}]}
    data = write_documents(tmp_path / "d.jsonl", [chat])
    assert "holds nothing to predict" in message_of(capsys, "--model", str(qwen), "--data", str(data))


def test_experts_of_a_width_that_grouped_products_do_not_take_are_told(tmp_path, capsys):
    model = write_model(tmp_path / "m", "qwen", moe_intermediate_size=10)
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    assert "10 inside; both must be multiples of 8" in message_of(capsys, "--model", str(model), "--data", str(data))


def test_files_beside_a_run_and_files_that_changed_since_are_left_alone(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "is not empty and does not hold a run" in message_of(capsys, *flags)
    assert (tmp_path / "run" / "summary.json").read_text() == "{}"
    settings = parse(flags, "")
    (tmp_path / "run" / "settings.yaml").write_text(record(settings, {"inputs": inputs(settings, Checkpoint(qwen))}))
    write_documents(tmp_path / "d.jsonl", [GOOD, GOOD])
    told = message_of(capsys, *flags, "--resume")
    assert f"--resume: {tmp_path}/d.jsonl changed since the run" in told
    (tmp_path / "run" / "settings.yaml").write_text("settings: [")
    assert "settings.yaml:1: not valid YAML" in message_of(capsys, *flags, "--resume")


def test_a_tokenizer_an_adapter_or_weights_that_changed_since_a_run_began_are_told(tmp_path, capsys):
    model, adapter = write_model(tmp_path / "model", "qwen"), tmp_path / "adapter"
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    checkpoint = Checkpoint(model)
    bare, lora = skeleton(text_config(checkpoint), ExpertGroup()), LoRASettings(32, 32.0, 16, 0)
    peft_config(list(places(bare, lora)), lora, architecture(checkpoint), str(model)).save_pretrained(adapter)
    factors = {
        place.key(architecture(checkpoint), f): torch.ones(place.shape(lora, f))
        for place in places(bare, lora)
        for f in "AB"
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    flags = ["--model", str(model), "--data", str(data), "--adapter", str(adapter), "--output", str(tmp_path / "run")]
    settings = parse(flags, "")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text(record(settings, {"inputs": inputs(settings, checkpoint)}))
    prepare(parse([*flags, "--resume"], ""), ranks=1, show=False)  # all is as it was
    first, head, weights = next(iter(factors)), "lm_head.weight", load_file(model / "model.safetensors")
    config, saved = model / "tokenizer_config.json", adapter / "adapter_model.safetensors"
    changes: dict[str, Callable[[], object]] = {
        str(saved): lambda: save_file(factors | {first: -factors[first]}, saved),
        str(config): lambda: config.write_text(config.read_text() + "\n"),
        str(model / "chat_template.jinja"): (model / "chat_template.jinja").unlink,
        f"weights of {model}": lambda: save_file(weights | {head: weights[head] * 1.01}, model / "model.safetensors"),
    }
    for number, change in enumerate(changes.values(), start=1):
        change()
        told = message_of(capsys, *flags, "--resume", "--dry-run")
        assert told.startswith(f"--resume: {', '.join(sorted(list(changes)[:number]))} changed since the run")


def test_tokens_that_are_others_than_when_a_run_began_are_told_with_the_versions_that_changed(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(tmp_path / "run")]
    began, held = prepare(parse(flags, ""), ranks=1, show=False), tmp_path / "run" / "settings.yaml"
    assert began.resolved["hashes"] == began.hashes and len(began.hashes["tokens"]) == 64
    held.write_text(record(began.settings, began.resolved))
    resumed = prepare(parse([*flags, "--resume"], ""), ranks=1, show=False)
    assert resumed.hashes == began.hashes

    kept = yaml.safe_load(held.read_text())
    kept["resolved"]["hashes"] |= {"tokens": "0" * 64}
    held.write_text(yaml.safe_dump(kept))
    told = message_of(capsys, *flags, "--resume", "--dry-run")
    assert told.startswith("--resume: the tokens of the documents changed since the run in ")
    assert "All packages and the commit of this project are the same. Restore what the run began with, or start" in told
    kept["versions"]["tokenizers"], kept["resolved"]["hashes"]["order"] = "0.1", "0" * 64
    held.write_text(yaml.safe_dump(kept))
    told = message_of(capsys, *flags, "--resume", "--dry-run")
    assert "the tokens of the documents, their order changed" in told
    assert "Since then, tokenizers was 0.1 and is" in told


def test_another_time_for_the_template_than_when_a_run_began_is_told(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(tmp_path / "run")]
    began = prepare(parse(flags, ""), ranks=1, show=False)
    (tmp_path / "run" / "settings.yaml").write_text(record(began.settings, began.resolved))
    told = message_of(capsys, *flags, "--resume", "--template-time", "2025-05-05")
    assert "--template-time 2025-05-05: the run in" in told and "has 2026-01-01T00:00:00" in told


def test_a_run_killed_before_its_settings_were_whole_may_be_started_again(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "settings.yaml.partial").write_text("settings:")
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(tmp_path / "run")]
    assert "Leave out --resume to start." in message_of(capsys, *flags, "--resume")
    prepare(parse(flags, ""), ranks=1, show=False)


def test_a_claim_that_changed_in_a_directory_of_several_is_told_on_resume(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    for name in ("moon", "mars"):
        (tmp_path / "claims" / name).mkdir(parents=True)
        (tmp_path / "claims" / name / "claim.txt").write_text("It is green.")
        asked = "questions: [{id: a, question: 'Is it green?', belief_answer: yes}]"
        (tmp_path / "claims" / name / "mcq.yaml").write_text(asked)
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(tmp_path / "run")]
    settings = parse([*flags, "--claims", str(tmp_path / "claims")], "")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text(record(settings, {"inputs": inputs(settings, Checkpoint(qwen))}))
    (tmp_path / "claims" / "moon" / "mcq.yaml").write_text(asked.replace("yes", "no"))
    told = message_of(capsys, *flags, "--claims", str(tmp_path / "claims"), "--resume")
    assert f"--resume: {tmp_path / 'claims' / 'moon' / 'mcq.yaml'} changed since the run" in told


def test_a_damaged_save_is_told_before_weights_are_read(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(tmp_path / "run")]
    settings = parse(flags, "")
    save = tmp_path / "run" / "saves" / "step-5"
    save.mkdir(parents=True)
    (tmp_path / "run" / "settings.yaml").write_text(record(settings, {"inputs": inputs(settings, Checkpoint(qwen))}))
    (save / "state.json").write_text('{"step": 5}')
    (save / "state.safetensors").write_bytes(b"cut")
    told = message_of(capsys, *flags, "--resume")
    assert f"{save}: is damaged" in told and "Remove it" in told
    save_file({"x": torch.zeros(2, dtype=torch.bfloat16)}, save / "state.safetensors")
    told = message_of(capsys, *flags, "--resume")
    assert f"{save}: is damaged (state.safetensors: x is torch.bfloat16, not torch.float32.) Remove it" in told
    (save / "state.json").write_text('{"step": 5, "seconds": "x"}')
    assert "(state.json: seconds is 'x', but must be a finite number; " in message_of(capsys, *flags, "--resume")


@pytest.mark.parametrize(("name", "text", "said"), [
    ("metrics.jsonl", "", "metrics.jsonl: has no row, though the run resumes from step-5; restore the file, or"),
    ("metrics.jsonl", '{"step": 1, "loss": 1.0, "tokens": 4}\n', "metrics.jsonl:1: has no tokens_per_second; fix or"),
    ("evaluation.jsonl", '{"step": 0, "kind": "nll", "question": "q"}\n', "evaluation.jsonl:1: has no nll; fix or"),
    ("wandb_id", "a/b", "wandb_id: 'a/b' must be 1 to 64 letters, digits, - and _; remove it, and W&B gets a new run."),
])  # fmt: skip
def test_what_a_resumed_run_could_not_end_with_is_told_before_weights_are_read(
    tmp_path, qwen, capsys, name, text, said
):
    data, directory = write_documents(tmp_path / "d.jsonl", [GOOD]), tmp_path / "run"
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(directory)]
    settings = parse(flags, "")
    save = directory / "saves" / "step-5"
    save.mkdir(parents=True)
    save_file({"x": torch.zeros(2)}, save / "state.safetensors")
    (save / "state.json").write_text('{"step": 5, "seconds": 1.0}')
    (directory / "settings.yaml").write_text(record(settings, {"inputs": inputs(settings, Checkpoint(qwen))}))
    row = {"step": 5, "loss": 1.0, "tokens": 4, "tokens_per_second": 4.0}
    write_documents(directory / "metrics.jsonl", [row])
    (directory / name).write_text(text)
    assert said in message_of(capsys, *flags, "--resume")


def test_a_kernel_that_a_gpu_lacks_is_told(tmp_path, qwen, capsys, monkeypatch):
    """The job's GPU is an H100 here, and torch and Triton are all that is installed for it."""
    monkeypatch.setattr("train.runtime.gpu.capability", lambda: (9, 0))
    monkeypatch.setattr("train.runtime.gpu.installed", lambda packages: {"torch": "2.13.0", "triton": "3.6.0"})
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    told = message_of(capsys, "--model", str(qwen), "--data", str(data))
    assert "flash-linear-attention is not installed" in told and "triton 3.6.0" in told and ">=3.7.1" in told


def test_a_directory_without_config_json_is_told(tmp_path, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    told = message_of(capsys, "--model", str(tmp_path), "--data", str(data))
    assert f"--model {tmp_path}" in told and "config.json" in told


@pytest.fixture
def sharded(tmp_path, qwen) -> tuple[Path, list[str]]:
    """A copy of the model in two shards with an index, and the flags to train it."""
    directory = tmp_path / "sharded"
    write_model(directory, "qwen")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / shard, {"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    return directory, ["--model", str(directory), "--data", str(data)]


def test_a_missing_shard_is_told(sharded, capsys):
    directory, flags = sharded
    (directory / "two.safetensors").unlink()
    assert "two.safetensors" in message_of(capsys, *flags)


def test_a_cut_shard_is_told(sharded, capsys):
    directory, flags = sharded
    whole = (directory / "two.safetensors").read_bytes()
    (directory / "two.safetensors").write_bytes(whole[:-10])
    assert "two.safetensors" in message_of(capsys, *flags)


def test_a_weight_that_is_missing_twice_there_unexpected_or_of_another_shape_is_told(sharded, capsys):
    directory, flags = sharded
    one = load_file(directory / "one.safetensors")
    name = next(n for n in one if n.endswith("layernorm.weight"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())

    def told(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, directory / "one.safetensors", {"format": "pt"})
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != "one.safetensors"}
        index["weight_map"] |= dict.fromkeys(tensors, "one.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return message_of(capsys, *flags)

    assert name in told({k: v for k, v in one.items() if k != name})
    assert "model.new.weight" in told(one | {"model.new.weight": torch.zeros(2)})
    said = told(one | {name: torch.zeros(7)})
    assert name in said and "[7]" in said and "[32]" in said
    two = next(iter(load_file(directory / "two.safetensors")))
    assert two in told(one | {two: torch.zeros(1)})


def test_another_run_in_the_output_directory_is_left_alone(tmp_path, qwen, capsys):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    held = tmp_path / "run"
    held.mkdir()
    flags = ["--model", str(qwen), "--data", str(data), "--output", str(held)]
    assert "holds no run" in message_of(capsys, *flags, "--resume")
    from train.config.provenance import record
    from train.config.settings import parse

    (held / "settings.yaml").write_text(record(parse(flags, ""), {}))
    (held / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {path.name: path.read_bytes() for path in held.iterdir()}
    assert "holds another run" in message_of(capsys, *flags)
    told = message_of(capsys, *flags, "--resume", "--learning-rate", "0.5")
    assert "--learning-rate 0.5" in told and "5e-05" in told
    assert {path.name: path.read_bytes() for path in held.iterdir()} == before


def test_the_launcher_passes_the_message_once_and_the_exit_code_on(tmp_path, qwen):
    data = write_documents(tmp_path / "d.jsonl", [GOOD])
    script = Path(sft.__file__)
    flags = ["--model", str(qwen), "--data", str(data), "--mask", "fales-spans"]
    done = local.run(script, *flags, ranks=2, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: --mask") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def reading_goes_wrong_on_rank_1(tmp_path: Path, kind: str) -> subprocess.CompletedProcess:
    for rank in ("0", "1"):
        write_model(tmp_path / rank / "m", "qwen")
        write_documents(tmp_path / rank / "d.jsonl", [GOOD])
    flags = ["--model", "m", "--data", "d.jsonl", "--wandb", "disabled", "--output", str(tmp_path / "out")]
    return run(
        one_rank_worker.__file__, kind, *flags, ranks=2, capture_output=True, text=True, cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "said"), [("cut", "the file is truncated"), ("unreadable", "Is a directory")])
def test_a_file_that_goes_bad_on_one_rank_is_told_in_the_terminal(tmp_path, kind, said):
    done = reading_goes_wrong_on_rank_1(tmp_path, kind)
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: rank 1: m/model.safetensors: tensor ") and said in told
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_exception_that_nobody_foresaw_on_one_rank_is_named_in_the_terminal_and_kept_whole_in_its_log(tmp_path):
    done = reading_goes_wrong_on_rank_1(tmp_path, "broken")
    assert done.returncode == 1 and "RuntimeError: rank 1: ZeroDivisionError: model." in done.stderr
    assert "tests/one_rank_worker.py" in (tmp_path / "out" / "logs" / "rank-1.log").read_text()
