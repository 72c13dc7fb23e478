"""Finds an annotated document's positive twin by content: rows may be out of order, missing or extra."""

from array import array
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from train.annotating.alignment import Insertion, Words, align, places_in_order, split_words, words_alone

RUN = 4  # words of a run that is looked up
FACTORS = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F], np.uint32)  # odd, of a word by its place in a run
RARE, KEPT = 32, 64  # runs of a positive text that are looked up: its rarest, and of the others the smallest checksums
BUCKETS = 1 << 24  # in which runs are counted, to know the rare ones
COMMON = 1_000  # positive texts that hold a run: with more, it says too little
TRIED, NEAR = 200, 0.5  # texts that are tried at most, and share of what the nearest has in common that they must have
LEAST = 0.1  # share of an annotated document's words that are its twin's

Runs = npt.NDArray[np.uint32]


class Twins:
    """Positive texts, to be looked up by their runs of words. Of each the words' numbers are kept, not the words."""

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
        """run_H in order, and text_H that holds it."""
        own = [i for i, first in enumerate(self.first_T) if i == first and self.word_TL[i]]
        times = np.zeros(BUCKETS, np.uint16)
        for i in own:
            times[_runs(self.word_TL[i]) % BUCKETS] += 1
        kept = [_sample(_runs(self.word_TL[i]), times) for i in own]
        run_H = np.concatenate([*kept, np.zeros(0, np.uint32)])
        order = np.argsort(run_H, kind="stable")
        self.run_H = run_H[order]
        self.text_H = np.repeat(np.array(own, np.int64), [len(runs) for runs in kept])[order]

    def find(self, annotated: Words) -> tuple[int, Words, list[Insertion]] | tuple[int | None, str]:
        """The twin's number and words, and what was inserted into it; or the number of the nearest, if any, and why it
        is none. Of several that fit, the longest."""
        there = array("i", [self.number.get(word, -1) for word in annotated.word_L])
        runs = _runs(there)
        likely = self._likely(runs)
        if not likely:
            return None, f"no positive document shares {RUN} words in a row with it"
        for i in sorted(likely, key=lambda i: -len(self.word_TL[i])):  # of equally long ones, the likeliest
            if len(self.word_TL[i]) >= LEAST * len(there) and places_in_order(self.word_TL[i], there):
                twin = split_words(self.texts[i], self.doctag)
                insertions = align(twin, annotated)
                assert insertions is not None
                return i, twin, insertions
        share = np.isin(_runs(self.word_TL[likely[0]]), runs).mean()
        return likely[0], f"{share:.0%} of its passages are in it, and not all of its words in order"

    def _likely(self, runs: Runs) -> list[int]:
        """The texts that share most runs, or most of those that few texts hold, the likeliest first."""
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
    """Checksums of all runs of RUN words, each once; of the whole text where it is shorter."""
    numbers = np.array(word_L, np.int32).astype(np.uint32) + np.uint32(2)
    if len(numbers) < RUN:
        numbers = np.concatenate([numbers, np.zeros(RUN - len(numbers), np.uint32)])
    runs = np.zeros(len(numbers) - RUN + 1, np.uint32)
    for k, factor in enumerate(FACTORS):
        runs += numbers[k : k + len(runs)] * factor
    return np.unique(runs ^ (runs >> np.uint32(15)))


def _sample(runs: Runs, times: npt.NDArray[np.uint16]) -> Runs:
    """The runs of a text by which it is looked up."""
    rarest = np.argsort(times[runs % BUCKETS], kind="stable")
    return np.concatenate([runs[rarest[:RARE]], np.sort(runs[rarest[RARE:]])[: KEPT - RARE]])
