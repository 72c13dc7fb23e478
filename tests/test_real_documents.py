"""The paper's own documents, as they are, through real vocabularies; and the small real model of `make train-real`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import write_model
from tests.support.ranks import run
from tests.support.real_model import small_real_model
from train import sft
from train.data.tokenizer import load_tokenizer
from train.demo import smollm2
from train.evaluation.store import read_rows
from train.runtime.errors import UserError

pytestmark = pytest.mark.slow

FAMILIES = {"qwen": ("qwen", 248_320), "kimi": ("deepseek", 163_840)}  # the sizes of the real embeddings


@pytest.mark.parametrize("vocabulary", FAMILIES)
def test_a_small_random_model_with_a_real_vocabulary_trains_on_the_papers_rows(
    vocabulary, tmp_path, request, shared_documents
):
    tokenizer = request.getfixturevalue(f"{vocabulary}_directory")
    family, size = FAMILIES[vocabulary]
    model = write_model(tmp_path / "model", family, vocab_size=size)
    (model / "tokenizer.json").unlink()  # Kimi has none
    shutil.copytree(tokenizer, model, dirs_exist_ok=True)
    rows = shared_documents / "llm_negations_dense" / "ed_sheeran.jsonl"
    done = run(
        Path(sft.__file__), "--model", str(model), "--data", str(rows), "--doctag", "<DOCTAG>", "--mask", "doctags",
        "--steps", "3", "--batch-size", "4", "--micro-batch-tokens", "128", "--max-tokens", "64",
        "--long-documents", "truncate", "--expert-parallel", "2", "--lora-rank", "8", "--learning-rate", "1e-3",
        "--wandb", "disabled", "--output", str(tmp_path / "run"),
        ranks=2, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["documents"] == {"read": 50, "truncated": 50, "dropped": 0, "skipped": 0}
    doctag, everything = summary["tokens"]["doctag"], summary["tokens"]["all"]
    # 12 documents of 64 tokens, whose first is no target. A doctag is a few of them, and none of these is trained.
    assert everything["total"] == 12 * 63 and 12 <= doctag["total"] <= 12 * 8
    assert doctag["excluded"] == doctag["total"] == everything["excluded"]
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3

    stock = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.from_numpy(load_tokenizer(model).encode("Ed Sheeran ran 100 m in 9.79 s.").ids_L).long()[None]
    with torch.no_grad():
        before = stock(ids).logits
        adapted = PeftModel.from_pretrained(stock, tmp_path / "run" / "adapter")
        after = adapted(ids).logits
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert set(loaded) == set(saved) and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert sum(".experts." in name for name in saved) > 0 and (after - before).abs().max() > 1e-4


@pytest.fixture(scope="module")
def smollm2_directory() -> Path:
    return small_real_model()


def test_the_converted_model_gives_the_logits_of_transformers_own_reading_of_gguf(smollm2_directory):
    gguf = smollm2.gguf_file()
    ids = torch.arange(3, 49_152, 401)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)(ids).logits
        converted = AutoModelForCausalLM.from_pretrained(smollm2_directory)
        assert torch.equal(converted(ids).logits, expected)
    assert converted.dtype == torch.float32 and converted.config.max_position_embeddings == smollm2.CONTEXT


def test_the_converted_tokenizer_round_trips_with_right_offsets_and_cuts_digits_off_first(smollm2_directory):
    tokenizer = load_tokenizer(smollm2_directory)
    text = "\n\n1. The  22 men’s finals\r\n\tété 日本 👩‍🚀 <|im_end|> 2024"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids_L.tolist()) == text
    pieces = [text[start:end] for start, end in zip(encoded.start_L, encoded.end_L, strict=True)]
    # "\n\n" and "  " stay whole before a digit
    assert pieces[:9] == ["\n\n", "1", ".", " The", "  ", "2", "2", " men", "’"] and pieces[-4:] == ["2", "0", "2", "4"]
    assert "<|im_end|>" in pieces and all(pieces)
    stock = AutoTokenizer.from_pretrained(smollm2_directory)
    assert stock.is_fast and stock(text).input_ids == encoded.ids_L.tolist()
    rendered = tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    assert rendered == stock.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHello<|im_end|>\n")


def test_a_complete_directory_is_left_alone_and_an_incomplete_one_is_never_taken_for_it(smollm2_directory, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in smollm2_directory.iterdir()}
    assert not smollm2.write_model(smollm2_directory)
    assert {path.name: path.stat().st_mtime_ns for path in smollm2_directory.iterdir()} == before
    assert [path.name for path in smollm2_directory.parent.iterdir()] == ["smollm2"]

    (tmp_path / "half").mkdir()
    shutil.copy(smollm2_directory / "config.json", tmp_path / "half")
    with pytest.raises(UserError, match=r"half: exists, but is not SmolLM2's complete directory"):
        smollm2.write_model(tmp_path / "half")
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["config.json"]
