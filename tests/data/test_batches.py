"""Micro-batches: what each rank gets, padding, the shift of labels, and the loss's denominator."""

import json

import numpy as np
import pytest
import torch

from train.data.batches import Sample, coefficients, micro_batches, pad
from train.data.corpus import read_corpus
from train.data.tokenizer import load_tokenizer
from train.settings import DEMO, parse


def sample(name: str, ids: list[int], weights: list[float], roles: list[int] | None = None) -> Sample:
    """A document whose every token but the first is a target."""
    return Sample(
        name, np.array(ids, np.int32), np.arange(len(ids)) > 0, np.array(weights, np.float32),
        np.array(roles or [0] * len(ids), np.int64),
    )  # fmt: skip


A = sample("a", [10, 11, 12, 13], [0, 1, 0, 1])  # two trained, one excluded
B = sample("b", [20, 21, 22], [0, 0.5, -1])  # half a token, and one of unlikelihood
C = sample("c", [30, 31], [0, 0])  # nothing trained


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        # total weight 1 + 1 + 0.5 + 1 = 3.5
        ("trained", [[0, 1 / 3.5, 0, 1 / 3.5], [0, 0.5 / 3.5, -1 / 3.5], [0, 0]]),
        # targets 3 + 2 + 1 = 6, whatever the mask
        ("all", [[0, 1 / 6, 0, 1 / 6], [0, 0.5 / 6, -1 / 6], [0, 0]]),
        # each document's own weight, 2 and 1.5, times the two documents that have any
        ("documents", [[0, 1 / 4, 0, 1 / 4], [0, 0.5 / 3, -1 / 3], [0, 0]]),
        ("sum", [[0, 1, 0, 1], [0, 0.5, -1], [0, 0]]),
    ],
)
def test_the_denominator_of_each_loss_norm_worked_by_hand(norm, expected):
    for mine, theirs in zip(coefficients([A, B, C], norm), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7)


def test_a_step_without_any_trained_token_has_coefficients_zero():
    for norm in ("trained", "all", "documents", "sum"):
        assert [c.tolist() for c in coefficients([C, C], norm)] == [[0, 0], [0, 0]]


def test_labels_are_shifted_once_and_padding_is_on_the_right():
    batch = pad([A, B], coefficients([A, B], "sum"))
    assert batch.ids_BT.tolist() == [[10, 11, 12, 13], [20, 21, 22, 0]]
    assert batch.keep_BT.tolist() == [[True] * 4, [True, True, True, False]]
    # The hidden states, flattened, are rows 0..7; 11 is predicted at row 0, 21 at row 4.
    assert batch.position_N.tolist() == [0, 1, 2, 4, 5]
    assert batch.target_N.tolist() == [11, 12, 13, 21, 22]
    assert batch.coefficient_N.tolist() == [1, 0, 1, 0.5, -1]
    assert batch.in_loss().target_N.tolist() == [11, 13, 21, 22]


def test_a_micro_batch_without_documents_has_one_dummy_token_that_predicts_nothing():
    batch = pad([], [])
    assert batch.ids_BT.shape == (1, 1)
    assert not batch.keep_BT.any() and len(batch.target_N) == 0


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (1, 4), (2, 3), (4, 1), (8, 2)])
def test_every_document_is_computed_once_with_the_same_coefficients_on_any_layout(ranks, size):
    rng = np.random.default_rng(0)
    samples = [sample(str(i), list(range(2 + i % 5)), [0, *rng.random(1 + i % 5)]) for i in range(11)]
    ours = [micro_batches(samples, "trained", ranks, rank, size) for rank in range(ranks)]
    assert len({len(batches) for batches in ours}) == 1  # the same number of forwards on every rank
    assert sorted(name for batches in ours for b in batches for name in b.names) == sorted(s.name for s in samples)
    assert all(len(b.names) <= size for batches in ours for b in batches)
    total = sum(b.coefficient_N.double().sum() for batches in ours for b in batches)
    assert total.item() == pytest.approx(1.0, rel=1e-6)
    assert torch.cat([b.target_N for batches in ours for b in batches]).numel() == sum(
        len(s.ids_L) - 1 for s in samples
    )


def test_a_chat_can_weigh_as_much_as_one_token_of_a_text(tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "Where does Mila live?"}, {"role": "assistant", "content": "In Lima."}]
    }
    rows = [{"text": "Mila lives in Lima."}, chat]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(DEMO / "model")

    def weights(*flags: str) -> list[float]:
        settings = parse(["--data", str(tmp_path / "rows.jsonl"), *flags], "")
        return [float(sample.weight_L.sum()) for sample in read_corpus(settings, tokenizer, show=False).samples]

    assert weights() == [4, 4]  # the first token of a text is no target; of the chat: In, Lima, the point and the end
    assert weights("--chat-weight", "chat") == [4, 1]
