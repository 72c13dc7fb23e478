"""Runs the main function of a command: prints its errors in one form, and turns them into exit codes. Imports nothing
heavy: what a command calls imports torch, after the checks that do not need it."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from train.runtime.errors import Interrupted, UserError, refused
from train.runtime.interruption import INTERRUPTED, interruption
from train.runtime.terminal import NobodyReads, complain, printable


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps the main function of a command, so that it prints errors as messages and returns an exit code: its own, or
    0 for None; 2 for an error that the user must fix, and 1 for one that may be temporary, or if the output has no
    reader any more; INTERRUPTED if it shut down on request; 130 for Ctrl-C. Other exceptions pass through."""

    @functools.wraps(main)
    def run(*arguments: Any) -> int:
        code = 0
        with printable():
            try:
                code = main(*arguments) or 0
                with suppress(NobodyReads):  # no error, because the command has done all its work
                    sys.stdout.flush()
            except (UserError, OSError) as error:
                code = code or _report(error if isinstance(error, UserError) else refused(error))
            except Interrupted as reason:
                if launched_as()[0] == 0:
                    complain(str(reason))
                code = INTERRUPTED
            except KeyboardInterrupt:
                complain(interruption.line if interruption.raises else "interrupted")
                code = INTERRUPTED if interruption.raises else 128 + signal.SIGINT
            except RuntimeError as error:
                if "torch" not in sys.modules:
                    raise
                from train.runtime.distributed import lost_another

                code = lost_another(error)
        return code

    return run


def _report(error: UserError) -> int:
    rank = launched_as()[0]
    if rank:  # the launcher ends all ranks when the first one exits: let rank 0 report first if it failed too
        time.sleep(30)
    complain(f"error: {f'rank {rank}: ' if rank else ''}{error}")
    return error.code


def launched_as() -> tuple[int, int]:
    """Returns the rank of this process and the number of ranks, also before the process group exists. Without a
    launcher it is (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def leave(code: int) -> NoReturn:
    """Exits the process at once with this exit code, without the interpreter's shutdown. That shutdown has two
    problems. Threads of gloo that still held a Python tensor have been seen to abort it, which changed the exit code.
    It also waits for a thread that is blocked on a disk or on a request."""
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe may be gone
            file.flush()
    os._exit(code)
