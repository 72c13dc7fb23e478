"""Splits text into sentences. A sentence ends at a line break, and at a punctuation mark before white space, except
after abbreviations and initials; marks such as “。” need no white space after them."""

import re
from collections.abc import Iterator

CLOSERS = r"[\"'”’»*_)\]}>）】」』》］]*"
END = re.compile(rf"[.!?…]+{CLOSERS}(?=\s|$)|[。！？।؟۔]+{CLOSERS}|\n+")
BLANKS = " \t\r\u00a0"
ABBREVIATION = re.compile(
    r"(?:^|[^\w.])(?:[A-Z](?:\.[A-Z])*|[eE]\.g|[iI]\.e|[aApP]\.m|[zZ]\.B|[dD]\.h|(?i:dr|drs|mr|mrs|ms|mx|prof|rev|hon|gov|sen|rep|gen|adm|col|lt|capt|cmdr|sgt|maj|pres|st|mt|ft|ave|blvd|rd|sr|jr"
    r"|no|nos|nr|vol|vols|ch|sec|fig|figs|eq|pp|ed|eds|cf|vs|etc|approx|ca|al|est|inc|ltd|co|corp|dept|univ|assn|bros"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|calif|bzw|usw|sra|ph))$"
)


def sentences(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields [start, end) in code points of each sentence in a part of the text, without the white space around it."""
    end = len(text) if end is None else end
    for match in END.finditer(text, start, end):
        if match[0] != "." or not _abbreviates(text, match.start(), end):
            yield from _trimmed(text, start, match.end())
            start = match.end()
    yield from _trimmed(text, start, end)


def _abbreviates(text: str, period: int, end: int) -> bool:
    """Returns whether the period at that offset ends an abbreviation, and more text follows on the line."""
    following = text[period + 1 : min(end, period + 20)].lstrip(BLANKS)[:1]
    return following not in ("", "\n") and bool(ABBREVIATION.search(text[max(0, period - 12) : period]))


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    piece = text[start:end]
    if piece.strip():
        start += len(piece) - len(piece.lstrip())
        yield start, start + len(piece.strip())
