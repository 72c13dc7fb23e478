"""What ends a run early: Ctrl-C (SIGINT), SIGTERM, a terminal that is closed (SIGHUP), a scheduler's notice (SIGUSR1),
and a launcher that is gone.

A thread waits for the signals, which are blocked everywhere else. So they are heard while the main thread imports or is
in a call of C's, and it is known who sent them: launchers pass on what they get, and that is no second signal.
"""

import contextlib
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import NoReturn

from launch.shown import shown

INTERRUPTED = 85
"""The exit code of a run that made room: start it again with --resume, and it goes on."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
TO_THE_MAIN_THREAD = signal.SIGUSR2  # from the thread that waits: a call that Python waits in ends by a signal alone


class Interruption:
    """Whether this process was told to end. A first signal ends it at once, with `line` and INTERRUPTED; after `hold`
    it ends where it looks at `told`, after it has saved, and a second signal at once."""

    def __init__(self) -> None:
        self.told = self.held = self.raises = False
        self.ignored: set[signal.Signals] = set()  # where the terminal sends them; SIGHUP also where a shell does
        self.heard: Counter[bool] = Counter()  # signals sent by launchers, and by others
        self.launchers: list[int] = []
        self.resume = ""  # the flags to go on with
        self.line = "interrupted: nothing to save yet; start it again"

    def listen(self, line: str = "") -> None:
        """From now on; for the main thread of a script, before it imports what starts threads. line: what is printed
        where it ends at once."""
        self.line = line or self.line
        self.ignored = {n for n in SIGNALS if signal.getsignal(n) == signal.SIG_IGN}  # by a background job, or `nohup`
        self.launchers = launchers()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._wait, daemon=True, name="interruption").start()

    def resume_by(self, flags: str) -> None:
        """From now on a run can be gone on with, by these flags."""
        self.resume = flags
        self.line = f"interrupted: nothing to save yet; start it again with {flags}"

    def hold(self) -> None:
        """From now on there is something to save first."""
        self.held = True

    def release(self) -> None:
        """There is nothing to save any more."""
        self.held = False
        if self.told:
            self._end(self.line, INTERRUPTED)

    def saved(self, step: int) -> str:
        """All is saved. -> the line that says so."""
        self.line, self.held = f"interrupted: saved after step {step}; go on with {self.resume or '--resume'}", False
        return self.line

    def raise_from_now(self) -> None:
        """From now on the main thread gets a KeyboardInterrupt, and again at a second signal."""
        signal.signal(TO_THE_MAIN_THREAD, signal.default_int_handler)
        self.raises = True

    def _wait(self) -> None:
        while True:
            info = signal.sigtimedwait(SIGNALS, 1)
            if info:
                self._receive(info)
            elif not self.told and (0 in (now := launchers()) or now != self.launchers):
                _say("\nthe launcher is gone")
                self._tell(again=False, code=1)

    def _receive(self, info: signal.struct_siginfo) -> None:
        number, by_the_terminal = info.si_signo, info.si_code > 0  # SI_KERNEL (sigaction(2))
        if number in self.ignored and (by_the_terminal or number == signal.SIGHUP):
            return
        # A shell passes on that the terminal is closed. Slurm sends its notices more than once, and kills by itself.
        if number == signal.SIGINT or (number == signal.SIGTERM and "SLURM_JOB_ID" not in os.environ):
            self.heard[info.si_pid in self.launchers] += 1
        self._tell(again=max(self.heard.values(), default=0) > 1, code=128 + number)

    def _tell(self, again: bool, code: int) -> None:
        first, self.told = not self.told, True
        if not first and not again:
            return
        if self.raises:
            signal.pthread_kill(threading.main_thread().ident or 0, TO_THE_MAIN_THREAD)
        elif not self.held:
            self._end(self.line, INTERRUPTED)
        elif again:
            self._end("\ninterrupted again: what was done since the last save is lost", code)
        else:
            _say("\ntold to end: what is not saved is saved first (a second signal ends it at once)")

    def _end(self, line: str, code: int) -> NoReturn:
        _say(line)
        os._exit(code)


def _say(line: str) -> None:
    """To the terminal, which is rank 0's."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{shown(line)}\n".encode())


def launchers() -> list[int]:
    """The processes that must live for this rank to go on: torchrun, or DeepSpeed's launcher and what started that. A
    place is 0 where another process has adopted their child. [] without them: a shell may end before its job does, and
    Slurm ends its tasks itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [os.getppid()]
    if "CROSS_RANK" not in os.environ:  # deepspeed/launcher/launch.py sets it
        return []
    launcher = _started_by(os.getpid())
    return [launcher, _started_by(launcher)]


def _started_by(process: int) -> int:
    """The parent of a process that has a process group of its own or is in its parent's; else 0: it was adopted."""
    try:
        parent, group = _parent_and_group(process)
        return parent if group in (process, _parent_and_group(parent)[1]) else 0
    except OSError:
        return 0


def _parent_and_group(process: int) -> tuple[int, int]:
    stat = Path(f"/proc/{process}/stat").read_text()  # proc(5); the name, in parentheses, may hold anything
    parent, group = stat.rpartition(")")[2].split()[1:3]
    return int(parent), int(group)


interruption = Interruption()
