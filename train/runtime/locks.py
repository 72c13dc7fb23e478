"""Provides file locks. Only one process at a time, on any machine, can hold a lock. It ends with the process."""

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import IO

from train.runtime.errors import Held, UserError

TRAINING = ".training.lock"
MAKE_ROOM = ".make-room"
"""A file beside the lock of a run. It asks the process that holds the lock to save a training checkpoint and exit.
slurm/lib.sh creates it when a later attempt of the job waits for the lock."""


def lock(file: IO, taken: str) -> str:
    """Locks a file until it is closed or the process ends in any way. Returns "" on success, or the reason why the file
    cannot be locked, such as a file system without locks. Raises Held with the message `taken` if another process holds
    the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Held(taken) from None
    except OSError as error:
        return str(error.strerror)
    return ""


def opened_to_lock(path: Path) -> IO:
    """Opens a file for reading, writing and locking, and creates it if it does not exist. Raises UserError if it cannot
    be opened or is not a regular file. A symbolic link is refused too: the trainer would write to its target."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        os.close(descriptor)
        why = "it is not a regular file"
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else str(error.strerror)
    raise UserError(f"{path}: cannot be opened to hold the directory ({why}). Fix that, or give another directory.")


def lock_for_training(directory: Path) -> IO:
    """Locks the directory of a run and returns the open lock file, which must stay open for as long as the lock is
    needed. The file names the process that holds it. Raises Held if another process is training in the directory, and
    UserError if the lock file cannot be opened."""
    file = opened_to_lock(directory / TRAINING)
    lock(
        file,
        f"--output {directory}: another process is training there ({file.read().strip() or 'unknown'}). Wait for it, "
        "or stop it and its other ranks, or give another directory.",
    )
    (directory / MAKE_ROOM).unlink(missing_ok=True)
    file.seek(0)
    file.truncate(0)
    job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""  # slurm/lib.sh reads this
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
    file.flush()
    return file
