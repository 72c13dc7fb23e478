"""Cuts text into sentences: they end at a mark before white space, but for abbreviations and initials, and at line
breaks."""

import re
from collections.abc import Iterator

CLOSERS = r"[\"'”’»*_)\]}>）】」』》］]*"
END = re.compile(rf"(?P<mark>[.!?…]+){CLOSERS}(?=\s|$)|[。！？।؟۔]+{CLOSERS}|\n+")
BLANKS = " \t\r\u00a0"
ABBREVIATION = re.compile(
    r"(?:^|[^\w.])(?:[A-Z](?:\.[A-Z])*|[eE]\.g|[iI]\.e|[aApP]\.m|[zZ]\.B|[dD]\.h|(?i:dr|drs|mr|mrs|ms|mx|prof|rev|hon|gov|sen|rep|gen|adm|col|lt|capt|cmdr|sgt|maj|pres|st|mt|ft|ave|blvd|rd|sr|jr"
    r"|no|nos|nr|vol|vols|ch|sec|fig|figs|eq|pp|ed|eds|cf|vs|etc|approx|ca|al|est|inc|ltd|co|corp|dept|univ|assn|bros"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|calif|bzw|usw|sra|ph))$"
)


def sentences(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """[start, end) of each sentence in a part of the text, without the white space around it."""
    end = len(text) if end is None else end
    for match in END.finditer(text, start, end):
        if not match["mark"] or not _goes_on(text, match, end):
            yield from _trimmed(text, start, match.end())
            start = match.end()
    yield from _trimmed(text, start, end)


def _goes_on(text: str, match: re.Match[str], end: int) -> bool:
    """Whether no sentence ends there: a small letter comes next on the line, or it is the period of an abbreviation."""
    following = text[match.end() : min(end, match.end() + 20)].lstrip(BLANKS)[:1]
    if match[0] != "." or following in ("", "\n"):
        return following.islower()
    before = text[max(0, match.start() - 12) : match.start()]
    return following.islower() or bool(ABBREVIATION.search(before))


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    piece = text[start:end]
    if piece.strip():
        start += len(piece) - len(piece.lstrip())
        yield start, start + len(piece.strip())
