"""What commands say. Texts of users are shown as they are: no markup, and control characters by their codes."""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from launch.interruption import interruption
from launch.shown import shown
from train.errors import UserError, refused

# What tqdm begins with: a move to the beginning of its line, or moves to lines above, which it writes alone.
A_BAR = re.compile("(?:\x1b\\[A)+\\Z|\r?")


class Terminal(Console):
    """Prints strings as they are. Wide enough for the tables where the output is a file."""

    def __init__(self, width: int = 110, **options: Any):
        super().__init__(
            file=_raw(sys.stdout), width=None if sys.stdout.isatty() else width, markup=False, emoji=False,
            highlight=False, **options,
        )  # fmt: skip

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Runs a command's main -> its exit code. A UserError is a message, and so is what the system refuses of a file."""

    @functools.wraps(main)
    def run(*arguments: Any) -> int:
        code = 0
        with _streams():
            try:
                code = main(*arguments)
                with suppress(NobodyReads):  # all is done
                    sys.stdout.flush()
            except (UserError, OSError) as error:
                complain(f"error: {error if isinstance(error, UserError) else refused(error)}")
                code = code or UserError.code
            except KeyboardInterrupt:
                complain("interrupted")
                code = 128 + signal.SIGINT
        return code

    return run


def complain(text: str) -> None:
    """Prints to stderr, if anybody reads it."""
    with suppress(Unwritten):
        print(text, file=sys.stderr)


class Unwritten(UserError):
    """The output cannot be written."""


class NobodyReads(Unwritten):
    """The output is a pipe whose other end is closed, as by `| head`. What all is done before is no error."""

    code = 1


class _Stream:
    """A text stream whose failures are UserErrors; where something is to be saved first, as in a run whose `| tee` is
    gone, the process is told to end instead. escaped: texts are shown, as by `shown`."""

    def __init__(self, stream: Any, escaped: bool = True):
        self.stream, self.escaped = stream, escaped

    def write(self, text: str) -> int:
        start = A_BAR.match(text)[0] if self.escaped else text  # type: ignore[index]  # all texts match
        with self._told():
            self.stream.write(start + shown(text.removeprefix(start)))
        return len(text)

    def flush(self) -> None:
        with self._told():
            self.stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in the buffer goes nowhere, or Python's own end would fail on it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if interruption.held:
                interruption.told = True
                return
            if isinstance(error, BrokenPipeError):
                raise NobodyReads("nobody reads the output any more: what was still to be done is not done.") from None
            raise Unwritten(
                f"the output cannot be written ({error.strerror}). Make room, or send it elsewhere."
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _raw(stream: Any) -> Any:
    """For what has control codes of its own."""
    return _Stream(stream.stream, escaped=False) if isinstance(stream, _Stream) else stream


@contextmanager
def _streams() -> Iterator[None]:
    """Inside, what is printed is shown, whatever the terminal's encoding."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  # None where a shell has closed it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream if isinstance(stream, _Stream) else _Stream(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
