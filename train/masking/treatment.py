"""What the loss does with each token: the one place where --mask is decided. Nothing before it depends on the mask.

Shapes: L tokens. The treatment of a token is that of its own prediction; the token stays in the context of all others.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from train.data.documents import Span
from train.data.offsets import straddling, touched
from train.data.tokens import TokenizedDocument
from train.masking.grammar import Entry, Mask

# What the two words mean, for whoever reads the counts.
UNSPANNED = "unspanned: targets that no span touches"
STRADDLING = "straddling: targets with text both inside and outside a span, treated as inside"

DRAWS = 8  # new draws of all of a document's random runs before they are packed tightly, or at last split


@dataclass
class Treatment:
    """A document's tokens under a mask; all counts are of targets."""

    weight_L: np.ndarray
    """float32, the token's own term in the loss, by the mask times the document's and message's own weight: w > 0
    cross-entropy times w; 0 none (always so where target_L is False); -alpha unlikelihood times alpha."""
    touched: dict[str, np.ndarray]
    """Role to bool [L], for every role of the document's spans, whatever the mask."""
    straddling: dict[str, np.ndarray]
    """Role to bool [L]: targets that hold text both inside and outside one of its spans."""
    random_shortfall: int
    """Targets that a random: entry could not place."""
    entry_L: np.ndarray
    """int16, which entry of the mask decided the token; -1 where none did."""


def shortfall_note(missing: int) -> str:
    """What a user should know of random: entries that could not place so many targets."""
    return (
        f"note: random: found no place for {missing:,} targets, so it is no control of equal size: documents have too "
        "few others"
    )


def touched_by(doc: TokenizedDocument, spans: Iterable[Span]) -> np.ndarray:
    """[L] bool: tokens that share a code point that is not white space with a span, or that are all white space and lie
    inside one."""
    return touched(doc.start_L, doc.end_L, doc.solid_counts, [(span.start, span.end) for span in spans])


def treat(doc: TokenizedDocument, mask: Mask, seed: int) -> Treatment:
    """Each token's treatment. Of several entries that touch a token the last one wins; random: entries avoid the tokens
    of all that name a role, and depend on the seed and the document alone."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for span in doc.spans:
        ranges.setdefault(span.role, []).append((span.start, span.end))
    tokens = doc.start_L, doc.end_L, doc.solid_counts
    by_role = {role: touched(*tokens, those) for role, those in ranges.items()}
    crossing = {role: straddling(*tokens, those) & doc.target_L for role, those in ranges.items()}

    nowhere_L = np.zeros(len(doc.ids_L), dtype=bool)
    without_role = {"all": ~nowhere_L, "unspanned": ~np.logical_or.reduce([nowhere_L, *by_role.values()])}
    free_L = doc.target_L.copy()  # where random runs may go
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
    return Treatment(weight_L, by_role, crossing, shortfall, entry_L)


def _random_runs(
    doc: TokenizedDocument, entry: Entry, reached_L: np.ndarray, free_L: np.ndarray, seed: int
) -> tuple[np.ndarray, int]:
    """([L] bool, targets without a place): as many targets as the role touches, in runs as long, elsewhere."""
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
    """Draws a place for each run, longest first, none next to another (or two would be one longer run). With `tight`,
    each goes to the beginning of the shortest stretch that holds it; with `split`, a run that fits nowhere goes in
    pieces, in the end even next to others: as many targets matters more."""
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
    """Where the shortest run of True of at least `length` begins."""
    return min((end - start, start) for start, end in _runs(open_L) if end - start >= length)[1]


def _run_lengths(member_L: np.ndarray) -> list[int]:
    """Lengths of the maximal runs of True, in order."""
    return [end - start for start, end in _runs(member_L)]


def _runs(member_L: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the maximal runs of True, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], member_L.astype(np.int8), [0]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _starts(open_L: np.ndarray, length: int) -> np.ndarray:
    """Where a run of `length` fits."""
    if length > len(open_L):
        return np.zeros(0, dtype=np.int64)
    counts = np.concatenate([[0], np.cumsum(open_L)])
    return np.flatnonzero(counts[length:] - counts[:-length] == length)
