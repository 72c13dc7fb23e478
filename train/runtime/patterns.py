"""Runs regular expressions of users with a time limit. The time of some patterns, such as `(a|aa)+$`, grows without
bound with the length of the text. Such a search ends with an error that names the pattern. The package `regex` is used
because its searches accept a timeout; those of `re` do not."""

from collections.abc import Iterator

import regex

from train.runtime.errors import UserError
from train.runtime.text_formats import Unreadable

SECONDS = 2  # limit of a search in one text; the paper's patterns take less than a millisecond per document


class Pattern:
    """A case-insensitive regular expression. Raises Unreadable if the text is not a valid one."""

    def __init__(self, text: str):
        self.text = text
        try:
            self._compiled = regex.compile(text, regex.IGNORECASE)
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise Unreadable(f"is not a valid regular expression ({error})") from None

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields [start, end) of each match, in characters of the text. Raises UserError if the search takes more than
        SECONDS seconds."""
        try:
            for match in self._compiled.finditer(text, timeout=SECONDS):
                yield match.span()
        except TimeoutError:
            raise UserError(
                f"pattern {self.text!r}: takes more than {SECONDS} s on a text of {len(text):,} characters; write it "
                "without a repetition inside a repetition."
            ) from None

    def is_in(self, text: str) -> bool:
        """Returns whether there is a match. Raises UserError if the search takes more than SECONDS seconds."""
        return any(True for _ in self.spans(text))
