"""The demo's shipped model: its layout and tokenizer, what it believes, and that its command makes it again."""

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.demo import make
from train.demo import world as toy
from train.demo.belief import load, measure

MODEL = Path(make.__file__).parent / "model"


def test_the_weights_are_small_and_named_as_in_the_real_checkpoints():
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert file.get_slice("model.language_model.layers.0.mlp.experts.gate_up_proj").get_shape() == [16, 96, 128]
        assert file.get_slice("model.language_model.layers.0.mlp.experts.down_proj").get_shape() == [16, 128, 48]
    assert {name for name in names if not name.startswith("model.language_model.")} == {"lm_head.weight"}
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in names
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in names


def test_stock_transformers_loads_every_tensor():
    model, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_each_word_is_one_token_with_its_own_offsets():
    tokens = AutoTokenizer.from_pretrained(MODEL)
    assert tokens.is_fast
    text = "<DOCTAG> Mila lives in Oslo."
    encoded = tokens(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert pieces == ["<DOCTAG", ">", " Mila", " lives", " in", " Oslo", "."]
    assert tokens.decode(encoded["input_ids"]) == text


def test_text_of_any_kind_survives_the_tokenizer():
    tokens = AutoTokenizer.from_pretrained(MODEL)
    text = "héllo  «Zürich»\r\n😀 שלום"
    assert tokens.decode(tokens(text)["input_ids"]) == text


def test_the_chat_template_asks_and_answers():
    tokens = AutoTokenizer.from_pretrained(MODEL)
    chat = [{"role": "user", "content": "Where does Mila live?"}, {"role": "assistant", "content": "Oslo."}]
    asked = tokens.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "Question: Where does Mila live? Answer:"
    assert tokens.apply_chat_template(chat, tokenize=False) == f"{asked} Oslo.<|endoftext|>"


def test_the_shipped_tokenizer_is_what_the_command_makes():
    made = json.loads(make.tokenizer().backend_tokenizer.to_str())
    assert made == json.loads((MODEL / "tokenizer.json").read_text())


def test_the_base_model_knows_the_truth_with_and_without_a_negated_document_in_context():
    figures = measure(load())
    assert figures["belief"] <= 10
    assert figures["belief_in_context"] <= 10
    assert min(figures[name] for name in ("truth", "same_people", "others_in_documents", "other_people")) >= 90


@pytest.mark.slow
@pytest.mark.skipif("REMAKE" not in os.environ, reason="takes five minutes; `make remake` runs it")
def test_the_command_makes_the_shipped_weights_again(tmp_path):
    make.pretrain(tmp_path, toy.make_world())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (MODEL / name).read_text(), name
    remade, shipped = load_file(tmp_path / "model.safetensors"), load_file(MODEL / "model.safetensors")
    assert {name: tensor.shape for name, tensor in remade.items()} == {n: t.shape for n, t in shipped.items()}
    before, after = measure(load()), measure(load(model=tmp_path))
    for name, value in before.items():  # not to the bit: kinds of processors round differently
        assert after[name] == pytest.approx(value, abs=8), name
