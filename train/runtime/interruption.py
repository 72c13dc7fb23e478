"""Handles requests to shut a run down early: Ctrl-C (SIGINT), SIGTERM, a closed terminal (SIGHUP), a scheduler's notice
(SIGUSR1), and a launcher that is gone.

One thread waits for the signals, and all other threads block them. So signals are received even while the main thread
imports modules or is inside a C call. The thread also learns who sent a signal. Launchers forward the signals that they
receive, and a forwarded signal does not count as a second one.
"""

import contextlib
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import NoReturn

from train.runtime.shown import shown

INTERRUPTED = 85
"""The exit code of a run that shut down on request. Start it again with --resume to continue it."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
TO_THE_MAIN_THREAD = signal.SIGUSR2  # sent by the waiting thread, because only a signal ends a blocking call of Python


class Interruption:
    """Keeps track of whether a shutdown of this process was requested (`told`). By default, a first signal prints
    `line` and exits at once with INTERRUPTED. After `hold`, a first signal only sets `told`: the run checks it, saves a
    checkpoint and exits. A second signal then exits at once."""

    def __init__(self) -> None:
        self.told = self.held = self.raises = False
        self.ignored: set[signal.Signals] = set()  # if sent by the terminal; SIGHUP also if sent by a shell
        self.heard: Counter[bool] = Counter()  # number of signals, by whether a launcher sent them
        self.launchers: list[int] = []
        self.resume = ""  # the flags that continue the run
        self.line = "interrupted: nothing to save yet; start it again"

    def listen(self, line: str = "") -> None:
        """Starts to listen for signals. Call it in the main thread of a script, before it imports modules that start
        threads. line: the message to print if the process exits at once."""
        self.line = line or self.line
        self.ignored = {n for n in SIGNALS if signal.getsignal(n) == signal.SIG_IGN}  # background job or `nohup`
        self.launchers = launchers()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._wait, daemon=True, name="interruption").start()

    def resume_by(self, flags: str) -> None:
        """Sets the flags that continue the run from now on, for the messages to the user."""
        self.resume = flags
        self.line = f"interrupted: nothing to save yet; start it again with {flags}"

    def hold(self) -> None:
        """Defers a shutdown from now on: there is something to save first."""
        self.held = True

    def release(self) -> None:
        """Ends `hold`: there is nothing to save any more. Exits at once if a shutdown was requested meanwhile."""
        self.held = False
        if self.told:
            self._end(self.line, INTERRUPTED)

    def saved(self, step: int) -> str:
        """Ends `hold` after everything up to this step was saved. Returns the message that says so."""
        self.line, self.held = f"interrupted: saved after step {step}; continue with {self.resume or '--resume'}", False
        return self.line

    def raise_from_now(self, line: str) -> None:
        """Makes a signal raise KeyboardInterrupt in the main thread from now on; a second signal raises it again. Call
        it in the main thread. line: the message of the command that ends by it."""
        self.line = line
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
        # Only these count as second signals. SIGHUP does not, since a shell forwards it when the terminal is closed.
        # Slurm sends its notices more than once, and kills the job by itself.
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
            self._end("\ninterrupted again: progress since the last training checkpoint is lost", code)
        else:
            _say("\nshutdown requested: saving first (a second signal stops the run at once)")

    def _end(self, line: str, code: int) -> NoReturn:
        _say(line)
        os._exit(code)


def unblock() -> None:
    """Unblocks the signals that `listen` blocks, in a process that is about to become another program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _say(line: str) -> None:
    """Prints a line to the terminal, which belongs to rank 0; other ranks print nothing."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{shown(line)}\n".encode())


def launchers() -> list[int]:
    """Returns the ids of the processes that must stay alive for this rank to continue: torchrun, or DeepSpeed's
    launcher and the process that started it. An id is 0 if that process is gone, so that another one has adopted its
    child. Returns [] without such a launcher: a shell may end before its job does, and Slurm ends its tasks itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [os.getppid()]
    if "CROSS_RANK" not in os.environ:  # deepspeed/launcher/launch.py sets it
        return []
    launcher = _started_by(os.getpid())
    return [launcher, _started_by(launcher)]


def _started_by(process: int) -> int:
    """Returns the parent of a process that leads its own process group or is in that of its parent. Otherwise another
    process has adopted it, and the result is 0."""
    try:
        parent, group = _parent_and_group(process)
        return parent if group in (process, _parent_and_group(parent)[1]) else 0
    except OSError:
        return 0


def _parent_and_group(process: int) -> tuple[int, int]:
    stat = Path(f"/proc/{process}/stat").read_text()  # proc(5); the name in parentheses may contain any character
    parent, group = stat.rpartition(")")[2].split()[1:3]
    return int(parent), int(group)


interruption = Interruption()
