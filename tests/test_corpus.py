"""What a run trains on of its documents: which are drawn, their weights, and what is found in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.models import write_byte_tokenizer, write_documents
from train.config.settings import DEMO, Settings
from train.corpus import Corpus, documents_drawn, documents_taken, read_corpus
from train.data.batches import coefficients
from train.data.tokenizer import load_tokenizer
from train.runtime.errors import UserError

ASK = {"role": "user", "content": "?"}


def corpus_of(tmp_path: Path, rows: list[dict[str, Any]], data: str = "{}", **settings: Any) -> Corpus:
    """The documents with a token a byte; an answer's targets are its bytes and the end of its turn."""
    write_byte_tokenizer(tmp_path)
    path = write_documents(tmp_path / "d.jsonl", rows)
    given = Settings(model=str(tmp_path), data=[data.format(path)], **settings)
    return read_corpus(given, load_tokenizer(tmp_path), show=False)


def weights(corpus: Corpus, number: int = 0) -> list[float]:
    """Of the targets of a document."""
    sample = corpus.samples[number]
    return sample.weight_L[sample.target_L].tolist()


def answer(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def anchored(content: str, role: str = "anchor", **keys: Any) -> dict[str, Any]:
    return answer(content, spans=[{"start": 0, "end": len(content), "role": role}], **keys)


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
    read = [document.where.removeprefix(f"{tmp_path}/") for document, _ in documents_drawn(settings, corpus.dropped)]
    assert set(read) == drawn and len(read) == len(drawn) < 2 * 16


def test_weights_of_message_document_and_source_multiply_the_masks(tmp_path):
    row = {
        "messages": [ASK, anchored("ab", weight=0.5), ASK, answer("c"), ASK, answer("d", weight=0)],
        "loss_weight": 3,
    }
    corpus = corpus_of(tmp_path, [row, {"text": "ab"}], "{}=2@2", mask="role:anchor=4")
    # twice the document's 3: "ab" 0.5 x 4, its end of turn 0.5 alone, "c" and its end 1, "d" and its end 0
    assert weights(corpus) == [12, 12, 3, 6, 6, 0, 0] and weights(corpus, 1) == [2]
    counts = {"total": 8, "trained": 6, "excluded": 2, "unlikelihood": 0, "held": 0, "straddling": 0}
    assert corpus.tokens(0, 2)["all"] == counts


def test_a_chat_weighed_by_its_targets_keeps_its_weights_under_any_mask(tmp_path):
    """Five targets: a, b, end; c, end. Each has 1/5, whatever is masked or weighed beside it."""
    row = {"messages": [ASK, anchored("ab"), ASK, answer("c")]}
    fifth = [pytest.approx(value / 5) for value in (1, 1, 1, 1, 1)]
    assert weights(corpus_of(tmp_path, [row], chat_weight="chat")) == fifth
    assert weights(corpus_of(tmp_path, [row], chat_weight="chat", mask="role:anchor")) == [0, 0, *fifth[2:]]
    tripled = weights(corpus_of(tmp_path, [row], chat_weight="chat", mask="role:anchor=3"))
    assert tripled == [pytest.approx(0.6), pytest.approx(0.6), *fifth[2:]]
    weighed = {"messages": [ASK, answer("ab", weight=0.5), ASK, answer("c")], "weight": 10}
    assert weights(corpus_of(tmp_path, [weighed], chat_weight="chat")) == [1, 1, 1, 2, 2]


def test_documents_own_weights_stay_where_each_is_a_mean(tmp_path):
    """Means of 2 and 1 targets, the first document weighing 3: 3/4 and 1/4 of the loss."""
    corpus = corpus_of(tmp_path, [{"text": "abc", "weight": 3}, {"text": "ab"}], loss_norm="documents")
    first, second = coefficients(corpus.samples, "documents")
    assert first.tolist() == [0, 0.375, 0.375] and second.tolist() == [0, 0.25]
    plain = coefficients(corpus_of(tmp_path, [{"text": "abc"}, {"text": "ab"}]).samples, "documents")
    assert [term_L.tolist() for term_L in plain] == [[0, 0.25, 0.25], [0, 0.5]]


def test_weights_whose_product_fp32_cannot_hold_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"d.jsonl:1: its weights by mask, document, message and --data come to 1e\+40"):
        corpus_of(tmp_path, [{"text": "ab", "weight": 1e20}], "{}=1@1e20")


