"""The processor time of each test file, shown at the end: of the process that runs the tests, and of all below it.
Not seen is what leaves it, as Slurm's daemons do."""

import contextlib
import os
from collections import Counter
from collections.abc import Generator

import psutil
import pytest

_so_far = [0.0]
_unreported: Counter[str] = Counter()
_by_file: Counter[str] = Counter()


def _since_last() -> float:
    """Seconds of this process, of those that it has waited for, and of those below it that still run."""
    used = sum(os.times()[:4])
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(process.cpu_times()[:4])
    _so_far.append(used)
    return used - _so_far.pop(0)


def pytest_collection_finish() -> None:
    _unreported["imports and collection"] += _since_last()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _unreported[item.location[0]] += _since_last()
    report.processor_seconds = dict(_unreported)  # goes to the process that shows the table
    _unreported.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _by_file.update(report.processor_seconds)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("processor time of the files")
    for file, seconds in _by_file.most_common():
        if seconds >= 5:
            terminalreporter.write_line(f"{seconds:7.1f} s  {file}")
    terminalreporter.write_line(f"{_by_file.total():7.1f} s  in all")
