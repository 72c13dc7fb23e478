"""Ends a job none of whose ranks gets on any more, and says which rank is to blame and where each stood.

A rank that hangs or whose process is stopped leaves the others waiting in a collective, for ever or for as long as the
backend's own limit says, which cannot name it. Here a thread of each rank tells all others over the ranks' store that
it lives and what was last got on with; where nothing moves on any rank for the limit, each dumps its stacks and ends.
So a slow load of one rank, for which the others wait, is no reason to end.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed import TCPStore

REPOSITORY = str(Path(__file__).resolve().parents[1]) + os.sep
WAITING = ("torch/distributed/", "deepspeed/comm/")  # whose frames are innermost in a rank that waits for others


@dataclass
class _Done:
    """How much this process has got on with, and with what last."""

    count: int = 0
    what: str = "starting"


_done = _Done()


def progress(what: str) -> None:
    """Tells the watchdog that this rank gets on, and with what."""
    _done.count += 1
    _done.what = what


class Watchdog:
    """Watches all ranks from this one. limit: seconds without progress on any rank. store: a connection of its own,
    whose calls may never return: rank 0, where the store is, may be the one that is stopped."""

    def __init__(self, rank: int, ranks: int, store: TCPStore, limit: float):
        self.rank, self.store, self.limit = rank, store, limit
        self.interval = min(5.0, limit / 10)
        self.notes: list[dict[str, Any] | None] = [None] * ranks
        self.answered = self.moved = time.monotonic()
        self.heard = [self.answered] * ranks
        self.terminal = os.dup(2)  # ranks but the first send theirs to a log, later

    def start(self) -> None:
        """Until the process ends."""
        for loop in (self._tell_and_hear, self._judge):
            threading.Thread(target=loop, daemon=True, name="watchdog").start()

    def _tell_and_hear(self) -> None:
        beat, counts = 0, None
        with contextlib.suppress(RuntimeError):  # where rank 0 is gone: after that nobody is heard
            while True:
                beat += 1
                own = {"beat": beat, "count": _done.count, "what": _done.what, **where_the_main_thread_is()}
                self.store.set(f"watchdog/{self.rank}", json.dumps(own))
                for rank, known in enumerate(self.notes):
                    key = f"watchdog/{rank}"
                    note = json.loads(self.store.get(key)) if self.store.check([key]) else None
                    if note is not None and (known is None or note["beat"] != known["beat"]):
                        self.heard[rank] = time.monotonic()
                    self.notes[rank] = note
                self.answered = time.monotonic()
                before, counts = counts, [note and note["count"] for note in self.notes]
                if counts != before:
                    self.moved = self.answered
                    faulthandler.dump_traceback_later(self.limit, file=2)  # in C: also where Python may not run
                time.sleep(self.interval)

    def _judge(self) -> None:
        while (now := time.monotonic()) - self.moved <= self.limit:
            time.sleep(self.interval)
        if now - self.answered > self.limit / 2:
            self._end("rank 0, which keeps what ranks tell each other, does not answer.", self.rank)
        silent = [rank for rank, heard in enumerate(self.heard) if now - heard > self.limit / 2]
        waiting = [rank for rank, note in enumerate(self.notes) if note and note["waits"]]
        if silent:
            verdict = f"{_ranks(silent)} gave no sign of life: gone, stopped, or never started."
        elif 0 < len(waiting) < len(self.notes):
            verdict = f"{_ranks([r for r in range(len(self.notes)) if r not in waiting])} kept the others waiting."
        else:
            verdict = "which rank is to blame cannot be told: see the stacks."
        self._end(verdict, next(rank for rank in range(len(self.notes)) if rank not in silent))

    def _end(self, verdict: str, speaker: int) -> NoReturn:
        """Tells the verdict, in each rank's log, and the speaker in the terminal."""
        stood = [
            f"  rank {rank}: {note['what']}, in {note['at']}" if note else f"  rank {rank}: never heard of"
            for rank, note in enumerate(self.notes)
        ]
        message = "\n".join([
            f"error: no rank has got on for {self.limit:g} s (--timeout): {verdict}",
            "Where each was last seen:", *stood,
            "The stacks of this rank are above, those of the others in logs/rank-N.log.\n",
        ])  # fmt: skip
        own_log = not os.path.sameopenfile(2, self.terminal)
        for file in (2, self.terminal) if own_log and self.rank == speaker else (2,):
            os.write(file, message.encode())
        sys.stdout.flush()
        time.sleep(2 * self.interval)  # the first to go takes the others with it, which have something to say too
        os._exit(1)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def where_the_main_thread_is() -> dict[str, Any]:
    """at: the innermost line of this project's that the main thread is in; waits: whether any thread is inside a
    collective (backward on a GPU has a thread of its own)."""
    main, frames = threading.main_thread().ident, sys._current_frames()
    waits = any(frame and any(part in frame.f_code.co_filename for part in WAITING) for frame in frames.values())
    frame: FrameType | None = frames.get(main or 0)
    while frame and not frame.f_code.co_filename.startswith(REPOSITORY):
        frame = frame.f_back
    at = "no line of ours"
    if frame:
        at = f"{frame.f_code.co_filename.removeprefix(REPOSITORY)}:{frame.f_lineno} {frame.f_code.co_name}"
    return {"at": at, "waits": waits}


def watch(rank: int, ranks: int, host: str, port: int, limit: float) -> TCPStore:
    """Starts the watchdog. -> the ranks' store, on rank 0's host, for the process group too."""
    try:
        store = TCPStore(host, port, ranks, rank == 0, timedelta(seconds=limit), wait_for_workers=False)
        own = TCPStore(host, store.port, ranks, False, timedelta(seconds=limit), wait_for_workers=False)
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank}: rank 0 was not to be met at {host}:{port} in {limit:g} s") from error
    Watchdog(rank, ranks, own, limit).start()
    return store