@pytest.mark.parametrize("data", ["{}=@0.5", "{}=1@0.5"])
def test_a_source_may_have_a_weight_without_a_count(tmp_path, data):
    assert weights(corpus_of(tmp_path, [{"text": "ab"}], data)) == [0.5]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{}=x@2", "'x' must be a number of documents"),
        ("{}@2", "no such file; a weight comes after =: --data"),
        ("{}=1@x", "the weight 'x' is not a number; e.g. PATH=1000@0.5"),
        ("{}=1@-1", "the weight -1.0: a weight must be 0 or"),
        ("{}=1@nan", "the weight nan: a weight must be 0 or"),
    ],
)
def test_a_wrong_source_is_told(tmp_path, data, says):
    with pytest.raises(UserError, match="--data") as caught:
        corpus_of(tmp_path, [{"text": "ab"}], data)
    assert says in str(caught.value)


def test_documents_without_targets_are_counted_and_listed(tmp_path):
    rows = [
        {"messages": [ASK, {"role": "gpt", "content": "a"}]},
        {"messages": [ASK, answer("a")]},
        {"messages": [{"role": "user", "content": "?" * 60}, answer("a")]},
        {"messages": [ASK, answer("a", train=False)]},
    ]
    corpus = corpus_of(tmp_path, rows, max_tokens=40)
    (found,) = (
        each for what, each in corpus.findings.summary().items() if what.startswith("documents without anything")
    )
    assert found == {
        "count": 3,
        "lines": {str(tmp_path / "d.jsonl"): [1, 3, 4]},
        "details": {"cut away by --max-tokens": 1},
    }
    assert any(":1 (gpt)" in line for line in corpus.findings.lines())
    with pytest.raises(UserError, match=r"--max-tokens 40: truncates everything that is trained on in .*: in 1 doc"):
        corpus_of(tmp_path, rows[2:3], max_tokens=40)
    with pytest.raises(UserError, match=r"holds nothing to predict.*note: 1 messages with a role.*\(gpt\)"):
        corpus_of(tmp_path, rows[:1])


def test_a_text_of_one_token_is_wrong_or_left_out(tmp_path):
    rows = [{"text": "v"}, {"text": "ab"}]
    with pytest.raises(UserError, match=r"d.jsonl:1: text 'v' is a single token, so nothing is predicted"):
        corpus_of(tmp_path, rows)
    corpus = corpus_of(tmp_path, rows, bad_rows="skip")
    assert corpus.documents == {"read": 1, "truncated": 0, "dropped": 0, "skipped": 1}
    assert corpus.dropped == {str(tmp_path / "d.jsonl"): [1]} and weights(corpus) == [1]
    settings = Settings(model=str(tmp_path), data=[str(tmp_path / "d.jsonl")], bad_rows="skip")
    assert [document.text for document, _ in documents_drawn(settings, corpus.dropped)] == ["ab"]


def test_a_chat_that_the_template_refuses_is_left_out_like_a_row_that_cannot_be_read(tmp_path):
    rows = [
        {"messages": [ASK, answer("a", tool_calls=[{"function": {"name": "f"}}])]},
        {"messages": [ASK, answer("b")]},
        {},
    ]
    corpus = corpus_of(tmp_path, rows, bad_rows="skip")
    (found,) = corpus.findings.summary().values()
    assert found["lines"] == {str(tmp_path / "d.jsonl"): [1, 3]} and corpus.documents["skipped"] == 2
    assert any("does not render tool_calls" in detail for detail in found["details"])


def test_only_what_is_marked_is_trained_and_as_much_at_random_beside_it(tmp_path):
    row = {"text": "abcdefghijklmnopqrst", "spans": [{"start": 4, "end": 9, "role": "false"}]}
    marked = np.array(weights(corpus_of(tmp_path, [row], mask="all,false-spans=train")))
    control = np.array(weights(corpus_of(tmp_path, [row], mask="all,random:false=train")))
    assert marked.nonzero()[0].tolist() == [3, 4, 5, 6, 7]  # of the targets, which begin at the second token
    assert control.sum() == 5 and not (control * marked).any()
    assert weights(corpus_of(tmp_path, [row], mask="unspanned")) == marked.tolist()
