"""The kinds of a token's own term in the loss. A token's term is its kind's, times a weight of 0 or more; with weight 0
the token has no term."""

from collections.abc import Iterable, Mapping
from enum import IntEnum


class TermKind(IntEnum):
    """CROSS_ENTROPY: -log p of the token. UNLIKELIHOOD: -log(1 - p). HELD: the KL divergence, over the whole
    vocabulary, of the model's distribution from that of its base. train/masking/loss.py has the formulas."""

    CROSS_ENTROPY = 0
    UNLIKELIHOOD = 1
    HELD = 2


COUNTED = {TermKind.CROSS_ENTROPY: "trained", TermKind.UNLIKELIHOOD: "unlikelihood", TermKind.HELD: "held"}
"""What a target with a term of this kind is counted as."""

COUNTS = ("total", "trained", "excluded", "unlikelihood", "held")
"""How the targets of a role are counted: all of them, and by what becomes of them."""


def counts_shown(rows: Iterable[Mapping[str, int]]) -> list[str]:
    """Returns the names of COUNTS that a table of these rows shows: without `held` where nothing is held."""
    held = any(row.get("held") for row in rows)
    return [name for name in COUNTS if name != "held" or held]
