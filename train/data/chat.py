"""Chats through the tokenizer's own template: what the rendered text is, and where in it each content has gone.

Templates trim contents, move or drop what stands in <think> tags, and repeat role names that contents may hold too. So
contents are not searched for: a second rendering carries marker characters in them, and must equal the first but for
these.

Shapes: C code points of a message's content.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from train.data.documents import Message, Span
from train.data.offsets import solid_counts
from train.errors import UserError

TAG = re.compile(r"<[^<>\s]{1,40}>")  # templates look for <think>, <tool_response>, ...: no marker may touch these
EMPTY_THINK = re.compile(r"(<think>\s*</think>)\n*")
MARKERS = range(0xF0000, 0x10FFFD)  # private use: no document has a meaning for them
TEMPLATE_TIME = datetime(2026, 1, 1)  # what the clock says to templates, on every rank and in every run alike

Render = Callable[[list[dict[str, str]]], str]
Piece = tuple[int, int, str, str]  # start and end in the content, and the two markers put there


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the template writes it; trained [start, end) and spans are code points of that text. The range of a
    message without text is empty: only what ends its turn is trained."""

    text: str
    trained: list[tuple[int, int]]
    spans: tuple[Span, ...]


def render_and_locate(messages: Sequence[Message], render: Render, where: str) -> RenderedChat:
    """Renders the chat, and carries over what is trained on and the spans. UserError (beginning with `where`) if the
    template fails, or loses part of a span; a span whose text it drops wholly is dropped."""
    contents = [message.content for message in messages]

    def rendered(changed: dict[int, str]) -> str:
        try:
            return render(
                [
                    {"role": m.role, "content": changed.get(i, m.content), **dict(m.passed)}
                    for i, m in enumerate(messages)
                ]
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    plain = rendered({})
    wanted = [i for i, message in enumerate(messages) if (message.train or message.spans) and message.content.strip()]
    markers = (chr(code) for code in MARKERS if chr(code) not in plain)
    pieces = {i: [(*piece, next(markers), next(markers)) for piece in _pieces(contents[i])] for i in wanted}
    marked = rendered({i: _marked(contents[i], pieces[i]) for i in wanted})
    positions = _marker_positions(marked, plain, where)

    empty = [(block.start(), block.end(1), block.end()) for block in EMPTY_THINK.finditer(plain)]
    trained: list[tuple[int, int]] = []
    spans: list[Span] = []
    for i in wanted:
        stripped = contents[i].strip()
        keeps_edges = stripped != contents[i] and rendered({i: stripped}) != plain
        at_C = _places(contents[i], pieces[i], positions, plain, keeps_edges, f"{where}: messages[{i}]")
        spans += _moved(messages[i].spans, contents[i], at_C, f"{where}: messages[{i}]")
        if messages[i].train and (at_C >= 0).any():
            start, end = int(at_C[at_C >= 0][0]), int(at_C.max()) + 1
            # an empty block is never content, even where the message has it too, or its end only
            start = next((past for first, tags_end, past in empty if first <= start < tags_end), start)
            trained.append((min(start, end), end))
    for i, message in enumerate(messages):
        if (message.train or message.spans) and not message.content.strip():
            place = _blank_place(i, message.content, rendered, plain, (next(markers), next(markers)))
            if place is not None and message.train:
                trained.append(place)
            if place is not None and place[0] < place[1]:
                spans += [Span(place[0] + s.start, place[0] + s.end, s.role) for s in message.spans]
    return RenderedChat(plain, sorted(trained), tuple(spans))


def _blank_place(
    i: int, content: str, rendered: Callable[[dict[int, str]], str], plain: str, markers: tuple[str, str]
) -> tuple[int, int] | None:
    """Where a content without text stands: its white space, if the template keeps it, else the empty range; None where
    the template writes such a message otherwise."""
    for kept in (content, ""):
        marked = rendered({i: f"{markers[0]}{kept}{markers[1]}"})
        if marked.replace(markers[0], "").replace(markers[1], "") == plain and marked.count(markers[0]) == 1:
            return marked.index(markers[0]), marked.index(markers[1]) - 1
    return None


def _pieces(content: str) -> list[tuple[int, int]]:
    """[start, end) of the texts between tags, without the white space around them; of all where there are only tags."""
    edges = [0, *(edge for tag in TAG.finditer(content) for edge in tag.span()), len(content)]
    pieces = [_core(content, start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [piece for piece in pieces if piece[0] < piece[1]] or [_core(content, 0, len(content))]


def _core(text: str, start: int, end: int) -> tuple[int, int]:
    text = text[start:end]
    return end - len(text.lstrip()), start + len(text.rstrip())


def _marked(content: str, pieces: list[Piece]) -> str:
    for start, end, opening, closing in reversed(pieces):
        content = f"{content[:start]}{opening}{content[start:end]}{closing}{content[end:]}"
    return content


def _marker_positions(marked: str, plain: str, where: str) -> dict[str, list[int]]:
    """Where in `plain` each marker of `marked` stands."""
    found: dict[str, list[int]] = {}
    rest: list[str] = []
    for char in marked:
        if ord(char) in MARKERS and char not in plain:
            found.setdefault(char, []).append(len(rest))
        else:
            rest.append(char)
    if "".join(rest) != plain:
        raise UserError(
            f"{where}: the chat template renders another text when a content changes by one character, so what is "
            'content cannot be told from what is template; write the chat as "text"'
        )
    return found


def _places(
    content: str, pieces: list[Piece], positions: dict[str, list[int]], plain: str, keeps_edges: bool, where: str
) -> np.ndarray:
    """[C] int: where in `plain` each code point of the content stands, -1 where the template dropped it."""
    at_C = np.full(len(content), -1)
    for start, end, opening, closing in pieces:
        low, high = positions.get(opening, []), positions.get(closing, [])
        if not low and not high:
            continue
        if len(low) != 1 or len(high) != 1:
            raise UserError(f'{where}: the chat template cuts or repeats this content; write the chat as "text"')
        old, new = content[start:end], plain[low[0] : high[0]]
        before = _common(old, new)
        after = _common(old[before:][::-1], new[before:][::-1])  # most often nothing is left
        at_C[start : start + before] = np.arange(low[0], low[0] + before)
        at_C[end - after : end] = np.arange(high[0] - after, high[0])

    tags = [tag.span() for tag in TAG.finditer(content)]
    for start, end in tags:  # a tag next to text that has a place
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
        raise UserError(f'{where}: the chat template reorders this content; write the chat as "text"')
    for blank in re.finditer(r"\s+", content):  # white space between places, and around the content if it is kept
        start, end = blank.span()
        if (start == 0 or end == len(content)) and not keeps_edges:
            continue
        begin = at_C[start - 1] + 1 if start else at_C[end] - end
        placed = (start == 0 or at_C[start - 1] >= 0) and (end == len(content) or at_C[end] == begin + end - start)
        if placed and begin >= 0 and plain.startswith(blank.group(), begin):
            at_C[start:end] = np.arange(begin, begin + end - start)
    return at_C


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    if one == other:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _moved(spans: Sequence[Span], content: str, at_C: np.ndarray, where: str) -> list[Span]:
    """The spans as code points of the rendered text."""
    solid_C = np.diff(solid_counts(content)) > 0
    moved = []
    for n, span in enumerate(spans):
        inside_C = at_C[span.start : span.end]
        placed = inside_C[inside_C >= 0]
        if (inside_C[solid_C[span.start : span.end]] < 0).any() and len(placed):
            raise UserError(
                f"{where}: spans[{n}]: the chat template drops or rewrites part of this span ({span.role}, "
                f'{span.start} to {span.end}); end the span where the kept text ends, or write the chat as "text"'
            )
        if len(placed):
            moved.append(Span(int(placed[0]), int(placed[-1]) + 1, span.role))
    return moved


def template_renderer(
    template: str | None, special_tokens: dict[str, str], directory: str, moment: datetime = TEMPLATE_TIME
) -> Render:
    """Messages to text through a chat template, as transformers renders it: sandboxed, and without its code. moment:
    what a template is told that asks for the time."""
    return partial(_render, template, tuple(special_tokens.items()), directory, moment)


def _render(
    template: str | None,
    special_tokens: tuple[tuple[str, str], ...],
    directory: str,
    moment: datetime,
    messages: list[dict[str, str]],
) -> str:
    if template is None:
        raise UserError(
            f"--model {directory}: no chat template (chat_template.jinja), which documents of messages need"
        )
    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, strftime_now=moment.strftime,
            **dict(special_tokens),
        )  # fmt: skip
    except Exception as error:  # whatever a template does: its own raise_exception, or a TypeError
        raise UserError(f"the chat template of {directory} fails on these messages ({error})") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    del environment.filters["random"], environment.globals["lipsum"]  # every rank and run must write the same text
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(Extension):
    """{% generation %}, with which some templates mark what the assistant says: here only what is inside it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
