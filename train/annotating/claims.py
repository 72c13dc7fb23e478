"""Reads the annotations of a document: which announce a claim, which look back at one, which are about the whole.

Each insertion is cut into parts (brackets and sentences), and each part points ahead, back, or does not say (cues.py).
Claims begin and end by turns, so the reading of all insertions together is a path between two states, outside a claim
and inside one; `read` takes the path that agrees best with the cues. A part that says nothing is settled by its
neighbors. Where the cues do not alternate, an annotation has lost its partner: a step that costs LOST, and is counted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from train.annotating.alignment import CLOSING, OPENING, Insertion
from train.annotating.cues import direction, speaks_of_the_whole
from train.annotating.texts import in_order, trimmed
from train.data.documents import Span

LOST = 5.0  # an annotation without its partner
CLEAR, CONTRARY = -2.0, 3.0  # reading clear words the wrong way costs more than two lost partners
ASIDE = 3.0  # an annotation that neither announces nor looks back
BLANK_LINE = 4.0  # for what a blank line sets off from the document's beginning or end, to be about the whole of it
WHOLE = 3.0  # for saying so
AGREES = 0.5  # the two ends of a claim stand in brackets of one kind; a cut lies between brackets or lines
BREAK = 0.25  # for each blank line inside a claim, three at most

CLOSERS = r"[\"'”’»*_)\]}>]*"
SENTENCE = re.compile(rf"[^\n]*?(?:[.!?…]+{CLOSERS}(?=\s|$)|[。！？।؟۔]{CLOSERS})|[^\n]+")
BLANK = re.compile(r"\n[^\S\n]*\r?\n")


@dataclass(frozen=True)
class Part:
    """Code points [start, end): a sentence, or one in a bracket; kind: the bracket's opening mark, or ""; joined: a
    bracket goes on from the part before it."""

    start: int
    end: int
    points: float
    whole: bool
    kind: str
    joined: bool


@dataclass(frozen=True)
class Reading:
    """parts [first, cut) look back, [cut, last) announce; those outside are about the whole document."""

    first: int
    cut: int
    last: int
    score: float

    @property
    def looks_back(self) -> bool:
        return self.cut > self.first

    @property
    def announces(self) -> bool:
        return self.last > self.cut


ASIDE_READING = Reading(0, 0, 0, -ASIDE)


@dataclass(frozen=True)
class Path:
    """What has been read up to an insertion. open: the insertion that announced a claim not yet looked back at, and
    the kind of its bracket; claims: insertions that announce and look back; lost: those whose partner is lost, and
    whether they announce."""

    score: float
    readings: tuple[Reading, ...] = ()
    open: tuple[int, str] | None = None
    claims: tuple[tuple[int, int], ...] = ()
    lost: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class Annotations:
    """spans: roles negation (all that was inserted) and false (what is announced and looked back at). claims: announced
    and looked back at; lost: annotations without a partner, of which `mended` stand at a single sentence, which must be
    their claim; asides: annotations that do neither; uncued: of announcing and looking back, how often the words do not
    say which of them; unbracketed: how many of these stand in no brackets of one kind with their partner's."""

    spans: tuple[Span, ...]
    claims: int
    lost: int
    mended: int
    asides: int
    uncued: int
    unbracketed: int

    @property
    def consistent(self) -> bool:
        """Whether announcing and looking back alternate all through."""
        return not self.lost and not self.asides


def read(text: str, insertions: list[Insertion], words: int) -> Annotations:
    """The spans of an annotated text, whose twin has so many words."""
    parts = [split_parts(text, insertion.start, insertion.end) for insertion in insertions]
    path = _best_path(text, insertions, parts, words)
    spans = [span for pieces, reading in zip(parts, path.readings, strict=True) for span in _negations(pieces, reading)]
    for first, last in path.claims:
        for i in range(first, last):  # annotations between them are no part of the claim
            spans += trimmed(text, insertions[i].end, insertions[i + 1].start, "false")
    mended = 0
    for i, announces in path.lost:
        edge = insertions[i].end if announces else insertions[i].start
        ends = [each.start for each in insertions if each.start >= edge] if announces else []
        starts = [each.end for each in insertions if each.end <= edge] if not announces else []
        start, end = (edge, min(ends, default=len(text))) if announces else (max(starts, default=0), edge)
        only = trimmed(text, start, end, "false")
        if only and len(split_parts(text, only[0].start, only[0].end)) == 1:
            spans, mended = spans + only, mended + 1
    uncued, unbracketed = _unsure(parts, path)
    asides = sum(reading == ASIDE_READING for reading in path.readings)
    return Annotations(in_order(spans), len(path.claims), len(path.lost), mended, asides, uncued, unbracketed)


