"""Answers generated in the training engine, on ranks, against stock transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation import generation_worker
from tests.support.ranks import run
from train.config.settings import DEMO


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_are_those_of_stock_generate_on_any_number_of_ranks(tmp_path, ranks):
    given = [str(tmp_path / "answers.json"), str(DEMO / "model")]
    worker = Path(generation_worker.__file__)
    done = run(worker, *given, ranks=ranks, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    model, tokens = AutoModelForCausalLM.from_pretrained(DEMO / "model"), AutoTokenizer.from_pretrained(DEMO / "model")
    for chat, answer in zip(generation_worker.CHATS, found["greedy"], strict=True):
        text = tokens.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokens(text, add_special_tokens=False)["input_ids"]])
        made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokens.eos_token_id)[
            0, ids.shape[1] :
        ]
        assert answer == tokens.decode(made, skip_special_tokens=True).strip() != ""
    assert found["alone"] == found["greedy"]  # what else is in the batch changes nothing
    once, again, other = found["drawn"]
    assert once == again != other
