"""Makes texts and numbers of bytes fit to print on a terminal. It is a separate module so that importing it is fast."""

import re

# Control characters except tab and line break, marks that change the direction of writing, and lone surrogates.
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def size_shown(size: float) -> str:
    """Returns a number of bytes with three digits, in the largest unit in which it is at least 0.1, such as "0.74 GB",
    "8.40 MB" or "12 bytes". Units are powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if (value := size / factor) >= 0.1:
            return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{size:.0f} bytes"


def shown(text: str) -> str:
    r"""Returns the text with escapes such as \x1b for characters that a terminal would obey or cannot show."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
