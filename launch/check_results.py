"""What a check of a node found, and checks that end by themselves."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.runtime.errors import UserError
from train.runtime.watchdog import REPOSITORY

PASSED, MAY_PASS, WILL_NOT_PASS = 0, 1, 2
"""Codes of a finding, and exit codes of the command: no problem; a problem that may be temporary, such as a busy GPU;
one that is not, such as a missing shard."""


@dataclass(frozen=True)
class Finding:
    """What a check found on a node. code: PASSED, MAY_PASS or WILL_NOT_PASS. same: name -> value that must be equal on
    all nodes, if there is any."""

    check: str
    code: int
    text: str
    same: Any = None


def within(seconds: float, check: str, work: Callable[[], Finding]) -> Finding:
    """Runs `work` in a thread and returns its finding.

    If it is not done within `seconds`, the finding says at which line it stands: a file system that does not respond
    blocks its reader forever. A UserError becomes a finding with WILL_NOT_PASS, any other exception one with MAY_PASS.
    """
    if seconds <= 0:
        return Finding(check, MAY_PASS, "not run: earlier checks used up the time limit (PREFLIGHT_TIME_LIMIT)")
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(work())
        except UserError as error:
            found.append(Finding(check, WILL_NOT_PASS, str(error)))
        except Exception as error:
            found.append(Finding(check, MAY_PASS, f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    frame = sys._current_frames().get(thread.ident or 0)
    while frame and frame.f_back and not frame.f_code.co_filename.startswith(REPOSITORY):
        frame = frame.f_back
    stood = f", in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
    return Finding(check, MAY_PASS, f"not done within the time limit (PREFLIGHT_TIME_LIMIT){stood}")
