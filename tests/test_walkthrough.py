"""docs/walkthrough.md: every command runs, and prints what the page shows (the rule: tests/walkthrough.py)."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.ranks import SERVER, address
from tests.walkthrough import PAGE, STEP, Step, agree, placed, rewritten, run
from train.config.command_line import REPOSITORY

README = REPOSITORY / "README.md"


# Stands for python: forks one that has imported what takes long, but for the training itself.
PYTHON = f"""#!/bin/sh
case "$*" in *--dry-run*) ;; train/sft.py*) exec '{sys.executable}' "$@" ;; esac
PYTHONPATH='{REPOSITORY}' exec '{sys.executable}' -c '
import sys
from tests.support.ranks import Forked
words = ["-c", sys.stdin.read()] if sys.argv[1:] == ["-"] else sys.argv[1:]
sys.exit(Forked(*words).wait())' "$@"
"""


@pytest.fixture
def bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SERVER, address())
    python = tmp_path / "bins" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    return python.parent


@pytest.mark.slow
def test_every_command_of_the_walk_through_runs_and_prints_what_the_page_shows(tmp_path, bins):
    for step in run(PAGE.read_text(), tmp_path, bins):
        placed(step, agree)


def test_every_output_on_the_page_belongs_to_a_command():
    page = PAGE.read_text()
    assert page.count("```text\n") == sum(match["shown"] is not None for match in STEP.finditer(page))
    assert page.count("```sh\n") == len(list(STEP.finditer(page)))


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("│ false │ 1,294 │ 0.447 │", "│ false  │ 1,294 │  0.612 │"),
        ("10 s, 1140 tokens/s, 0.73 GB at most", "9 s, 98 tokens/s, 1.20 GB at most"),
        ("dense 4.45 [−12.03, 20.92]", "dense 4.10 [−30.00, 41.00]"),
        ("shift −0.75", "shift 0.10"),
    ],
)
def test_lines_agree_whose_words_and_whole_numbers_do(shown, printed):
    assert agree(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("false 1,294", "false 1,295"),
        ("mask: doctags", "mask: none"),
        ("shift 4.26", "shift 2.90"),
        ("shift 40.0", "shift 51.0"),
        ("false 16 0", "false 16 4"),
    ],
)
def test_lines_disagree_where_a_word_a_whole_number_or_a_result_does(shown, printed):
    assert not agree(shown, printed)


def test_what_is_left_out_is_marked():
    printed = ["a", "b", "c", "d"]
    for shown in (["a", "…", "d"], ["…", "c", "…"], ["a", "b", "c", "d"], []):
        assert placed(Step("", shown, printed, 0), agree) == shown
    for shown in (["a", "d"], ["a", "b", "c"], ["b", "…"], ["…", "d", "a"]):
        with pytest.raises(AssertionError):
            placed(Step("", shown, printed, 0), agree)


def test_a_run_writes_its_figures_and_seconds_into_the_page():
    page = "A\n\n```sh\nx\n```\n\n```text\nloss 1.5\n…\n```\n\n(7 s)\n\nB (7 s)\n"
    done = [Step("x\n", ["loss 1.5", "…"], ["loss 8.25", "more"], 2.8)]
    assert rewritten(page, done) == page.replace("1.5", "8.25").replace("\n(7 s)", "\n(3 s)")


def test_the_readme_shows_lines_of_the_walk_through():
    shown = re.findall(r"^(?:[┃│]| variant| false excluded).*", README.read_text(), re.MULTILINE)
    assert len(shown) == 5 and set(shown) <= set(PAGE.read_text().splitlines())
