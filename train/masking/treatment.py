"""Decides what the loss does with each token. --mask is applied here alone; nothing before it depends on the mask.

Shapes: L tokens. A token's treatment applies to its own prediction; the token stays in the context of all others.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from train.data.documents import Span
from train.data.kinds import TermKind
from train.data.offsets import straddling, touched
from train.data.tokens import TokenizedDocument
from train.masking.grammar import Entry, Mask

# Definitions of the two words, for readers of the counts.
UNSPANNED = "unspanned: targets that no span touches"
STRADDLING = "straddling: targets with text both inside and outside a span, treated as inside"

DRAWS = 8  # attempts to place all random runs of a document, before they are packed tightly and at last split


@dataclass
class Treatment:
    """The treatment of a document's tokens under a mask. All counts are of targets."""

    weight_L: np.ndarray
    """float32, weight of the token's own term in the loss: the mask's weight times the document's and the message's
    own. 0: no term, as always where target_L is False."""
    kind_L: np.ndarray
    """int8, TermKind of the token's own term."""
    touched: dict[str, np.ndarray]
    """Role -> bool [L]: tokens that its spans touch, for every role in the document, whatever the mask."""
    straddling: dict[str, np.ndarray]
    """Role -> bool [L]: targets with text both inside and outside one of its spans."""
    random_shortfall: int
    """Number of targets that random: entries could not place."""
    entry_L: np.ndarray
    """int16, index of the mask's entry that decided the token; -1 if none did."""


def shortfall_note(missing: int) -> str:
    """Returns the note for users that random: entries could not place this number of targets."""
    return (
        f"note: random: found no place for {missing:,} targets, so it is no control of equal size: documents have too "
        "few others"
    )


def touched_by(doc: TokenizedDocument, spans: Iterable[Span]) -> np.ndarray:
    """Returns [L] bool: tokens that share a non-white-space code point with a span, or that are all white space and lie
    inside one."""
    return touched(doc.start_L, doc.end_L, doc.solid_counts, [(span.start, span.end) for span in spans])


def treat(doc: TokenizedDocument, mask: Mask, seed: int) -> Treatment:
    """Returns the treatment of each token of a document. If several entries touch a token, the last one wins.

    random: entries avoid their own role's tokens, the tokens of every role that an entry without random: names, and
    earlier random runs. Otherwise they depend only on the seed and the document.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for span in doc.spans:
        ranges.setdefault(span.role, []).append((span.start, span.end))
    tokens = doc.start_L, doc.end_L, doc.solid_counts
    by_role = {role: touched(*tokens, those) for role, those in ranges.items()}
    crossing = {role: straddling(*tokens, those) & doc.target_L for role, those in ranges.items()}

    nowhere_L = np.zeros(len(doc.ids_L), dtype=bool)
    without_role = {"all": ~nowhere_L, "unspanned": ~np.logical_or.reduce([nowhere_L, *by_role.values()])}
    free_L = doc.target_L.copy()  # where random runs can be placed
    for entry in mask.entries:
        if entry.kind == "role":
            free_L &= ~by_role.get(entry.role, nowhere_L)
    entry_L = np.full(len(doc.ids_L), -1, dtype=np.int16)
    shortfall = 0
    for index, entry in enumerate(mask.entries):
        reached_L = without_role[entry.kind] if entry.kind in without_role else by_role.get(entry.role, nowhere_L)
        if entry.random:
            reached_L, missing = _random_runs(doc, entry, reached_L, free_L, seed)
            free_L &= ~reached_L
            shortfall += missing
        entry_L[reached_L] = index

    weight_of_entry = np.array([entry.weight for entry in mask.entries] + [1.0], dtype=np.float32)  # [-1]: no entry
    weight_L = np.where(doc.target_L, weight_of_entry[entry_L] * doc.factor_L, 0).astype(np.float32)
    kind_of_entry = np.array([entry.term for entry in mask.entries] + [TermKind.CROSS_ENTROPY], dtype=np.int8)
    return Treatment(weight_L, kind_of_entry[entry_L], by_role, crossing, shortfall, entry_L)


def _random_runs(
    doc: TokenizedDocument, entry: Entry, reached_L: np.ndarray, free_L: np.ndarray, seed: int
) -> tuple[np.ndarray, int]:
    """Returns ([L] bool, number of targets without a place): random runs of targets outside the role's spans, with the
    same lengths as the runs of targets that the role touches."""
    lengths = _run_lengths(reached_L & doc.target_L)
    if not lengths:
        return np.zeros(len(free_L), dtype=bool), 0
    digest = hashlib.sha256(f"{seed}\0{entry.role}\0".encode() + doc.ids_L.tobytes()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype="<u8"))
    free_L = free_L & ~reached_L
    for tight in (*[False] * DRAWS, True):
        chosen_L, missing = _place(lengths, free_L, rng, split=False, tight=tight)
        if not missing:
            return chosen_L, 0
    return _place(lengths, free_L, rng, split=True)


def _place(
    lengths: list[int], free_L: np.ndarray, rng: np.random.Generator, split: bool, tight: bool = False
) -> tuple[np.ndarray, int]:
    """Draws a place for each run, longest first. Returns ([L] bool, number of targets without a place).

    Runs are not adjacent, because two adjacent ones would be one longer run. tight: each run goes to the beginning of
    the shortest stretch that holds it. split: a run that fits nowhere is split into pieces, which in the end may be
    adjacent to others, because the number of targets matters more.
    """
    chosen_L = np.zeros(len(free_L), dtype=bool)
    open_L, gap = free_L.copy(), 1
    queue = sorted(lengths)
    while queue:
        length = queue.pop()
        starts = _starts(open_L, length)
        if len(starts):
            start = _shortest_stretch(open_L, length) if tight else starts[rng.integers(len(starts))]
            chosen_L[start : start + length] = True
            open_L[max(0, start - gap) : start + length + gap] = False
        elif split and open_L.any():
            longest = max(_run_lengths(open_L))
            queue = sorted([*queue, longest, length - longest])
        elif split and (free_L & ~chosen_L).any():
            open_L, gap = free_L & ~chosen_L, 0
            queue.append(length)
        else:
            return chosen_L, length + sum(queue)
    return chosen_L, 0


def _shortest_stretch(open_L: np.ndarray, length: int) -> int:
    """Returns the start of the shortest run of True that has at least `length` elements."""
    return min((end - start, start) for start, end in _runs(open_L) if end - start >= length)[1]


def _run_lengths(member_L: np.ndarray) -> list[int]:
    """Returns the lengths of the maximal runs of True, in order."""
    return [end - start for start, end in _runs(member_L)]


def _runs(member_L: np.ndarray) -> list[tuple[int, int]]:
    """Returns [start, end) of the maximal runs of True, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], member_L.astype(np.int8), [0]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _starts(open_L: np.ndarray, length: int) -> np.ndarray:
    """Returns the positions at which a run of `length` fits."""
    if length > len(open_L):
        return np.zeros(0, dtype=np.int64)
    counts = np.concatenate([[0], np.cumsum(open_L)])
    return np.flatnonzero(counts[length:] - counts[:-length] == length)
