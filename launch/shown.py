"""Texts as a terminal may get them. In a module of its own, which imports nothing that takes long."""

import re

# Control characters but tab and line break, what turns the direction of writing, and halves of surrogate pairs.
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text with what a terminal would obey, or cannot show, as codes such as \x1b."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
