"""Determines which code points of a text each token holds, and which tokens a span touches.

Shapes: L tokens, N code points of the text, S spans. start_L and end_L are nondecreasing; a token without text of its
own (an added BOS or EOS) has start == end.
"""

from collections.abc import Sequence

import numpy as np

# White space is defined by str.isspace(); the last such code point is U+3000.
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])


def solid_counts(text: str) -> np.ndarray:
    """Returns [N + 1] int32: element i is the number of the first i code points that are not white space."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    solid_N = ~_IS_SPACE[np.minimum(code_N, len(_IS_SPACE) - 1)]
    return np.concatenate([[0], np.cumsum(solid_N)]).astype(np.int32)


def touched(
    start_L: np.ndarray, end_L: np.ndarray, solid_counts: np.ndarray, ranges: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Returns [L] bool: tokens that share a non-white-space code point with one of the ranges [start, end), or that are
    all white space and lie inside one of them. solid_counts: [N + 1], of the text."""
    if not ranges:
        return np.zeros(len(start_L), dtype=bool)
    start_S, end_S = np.array(ranges, dtype=np.int64).T

    covered_N = _inside(start_S, end_S, len(solid_counts) - 1)
    shared = np.concatenate([[0], np.cumsum(covered_N & (np.diff(solid_counts) > 0))])
    shares_L = shared[end_L] > shared[start_L]

    blank_L = (solid_counts[end_L] == solid_counts[start_L]) & (end_L > start_L)
    first_S = np.searchsorted(start_L, start_S, side="left")  # the tokens first:past lie inside the range
    past_S = np.searchsorted(end_L, end_S, side="right")
    return shares_L | (blank_L & _inside(first_S, np.maximum(first_S, past_S), len(start_L)))


def straddling(
    start_L: np.ndarray, end_L: np.ndarray, solid_counts: np.ndarray, ranges: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Returns [L] bool: tokens that hold non-white-space code points both inside and outside one of the ranges."""
    result_L = np.zeros(len(start_L), dtype=bool)
    if not ranges or not len(start_L):
        return result_L
    start_S, end_S = np.array(ranges, dtype=np.int64).T
    for edge_S in (start_S, end_S):
        token_S = np.searchsorted(start_L, edge_S, side="left") - 1  # the last token that starts before the edge
        token_S = np.maximum(token_S, 0)
        low_S, high_S = start_L[token_S], end_L[token_S]
        crosses_S = (low_S < edge_S) & (edge_S < high_S)
        within_S = solid_counts[np.minimum(high_S, end_S)] - solid_counts[np.maximum(low_S, start_S)]
        whole_S = solid_counts[high_S] - solid_counts[low_S]
        result_L[token_S[crosses_S & (within_S > 0) & (within_S < whole_S)]] = True
    return result_L


def _inside(first_S: np.ndarray, past_S: np.ndarray, length: int) -> np.ndarray:
    """Returns [length] bool: positions in the union of the half-open ranges."""
    change = np.zeros(length + 1, dtype=np.int64)
    np.add.at(change, first_S, 1)
    np.add.at(change, past_S, -1)
    return np.cumsum(change[:-1]) > 0


def offsets_from_bytes(text: str, lengths_L: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns start_L, end_L (int32) of tokens with the given lengths in UTF-8 bytes. A token that holds any byte of a
    code point holds that code point."""
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    bytes_L = np.asarray(lengths_L, dtype=np.int64)
    end_byte_L = np.cumsum(bytes_L)
    assert bytes_L.sum() == len(data), f"the tokens hold {bytes_L.sum()} bytes, the text {len(data)}"
    # bytes 0b10xxxxxx continue a code point, all others begin one
    code_point = np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))
    start_L = code_point[end_byte_L - bytes_L]
    end_L = code_point[end_byte_L - 1] + 1
    return start_L.astype(np.int32), end_L.astype(np.int32)


def hold_merged_marks(text: str, start_L: np.ndarray, end_L: np.ndarray) -> np.ndarray:
    """Returns end_L of a fast tokenizer, with code points that no token holds assigned to the token before them.

    Such code points are combining marks that the normalizer merged into their letter: the tokenizer reports them as
    part of no token. White space that no token holds stays unassigned.
    """
    if not len(end_L):
        return end_L
    end_L, past_L = end_L.copy(), np.maximum.accumulate(end_L)
    next_L = np.append(start_L[1:], len(text))
    for i in np.flatnonzero(next_L > past_L):
        if orphans := text[past_L[i] : next_L[i]].rstrip():
            end_L[end_L == past_L[i]] = past_L[i] + len(orphans)
    return end_L
