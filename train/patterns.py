"""Regular expressions of users. Each search ends: one whose time grows without bound with the text, as that of
`(a|aa)+$`, is told by its name. So they run on the package `regex`, whose searches have a limit; `re` has none."""

from collections.abc import Iterator

import regex

from train.errors import UserError
from train.formats import Unreadable

SECONDS = 2  # of a search through one text; the paper's patterns take less than a millisecond a document


class Pattern:
    """A regular expression, in which case does not matter; Unreadable where it is none."""

    def __init__(self, text: str):
        self.text = text
        try:
            self._compiled = regex.compile(text, regex.IGNORECASE)
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise Unreadable(f"is no regular expression ({error})") from None

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """[start, end) of each match. UserError where looking for them takes too long."""
        try:
            for match in self._compiled.finditer(text, timeout=SECONDS):
                yield match.span()
        except TimeoutError:
            raise UserError(
                f"pattern {self.text!r}: takes more than {SECONDS} s on a text of {len(text):,} characters; write it "
                "without a repetition inside a repetition."
            ) from None

    def is_in(self, text: str) -> bool:
        """Whether there is a match."""
        return any(True for _ in self.spans(text))
