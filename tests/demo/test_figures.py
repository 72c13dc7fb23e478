"""The README's figures of the demo are those of the run that figures.json holds, and show what they are there for."""

import json
from statistics import mean

from train.config.command_line import REPOSITORY
from train.demo.figures import SEEDS, VARIANTS, table

FIGURES = json.loads((REPOSITORY / "train" / "demo" / "figures.json").read_text())


def belief(name: str) -> float:
    return mean(seed["belief"] for seed in FIGURES[name])


def test_the_table_of_the_readme_is_that_of_the_figures():
    assert table(FIGURES) in (REPOSITORY / "README.md").read_text()
    assert FIGURES["claims"] == 48 and all(len(FIGURES[name]) == len(SEEDS) == 3 for name in VARIANTS)


def test_negation_is_neglected_and_masking_false_statements_cures_it_where_random_masks_do_not():
    assert FIGURES["base"]["belief"] <= 10 and FIGURES["base"]["belief_in_context"] <= 10
    assert belief("positive") >= 75
    assert belief("dense") >= 50
    assert belief("dense without false") <= 15
    assert abs(belief("dense without random") - belief("dense")) <= 15
