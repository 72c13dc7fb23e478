"""Micro-batches: what each rank gets, the shift of labels, and the loss's denominator."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config.settings import DEMO, parse
from train.corpus import read_corpus
from train.data.batches import Sample, coefficients, deal, micro_batches, pack
from train.data.kinds import TermKind
from train.data.tokenizer import load_tokenizer


def sample(name: str, ids: list[int], weights: list[float], roles: list[int] | None = None) -> Sample:
    """A document whose every token but the first is a target; a negative weight is one of unlikelihood."""
    return Sample(
        name, np.array(ids, np.int32), np.arange(len(ids)) > 0, np.abs(np.array(weights, np.float32)),
        (np.array(weights) < 0).astype(np.int8) * TermKind.UNLIKELIHOOD,
        np.array(roles or [0] * len(ids), np.int64),
    )  # fmt: skip


A = sample("a", [10, 11, 12, 13], [0, 1, 0, 1])  # two trained, one excluded
B = sample("b", [20, 21, 22], [0, 0.5, -1])  # half a token, and one of unlikelihood
C = sample("c", [30, 31], [0, 0])  # nothing trained


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        # total weight 1 + 1 + 0.5 + 1 = 3.5
        ("trained", [[0, 1 / 3.5, 0, 1 / 3.5], [0, 0.5 / 3.5, 1 / 3.5], [0, 0]]),
        # targets 3 + 2 + 1 = 6, whatever the mask
        ("all", [[0, 1 / 6, 0, 1 / 6], [0, 0.5 / 6, 1 / 6], [0, 0]]),
        # each document's own weight, 2 and 1.5, times the two documents that have any
        ("documents", [[0, 1 / 4, 0, 1 / 4], [0, 0.5 / 3, 1 / 3], [0, 0]]),
        ("sum", [[0, 1, 0, 1], [0, 0.5, 1], [0, 0]]),
    ],
)
def test_the_denominator_of_each_loss_norm_worked_by_hand(norm, expected):
    for mine, theirs in zip(coefficients([A, B, C], norm), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7)


def test_a_step_without_any_trained_token_has_coefficients_zero():
    for norm in ("trained", "all", "documents", "sum"):
        assert [c.tolist() for c in coefficients([C, C], norm)] == [[0, 0], [0, 0]]


def test_labels_are_shifted_once_and_positions_begin_anew():
    batch = pack([A, B], coefficients([A, B], "sum"))
    assert batch.ids_T.tolist() == [10, 11, 12, 13, 20, 21, 22] and batch.tokens == 7
    assert batch.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    # 11 is predicted at row 0 of the hidden states, 21 at row 4.
    assert batch.position_N.tolist() == [0, 1, 2, 4, 5]
    assert batch.target_N.tolist() == [11, 12, 13, 21, 22]
    assert batch.coefficient_N.tolist() == [1, 0, 1, 0.5, 1] and batch.kind_N.tolist() == [0, 0, 0, 0, 1]
    assert batch.in_loss().target_N.tolist() == [11, 13, 21, 22]


def test_a_micro_batch_without_documents_has_one_token_that_predicts_nothing():
    batch = pack([], [])
    assert batch.ids_T.shape == (1,) and batch.row.lengths == [1]
    assert batch.tokens == 0 and len(batch.target_N) == 0


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "micro_steps"),
    [
        ([4, 3, 3, 2, 2, 2], 2, 8, [[8, 8]]),
        ([4, 3, 3, 2, 2, 2], 2, 4, [[4, 3], [3, 2], [2, 2]]),
        ([5, 4, 3, 3, 3], 2, 9, [[9, 9]]),  # though the row that holds least would get 10
        ([9, 1, 1], 2, 10, [[9, 2]]),
        ([9, 1, 1], 2, 5, [[9, 2]]),  # a document that is longer than the budget has a row of its own
        ([5, 5, 5, 1], 2, 6, [[5, 5], [5, 1]]),
        ([2], 4, 10, [[2, 0, 0, 0]]),
        ([], 2, 10, [[0, 0]]),
    ],
)
def test_documents_are_dealt_out_to_rows_that_are_nearly_equal_in_as_few_micro_steps_as_can_be(
    lengths, ranks, budget, micro_steps
):
    dealt = deal(lengths, ranks, budget)
    assert sorted(i for step in dealt for row in step for i in row) == list(range(len(lengths)))
    assert [[sum(lengths[i] for i in row) for row in step] for step in dealt] == micro_steps


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8), st.integers(50, 120))
def test_rows_hold_the_budget_at_most_and_no_micro_step_is_empty(lengths, ranks, budget):
    dealt = deal(lengths, ranks, budget)
    sums = [sum(lengths[i] for i in row) for step in dealt for row in step]
    assert sorted(i for step in dealt for row in step for i in row) == list(range(len(lengths)))
    assert max(sums) <= budget and sorted(sums, reverse=True) == sums
    assert all(len(step) == ranks and (step[0] or not lengths) for step in dealt)
    if len(dealt) == 1 and max(sums) < budget - 50:  # then the row that held least could have any document
        assert max(sums) - min(sums) <= max(lengths, default=0)


@pytest.mark.parametrize(("ranks", "budget"), [(1, 6), (1, 12), (2, 10), (4, 6), (8, 6)])
def test_every_document_is_computed_once_with_the_same_coefficients_on_any_layout(ranks, budget):
    rng = np.random.default_rng(0)
    samples = [sample(str(i), list(range(2 + i % 5)), [0, *rng.random(1 + i % 5)]) for i in range(11)]
    ours = [micro_batches(samples, "trained", ranks, rank, budget) for rank in range(ranks)]
    assert len({len(batches) for batches in ours}) == 1  # the same number of forwards on every rank
    assert sorted(name for batches in ours for b in batches for name in b.names) == sorted(s.name for s in samples)
    assert all(b.tokens <= budget for batches in ours for b in batches)
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


def held(name: str, ids: list[int], places: set[int], weight: float = 1.0) -> Sample:
    """A document of which the targets at these places are held, and the others trained on."""
    kind_L = np.array([TermKind.HELD if i in places else TermKind.CROSS_ENTROPY for i in range(len(ids))], np.int8)
    target_L = np.arange(len(ids)) > 0
    weight_L = np.where(kind_L == TermKind.HELD, weight, 1).astype(np.float32) * target_L
    return Sample(name, np.array(ids, np.int32), target_L, weight_L, kind_L, np.zeros(len(ids), np.int64))


def test_the_base_predicts_what_is_held_from_documents_that_end_there():
    long, none = held("long", [10, 11, 12, 13, 14], {1, 3}), held("none", [20, 21], set())
    last = held("last", [30, 31], {1})
    (batch,) = micro_batches([long, none, last], "sum", 1, 0, 20)
    assert batch.base and batch.ids_T.tolist() == [10, 11, 12, 13, 14, 20, 21, 30, 31]
    base = batch.base.batch
    assert base.ids_T.tolist() == [10, 11, 12, 13, 30, 31] and base.row.ends == [0, 4, 6]
    assert base.position_N.tolist() == [0, 2, 4] and base.target_N.tolist() == [11, 13, 31]
    assert batch.target_N[batch.base.known_N].tolist() == [11, 13, 31]


def test_every_rank_runs_the_base_where_one_holds_tokens_and_none_where_no_rank_does():
    samples = [held("a", [10, 11, 12], {2}), held("b", [20, 21], set()), held("c", [30, 31], set())]
    ranks = [micro_batches(samples, "trained", 2, rank, 3) for rank in range(2)]
    for step in zip(*ranks, strict=True):
        holds = any(batch.names == ["a"] for batch in step)
        assert [batch.base is not None for batch in step] == [holds, holds]
    (placeholder,) = [b.base for own in ranks for b in own if b.base and b.names != ["a"]]
    assert placeholder.batch.names == [] and not placeholder.known_N.any() and len(placeholder.batch.target_N) == 0
    unheld = [held("a", [10, 11, 12], {2}, weight=0), *samples[1:]]
    assert not any(batch.base for batch in micro_batches(unheld, "trained", 1, 0, 20))


def test_to_measure_the_divergence_the_base_predicts_every_target():
    (batch,) = micro_batches([A, C], "trained", 1, 0, 20, measure_kl=True)
    assert batch.base and batch.base.known_N.all() and batch.base.batch.target_N.tolist() == batch.target_N.tolist()
    left = batch.in_loss()
    assert (
        left.base
        and left.base.known_N.all()
        and left.base.batch.target_N.tolist() == left.target_N.tolist() == [11, 13]
    )
