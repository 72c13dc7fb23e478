"""What README.md and docs/ name exists, and what they show is what the code and the measurements say."""

import dataclasses
import re
from pathlib import Path

import pytest

from tests import documentation
from tests.benchmarks.tables import LAYOUTS_BY_NAME, block, written
from train.config.command_line import REPOSITORY, flag_of

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BY_NAME = {page.name: page for page in PAGES}
OF_OTHERS = {  # flags of what is not ours
    "--num_gpus", "--nodes", "--array", "--evaluate", "--signal", "--shutdown-timeout", "--tag", "--constraint",
    "--no-build-isolation", "--gpus", "--time", "--ntasks-per-node", "--help",
    "--kill-on-bad-exit", "--master_port", "--durations", "--language-model-only",
}  # fmt: skip
ROOTS = ("train", "launch", "tests", "slurm", "ds_configs", "docs", ".ci")


def code_of(page: Path) -> str:
    """The fenced blocks and code spans of a page."""
    return "\n".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`|^    .*$", page.read_text(), re.MULTILINE))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```[\s\S]*?```", "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", BY_NAME)
def test_every_link_leads_somewhere(page):
    path = BY_NAME[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        place = path.parent / name if name else path
        assert place.exists(), target
        assert not anchor or anchor in anchors_of(place), target


@pytest.mark.parametrize("page", BY_NAME)
def test_every_file_that_is_named_exists(page):
    named = re.findall(rf"(?<![\w./-])(?:{'|'.join(ROOTS)})/[\w./-]*[\w/]", code_of(BY_NAME[page]))
    for name in named:
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("page", BY_NAME)
def test_every_flag_that_is_named_exists(page):
    ours = ("train/**/*.py", "launch/*.py", "tests/benchmarks/*.py", "tests/comparison/coverage.py", "tests/gpu/*.py")
    sources = [path for pattern in ours for path in REPOSITORY.glob(pattern)]
    known = {flag for source in sources for flag in re.findall(r"[\"'](--[a-z][a-z_-]+)[\"']", source.read_text())}
    known |= {
        flag_of(field.name)
        for settings in documentation.COMMANDS.values()
        for each in settings
        for field in dataclasses.fields(each)
    }
    known |= {f"--judge-{name}" for name in ("concurrency", "timeout", "max-tokens")} | OF_OTHERS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", code_of(BY_NAME[page])))
    assert named <= known, sorted(named - known)


def test_the_readme_is_short():
    text = README.read_text()
    assert text.count("\n") <= 200 and len(text.split()) <= 1800


def test_the_settings_page_is_that_of_the_settings():
    assert (REPOSITORY / "docs" / "settings.md").read_text() == documentation.settings_page(), "run make docs"


@pytest.mark.parametrize("page", sorted(path.name for path in (REPOSITORY / "docs").glob("*.md")))
def test_every_table_of_a_measurement_is_that_of_its_results(page):
    text = BY_NAME[page].read_text()
    assert written(text) == text, "run make docs"


def test_every_layout_of_a_table_has_its_place_in_one_page():
    text = "".join(page.read_text() for page in PAGES)
    for name in LAYOUTS_BY_NAME:
        assert len(re.findall(rf"^<!-- {name} -->\n[^<]+^<!-- end {name} -->$", text, re.MULTILINE)) == 1, name


def test_a_table_takes_the_place_of_what_stands_between_its_markers_and_of_nothing_else():
    for before in ("", "| old |\n"):
        page = f"# A\n\n<!-- host -->\n{before}<!-- end host -->\n\nB <!-- host -->\n\n<!-- other -->\nC\n"
        assert written(page) == page.replace(
            f"<!-- host -->\n{before}<!-- end", f"<!-- host -->\n{block('host')}\n<!-- end"
        )


def test_every_page_is_in_the_readmes_map():
    assert {f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")} <= set(
        re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    )