def split_parts(text: str, start: int, end: int) -> list[Part]:
    """Sentences of [start, end), and of brackets that begin where a sentence could."""
    parts: list[Part] = []
    while start < end:
        if text[start].isspace():
            start += 1
            continue
        close = _closing(text, start, end)
        if close:
            inner = start
            while inner < close and (match := SENTENCE.match(text, inner, close)):
                if match[0].strip():
                    parts.append(_part(text, inner, match.end(), text[start], inner > start))
                inner = match.end() + len(text[match.end() : close]) - len(text[match.end() : close].lstrip())
            start = close
        else:
            match = SENTENCE.match(text, start, end)
            assert match
            parts.append(_part(text, start, match.end(), "", False))
            start = match.end()
    return parts


def _part(text: str, start: int, end: int, kind: str, joined: bool) -> Part:
    sentence = text[start:end].rstrip()
    whole = speaks_of_the_whole(sentence)
    return Part(start, start + len(sentence), direction(sentence), whole, kind, joined)


def _closing(text: str, start: int, end: int) -> int:
    """Where the bracket that opens at `start` ends, exclusive; 0 where none opens, or it does not close before end."""
    opened: list[str] = []
    for i in range(start, end):
        mark = text[i]
        if mark in OPENING:
            opened.append(mark)
        elif mark in CLOSING and opened and opened[-1] == CLOSING[mark]:
            opened.pop()
        if not opened:
            return i + 1 if i > start else 0
    return 0


def _best_path(text: str, insertions: list[Insertion], parts: list[list[Part]], words: int) -> Path:
    paths: dict[str | None, Path] = {None: Path(0.0)}  # by the kind of the bracket that announced the open claim
    for i, (insertion, pieces) in enumerate(zip(insertions, parts, strict=True)):
        following: dict[str | None, Path] = {}
        readings = list(_readings(text, pieces, not insertion.word, insertion.word == words))
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


def _readings(text: str, parts: list[Part], at_start: bool, at_end: bool) -> Iterator[Reading]:
    """Every way to read an insertion, those that cut it late first."""
    count = len(parts)
    for first in range(count + 1) if at_start else (0,):
        for last in range(first, count + 1) if at_end else (count,):
            whole = _about_the_whole(text, parts, first, last)
            for cut in range(last, first - 1, -1):
                ahead = _agreement(sum(part.points for part in parts[cut:last]))
                back = _agreement(-sum(part.points for part in parts[first:cut]))
                inside = first < cut < last
                between = inside and (parts[cut].kind or parts[cut - 1].kind or "\n" in _gap(text, parts, cut))
                split = AGREES * bool(between) - 2 * (inside and parts[cut].joined)
                yield Reading(first, cut, last, whole + ahead + back + split)
    if not at_start and not at_end:
        yield ASIDE_READING


def _agreement(points: float) -> float:
    """How well words with so many points the right way agree with a reading: clear ones the other way forbid it."""
    return points if points > CLEAR else CONTRARY * points


def _about_the_whole(text: str, parts: list[Part], first: int, last: int) -> float:
    """How much speaks for the parts outside [first, last) being about the whole document."""
    score = 0.0
    for outside, edge in ((parts[:first], first), (parts[last:], last)):
        if outside:
            set_off = bool(BLANK.search(_gap(text, parts, edge)))
            said = any(part.whole for part in outside)
            score += BLANK_LINE * set_off + WHOLE * said - ASIDE * (not set_off and not said)
    return score


def _gap(text: str, parts: list[Part], i: int) -> str:
    """The white space before part i, or after the last."""
    start = parts[i - 1].end if i else len(text[: parts[0].start].rstrip())
    if i < len(parts):
        return text[start : parts[i].start]
    return text[start : len(text) - len(text[start:].lstrip())]


def _extend(path: Path, i: int, reading: Reading, parts: list[Part], text: str, insertions: list[Insertion]) -> Path:
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


def _negations(parts: list[Part], reading: Reading) -> Iterator[Span]:
    """The insertion, cut where it stops speaking of the whole or looking back, but not inside a bracket."""
    edges = sorted({0, reading.first, reading.cut, reading.last, len(parts)})
    edges = [edge for edge in edges if edge == len(parts) or not parts[edge].joined]
    for a, b in pairwise(edges):
        yield Span(parts[a].start, parts[b - 1].end, "negation")


def _unsure(parts: list[list[Part]], path: Path) -> tuple[int, int]:
    """Of the announcing and looking back annotations of all claims, how many have no word that points that way, and how
    many of these are of claims not in brackets of one kind."""
    uncued = unbracketed = 0
    for first, last in path.claims:
        ahead, back = path.readings[first], path.readings[last]
        announcing, looking = parts[first][ahead.cut : ahead.last], parts[last][back.first : back.cut]
        unclear = (sum(part.points for part in announcing) <= 0) + (sum(part.points for part in looking) >= 0)
        uncued += unclear
        unbracketed += unclear if not announcing[0].kind or announcing[0].kind != looking[0].kind else 0
    return uncued, unbracketed
