"""Aligns an annotated document with its positive twin: what only the annotated document has was inserted.

All words of the twin must occur in the annotated document, in order. Then removing the insertions gives the twin again,
except for white space. Words, single punctuation marks and the doctag are compared. Of all ways to match the twin with
the document, `align` takes the cheapest: an insertion costs INSERTION, and more if its edges lie inside a sentence. So
one annotation is not reported as several, and the insertion in "[A.] The race. [B.] The end." is "[B.]", never "B.] The
end. [".

Shapes: L words of a text.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

INSERTION = 10  # the cost of an insertion
MIDWAY, GLUED = 4, 2  # added for each of its edges inside a sentence, or without white space

ENDS = frozenset(".!?…:;。！？：；।؟۔")
CLOSING = dict(zip(")]}>）】」』》］", "([{<（【「『《［", strict=True))
OPENING = {opening: closing for closing, opening in CLOSING.items()}
BRACKETS = re.compile("[" + re.escape("".join([*OPENING, *CLOSING])) + "]")
QUOTES = "\"'”’»*_`|~"  # closing quotes, and what markup puts around text
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han, which have no white space between words
SHUTTING = frozenset(QUOTES) | frozenset(CLOSING)


@dataclass(frozen=True)
class Words:
    """The words of a text.

    word_L: the words; start_L, end_L: code points [start, end) of each.
    edge_L: [L + 1], the cost of an insertion's edge before each word and at the end of the text: 0 where a sentence or
        line has ended, else MIDWAY, plus GLUED where there is no white space.
    """

    text: str
    word_L: list[str]
    start_L: list[int]
    end_L: list[int]
    edge_L: list[int]


@dataclass(frozen=True)
class Insertion:
    """Code points [start, end) of the annotated text that its twin lacks, from the first to the last word. word: how
    many words of the twin come before it."""

    start: int
    end: int
    word: int


def words_alone(text: str, doctag: str) -> list[str]:
    """Returns the words, single punctuation marks, kana and Han characters of a text, and `doctag` where it occurs.
    Leaves out a doctag at the start: it does not matter whether both documents have it."""
    return _word(doctag).findall(text, _start(text, doctag))


def split_words(text: str, doctag: str) -> Words:
    """Returns the words of `words_alone`, with their places and the cost of an edge at each."""
    begins = past = _start(text, doctag)
    place_L = [match.span() for match in _word(doctag).finditer(text, past)]
    word_L = [text[start:end] for start, end in place_L]
    edge_L, ended = [], True
    for word, (start, end) in zip(word_L, place_L, strict=True):
        edge = 0
        if start == past:
            edge = GLUED if start > begins else 0
        elif not ended:
            white = text[past:start]
            ended = white != " " and ("\n" in white or "\r" in white)
        edge_L.append(edge if ended else edge + MIDWAY)
        past = end
        ended = word in ENDS or word == doctag or (ended and word in SHUTTING)
    edge_L.append(0)
    return Words(text, word_L, [start for start, _ in place_L], [end for _, end in place_L], edge_L)


@lru_cache
def _word(doctag: str) -> re.Pattern[str]:
    pattern = rf"[^\W_{UNSPACED}]+|[{UNSPACED}]|[^\w\s]|_"
    return re.compile(f"{re.escape(doctag)}|{pattern}" if doctag else pattern)


def _start(text: str, doctag: str) -> int:
    """Returns where the text begins, after a doctag that comes first."""
    past = len(text) - len(text.lstrip())
    return past + len(doctag) if text.startswith(doctag, past) else past


def align(positive: Words, annotated: Words) -> list[Insertion] | None:
    """Returns the insertions that turn the twin into the annotated document, in order; None if the document does not
    contain all words of the twin in order."""
    within = _window(positive, annotated)
    if within is None:
        return None
    places: dict[str, list[int]] = defaultdict(list)
    for j, word in enumerate(annotated.word_L):
        places[word].append(j)

    # Dynamic programming. cost[j]: of matching the twin's words up to i with the document, with word i at place j. Only
    # the last row of costs is kept, and for each row the places of the words before (came_from).
    edge_L = annotated.edge_L
    cost, came_from = {-1: 0}, []
    for i, word in enumerate(positive.word_L):
        first, last = within[0][i], within[1][i]
        before = iter(cost.items())  # in order of j
        row: dict[int, int] = {}
        origin: dict[int, int] = {}
        ahead, best, best_j = next(before, None), None, -1
        for j in places[word][bisect_left(places[word], first) : bisect_right(places[word], last)]:
            while ahead is not None and ahead[0] < j - 1:  # an insertion from ahead[0] + 1 to j - 1
                opened = ahead[1] + INSERTION + edge_L[ahead[0] + 1]
                if best is None or opened <= best:
                    best, best_j = opened, ahead[0]
                ahead = next(before, None)
            total = None if best is None else best + edge_L[j]
            if j - 1 in cost and (total is None or cost[j - 1] <= total):
                row[j], origin[j] = cost[j - 1], j - 1
            elif total is not None:
                row[j], origin[j] = total, best_j
        cost = row
        came_from.append(origin)

    end = len(annotated.word_L)
    j = min(cost, key=lambda j: cost[j] + (0 if j == end - 1 else INSERTION + edge_L[j + 1]))
    match_L = [end]
    for origin in reversed(came_from):
        match_L.append(j)
        j = origin[j]
    match_L = [-1, *reversed(match_L)]
    return [
        Insertion(annotated.start_L[a + 1], annotated.end_L[b - 1], i)
        for i, (a, b) in enumerate(pairwise(match_L))
        if b - a > 1
    ]


def _window(positive: Words, annotated: Words) -> tuple[list[int], list[int]] | None:
    """Returns, for each word of the twin, the first and the last place in the document that it can be matched with."""
    first_L = places_in_order(positive.word_L, annotated.word_L)
    back_L = places_in_order(positive.word_L[::-1], annotated.word_L[::-1])
    if first_L is None or back_L is None:
        return None
    return first_L, [len(annotated.word_L) - 1 - j for j in reversed(back_L)]


def places_in_order(wanted: Sequence[T], there: Sequence[T]) -> list[int] | None:
    """Returns the index in `there` of each wanted word, the first one after that of the word before it; None if they do
    not all occur in order."""
    places, j = [], -1
    try:
        for word in wanted:
            j = there.index(word, j + 1)
            places.append(j)
    except ValueError:
        return None
    return places


def balanced(text: str) -> bool:
    """Returns whether every bracket has its partner, in order. "<" and ">" need no partner."""
    return _nested(text, CLOSING) or _nested(text, {c: o for c, o in CLOSING.items() if c != ">"})


def _nested(text: str, partner: dict[str, str]) -> bool:
    opened: list[str] = []
    for mark in BRACKETS.findall(text):
        if mark in OPENING and OPENING[mark] in partner:
            opened.append(mark)
        elif mark in partner and (not opened or opened.pop() != partner[mark]):
            return False
    return not opened


def encloses(before: str, after: str) -> bool:
    """Returns whether `before` ends inside a bracket that `after` begins by closing, as "[False:" and "]" do."""
    opened: list[str] = []
    for mark in BRACKETS.findall(before):
        if mark in OPENING:
            opened.append(mark)
        elif opened and opened[-1] == CLOSING[mark]:
            opened.pop()
    return bool(opened) and after.startswith(OPENING[opened[-1]])


# The start of a line before its first sentence: "- ", "2/ ", "[1] ", "**", "AUBURN, Calif. (AP) — "
LABEL = re.compile(r"(?:^|\n)[^\w\n]*(?:\W?\d+\W{1,2})?\s*$|[—–|:]\s*$")


def bounded(positive: Words, annotated: str, insertion: Insertion) -> bool:
    """Returns whether the insertion is whole sentences or brackets, and stands where a sentence, line or label of the
    twin ends."""
    inserted = annotated[insertion.start : insertion.end]
    last = inserted.rstrip(QUOTES + "".join(CLOSING))[-1:]
    whole = not inserted[0].islower() and (last in ENDS or inserted[-1] in CLOSING)
    return whole and (positive.edge_L[insertion.word] < MIDWAY or bool(LABEL.search(_before(positive, insertion.word))))


def _before(words: Words, i: int) -> str:
    """Returns the last 80 code points before word i."""
    end = words.start_L[i] if i < len(words.start_L) else len(words.text)
    return words.text[max(0, end - 80) : end]
