"""Makes texts safe to print on a terminal. It is a separate module so that importing it is fast."""

import re

# Control characters except tab and line break, marks that change the direction of writing, and lone surrogates.
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""Returns the text with escapes such as \x1b for characters that a terminal would obey or cannot show."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
