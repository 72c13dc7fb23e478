"""Finds the name that a misspelled word was meant to be."""

import difflib
from collections.abc import Iterable


def similar(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name with the most similar spelling; None if none is similar. cutoff: the least similarity, by
    the ratio of difflib, from 0 to 1."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)
