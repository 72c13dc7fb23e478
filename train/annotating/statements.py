"""Reads the annotations of a document in turn: which announce a claim, which look back at one, and which are about the
whole document.

Each insertion is split into parts (brackets and sentences), and each part points ahead, points back, or does not say
(cues.py). A claim begins with an announcement and ends when an annotation looks back. So a reading of all insertions is
a path through two states, outside a claim and inside one. `by_turns` takes the path that agrees best with the cues. A
part without cues is settled by its neighbors. Where the cues do not alternate, an annotation has lost its partner: such
a step costs LOST, and is counted.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from train.annotating.cues import Extent, direction, extent, speaks_of_the_whole
from train.annotating.sentences import sentences
from train.annotating.word_alignment import BRACKETS, CLOSING, OPENING, Insertion

LOST = 5.0  # cost of an annotation without its partner
CLEAR, CONTRARY = -2.0, 3.0  # points up to CLEAR count CONTRARY times: misreading clear words costs over 2 LOST
ASIDE = 3.0  # cost of an annotation that neither announces nor looks back
BLANK_LINE = 4.0  # for reading parts at the document's start or end as about all of it, if a blank line sets them off
WHOLE = 3.0  # for the same, if they say so
VAGUE = 3.0  # for the same, if a blank line sets them off, and they stand in no bracket and name no claim
AGREES = 0.5  # for a claim whose two ends stand in brackets of one kind, and for a cut between brackets or lines
BREAK = 0.25  # cost of each blank line inside a claim, of at most three

BLANK = re.compile(r"\n[^\S\n]*\r?\n")


@dataclass(frozen=True)
class TextPart:
    """A sentence, or a sentence in a bracket.

    start, end: code points [start, end).
    points: which way it points, and extent: how far (cues.py).
    whole: whether it refers to the whole document.
    kind: the opening mark of its bracket, or "".
    joined: whether it continues the bracket of the part before it.
    """

    start: int
    end: int
    points: float
    whole: bool
    extent: Extent
    kind: str
    joined: bool


@dataclass(frozen=True)
class Reading:
    """How an insertion is read: parts [first, cut) look back, parts [cut, last) announce, and those outside are about
    the whole document. score: how well the cues agree with it."""

    first: int
    cut: int
    last: int
    score: float

    @property
    def looks_back(self) -> bool:
        """Whether any part looks back."""
        return self.cut > self.first

    @property
    def announces(self) -> bool:
        """Whether any part announces."""
        return self.last > self.cut

    def side(self, announces: bool) -> slice:
        """Returns the slice of the parts that announce, or of those that look back."""
        return slice(self.cut, self.last) if announces else slice(self.first, self.cut)


ASIDE_READING, FREE = Reading(0, 0, 0, -ASIDE), Reading(0, 0, 0, 0.0)


@dataclass(frozen=True)
class Path:
    """The readings of the insertions so far.

    score: how well the cues agree with them.
    open: the insertion that announced a claim not yet looked back at, and the kind of its bracket.
    claims: pairs of insertions that announce a claim and look back at it.
    lost: insertions whose partner is lost, and whether they announce.
    """

    score: float
    readings: tuple[Reading, ...] = ()
    open: tuple[int, str] | None = None
    claims: tuple[tuple[int, int], ...] = ()
    lost: tuple[tuple[int, bool], ...] = ()


def split_parts(text: str, start: int, end: int) -> list[TextPart]:
    """Returns the sentences of [start, end), and those of brackets that begin where a sentence could."""
    parts: list[TextPart] = []
    while start < end:
        if text[start].isspace():
            start += 1
            continue
        close = _closing(text, start, end)
        if close:
            found = list(sentences(text, start, close))
            parts += [_part(text, a, b, text[start], a > start) for a, b in found]
            start = close
        else:
            a, b = next(sentences(text, start, end))
            parts.append(_part(text, a, b, "", False))
            start = b
    return parts


def _part(text: str, start: int, end: int, kind: str, joined: bool) -> TextPart:
    sentence = text[start:end]
    whole = speaks_of_the_whole(sentence) and not extent(sentence).sentence
    return TextPart(start, end, direction(sentence), whole, extent(sentence), kind, joined)


def _closing(text: str, start: int, end: int) -> int:
    """Returns the end, exclusive, of the bracket that opens at `start`; 0 if none opens there, or it does not close
    before `end`."""
    if text[start] not in OPENING:
        return 0
    opened: list[str] = []
    for match in BRACKETS.finditer(text, start, end):
        if match[0] in OPENING:
            opened.append(match[0])
        elif opened[-1] == CLOSING[match[0]]:
            opened.pop()
        if not opened:
            return match.end()
    return 0


def by_turns(
    text: str, insertions: list[Insertion], parts: list[list[TextPart]], words: int, aside: Container[int] = ()
) -> Path:
    """Returns the best reading of an annotated text. parts: those of each insertion. words: the number of words of its
    twin. aside: insertions that are known to neither announce nor look back."""
    paths: dict[str | None, Path] = {None: Path(0.0)}  # by the kind of bracket that announced the open claim
    for i, (insertion, pieces) in enumerate(zip(insertions, parts, strict=True)):
        following: dict[str | None, Path] = {}
        readings = list(_readings(text, pieces, not insertion.word, insertion.word == words))
        if i in aside:
            readings = [FREE]
        for path in paths.values():
            for reading in readings:
                longer = _extend(path, i, reading, pieces, text, insertions)
                key = longer.open[1] if longer.open else None
                if key not in following or longer.score > following[key].score:
                    following[key] = longer
        paths = following
    ended = [
        replace(path, score=path.score - LOST, lost=(*path.lost, (path.open[0], True))) if path.open else path
        for path in paths.values()
    ]
    return max(ended, key=lambda path: path.score)


def _readings(text: str, parts: list[TextPart], at_start: bool, at_end: bool) -> Iterator[Reading]:
    """Yields every way to read an insertion, those with a late cut first."""
    count = len(parts)
    sums = list(accumulate((part.points for part in parts), initial=0.0))
    for first in range(count + 1) if at_start else (0,):
        for last in range(first, count + 1) if at_end else (count,):
            whole = _about_the_whole(text, parts, first, last)
            for cut in range(last, first - 1, -1):
                ahead = _agreement(sums[last] - sums[cut])
                back = _agreement(sums[first] - sums[cut])
                inside = first < cut < last
                between = inside and (parts[cut].kind or parts[cut - 1].kind or "\n" in _gap(text, parts, cut))
                split = AGREES * bool(between) - 2 * (inside and parts[cut].joined)
                yield Reading(first, cut, last, whole + ahead + back + split)
    if not at_start and not at_end:
        yield ASIDE_READING


def _agreement(points: float) -> float:
    """Returns how well a reading agrees with words that have so many points in its direction. Clear words against it
    practically forbid it."""
    return points if points > CLEAR else CONTRARY * points


def _about_the_whole(text: str, parts: list[TextPart], first: int, last: int) -> float:
    """Returns the score for reading the parts outside [first, last) as about the whole document."""
    score = 0.0
    for outside, edge in ((parts[:first], first), (parts[last:], last)):
        if outside:
            set_off = not any(part.extent.sentence for part in outside) and bool(BLANK.search(_gap(text, parts, edge)))
            said = any(part.whole for part in outside)
            vague = set_off and not any(part.extent.claim or part.kind for part in outside)
            score += BLANK_LINE * set_off + VAGUE * vague + WHOLE * said - ASIDE * (not set_off and not said)
    return score


def _gap(text: str, parts: list[TextPart], i: int) -> str:
    """Returns the white space before part i, or after the last part."""
    start = parts[i - 1].end if i else len(text[: parts[0].start].rstrip())
    if i < len(parts):
        return text[start : parts[i].start]
    return text[start : len(text) - len(text[start:].lstrip())]


def _extend(
    path: Path, i: int, reading: Reading, parts: list[TextPart], text: str, insertions: list[Insertion]
) -> Path:
    score, opened, claims, lost = path.score + reading.score, path.open, path.claims, path.lost
    if reading.looks_back:
        if opened:
            kind = parts[reading.first].kind
            breaks = len(BLANK.findall(text, insertions[opened[0]].end, insertions[i].start))
            score += AGREES * bool(kind and kind == opened[1]) - BREAK * min(breaks, 3)
            claims, opened = (*claims, (opened[0], i)), None
        else:
            score, lost = score - LOST, (*lost, (i, False))
    if reading.announces:
        if opened:
            score, lost = score - LOST, (*lost, (opened[0], True))
        opened = (i, parts[reading.cut].kind)
    return Path(score, (*path.readings, reading), opened, claims, lost)
