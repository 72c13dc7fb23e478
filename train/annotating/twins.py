"""Finds an annotated document's positive twin by content: rows may be out of order, missing or extra."""

import zlib
from collections import defaultdict

from train.annotating.alignment import Insertion, Words, align

RUN = 4  # words of a run that is looked up
KEPT = 64  # runs of a positive text that are looked up: those with the smallest checksums
COMMON = 1_000  # positive texts that hold a run: with more, it says too little
TRIED, NEAR = 50, 0.5  # texts that are tried at most, and share of what the nearest has in common that they must have
LEAST = 0.1  # share of an annotated document's words that are its twin's


class Twins:
    """Positive texts, to be looked up by their runs of words."""

    def __init__(self, positives: list[Words]) -> None:
        self.positives = positives
        self.holders: dict[int, list[int]] = defaultdict(list)
        known: set[tuple[str, ...]] = set()
        for i, words in enumerate(positives):
            if words.word_L and (text := tuple(words.word_L)) not in known:  # of equal texts, the first
                known.add(text)
                for run in sorted(_runs(words))[:KEPT]:
                    self.holders[run].append(i)

    def find(self, annotated: Words) -> tuple[int, list[Insertion]] | tuple[int | None, str]:
        """The twin's number and what was inserted into it; or the number of the nearest, if any, and why it is none. Of
        several that fit, the longest."""
        runs = _runs(annotated)
        shared: dict[int, float] = defaultdict(float)
        for run in runs:
            holders = self.holders.get(run, ())
            if len(holders) <= COMMON:
                for i in holders:
                    shared[i] += 1 / len(holders)  # what many texts hold says little
        most = max(shared.values(), default=0.0)
        near = (i for i, share in shared.items() if share >= NEAR * most)
        likely = sorted(near, key=lambda i: (-shared[i], i))[:TRIED]
        if not likely:
            return None, f"no positive document shares {RUN} words in a row with it"
        fitting = []
        for i in likely:
            if len(self.positives[i].word_L) >= LEAST * len(annotated.word_L):
                found = align(self.positives[i], annotated)
                if found is not None:
                    fitting.append((i, found))
        if not fitting:
            own = _runs(self.positives[likely[0]])
            return likely[
                0
            ], f"{len(own & runs) / len(own):.0%} of its passages are in it, and not all of its words in order"
        return max(fitting, key=lambda each: len(self.positives[each[0]].word_L))


def _runs(words: Words) -> set[int]:
    """Checksums of all runs of RUN words; of the whole text where it is shorter."""
    word_L = [word.encode() for word in words.word_L]
    return {zlib.crc32(b" ".join(word_L[i : i + RUN])) for i in range(max(1, len(word_L) - RUN + 1))}
