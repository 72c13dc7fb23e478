"""Starts a model server, waits until it answers, and restarts it if it dies."""

import http.client
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from train.runtime.errors import MayPass, UserError
from train.runtime.interruption import unblock

PAUSE = 1.0  # seconds between looks at a server that is starting
LAST_LINES = 15  # of its log, where it does not start
AN_ERROR = re.compile(r"\b\w*(Error|Exception): \S")
MOST_CAUSES = 5
MOST_OF_LOG = 2**24  # bytes of it that are searched
ENDING = 60.0  # seconds that a server has to end; Slurm gives the processes of a step 30, and kills them then
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not by the proxy that the environment names


class Server:
    """A process that serves models. log: the file that its output is appended to. url: its base URL, ending in /v1."""

    def __init__(self, command: list[str], url: str, log: Path, seconds: float):
        self.command, self.url, self.log, self.seconds = command, url, log, seconds
        self.process: subprocess.Popen[bytes] | None = None
        self._begun = 0  # bytes of the log before the latest start

    def alive(self) -> bool:
        """Whether the server runs and answers. One whose engine has died may still be about to exit."""
        return self.process is not None and self.process.poll() is None and self._answers()

    def exited(self) -> bool:
        """Whether the server's process is gone."""
        return self.process is None or self.process.poll() is not None

    def start(self) -> None:
        """Starts the server and returns once it answers. Raises MayPass if it ends before or takes longer than
        `seconds`, UserError if another server has the port already."""
        self.stop()  # processes that a dead server has left
        if self.process is None:  # on a restart, what the server has left of itself will go
            self._check_port()
        self._begun = self.log.stat().st_size if self.log.exists() else 0
        started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=unblock,
            )  # fmt: skip
        print(f"starting the server; its log is {self.log}", flush=True)
        while not self._answers():
            if self.process.poll() is not None:
                raise MayPass(f"the server exited with code {self.process.returncode} during startup:\n{self._end()}")
            if time.monotonic() - started > self.seconds:
                self.stop()
                raise MayPass(f"--start-timeout {self.seconds:g}: the server did not answer in time:\n{self._end()}")
            time.sleep(PAUSE)
        print(f"the server answers after {time.monotonic() - started:.0f} s", flush=True)

    def _check_port(self) -> None:
        """Raises UserError if a program of this machine, such as another server, has the port."""
        port = urlsplit(self.url).port or 0
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a server has left is no program
            try:
                own.bind(("127.0.0.1", port))
            except OSError as error:
                raise UserError(f"--port {port}: cannot be used ({error.strerror}); give another port.") from None

    def _answers(self) -> bool:
        try:
            with DIRECT.open(f"{self.url.removesuffix('/v1')}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError, http.client.HTTPException):
            return False

    def _end(self) -> str:
        """Returns the first errors in the log and its last lines: a server of several processes ends with that they
        have ended, and the cause is far above."""
        with self.log.open("rb") as log:
            log.seek(self._begun)  # what is before is of earlier starts
            lines = log.read(MOST_OF_LOG).decode(errors="replace").splitlines()
        last = lines[-LAST_LINES:]
        causes = [line for line in lines[:-LAST_LINES] if AN_ERROR.search(line)]
        shown = [*list(dict.fromkeys(causes))[:MOST_CAUSES], *["…"] * bool(causes), *last]
        return "\n".join(f"  {line}" for line in shown)

    def stop(self) -> None:
        """Ends the server and every process that it started."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING)
        with suppress(ProcessLookupError):  # also of a server that died, whose workers may hold a GPU's memory
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
