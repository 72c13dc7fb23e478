"""Determines which documents a run sees and in which order, from the seed and the data alone.

The mask, the number of ranks and the micro-batch size have no influence.
"""

import numpy as np


def epoch_order(sizes: list[int], counts: list[int | None], seed: int, epoch: int) -> np.ndarray:
    """Returns the document numbers of one epoch, int64. Numbers count through all sources, in order.

    Source i holds sizes[i] documents, and counts[i] of them are drawn: the first sizes[i] without replacement, any
    further ones with replacement. A count of None takes each document once. The draws of all sources are then shuffled
    together.

    What is drawn of a source depends on the seed, the epoch and its own size alone, and a smaller count draws a part of
    what a larger one does. So whatever is mixed with a file, its rows are the same, and two versions of the same
    documents have the same rows drawn.
    """
    drawn, first = [], 0
    for size, count in zip(sizes, counts, strict=True):
        rng = np.random.default_rng([seed, epoch, 0])
        count = size if count is None else count
        once = rng.permutation(size)[:count]
        beyond = rng.integers(0, size, size=max(0, count - size))
        drawn.append(first + np.concatenate([once, beyond]))
        first += size
    return np.random.default_rng([seed, epoch, len(sizes)]).permutation(np.concatenate(drawn)).astype(np.int64)


class Order:
    """An endless stream of documents: epoch after epoch, each in its own order (see epoch_order)."""

    def __init__(self, sizes: list[int], counts: list[int | None], seed: int):
        self.sizes, self.counts, self.seed = sizes, counts, seed
        self.epoch_length = sum(size if count is None else count for size, count in zip(sizes, counts, strict=True))
        self._epoch: tuple[int, np.ndarray] | None = None

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Returns the document numbers (int64) at positions [start, stop) of the stream."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.epoch_length)
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = epoch, epoch_order(self.sizes, self.counts, self.seed, epoch)
            piece = self._epoch[1][offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
