"""Exceptions that end a run: mistakes of the user, shutdown requests, and errors of the operating system."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.runtime.interruption import interruption

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # errors of network file systems that may pass


class UserError(ValueError):
    """A setting, a file or a document is wrong. The message gives the setting (or file and line), the value, the rule
    and the fix. The commands print it without a traceback and exit with code 2."""

    code = 2  # exit code of a command


class MayPass(UserError):
    """An error that may be temporary, so job scripts retry the run."""

    code = 1


class Held(MayPass):
    """Another process holds a lock that this one needs."""


class Interrupted(RuntimeError):
    """The run ends here because a shutdown was requested. The message names the step of its last training checkpoint,
    if there is one."""


class NonFiniteLoss(UserError):
    """The loss is NaN or infinite. The message names the step and the documents. The same settings would give the same
    result, so the user must fix the cause."""


def refused(error: OSError) -> UserError:
    """Returns an error of the operating system as a UserError that names the file and the reason. It is a MayPass for
    the passing errors of network file systems."""
    where = error.filename2 or error.filename or ""
    text = f"{error.strerror or error or type(error).__name__}."
    if error.errno in NO_ROOM:
        how = f"continue with {interruption.resume}" if interruption.resume else "start the same command again"
        text += f" Free disk space, and {how}."
    kind = MayPass if error.errno in PASSING else UserError
    return kind(f"{os.fsdecode(where) if isinstance(where, bytes) else where}: {text}" if where else text)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds the path to an OSError that is raised inside the block. The system does not name the file if the operation
    is on a file that is already open."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
