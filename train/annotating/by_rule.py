"""Makes spans by rule: from the regular expressions of a YAML file, and from markup in the text.

patterns:            # the format of the paper's word_masks.yaml; matching ignores case
  - '\\bEd\\s+Sheeran\\b'
"""

import re
from collections.abc import Iterable
from pathlib import Path

from train.annotating.texts import in_order, joined, trimmed
from train.data.documents import Span
from train.runtime.errors import UserError
from train.runtime.outside import read_yaml
from train.runtime.patterns import Pattern
from train.runtime.text_formats import Unreadable


def read_patterns(setting: str, path: str | Path) -> list[Pattern]:
    """Returns the patterns of a YAML file, which is a list or a mapping with a list under `patterns`. Raises UserError,
    naming setting, file, pattern and rule, if the file cannot be read, or a pattern is invalid or matches empty text.
    """
    where = f"{setting} {path}"
    found = read_yaml(path, where, "give a YAML file with patterns in single quotes")
    if isinstance(found, dict):
        if "patterns" not in found:
            keys = ", ".join(map(str, found)) or "none"
            raise UserError(f"{where}: the key patterns is missing (its keys: {keys}); list them under it")
        found = found["patterns"]
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: patterns must be a list of at least one regular expression")
    return [_pattern(pattern, f"{where}: pattern {number}") for number, pattern in enumerate(found, start=1)]


def _pattern(pattern: object, where: str) -> Pattern:
    if not isinstance(pattern, str):
        raise UserError(f"{where}: {pattern!r} is not a string; put it in single quotes")
    try:
        compiled = Pattern(pattern)
    except Unreadable as error:
        raise UserError(f"{where}: {pattern!r} {error}") from None
    if compiled.is_in(""):
        raise UserError(f"{where}: {pattern!r} matches empty text, so it would be everywhere; make it match something")
    return compiled


def matches(text: str, patterns: Iterable[Pattern]) -> list[tuple[int, int]]:
    """Returns [start, end) of the matches in code points, without white space at the ends; overlapping matches are
    merged. Raises UserError if a search takes too long."""
    found = [span for pattern in patterns for span in pattern.spans(text)]
    spans = [span for start, end in found for span in trimmed(text, start, end, "")]
    return joined((span.start, span.end) for span in spans)


def mark_matches(
    text: str, spans: tuple[Span, ...], patterns: list[Pattern], role: str
) -> tuple[str, tuple[Span, ...]]:
    """Returns the text, unchanged, and its spans with one of `role` added for each match. Raises UserError if a search
    takes too long."""
    return text, in_order([*spans, *(Span(start, end, role) for start, end in matches(text, patterns))])


def parse_markup(values: list[str]) -> dict[str, str]:
    """Returns the values of the repeatable flag --markup TAG=ROLE as {tag: role}. Raises UserError for a value of
    another form, and for a tag with two roles."""
    roles: dict[str, str] = {}
    for value in values:
        tag, equals, role = (piece.strip() for piece in value.partition("="))
        tag = tag.removeprefix("<").removesuffix(">")
        if not equals or not role or not re.fullmatch(r"[^\s<>/=]+", tag):
            raise UserError(f"--markup {value!r}: must be TAG=ROLE, such as lossmask=word for <lossmask>…</lossmask>")
        if roles.setdefault(tag, role) != role:
            raise UserError(f"--markup {value!r}: {tag} already has the role {roles[tag]!r}; give each tag once")
    return roles


def take_out_markup(text: str, spans: tuple[Span, ...], roles: dict[str, str]) -> tuple[str, tuple[Span, ...]]:
    """Returns the text without the tags, and its spans, moved accordingly, with a span added for the text between each
    pair of tags. Tags may nest, and pairs of different tags may overlap. Raises UserError if a tag lacks its partner.
    """
    tags = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, roles))})>", text))
    found = list(spans)
    opened: dict[str, list[re.Match[str]]] = {tag: [] for tag in roles}
    for match in tags:
        if not match[1]:
            opened[match[2]].append(match)
        elif not opened[match[2]]:
            raise UserError(f"</{match[2]}> at code point {match.start()} closes nothing; put <{match[2]}> before it")
        else:
            found.append(Span(opened[match[2]].pop().end(), match.start(), roles[match[2]]))
    for tag, left in opened.items():
        if left:
            raise UserError(f"<{tag}> at code point {left[-1].start()} is never closed; put </{tag}> after it")

    pieces, kept, past = [], [], 0  # kept: [start, end) of the text between tags
    for start, end in [*(match.span() for match in tags), (len(text), len(text))]:
        pieces.append(text[past:start])
        kept.append((past, start))
        past = end
    bare = "".join(pieces)

    def moved(offset: int) -> int:
        """Maps an offset in the text with tags to the text without them."""
        return sum(max(0, min(end, offset) - start) for start, end in kept)

    moved_spans = [trimmed(bare, moved(span.start), moved(span.end), span.role) for span in found]
    return bare, in_order(span for each in moved_spans for span in each)
