"""What a run measures of itself."""

import multiprocessing

import torch

from train.runtime.distributed import peak_host_bytes
from train.training.metrics import reset_peak_memory
from train.training.tables import belief_table, closing_table


def peaks() -> list[int]:
    """Of a process that takes 200 MB, gives them back, begins anew, and takes as much again."""
    assert reset_peak_memory(torch.device("cpu"))
    large = torch.ones(50_000_000)
    first = peak_host_bytes()
    del large
    assert reset_peak_memory(torch.device("cpu"))
    between = peak_host_bytes()
    again = torch.ones(50_000_000)
    assert again.sum() == 50_000_000
    return [first, between, peak_host_bytes()]


def test_the_peak_of_memory_of_one_run_is_not_that_of_the_run_before():
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a heap without what other tests have left in it
        first, between, second = pool.apply(peaks)
    assert between < first - 150_000_000
    assert second > first - 50_000_000


def test_theclosing_table_has_no_figure_of_an_nll_that_is_not_finite():
    counts = {"total": 4, "trained": 3, "excluded": 1, "unlikelihood": 0}
    nll = {"all": {"first": 1.5, "last": None}}  # as metrics.jsonl has it
    summary = {"mask": "none", "steps": 2, "tokens": {"all": counts}, "nll": nll, "kl": {}}
    shown = [list(column.cells) for column in closing_table(summary).columns]
    assert shown == [["all"], ["4"], ["3"], ["1"], ["0"], ["1.500"], ["–"]]
    counts["held"] = 2
    shown = [list(c.cells) for c in closing_table(summary | {"kl": {"all": {"first": 0.0, "last": 0.0123}}}).columns]
    assert shown == [["all"], ["4"], ["3"], ["1"], ["0"], ["2"], ["1.500"], ["–"], ["0.012"]]


def test_the_belief_table_has_each_claim_before_and_after_or_the_mean_of_many():
    def rows(step: int, claim: str, subject: float) -> list[dict]:
        common = {"step": step, "claim": claim, "kind": "likelihood", "question": "a", "sample": 0}
        return [
            common | {"entity": "S", "control": False, "llr": subject},
            common | {"entity": "A", "control": True, "llr": -1.0},
        ]

    one = [row for step, subject in ((0, -1.0), (5, 2.0)) for row in rows(step, "mila", subject)]
    table = belief_table(one, rows(0, "mila", -1.0))
    assert table and [list(column.cells) for column in table.columns] == [
        ["shift", "preference"], ["nats", "%"], ["mila", "mila"], ["0.00", "0.00"], ["3.00", "100.00"],
    ]  # fmt: skip
    assert "5 steps" in str(table.title)
    many = [row for step in (0, 5) for i in range(9) for row in rows(step, f"claim {i}", step * i - 1.0)]
    table = belief_table(many, many[: len(many) // 2])
    assert table and list(table.columns[2].cells) == ["9 claims", "9 claims"]
    assert next(iter(table.columns[4].cells)) == f"{sum(5 * i for i in range(9)) / 9:.2f}"
    assert belief_table([], []) is None and belief_table(rows(0, "mila", 1.0), rows(0, "mila", 1.0)) is None
    # a run that continues another begins with a belief, and its base is that of the other
    later = belief_table([*rows(0, "mila", 2.0), *rows(2, "mila", 4.0)], rows(0, "mila", -1.0))
    assert later and [next(iter(column.cells)) for column in later.columns[3:]] == ["3.00", "5.00"]
