"""Finds an annotated document's positive twin by content: rows may be out of order, missing or extra."""

from collections import Counter, defaultdict

from train.annotating.alignment import Insertion, Mismatch, Words, align

RUN = 4  # words of a run that is looked up
COMMON = 50  # a run that more texts hold says little, and is not looked up
LIKELY = 0.25  # share of a text's runs that a twin must have in common; each annotation breaks three
TRIED = 5


class Twins:
    """Positive texts, to be looked up by their runs of words."""

    def __init__(self, positives: list[Words]) -> None:
        self.positives = positives
        self.runs = [_runs(words) for words in positives]
        self.holders: dict[int, list[int]] = defaultdict(list)
        for i, runs in enumerate(self.runs):
            for run in runs:
                self.holders[run].append(i)

    def find(self, annotated: Words) -> tuple[int, list[Insertion]] | str:
        """The twin's number and what was inserted into it; or why there is none. Of several that fit, the longest; of
        equal ones, the first."""
        shared: Counter[int] = Counter()
        runs = _runs(annotated)
        for run in runs:
            holders = self.holders.get(run, ())
            if len(holders) <= COMMON:
                shared.update(holders)
        likely = [i for i, count in shared.most_common(TRIED) if count >= LIKELY * len(self.runs[i])]
        if not likely:
            return "no twin: no positive document shares enough of its text"
        fitting, nearest = [], None
        for i in likely:
            found = align(self.positives[i], annotated)
            if isinstance(found, Mismatch):
                nearest = nearest or (i, found)
            else:
                fitting.append((i, found))
        if not fitting:
            assert nearest
            ...
        return max(fitting, key=lambda each: len(self.positives[each[0]].word_L))


def _runs(words: Words) -> set[int]:
    word_L = words.word_L
    return {hash(tuple(word_L[i : i + RUN])) for i in range(max(1, len(word_L) - RUN + 1))}
