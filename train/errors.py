"""What ends a run on purpose, or by what the system refuses."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.interruption import interruption

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # of file systems over a network


class UserError(ValueError):
    """A setting, a file or a document is wrong. The message gives the setting (or file and line), the value, the rule
    and the fix; the commands print it without a traceback and exit with code 2."""

    code = 2  # of train/sft.py and what else `guarded` runs


class MayPass(UserError):
    """It may pass by itself, so that job scripts try a run again."""

    code = 1


class Held(MayPass):
    """Another process holds what this one needs."""


class Interrupted(RuntimeError):
    """The run was told to end, and ends here; the message says after which step it has saved."""


class NonFiniteLoss(UserError):
    """The loss is NaN or infinite; the message names the step and the documents. The same settings would come to the
    same, so that it is the user's to mend."""


def refused(error: OSError) -> UserError:
    """What the system refuses, and of which file, as a UserError."""
    where = error.filename2 or error.filename or ""
    text = f"{error.strerror or error or type(error).__name__}."
    if error.errno in NO_ROOM:
        how = f"go on with {interruption.resume}" if interruption.resume else "start the same command again"
        text += f" Make room, and {how}."
    kind = MayPass if error.errno in PASSING else UserError
    return kind(f"{os.fsdecode(where) if isinstance(where, bytes) else where}: {text}" if where else text)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside names the file, as it does not where it is open already."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
