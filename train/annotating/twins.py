"""Finds an annotated document's positive twin by content: rows may be out of order, missing or extra.

Shapes: T positive texts, L words of a text, H indexed runs of words.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from train.annotating.word_alignment import Insertion, Words, align, places_in_order, split_words, words_alone

RUN = 4  # words of a run, by which texts are looked up
FACTORS = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F], np.uint32)  # odd factors, one per place in a run
RARE, KEPT = 32, 64  # a positive text is indexed by its RARE rarest runs and, up to KEPT, those of smallest checksum
BUCKETS = 1 << 24  # buckets in which runs are counted, to find the rare ones
COMMON = 1_000  # a run that occurs in more positive texts is ignored, because it says too little
TRIED, NEAR = 200, 0.5  # maximum texts to try, and minimum of what they share, as a fraction of what the nearest shares
LEAST = 0.1  # minimum length of the twin, as a fraction of the annotated document's words

Runs = npt.NDArray[np.uint32]


class Twins:
    """An index of positive texts by their runs of words. It keeps the words of each text as numbers."""

    def __init__(self, texts: Sequence[str], doctag: str) -> None:
        self.texts, self.doctag = texts, doctag
        self.number: dict[str, int] = {}  # of each word
        self.word_TL: list[array[int]] = []
        self.first_T: list[int] = []  # the first text with the same words
        known: dict[bytes, int] = {}
        for i, text in enumerate(tqdm(texts, desc="reading positive documents", unit="doc", mininterval=0.5)):
            word_L = words_alone(text, doctag)
            self.word_TL.append(array("i", [self.number.setdefault(word, len(self.number)) for word in word_L]))
            self.first_T.append(known.setdefault(sha256(self.word_TL[i].tobytes()).digest(), i))
        self._index()

    def _index(self) -> None:
        """Builds the sorted run_H, and text_H, the text that contains each run."""
        own = [i for i, first in enumerate(self.first_T) if i == first and self.word_TL[i]]
        times = np.zeros(BUCKETS, np.uint32)
        for i in own:
            times[_runs(self.word_TL[i]) % BUCKETS] += 1
        kept = [_sample(_runs(self.word_TL[i]), times) for i in own]
        run_H = np.concatenate([*kept, np.zeros(0, np.uint32)])
        order = np.argsort(run_H, kind="stable")
        self.run_H = run_H[order]
        self.text_H = np.repeat(np.array(own, np.int64), [len(runs) for runs in kept])[order]

    def find(self, annotated: Words) -> tuple[int, Words, list[Insertion]] | tuple[int | None, str]:
        """Returns the number of the twin, its words, and the insertions that make the annotated document of it. Without
        a twin, returns the number of the nearest text, or None, and why it is not the twin. If several texts fit, the
        longest is the twin."""
        there = array("i", [self.number.get(word, -1) for word in annotated.word_L])
        runs = _runs(there)
        likely = self._likely(runs)
        if not likely:
            return None, f"no positive document shares {RUN} words in a row with it"
        for i in sorted(likely, key=lambda i: -len(self.word_TL[i])):  # stable: of equally long ones, the likeliest
            if len(self.word_TL[i]) >= LEAST * len(there) and places_in_order(self.word_TL[i], there):
                twin = split_words(self.texts[i], self.doctag)
                insertions = align(twin, annotated)
                assert insertions is not None
                return i, twin, insertions
        share = np.isin(_runs(self.word_TL[likely[0]]), runs).mean()
        return likely[0], f"{share:.0%} of its passages are in it, and not all of its words in order"

    def _likely(self, runs: Runs) -> list[int]:
        """Returns the texts that share the most runs, or the most of those that few texts contain, likeliest first."""
        low, high = np.searchsorted(self.run_H, runs, "left"), np.searchsorted(self.run_H, runs, "right")
        telling = (high > low) & (high - low <= COMMON)
        low, count = low[telling], (high - low)[telling]
        if not len(low):
            return []
        places = np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())
        shared = np.bincount(self.text_H[places])
        telling_shared = np.bincount(self.text_H[places], np.repeat(1 / count, count))
        nearness = np.maximum(shared / shared.max(), telling_shared / telling_shared.max())
        likely = np.flatnonzero(nearness >= NEAR)
        return [int(i) for i in likely[np.argsort(-nearness[likely], kind="stable")][:TRIED]]


def _runs(word_L: Sequence[int]) -> Runs:
    """Returns the sorted checksums of all runs of RUN words, without duplicates; that of the whole text if it is
    shorter."""
    numbers = np.array(word_L, np.int32).astype(np.uint32) + np.uint32(2)
    if len(numbers) < RUN:
        numbers = np.concatenate([numbers, np.zeros(RUN - len(numbers), np.uint32)])
    runs = np.zeros(len(numbers) - RUN + 1, np.uint32)
    for k, factor in enumerate(FACTORS):
        runs += numbers[k : k + len(runs)] * factor
    return np.unique(runs ^ (runs >> np.uint32(15)))


def _sample(runs: Runs, times: npt.NDArray[np.uint32]) -> Runs:
    """Returns the runs of a text by which it is looked up."""
    rarest = np.argsort(times[runs % BUCKETS], kind="stable")
    return np.concatenate([runs[rarest[:RARE]], np.sort(runs[rarest[RARE:]])[: KEPT - RARE]])
