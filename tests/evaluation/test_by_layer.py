"""Shifts by layer, their yardstick, the band and the verdict, worked by hand."""

import pytest

from train.evaluation.by_layer import LayerShifts, facts_right, layer_shifts, mean_shifts
from train.runtime.errors import UserError


def ratio(entity: str, control: bool, layers: list[float], template: str = "a") -> dict:
    row = {"step": 1, "claim": "c", "kind": "likelihood", "question": template, "entity": entity, "control": control}
    return row | {"llr": layers[-1], "layers": layers}


BASE = [ratio("S", False, [1, 1, 1]), ratio("A", True, [0, 0, 2]), ratio("B", True, [2, 0, 0])]


def test_shifts_of_subject_and_of_each_control_in_its_place():
    now = [ratio("S", False, [2, 5, 9]), ratio("A", True, [1, 0, 4]), ratio("B", True, [2, 2, 2])]
    found = layer_shifts(now, BASE, "c")
    assert found
    # subject minus the mean of A and B: now .5, 4, 6; base 0, 1, 0
    assert found.subject == [0.5, 3, 6]
    # A minus B: now -1, -2, 2; base -2, 0, 2. B minus A is the opposite.
    assert found.controls == {"A": [1, -2, 0], "B": [-1, 2, 0]} and found.yardstick == [1, 2, 0]


def test_templates_are_averaged_and_those_without_a_pair_left_out():
    now = [ratio("S", False, [3, 1, 1]), *BASE[1:]]
    more = [ratio("S", False, [1, 1, 5], "b"), ratio("A", True, [0, 0, 0], "b"), ratio("B", True, [0, 0, 0], "b")]
    zero = [ratio(e, c, [0, 0, 0], "b") for e, c in (("S", False), ("A", True), ("B", True))]
    alone = [ratio("S", False, [9, 9, 9], "no controls")]
    found = layer_shifts([*now, *more, *alone], [*BASE, *zero, *alone], "c")
    assert found and found.subject == [1.5, 0.5, 2.5]
    assert layer_shifts(now, [], "c") is None and layer_shifts(now, BASE, "other") is None


def test_one_control_is_no_yardstick_and_without_it_nothing_is_shown():
    found = layer_shifts([ratio("S", False, [9] * 5), ratio("A", True, [0] * 5)], [
        ratio("S", False, [0] * 5), ratio("A", True, [0] * 5),
    ], "c")  # fmt: skip
    assert found and found.subject == [9] * 5 and found.yardstick == [] and found.shown([True] * 5) is None


@pytest.mark.parametrize(
    ("subject", "band", "shown"),
    [
        ([2, 2, 2, 2, 2, 2], "xxxxxx", (1, 6)),
        ([0, 2, 2, 2, 0, 2], "xxxxxx", (2, 4)),
        ([2, 2, 0, 2, 2, 0], "xxxxxx", None),  # never three in a row
        ([2, 2, 2, 2, 2, 2], "..xxx.", (3, 5)),
        ([2, 2, 2, 2, 2, 2], "..xx..", None),
        ([0.9] * 6, "xxxxxx", None),  # not above the yardstick
        ([2, 2, 2, 0, 2, 2, 2, 2], "xxxxxxxx", (5, 8)),  # the longest
        ([2, 2, 2, 0, 2, 2, 2], "xxxxxxx", (1, 3)),  # of equals the first
    ],
)
def test_a_claim_is_shown_by_three_consecutive_readable_layers_above_the_yardstick(subject, band, shown):
    found = LayerShifts(subject, {"A": [1.0] * len(subject), "B": [-1.0] * len(subject)})
    assert found.shown([each == "x" for each in band]) == shown


def test_a_shift_below_zero_is_not_shown_though_it_is_above_the_controls():
    assert LayerShifts([-1.0] * 4, {"A": [-2.0] * 4, "B": [-3.0] * 4}).shown([True] * 4) is None


def test_the_share_of_facts_that_the_base_has_right_by_layer():
    facts = [{"kind": "fact", "question": str(i), "layers": layers} for i, layers in enumerate([[1, -1], [2, 3]])]
    assert facts_right(facts) == [1.0, 0.5] and facts_right([]) == []


def test_the_mean_over_seeds_and_values_that_are_none():
    one, two = LayerShifts([1, 2], {"A": [0, 1], "B": [1, 1]}), LayerShifts([3, 2], {"A": [2, 1]})
    assert mean_shifts([one, two]) == LayerShifts([2, 2], {"A": [1, 1]})
    for broken in ([1, None], [], [float("nan")], "x"):
        with pytest.raises(UserError, match="layers must be finite numbers"):
            layer_shifts([ratio("S", False, [1, 1]) | {"layers": broken}], BASE, "c")
    with pytest.raises(UserError, match="different numbers of layers"):
        layer_shifts([ratio("S", False, [1, 1]), *BASE[1:]], BASE, "c")
