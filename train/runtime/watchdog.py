"""Ends a job when none of its ranks makes progress any more. Reports which rank is to blame and where each rank was.

If a rank hangs or its process is stopped, the other ranks wait in a collective. They wait forever, or until the timeout
of the backend, which cannot name the rank. Here, a thread on each rank reports to all others through the TCP store that
the rank is alive and what it worked on last. If no rank makes progress for the time limit, each rank dumps its stacks
and exits. So the job goes on while the others wait for one rank that loads slowly.

A rank makes progress if it calls `progress`, if it issues a collective, or if its main thread is at another instruction
than before. So ordinary work in Python does not count as a hang. A single C call that takes longer than the limit does
count as a hang. So does a loop so small that each check finds it at the same instruction. An endless loop over several
instructions is not detected.

The rank to blame has issued fewer collectives than the ranks that wait for it. The counts are torch's own for each
group (`ProcessGroup._get_sequence_number_for_group`). The host increments them when it issues a collective. So they
also work for NCCL, where a rank waits not in the collective itself but in the first operation that needs its result.
They do not identify the rank if all ranks have issued the same number and the GPU of one does not finish. Then the
stacks must show it.
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

REPOSITORY = str(Path(__file__).resolve().parents[2]) + os.sep


@dataclass
class _Done:
    """How many steps of progress this process has reported, and the last one."""

    count: int = 0
    what: str = "starting"
    alone: bool = False


_done = _Done()


def progress(what: str) -> None:
    """Reports progress of this rank to the watchdog. what: a description, for the message when the job hangs."""
    _done.count += 1
    _done.what = what


def work_alone() -> None:
    """Stops the watchdog of this rank: from here on no rank waits for this one."""
    _done.alone = True


class Watchdog:
    """Watches all ranks from this one. limit: seconds without progress on any rank after which the job ends. connect:
    returns a new connection to the TCP store. Calls on it may never return, because rank 0, which hosts the store, may
    be the one that is stopped."""

    def __init__(self, rank: int, ranks: int, connect: Callable[[], TCPStore], limit: float):
        self.rank, self.connect, self.store, self.limit = rank, connect, connect(), limit
        self.beat = self.moves = 0
        self.seen: Any = None
        self.interval = min(5.0, limit / 10)
        self.notes: list[dict[str, Any] | None] = [None] * ranks
        self.answered = self.moved = time.monotonic()
        self.heard = [self.answered] * ranks
        self.terminal = os.dup(2)  # all ranks but the first redirect their stderr to a log later

    def start(self) -> None:
        """Starts the threads of the watchdog. They run until the process ends or `work_alone` is called."""
        for loop in (self._tell_and_hear, self._judge):
            threading.Thread(target=loop, daemon=True, name="watchdog").start()

    def _tell_and_hear(self) -> None:
        while not _done.alone:
            try:
                self._exchange()
            except RuntimeError:  # the connection broke; `answered` shows if rank 0 stays gone for the limit
                with contextlib.suppress(RuntimeError):
                    self.store = self.connect()
            time.sleep(self.interval)
        faulthandler.cancel_dump_traceback_later()

    def _exchange(self) -> None:
        """Publishes the status of this rank in the store and reads the status of all ranks."""
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
            faulthandler.dump_traceback_later(self.limit + 4 * self.interval, file=2)  # in C, in case Python is stuck

    def _judge(self) -> None:
        now = time.monotonic()
        while now - self.moved <= self.limit:
            time.sleep(self.interval)
            if _done.alone:
                return
            before, now = now, time.monotonic()
            if now - before > self.limit / 2:  # this process itself was stopped and could not hear from the others
                self.moved = self.answered = now
                self.heard = [now] * len(self.notes)
        if now - self.answered > self.limit / 2:
            self._end("rank 0, which hosts the store shared by the ranks, does not answer.", self.rank)
        silent = [rank for rank, heard in enumerate(self.heard) if now - heard > self.limit / 2]
        awaited = ranks_behind({rank: note["issued"] for rank, note in enumerate(self.notes) if note})
        if silent:
            verdict = f"{_ranks(silent)} did not respond: gone, stopped, or never started."
        elif awaited:
            verdict = f"{_ranks(awaited)} kept the others waiting."
        else:
            verdict = "all ranks have issued the same collectives, so the cause is unknown: see the stacks."
        self._end(verdict, next(rank for rank in range(len(self.notes)) if rank not in silent))

    def _end(self, verdict: str, speaker: int) -> NoReturn:
        """Ends the process after writing the stacks and the verdict to the log of this rank. The rank `speaker` also
        writes the verdict to the terminal."""
        stood = [
            f"  rank {rank}: {note['what']}, in {note['at']}" if note else f"  rank {rank}: no status received"
            for rank, note in enumerate(self.notes)
        ]
        message = "\n".join([
            f"error: no rank has made progress for {self.limit:g} s (--timeout): {verdict}",
            "Where each was last seen:", *stood,
            "The stacks of this rank are above, those of the others in logs/rank-N.log.\n",
        ])  # fmt: skip
        faulthandler.cancel_dump_traceback_later()  # this also waits until a dump that has begun is complete
        faulthandler.dump_traceback(file=2)
        own_log = not os.path.sameopenfile(2, self.terminal)
        for file in (2, self.terminal) if own_log and self.rank == speaker else (2,):
            os.write(file, message.encode())
        last = threading.Timer(4 * self.interval, os._exit, [1])  # in case writing the log blocks
        last.daemon = True
        last.start()
        sys.stdout.flush()
        time.sleep(2 * self.interval)  # the first rank to exit ends the others, which must write their reports first
        os._exit(1)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def where_the_main_thread_is() -> tuple[str, int]:
    """Returns the main thread's innermost line of code in this project, as "FILE:LINE FUNCTION", and a hash of the
    current instructions of all its frames."""
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
    """Returns the number of collectives that this rank has issued in each of its groups, by the group's name and first
    rank. The key "groups" has the number of groups that it has begun to create, which all ranks do together."""
    world = distributed_c10d._world
    issued = {"groups": world.group_count}
    for group, ranks in list(world.pg_group_ranks.items()):
        if not isinstance(group, ProcessGroup):  # a placeholder for all groups of which this rank is not a member
            continue
        issued[f"{group.group_name}/{min(ranks)}"] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return issued


def ranks_behind(issued: Mapping[int, Mapping[str, int]]) -> list[int]:
    """Returns, sorted, the ranks that others wait for and that wait for no rank themselves. Such a rank has issued
    fewer collectives than another rank in some group, and more than another rank in no group. issued: the number of
    collectives by rank and group."""
    awaited, waiting = set(), set()
    for group in {group for own in issued.values() for group in own}:
        counts = {rank: own[group] for rank, own in issued.items() if group in own}
        awaited |= {rank for rank, count in counts.items() if count < max(counts.values())}
        waiting |= {rank for rank, count in counts.items() if count > min(counts.values())}
    return sorted(awaited - waiting)


def watch(rank: int, ranks: int, host: str, port: int, limit: float) -> TCPStore:
    """Starts the watchdog and returns the TCP store of the ranks, which serves the process group too. host and port:
    where rank 0 runs the store. limit: seconds without progress. Raises RuntimeError if rank 0 cannot be reached within
    the limit."""
    try:
        store = TCPStore(host, port, ranks, rank == 0, timedelta(seconds=limit), wait_for_workers=False)

        def connect() -> TCPStore:
            return TCPStore(host, store.port, ranks, False, timedelta(seconds=limit), wait_for_workers=False)

        Watchdog(rank, ranks, connect, limit).start()
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank}: rank 0 could not be reached at {host}:{port} in {limit:g} s") from error
    return store
