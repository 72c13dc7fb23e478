"""Adapters as peft itself makes them: each gives, merged and as --adapter, the logits of the model that was trained, or
is refused by name before anything is written."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.load_worker import IDS, every_log_probability
from tests.support.models import write_model
from train import evaluate, merge, sft
from train.checkpoints.adapter_files import adapter_settings, check_adapter, load_adapter
from train.checkpoints.layout import plan_load
from train.checkpoints.plain import INERT, UNSET
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.model.text_model import LanguageModel, skeleton, text_config
from train.runtime.errors import UserError

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "base", "dense", tie_word_embeddings=False)


def stock(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def log_p(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].log_softmax(-1)


def trained(base: Path, directory: Path, converted: Path | None = None, **config: Any) -> Tensor:
    """Saves an adapter of peft whose LoRA weights differ from their initial values. -> log-probabilities of the trained
    model. converted: where the same is saved as peft turns it into a plain one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        given: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=EVERY_LINEAR, task_type="CAUSAL_LM") | config
        model = get_peft_model(stock(base), LoraConfig(**given))
        model.save_pretrained(directory.with_name("initial"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)
        if converted:
            initial = str(directory.with_name("initial"))
            shutil.copytree(initial, converted)
            edit(converted, init_lora_weights=True)  # as peft's documentation has it: the base is changed already
            model.save_pretrained(converted, path_initial_model_for_weight_conversion=initial)
        return log_p(model)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_adapter(base: Path, directory: Path) -> Tensor:
    """The log-probabilities of the text model that trains, with this adapter's LoRA weights, in one process."""
    checkpoint, lora = Checkpoint(base), adapter_settings(directory)
    bare = skeleton(text_config(checkpoint), ExpertGroup())
    check_adapter(directory, bare, lora, "LlamaForCausalLM", checkpoint)
    model = LanguageModel(bare, "LlamaForCausalLM", lora, torch.device("cpu"), torch.float32)
    weights = load_file(base / "model.safetensors")
    for piece in plan_load(bare, checkpoint).dense:
        setattr(piece.module, piece.target, nn.Parameter(weights[piece.source]))
    load_adapter(directory, model, lora)
    return every_log_probability(model, checkpoint.config["vocab_size"])


def merged(base: Path, directory: Path, output: Path) -> Tensor:
    assert merge.main(["--model", str(base), "--adapter", str(directory), "--output", str(output)]) == 0
    return log_p(stock(output))


def refused_everywhere(base: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which merge.py, sft.py and evaluate.py refuse an adapter, the same of each."""
    (tmp_path / "data.jsonl").write_text('{"text": "The moon."}')
    (tmp_path / "claim.yaml").write_text("{id: moon, facts: [{id: a, group: truth, prompt: a, true: b, false: [c]}]}")
    given = ["--model", str(base), "--adapter", str(directory), "--output", str(tmp_path / "out")]
    same = ["--lora-rank", "4", "--lora-alpha", "8"]
    commands: list[tuple[Any, list[str]]] = [
        (merge.main, []),
        (sft.main, ["--data", str(tmp_path / "data.jsonl"), "--dry-run", *same]),
        (evaluate.main, ["--claims", str(tmp_path / "claim.yaml"), "--step", "1"]),
    ]
    capsys.readouterr()
    messages = set()
    for main, more in commands:
        assert main([*given, *more]) == 2
        messages.add(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and len(messages) == 1
    return messages.pop()


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_plain_initialisations_give_the_logits_of_stock_peft_merged_and_as_adapter(base, tmp_path, init):
    wanted = trained(base, tmp_path / "adapter", init_lora_weights=init)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] == init
    same = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(log_p(PeftModel.from_pretrained(stock(base), tmp_path / "adapter")), wanted, **same)
    torch.testing.assert_close(merged(base, tmp_path / "adapter", tmp_path / "out"), wanted, **same)
    torch.testing.assert_close(as_adapter(base, tmp_path / "adapter"), wanted, **same)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_refused_by_name(base, tmp_path, init, capsys):
    """Taken for plain they give another model. What peft makes of them for the base as it was is taken."""
    directory, converted = tmp_path / "adapter", tmp_path / "converted"
    wanted = trained(base, directory, converted, init_lora_weights=init)
    message = refused_everywhere(base, directory, tmp_path, capsys)
    said = f"init_lora_weights is '{init}', for which the LoRA weights may not be an update of the base itself"
    assert f"{directory}/adapter_config.json: {said}" in message
    assert "path_initial_model_for_weight_conversion" in message
    if init != "pissa_niter_4":  # whose start is drawn anew
        torch.testing.assert_close(merged(base, converted, tmp_path / "merged"), wanted, rtol=0, atol=1e-3)
    edit(directory, init_lora_weights=True)
    assert (merged(base, directory, tmp_path / "wrong") - wanted).abs().max() > 0.5


SWITCHES: dict[str, Any] = {
    "alora_invocation_tokens": [7, 8],
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [(0, 2), (0, 2)],
    "bias": "lora_only",
}


@pytest.mark.parametrize("key", SWITCHES)
def test_adapters_of_peft_that_are_more_than_factors_are_refused_by_name(base, tmp_path, key, capsys):
    trained(base, tmp_path / "adapter", **{key: SWITCHES[key]})
    message = refused_everywhere(base, tmp_path / "adapter", tmp_path, capsys)
    assert f"{tmp_path}/adapter/adapter_config.json: {key} is " in message and f"adapter without {key}." in message


OTHERS: list[tuple[str, Any]] = [
    ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "mica"), ("init_lora_weights", "of tomorrow"), ("lora_bias", True), ("use_qalora", True),
    ("fan_in_fan_out", True), ("megatron_config", {"tensor_model_parallel_size": 1}), ("alpha_pattern", {"q_proj": 16}),
    ("use_bdlora", {"nblocks": 2}), ("arrow_config", {"top_k": 3}), ("kasa_config", {"beta": 0.1}),
    ("velora_config", {"scale": 1.0}), ("monteclora_config", {"num_samples": 8}), ("ensure_weight_tying", True),
    ("use_the_method_of_tomorrow", 0.5), ("peft_type", "LOHA"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_whatever_else_is_set_is_refused_by_name_though_its_tensors_would_fit(base, tmp_path, key, value):
    trained(base, tmp_path / "adapter")
    adapter_settings(tmp_path / "adapter")
    edit(tmp_path / "adapter", **{key: value})
    with pytest.raises(UserError) as caught:
        adapter_settings(tmp_path / "adapter")
    assert str(caught.value).startswith(f"{tmp_path / 'adapter'}/adapter_config.json: {key} is {value!r}")


def test_every_setting_of_peft_is_known_to_be_inert_or_is_refused_unless_it_is_unset():
    """A setting that peft gains is refused where it is set, and not where it is not: no default is anything else."""
    for field in dataclasses.fields(LoraConfig):
        if field.name not in INERT:
            assert field.default in UNSET or field.default_factory is dict, field.name
