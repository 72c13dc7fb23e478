"""Ends a job none of whose ranks gets on any more, and says which rank is to blame and where each stood.

A rank that hangs or whose process is stopped leaves the others waiting in a collective, for ever or for as long as the
backend's own limit says, which cannot name it. Here a thread of each rank tells all others over the ranks' store that
it lives and what was last got on with; where nothing moves on any rank for the limit, each dumps its stacks and ends.
So a slow load of one rank, for which the others wait, is no reason to end.

A rank gets on where it says so by `progress`, issues a collective, or its main thread is at another instruction than
before: so work in Python is no hang. A single call of C's for longer than the limit is taken for one, and so is a loop
so small that it is always met at the same instruction; an endless loop of several is not.

To blame is the rank that has issued fewer collectives than others that wait for it. They are torch's own counts for
each group (`ProcessGroup._get_sequence_number_for_group`), made on the host when a collective is issued: so they also
tell it for NCCL, where a rank waits not in the collective but in whatever needs its result. They cannot tell it where
all ranks have issued the same, and one's GPU does not finish: then the stacks must.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import ProcessGroup, TCPStore, distributed_c10d

REPOSITORY = str(Path(__file__).resolve().parents[1]) + os.sep


@dataclass
class _Done:
    """How much this process has got on with, and with what last."""

    count: int = 0
    what: str = "starting"
    alone: bool = False


_done = _Done()


def progress(what: str) -> None:
    """Tells the watchdog that this rank gets on, and with what."""
    _done.count += 1
    _done.what = what


def work_alone() -> None:
    """Ends the watch: from here on no rank waits for this one."""
    _done.alone = True


class Watchdog:
    """Watches all ranks from this one. limit: seconds without progress on any rank. connect: to the ranks' store, a
    connection whose calls may never return: rank 0, where the store is, may be the one that is stopped."""

    def __init__(self, rank: int, ranks: int, connect: Callable[[], TCPStore], limit: float):
        self.rank, self.connect, self.store, self.limit = rank, connect, connect(), limit
        self.beat = self.moves = 0
        self.seen: Any = None
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
        while not _done.alone:
            try:
                self._exchange()
            except RuntimeError:  # the connection broke; where rank 0 is gone for the limit, `answered` says so
                with contextlib.suppress(RuntimeError):
                    self.store = self.connect()
            time.sleep(self.interval)
        faulthandler.cancel_dump_traceback_later()

    def _exchange(self) -> None:
        """Tells this rank's note and reads those of all."""
        at, instruction = where_the_main_thread_is()
        issued = collectives_issued()
        before, self.seen = self.seen, (_done.count, issued, instruction)
        self.moves += self.seen != before
        self.beat += 1
        own = {"beat": self.beat, "moves": self.moves, "what": _done.what, "at": at, "issued": issued}
        self.store.set(f"watchdog/{self.rank}", json.dumps(own))
        moves = [note and note["moves"] for note in self.notes]
        for rank, known in enumerate(self.notes):
            key = f"watchdog/{rank}"
            note = json.loads(self.store.get(key)) if self.store.check([key]) else None
            if note is not None and (known is None or note["beat"] != known["beat"]):
                self.heard[rank] = time.monotonic()
            self.notes[rank] = note
        self.answered = time.monotonic()
        if [note and note["moves"] for note in self.notes] != moves:
            self.moved = self.answered
            faulthandler.dump_traceback_later(self.limit + 4 * self.interval, file=2)  # in C: where Python may not run

    def _judge(self) -> None:
        now = time.monotonic()
        while now - self.moved <= self.limit:
            time.sleep(self.interval)
            if _done.alone:
                return
            before, now = now, time.monotonic()
            if now - before > self.limit / 2:  # this process was stopped itself, and has heard nothing of the others
                self.moved = self.answered = now
                self.heard = [now] * len(self.notes)
        if now - self.answered > self.limit / 2:
            self._end("rank 0, which keeps what ranks tell each other, does not answer.", self.rank)
        silent = [rank for rank, heard in enumerate(self.heard) if now - heard > self.limit / 2]
        awaited = ranks_behind({rank: note["issued"] for rank, note in enumerate(self.notes) if note})
        if silent:
            verdict = f"{_ranks(silent)} gave no sign of life: gone, stopped, or never started."
        elif awaited:
            verdict = f"{_ranks(awaited)} kept the others waiting."
        else:
            verdict = "which rank is to blame cannot be told, all have issued the same collectives: see the stacks."
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
        faulthandler.cancel_dump_traceback_later()  # and waits for the end of one that has begun
        faulthandler.dump_traceback(file=2)
        own_log = not os.path.sameopenfile(2, self.terminal)
        for file in (2, self.terminal) if own_log and self.rank == speaker else (2,):
            os.write(file, message.encode())
        last = threading.Timer(4 * self.interval, os._exit, [1])  # where even a log cannot be written
        last.daemon = True
        last.start()
        sys.stdout.flush()
        time.sleep(2 * self.interval)  # the first to go takes the others with it, which have something to say too
        os._exit(1)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def where_the_main_thread_is() -> tuple[str, int]:
    """The innermost line of this project's that it is in, and a hash of the instructions that all its frames are at."""
    frame, at = sys._current_frames().get(threading.main_thread().ident or 0), ""
    instructions = []
    while frame:
        code = frame.f_code
        if not at and code.co_filename.startswith(REPOSITORY) and "site-packages" not in code.co_filename:
            at = f"{code.co_filename.removeprefix(REPOSITORY)}:{frame.f_lineno} {code.co_name}"
        instructions.append((code.co_filename, code.co_firstlineno, frame.f_lasti))
        frame = frame.f_back
    return at or "no line of ours", hash(tuple(instructions))


def collectives_issued() -> dict[str, int]:
    """How many this rank has issued in each of its groups, by the group's name and first rank; and how many groups it
    has begun to create, which all ranks do together."""
    world = distributed_c10d._world
    issued = {"groups": world.group_count}
    for group, ranks in list(world.pg_group_ranks.items()):
        if not isinstance(group, ProcessGroup):  # what stands for all groups that this rank is no member of
            continue
        issued[f"{group.group_name}/{min(ranks)}"] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return issued


def ranks_behind(issued: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The ranks that others wait for, and that wait for none themselves: in some group they have issued fewer
    collectives than another rank, and in none more. issued: rank -> group -> collectives."""
    awaited, waiting = set(), set()
    for group in {group for own in issued.values() for group in own}:
        counts = {rank: own[group] for rank, own in issued.items() if group in own}
        awaited |= {rank for rank, count in counts.items() if count < max(counts.values())}
        waiting |= {rank for rank, count in counts.items() if count > min(counts.values())}
    return sorted(awaited - waiting)


def watch(rank: int, ranks: int, host: str, port: int, limit: float) -> TCPStore:
    """Starts the watchdog. -> the ranks' store, on rank 0's host, for the process group too."""
    try:
        store = TCPStore(host, port, ranks, rank == 0, timedelta(seconds=limit), wait_for_workers=False)

        def connect() -> TCPStore:
            return TCPStore(host, store.port, ranks, False, timedelta(seconds=limit), wait_for_workers=False)

        Watchdog(rank, ranks, connect, limit).start()
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank}: rank 0 was not to be met at {host}:{port} in {limit:g} s") from error
    return store
