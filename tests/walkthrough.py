"""Runs docs/walkthrough.md as a reader would, and compares what the page shows with what the commands print:

    python -m tests.walkthrough     # runs the page, and writes its figures and times anew; about three minutes

Each ```sh block is run in order, from a directory that has links to train/ and .venv as a clone has them. A ```text
block right after it shows its standard output, and "(3 s)" how long it took.

When do they agree? The shown lines are the printed ones, in order; a line `…` stands for any number of others. Words
and whole numbers are the same. A number with decimals may differ by TOLERANCE, since processors add in different
orders. A number before a unit of time, memory or speed may be any, and so may the ends of an interval ("[1.0, 2.0]").
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.config.command_line import REPOSITORY

PAGE = REPOSITORY / "docs" / "walkthrough.md"
LEFT_OUT = "…"
STEP = re.compile(
    r"^```sh\n(?P<commands>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?(?:\n\((?P<seconds>\d+) s\)\n)?",
    re.MULTILINE | re.DOTALL,
)
ANY = re.compile(r"[\d.,]+(?= ?(?:s|min|GB|MB|tokens/s|GB/s)\b)|(?<=\[)[^\[\]A-Za-z]+(?=\])")
DECIMAL = re.compile(r"[-+−]?\d+\.\d+")
TOLERANCE = 1.0, 0.25  # the larger of them: as it stands (nats, percent), and as a share of the shown number


@dataclass(frozen=True)
class Step:
    """One ```sh block, what the page shows of its output, and what it printed."""

    commands: str
    shown: list[str]
    printed: list[str]
    seconds: float


def run(page: str, directory: Path, bins: Path | None = None) -> list[Step]:
    """Runs every block. Raises AssertionError with its output if one has an exit code other than 0. bins: where the
    shell looks for commands first."""
    for name, target in {"train": REPOSITORY / "train", ".venv": Path(sys.prefix)}.items():
        (directory / name).symlink_to(target)
    places = [str(bins)] if bins else []
    environment = os.environ | {"PATH": ":".join([*places, str(directory / ".venv" / "bin"), os.environ["PATH"]])}
    environment.pop("COLUMNS", None)
    steps = []
    for block in STEP.finditer(page):
        started = time.perf_counter()
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block["commands"]],
            cwd=directory, env=environment, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        seconds = time.perf_counter() - started
        assert done.returncode == 0, f"{block['commands']}\n{done.stdout}\n{done.stderr}"
        printed = [line.rstrip() for line in done.stdout.splitlines()]
        steps.append(Step(block["commands"], (block["shown"] or "").splitlines(), printed, seconds))
    return steps


def agree(shown: str, printed: str) -> bool:
    """Whether two lines say the same, by the rule above."""
    ours, theirs = (ANY.sub("#", line) for line in (shown, printed))
    if _bare(DECIMAL.sub("#", ours)) != _bare(DECIMAL.sub("#", theirs)):
        return False
    pairs = zip(*(_decimals(line) for line in (ours, theirs)), strict=True)
    return all(abs(ours - theirs) <= max(TOLERANCE[0], TOLERANCE[1] * abs(ours)) for ours, theirs in pairs)


def alike(shown: str, printed: str) -> bool:
    """Whether two lines have the same words, whatever their numbers."""
    ours, theirs = (_bare(re.sub(r"[-+−]?\d[\d.,]*", "#", ANY.sub("#", line))) for line in (shown, printed))
    return ours == theirs


def placed(step: Step, same: Callable[[str, str], bool]) -> list[str]:
    """Returns the page's lines as they were printed. Raises AssertionError for one that was not."""
    out, at, anywhere = [], 0, False
    for line in step.shown:
        if line == LEFT_OUT:
            anywhere = True
            out.append(line)
            continue
        until = len(step.printed) if anywhere else at + 1
        found = [place for place in range(at, min(until, len(step.printed))) if same(line, step.printed[place])]
        assert found, f"not printed here:\n{line}\nbut:\n" + "\n".join(step.printed[at:until])
        out.append(step.printed[found[0]])
        at, anywhere = found[0] + 1, False
    rest = step.printed[at:]
    assert anywhere or not rest or not step.shown, "not shown:\n" + "\n".join(rest)
    return out


def rewritten(page: str, steps: list[Step]) -> str:
    """The page with the lines and the seconds of this run."""
    left = iter(steps)

    def anew(block: re.Match[str]) -> str:
        step, text = next(left), block[0]
        if block["shown"] is not None:
            lines = "\n".join(placed(step, alike) if step.shown else step.printed)
            text = text.replace(f"```text\n{block['shown']}```", f"```text\n{lines}\n```")
        return re.sub(r"\n\(\d+ s\)\n$", f"\n({max(1, round(step.seconds))} s)\n", text)

    return STEP.sub(anew, page)


def _bare(line: str) -> str:
    """Without what the width of a number changes: the lines and spaces of a table."""
    return re.sub(r"[━\s]+", " ", line).strip()


def _decimals(line: str) -> list[float]:
    return [float(number.replace("−", "-")) for number in DECIMAL.findall(line)]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        page = PAGE.read_text()
        PAGE.write_text(rewritten(page, run(page, Path(directory))))


if __name__ == "__main__":
    main()
