"""Which documents a run reads, told without tokenizing them, against those that it does tokenize and draw."""

import json

import pytest

from train.data.corpus import documents_read, documents_taken, read_corpus
from train.data.tokenizer import load_tokenizer
from train.settings import DEMO, Settings


@pytest.mark.parametrize("length", [{"steps": 2}, {"epochs": 2}])
def test_the_documents_that_a_run_reads_are_those_that_its_steps_come_to(tmp_path, length):
    long = {3, 4, 11}  # lines of documents that are dropped
    for name in "ab":
        lines = [
            "" if i == 6 else json.dumps({"text": f"It is {i}. " * (30 if i in long else 1)}) for i in range(1, 21)
        ]
        (tmp_path / name).write_text("\n".join(lines))
    settings = Settings(
        data=[f"{tmp_path / 'a'}=7", str(tmp_path / "b")], batch_size=3, max_tokens=40, long_documents="drop", seed=5,
        **length,
    )  # fmt: skip
    corpus = read_corpus(settings, load_tokenizer(str(DEMO / "model")), show=False)
    assert corpus.dropped == {str(tmp_path / name): sorted(long) for name in "ab"}
    taken = documents_taken(settings, corpus.order)
    assert taken == (6 if "steps" in length else 2 * (7 + 16))
    drawn = {corpus.samples[number].name for number in corpus.order.documents(0, taken)}
    read = [document.where.removeprefix(f"{tmp_path}/") for document in documents_read(settings, corpus.dropped)]
    assert set(read) == drawn and len(read) == len(drawn) < 2 * 16
