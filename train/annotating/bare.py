"""Removes the insertions from an annotated text, splits the rest into sentences, and maps these back to the annotated
text.

Shapes: I insertions, S sentences. All offsets are code points.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from train.annotating.sentences import sentences
from train.annotating.texts import trimmed
from train.annotating.word_alignment import ENDS, LABEL, SHUTTING, Insertion
from train.data.documents import Span

SKIPPED = 2  # maximum number of headings between a note and the sentence that it names
SHUTTING_MARKS, FULL_STOPS = "".join(SHUTTING), ENDS - {":", ";"}


class Bare:
    """An annotated text without its insertions.

    text: what is left; its sentences begin after `head` code points.
    cut_I: the offset in `text` at which each insertion stood.
    inserted_I: [I + 1], the total length of the insertions before each one, and of all of them.
    sentence_S: [start, end) of each sentence in `text`; start_S: the starts alone.
    """

    def __init__(self, annotated: str, insertions: Sequence[Insertion], head: int = 0) -> None:
        self.annotated, self.insertions = annotated, insertions
        pieces, past, length = [], 0, 0
        self.cut_I: list[int] = []
        for insertion in insertions:
            pieces.append(annotated[past : insertion.start])
            length += insertion.start - past
            self.cut_I.append(length)
            past = insertion.end
        self.inserted_I = list(accumulate((each.end - each.start for each in insertions), initial=0))
        self.text = "".join([*pieces, annotated[past:]])
        self.sentence_S = list(sentences(self.text, head))
        self.start_S = [start for start, _ in self.sentence_S]

    def around(self, i: int) -> tuple[int, int] | None:
        """Returns [start, end) in `text` of the sentence that insertion i stands inside, or None if it stands in none.
        A label before a sentence is not part of the sentence."""
        at = self.cut_I[i]
        number = max(0, bisect_right(self.start_S, at + len(self._blank(at))) - 1)
        if not self.sentence_S:
            return None
        start, end = self.sentence_S[number]
        before, after = self.text[start:at], self.text[at:end]
        if not before.strip() and self.annotated[self.insertions[i].end - 1] in ",—–":  # "Contrary to fact, it rained."
            return start, end
        inside = before.strip() and after.strip() and not LABEL.search(self.text[max(0, at - 80) : at])
        return (start, end) if inside else None

    def _blank(self, at: int) -> str:
        """Returns the white space at that offset of `text`."""
        end = at
        while end < len(self.text) and self.text[end].isspace():
            end += 1
        return self.text[at:end]

    def after(self, i: int, count: int) -> tuple[int, int] | None:
        """Returns [start, end) in `text` of the next `count` sentences after insertion i, or None if there are too few.
        With count 0, these are the rest of its line or, if nothing is left on it, the next line."""
        number = bisect_left(self.start_S, self.cut_I[i])
        found = self._nearest(range(number, len(self.sentence_S)), count, self.cut_I[i])
        return (found[0][0], found[-1][1]) if found else None

    def before(self, i: int, count: int) -> tuple[int, int] | None:
        """Returns [start, end) in `text` of the last `count` sentences before insertion i, or None if there are too
        few. With count 0, these are the part of its line before it or, if there is none, the line before."""
        number = bisect_left(self.start_S, self.cut_I[i])
        found = self._nearest(range(number - 1, -1, -1), count, self.cut_I[i])
        return (found[-1][0], found[0][1]) if found else None

    def _nearest(self, numbers: Iterable[int], count: int, at: int) -> list[tuple[int, int]]:
        """Returns the first `count` of these sentences; with count 0, all of them on one line. Headings and table rows
        do not count as sentences."""
        found: list[tuple[int, int]] = []
        skipped = 0
        for start, end in (self.sentence_S[number] for number in numbers):
            low, high = found[-1] if found else (at, at)
            gap = self.text[high:start] if start >= high else self.text[end:low]
            if "\n" in gap and ((found and not count) or skipped > SKIPPED):
                break
            if "\n" in gap and self.text[start:end].rstrip(SHUTTING_MARKS)[-1:] not in FULL_STOPS:
                skipped += 1
                continue
            found.append((start, end))
            if len(found) == count:
                return found
        return [] if count else found

    def count(self, start: int, end: int) -> int:
        """Returns the number of sentences that begin in [start, end) of `text`."""
        return bisect_left(self.start_S, end) - bisect_left(self.start_S, start)

    def spans(self, start: int, end: int) -> list[Span]:
        """Returns [start, end) of `text` as false spans of the annotated text, split where something was inserted."""
        first, last = bisect_right(self.cut_I, start), bisect_left(self.cut_I, end)
        edges = [self._moved(start, first)]
        for i in range(first, last):
            edges += [self.insertions[i].start, self.insertions[i].end]
        edges.append(self._moved(end, last))
        return [
            span
            for a, b in zip(edges[::2], edges[1::2], strict=True)
            for span in trimmed(self.annotated, a, b, "false")
        ]

    def _moved(self, offset: int, before: int) -> int:
        """Returns the offset in the annotated text of an offset in `text` that has `before` insertions before it."""
        return offset + self.inserted_I[before]
