"""Prints the output of commands. Texts of users appear as they are: no markup, and with control characters escaped."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from train.runtime.errors import UserError
from train.runtime.interruption import interruption
from train.runtime.shown import shown

# Control codes that tqdm starts a text with. Either it returns to the start of its line, or it moves to lines above; it
# writes the latter as a separate text.
A_BAR = re.compile("(?:\x1b\\[A)+\\Z|\r?")


class Terminal(Console):
    """A rich console that prints strings without markup. width: in characters, if the output is not a terminal; the
    default is wide enough for the tables."""

    def __init__(self, width: int = 110, **options: Any):
        super().__init__(
            file=_raw(sys.stdout), width=None if sys.stdout.isatty() else width, markup=False, emoji=False,
            highlight=False, **options,
        )  # fmt: skip

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders a string as rich does, with control characters escaped."""
        return super().render_str(shown(text), **options)


def complain(text: str) -> None:
    """Prints to stderr. Does nothing if stderr cannot be written."""
    with suppress(Unwritten):
        print(text, file=sys.stderr)


class Unwritten(UserError):
    """The output cannot be written."""


class NobodyReads(Unwritten):
    """The output is a pipe whose reader is gone, as after `| head`. Commands ignore it once all their work is done."""

    code = 1


class _Stream:
    """A text stream that raises its failures as UserErrors. If something must be saved first, as in a run whose `| tee`
    is gone, it requests a shutdown of the process instead. escaped: texts are escaped by `shown`."""

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
            # Discard what is left in the buffer; otherwise Python's shutdown would fail on it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if interruption.held:
                interruption.told = True
                return
            if isinstance(error, BrokenPipeError):
                raise NobodyReads("the reader of the output is gone; the remaining work was not done.") from None
            raise Unwritten(
                f"the output cannot be written ({error.strerror}). Free disk space, or redirect the output."
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _raw(stream: Any) -> Any:
    """Returns the stream without escaping, for a writer with control codes of its own."""
    return _Stream(stream.stream, escaped=False) if isinstance(stream, _Stream) else stream


@contextmanager
def printable() -> Iterator[None]:
    """Escapes what is printed inside the block, and makes it printable in any encoding of the terminal."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  # None if a shell has closed it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream if isinstance(stream, _Stream) else _Stream(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
