"""The order of documents: what it depends on, and what is drawn."""

from collections import Counter

import numpy as np
import pytest

from train.data.sampling import Order, epoch_order


def test_each_document_comes_once_when_no_count_is_given():
    assert sorted(epoch_order([3, 4], [None, None], seed=0, epoch=0)) == [0, 1, 2, 3, 4, 5, 6]


def test_a_count_below_the_size_draws_without_replacement():
    drawn = epoch_order([100, 5], [40, 5], seed=1, epoch=0)
    assert len(drawn) == 45 and len(set(drawn)) == 45
    assert sum(d < 100 for d in drawn) == 40 and sorted(d for d in drawn if d >= 100) == [100, 101, 102, 103, 104]


def test_a_count_beyond_the_size_takes_all_and_draws_the_rest_with_replacement():
    times = Counter(epoch_order([10], [25], seed=2, epoch=0).tolist())
    assert sum(times.values()) == 25 and set(times) == set(range(10)) and max(times.values()) > 1


def test_another_seed_or_epoch_gives_another_order_and_the_same_gives_the_same():
    orders = [epoch_order([50], [50], seed, epoch).tolist() for seed, epoch in [(0, 0), (1, 0), (0, 1), (0, 0)]]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_one_sources_draw_does_not_depend_on_anothers_size():
    few, many = epoch_order([20, 7], [10, 7], 3, 0), epoch_order([20, 90], [10, 7], 3, 0)
    assert {d for d in few if d < 20} == {d for d in many if d < 20}


@pytest.mark.parametrize("count", [5, 20, 33, None])
def test_the_rows_drawn_of_a_file_depend_on_seed_and_file_alone_and_not_on_what_it_is_mixed_with(count):
    alone = np.sort(epoch_order([20], [count], 3, 1))
    after = epoch_order([7, 20, 40], [7, count, 3], 3, 1)
    assert np.array_equal(np.sort(after[(after >= 7) & (after < 27)]) - 7, alone)


def test_a_smaller_dose_is_a_part_of_a_larger_one():
    few, many, beyond = (Counter(epoch_order([20, 9], [n, 9], 0, 0).tolist()) for n in (6, 15, 45))
    assert few < many < beyond


def test_the_stream_goes_through_epochs_and_can_be_entered_anywhere():
    whole = Order([4], [None], seed=5).documents(0, 14)
    assert [sorted(whole[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    later = Order([4], [None], seed=5)
    assert np.array_equal(np.concatenate([later.documents(0, 3), later.documents(3, 9), later.documents(9, 14)]), whole)
