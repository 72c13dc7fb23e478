"""Locates a content in a rendered chat by means of marker characters.

Templates trim contents, move or drop the text in <think> tags, and repeat role names that contents may also have.
Searching for the text of a content would therefore be ambiguous. Instead the chat is rendered a second time with marker
characters in its contents; without them, the result must equal the first rendering.

Shapes: C code points of a content.
"""

import re
from collections.abc import Iterator

import numpy as np

from train.runtime.errors import UserError

TAG = re.compile(r"<[^<>\s]{1,40}>")  # templates look for <think>, <tool_response>, ...: no marker may touch these
MARKERS = range(0xF0000, 0x10FFFD)  # private use: they have no meaning in documents

Marked = tuple[int, int, str, str]  # start and end in the content, and the two markers inserted there


def free_markers(plain: str) -> Iterator[str]:
    """Yields marker characters that the rendered chat does not contain."""
    return (chr(code) for code in MARKERS if chr(code) not in plain)


def pieces(content: str) -> list[tuple[int, int]]:
    """Returns [start, end) of each text between tags, without surrounding white space; of the whole content if it has
    only tags."""
    edges = [0, *(edge for tag in TAG.finditer(content) for edge in tag.span()), len(content)]
    pieces = [_core(content, start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [piece for piece in pieces if piece[0] < piece[1]] or [_core(content, 0, len(content))]


def _core(text: str, start: int, end: int) -> tuple[int, int]:
    text = text[start:end]
    return end - len(text.lstrip()), start + len(text.rstrip())


def marked(content: str, pieces: list[Marked]) -> str:
    """Returns the content with each piece enclosed in its two markers."""
    for start, end, opening, closing in reversed(pieces):
        content = f"{content[:start]}{opening}{content[start:end]}{closing}{content[end:]}"
    return content


def marker_positions(marked: str, plain: str, where: str) -> dict[str, list[int]]:
    """Returns marker -> its positions in `plain`, for the markers in `marked`.

    Raises UserError, beginning with `where`, if the two renderings differ in anything but markers.
    """
    found: dict[str, list[int]] = {}
    rest: list[str] = []
    for char in marked:
        if ord(char) in MARKERS and char not in plain:
            found.setdefault(char, []).append(len(rest))
        else:
            rest.append(char)
    if "".join(rest) != plain:
        raise UserError(
            f"{where}: the chat template renders another text when a content changes by one character, so the "
            'content cannot be distinguished from the template; write the chat as "text"'
        )
    return found


def places(
    content: str, pieces: list[Marked], positions: dict[str, list[int]], plain: str, keeps_edges: bool, where: str
) -> np.ndarray:
    """Returns [C] int: the position in `plain` of each code point of the content, -1 if the template dropped it.

    keeps_edges: whether the template keeps white space around the content. Raises UserError, beginning with `where`, if
    the template cuts, repeats or moves parts of the content.
    """
    at_C = np.full(len(content), -1)
    for start, end, opening, closing in pieces:
        low, high = positions.get(opening, []), positions.get(closing, [])
        if not low and not high:
            continue
        if len(low) != 1 or len(high) != 1:
            raise UserError(f'{where}: the chat template cuts or repeats this content; write the chat as "text"')
        old, new = content[start:end], plain[low[0] : high[0]]
        before = common(old, new)
        after = common(old[before:][::-1], new[before:][::-1])  # usually nothing is left
        at_C[start : start + before] = np.arange(low[0], low[0] + before)
        at_C[end - after : end] = np.arange(high[0] - after, high[0])

    tags = [tag.span() for tag in TAG.finditer(content)]
    for start, end in tags:  # locate tags after text that is located, then tags before such text
        neighbor = len(content[:start].rstrip()) - 1
        if neighbor >= 0 and at_C[start] < 0 <= at_C[neighbor]:
            begin = _core(plain, at_C[neighbor] + 1, len(plain))[0]
            if plain.startswith(content[start:end], begin):
                at_C[start:end] = np.arange(begin, begin + end - start)
    for start, end in reversed(tags):
        neighbor = _core(content, end, len(content))[0]
        if neighbor < len(content) and at_C[start] < 0 <= at_C[neighbor]:
            past = len(plain[: at_C[neighbor]].rstrip())
            if plain.endswith(content[start:end], 0, past):
                at_C[start:end] = np.arange(past - (end - start), past)

    if (np.diff(at_C[at_C >= 0]) <= 0).any():
        what = "moves parts of this content, or drops some"
        raise UserError(f'{where}: the chat template {what}; write the chat as "text"')
    for blank in re.finditer(r"\s+", content):  # white space between located text, and around the content if kept
        start, end = blank.span()
        if (start == 0 or end == len(content)) and not keeps_edges:
            continue
        begin = at_C[start - 1] + 1 if start else at_C[end] - end
        placed = (start == 0 or at_C[start - 1] >= 0) and (end == len(content) or at_C[end] == begin + end - start)
        if placed and begin >= 0 and plain.startswith(blank.group(), begin):
            at_C[start:end] = np.arange(begin, begin + end - start)
    return at_C


def common(one: str, other: str) -> int:
    """Returns the length of the common prefix, in code points."""
    if one == other:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
