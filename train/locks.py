"""Files that one process at a time may hold, on whatever machine it runs, for as long as it lives."""

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import IO

from train.errors import Held, UserError

TRAINING = ".training.lock"
MAKE_ROOM = ".make-room"
"""Beside a run's lock: whoever holds that is to save, and to leave. slurm/lib.sh makes it for an attempt that waits."""


def lock(file: IO, taken: str) -> str:
    """Until the file is closed, or the process ends however it may. Held with the message `taken` where another process
    holds it. -> "", or why it is not locked, as on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Held(taken) from None
    except OSError as error:
        return str(error.strerror)
    return ""


def opened_to_lock(path: Path) -> IO:
    """A file to be locked, made where there is none. UserError where something else has its place, which a link, say,
    would have this trainer write to."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        os.close(descriptor)
        why = "it is no file"
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else str(error.strerror)
    raise UserError(f"{path}: cannot be opened to hold the directory ({why}). Mend that, or give another directory.")


def lock_for_training(directory: Path) -> IO:
    """The lock of a run's directory, which says whose it is. Held where another process is training there."""
    file = opened_to_lock(directory / TRAINING)
    lock(
        file,
        f"--output {directory}: another process is training there ({file.read().strip() or 'unknown'}). Wait for it, "
        "or stop it and its other ranks, or give another directory.",
    )
    (directory / MAKE_ROOM).unlink(missing_ok=True)
    file.seek(0)
    file.truncate(0)
    job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""  # slurm/lib.sh looks for it
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
    file.flush()
    return file
