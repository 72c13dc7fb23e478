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


class Watchdog(threading.Thread):
    """Watches all ranks from this one. limit: seconds without progress on any rank. store: a connection of its own,
    which gives up after as long."""

    def __init__(self, rank: int, ranks: int, store: TCPStore, limit: float):
        super().__init__(daemon=True, name="watchdog")
        self.rank, self.store, self.limit = rank, store, limit
        self.interval = min(5.0, limit / 10)
        self.notes: list[dict[str, Any] | None] = [None] * ranks
        self.heard = [time.monotonic()] * ranks
        self.terminal = os.dup(2)  # ranks but the first send theirs to a log, later

    def run(self) -> None:
        """Until the process ends."""
        moved, counts, beat = time.monotonic(), None, 0
        while True:
            beat += 1
            try:
                self._exchange(beat)
            except Exception as error:  # after the limit, or at once where rank 0 is gone
                now = time.monotonic()
                if now - moved > self.limit:
                    self._end(f"rank 0, which all others report to, does not answer ({type(error).__name__}).")
            now = time.monotonic()
            before, counts = counts, [note and note["count"] for note in self.notes]
            if counts != before:
                moved = now
                faulthandler.dump_traceback_later(self.limit, file=2)  # in C: also where a rank never lets Python run
            elif now - moved > self.limit:
                self._end(self._verdict(now))
            time.sleep(self.interval)

    def _exchange(self, beat: int) -> None:
        own = {"beat": beat, "count": _done.count, "what": _done.what, **where_the_main_thread_is()}
        self.store.set(f"watchdog/{self.rank}", json.dumps(own))
        for rank, known in enumerate(self.notes):
            key = f"watchdog/{rank}"
            note = json.loads(self.store.get(key)) if self.store.check([key]) else None
            if note is not None and (known is None or note["beat"] != known["beat"]):
                self.heard[rank] = time.monotonic()
            self.notes[rank] = note

    def _silent(self, now: float) -> list[int]:
        return [rank for rank, heard in enumerate(self.heard) if now - heard > self.limit / 2]

    def _verdict(self, now: float) -> str:
        waiting = [rank for rank, note in enumerate(self.notes) if note and note["waits"]]
        if silent := self._silent(now):
            blamed = f"{_ranks(silent)} gave no sign of life: gone, stopped, or never started."
        elif len(waiting) < len(self.notes) and waiting:
            blamed = f"{_ranks([r for r in range(len(self.notes)) if r not in waiting])} kept the others waiting."
        else:
            blamed = "which rank is to blame cannot be told: see the stacks."
        stood = [
            f"  rank {rank}: {note['what']}, in {note['at']}" if note else f"  rank {rank}: never heard of"
            for rank, note in enumerate(self.notes)
        ]
        return "\n".join([blamed, "Where each was last seen:", *stood])

    def _end(self, verdict: str) -> NoReturn:
        message = (
            f"error: no rank has got on for {self.limit:g} s (--timeout): {verdict}\n"
            "The stacks of this rank are above; those of the others in logs/rank-N.log.\n"
        )
        silent = self._silent(time.monotonic())
        first = next((rank for rank in range(len(self.notes)) if rank not in silent), self.rank)
        for file in {2, self.terminal} if self.rank == first else {2}:
            with contextlib.suppress(OSError):
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
