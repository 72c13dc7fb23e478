"""An annotated text without what was inserted, cut into sentences, and where they lie in the annotated text."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from train.annotating.alignment import ENDS, LABEL, SHUTTING, Insertion
from train.annotating.sentences import sentences
from train.annotating.texts import trimmed
from train.data.documents import Span

SKIPPED = 2  # headings between a note and the sentence that it names
SHUTTING_MARKS, FULL_STOPS = "".join(SHUTTING), ENDS - {":", ";"}


class Bare:
    """text: without insertions; its sentences begin after `head` code points. cut_I: where in it each insertion stood;
    sentence_S: [start, end) of its sentences."""

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
        """The sentence that insertion i stands inside of, if it does; a label before a sentence is no part of it."""
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
        """The white space there."""
        end = at
        while end < len(self.text) and self.text[end].isspace():
            end += 1
        return self.text[at:end]

    def after(self, i: int, count: int) -> tuple[int, int] | None:
        """The next `count` sentences after insertion i; 0: the rest of its line, or the line after its own."""
        number = bisect_left(self.start_S, self.cut_I[i])
        found = self._nearest(range(number, len(self.sentence_S)), count, self.cut_I[i])
        return (found[0][0], found[-1][1]) if found else None

    def before(self, i: int, count: int) -> tuple[int, int] | None:
        """The last `count` sentences before insertion i; 0: the rest of its line, or the line before its own."""
        number = bisect_left(self.start_S, self.cut_I[i])
        found = self._nearest(range(number - 1, -1, -1), count, self.cut_I[i])
        return (found[-1][0], found[0][1]) if found else None

    def _nearest(self, numbers: Iterable[int], count: int, at: int) -> list[tuple[int, int]]:
        """The first `count` of these sentences, or all on one line. Headings and rows of tables are none."""
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
        """How many sentences begin there."""
        return bisect_left(self.start_S, end) - bisect_left(self.start_S, start)

    def spans(self, start: int, end: int) -> list[Span]:
        """What lies there, as false spans of the annotated text, cut where something was inserted."""
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
        """The offset in the annotated text, with so many insertions before it."""
        return offset + self.inserted_I[before]
