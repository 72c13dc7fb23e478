"""Renders chats through the tokenizer's own template, and locates each content, thought and tool call in the result.

Shapes: C code points of a content or thought.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.data.documents import Message, Span
from train.data.markers import TAG, common, free_markers, marked, marker_positions, pieces, places
from train.data.offsets import solid_counts
from train.data.template import Render
from train.runtime.errors import UserError
from train.runtime.text_formats import parse_json

EMPTY_THINK = re.compile(r"(<think>\s*</think>)\n*")
THINK_TAG = re.compile(r"<[^<>\s]*think[^<>\s]*>", re.IGNORECASE)
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # a template reads one of these
AS_TEXT = 'write the chat as "text"'


@dataclass(frozen=True)
class Trained:
    """Code points [start, end) of a rendered chat that are trained on, and the factor of their weight by the mask.

    The range is empty for a message without text: only the end of its turn is trained.
    """

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the template renders it. Trained ranges and spans are code points of that text.

    thoughts_dropped: number of trained messages that lost their thinking block. unwritten: roles of the messages not
    trained on that the template leaves out.
    """

    text: str
    trained: list[Trained]
    spans: tuple[Span, ...]
    thoughts_dropped: int
    unwritten: tuple[str, ...]


def render_and_locate(
    messages: Sequence[Message], render: Render, where: str, tools: Sequence[dict[str, Any]] = ()
) -> RenderedChat:
    """Renders the chat, and locates the trained ranges and the spans in the rendered text. The thought, content and
    calls of a trained message are trained as the template writes them, including the tags of the thought.

    Raises UserError, beginning with `where`, if the template fails, does not write calls or tools, drops a part of a
    trained content other than one whole thinking block, or loses part of a span. If it drops the whole text of a span,
    the span is dropped.
    """
    chat = _Chat(messages, render, where, list(tools))
    located = [_locate(chat, i, marks) for i, marks in enumerate(chat.marks)]
    return RenderedChat(
        chat.plain,
        sorted((found.trained for found in located if found.trained), key=lambda each: (each.start, each.end)),
        tuple(span for found in located for span in found.spans),
        sum(found.thought_dropped for found in located),
        chat.unwritten(),
    )


@dataclass
class _Located:
    """Where a message is in the rendered chat."""

    trained: Trained | None = None
    spans: list[Span] = field(default_factory=list)
    thought_dropped: bool = False


class _Chat:
    """A chat, the text that the template renders (plain), and the positions of the contents' markers in it."""

    def __init__(self, messages: Sequence[Message], render: Render, where: str, tools: list[dict[str, Any]]):
        self.messages, self.where, self._render, self._tools = messages, where, render, tools or None
        self.given = self._form()
        self.plain = self.render({})
        if tools and self._written(self.given, None) == self.plain:
            raise UserError(f"{where}: the chat template does not render tools; write them into a content")
        self.empty_thoughts = [(block.start(), block.end(1), block.end()) for block in EMPTY_THINK.finditer(self.plain)]
        self.free = free_markers(self.plain)
        self.marks = [_Marks(self, i) for i in range(len(messages))]
        changes = {i: marks.change for i, marks in enumerate(self.marks) if marks.change}
        self.positions = marker_positions(self.render(changes), self.plain, where) if changes else {}

    def render(self, changes: dict[int, dict[str, Any]], upto: int | None = None) -> str:
        """Renders the chat, or its first `upto` messages, with changed keys of messages. changes: message number ->
        key -> value; None removes a key other than content. Raises UserError if the template fails."""
        given = [
            {key: value for key, value in (each | changes.get(i, {})).items() if value is not None or key == "content"}
            for i, each in enumerate(self.given[:upto])
        ]
        return self._written(given, self._tools)

    def unwritten(self) -> tuple[str, ...]:
        """Returns the roles of messages that are not trained on and whose content the template does not write."""
        markers = {i: next(self.free) for i, m in enumerate(self.messages) if not (m.train or _blank(m.content))}
        changes = {i: {"content": f"{mark}{self.messages[i].content}{mark}"} for i, mark in markers.items()}
        try:
            text = self.render(changes) if changes else ""
        except UserError:  # the template depends on the text of contents
            return ()
        return tuple(self.messages[i].role for i, mark in markers.items() if mark not in text)

    def turn_start(self, i: int) -> int:
        """Returns the earliest position at which message i can begin. Up to there, rendering only the messages before
        it gives the same text."""
        try:
            return common(self.plain, self.render({}, upto=i)) if i else 0
        except UserError:  # some templates need the later messages
            return 0

    def _written(self, given: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        try:
            return self._render(given, tools)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None

    def _form(self) -> list[dict[str, Any]]:
        """Returns the messages in the form that the template expects. For messages with calls, templates expect an
        empty content or none, and arguments as an object or as text. The first form in which the template writes all
        calls is used."""
        if not any(message.tool_calls for message in self.messages):
            return [_given(message, "", False) for message in self.messages]
        errors = []
        for as_text in (False, True):
            for content in ("", None):
                given = [_given(message, content, as_text) for message in self.messages]
                try:
                    if self._writes_calls(given):
                        return given
                except UserError as error:
                    errors.append(error)
        if len(errors) == 4:
            raise errors[0]
        raise UserError(
            f"{self.where}: the chat template does not render tool_calls; write the calls into the content (if it "
            'renders ids instead of names, give each call an id such as "functions.NAME:0")'
        )

    def _writes_calls(self, given: list[dict[str, Any]]) -> bool:
        """Returns whether the rendered chat has the name of every call. Since tools and contents may contain the same
        name, the name of each call is rendered with its own marker character appended."""
        free, markers = free_markers(json.dumps((given, self._tools), ensure_ascii=False)), []

        def renamed(call: dict[str, Any]) -> dict[str, Any]:
            name, marker = call["function"]["name"], next(free)
            markers.append(marker)
            id_of = {"id": call["id"].replace(name, name + marker)} if isinstance(call.get("id"), str) else {}
            return call | id_of | {"function": call["function"] | {"name": name + marker}}

        changed = [
            each | {"tool_calls": [renamed(call) for call in each["tool_calls"]]} if "tool_calls" in each else each
            for each in given
        ]
        text = self._written(changed, self._tools)
        return all(marker in text for marker in markers)


def _given(message: Message, no_content: str | None, as_text: bool) -> dict[str, Any]:
    """Returns a message as chat templates take it. no_content: the content of a message that has only calls."""
    given: dict[str, Any] = {"role": message.role, "content": message.content, **dict(message.passed)}
    if message.reasoning:
        given |= dict.fromkeys(THOUGHT_KEYS, message.reasoning)
    if message.tool_calls:
        given["content"] = message.content or no_content
        given["tool_calls"] = [_call(call, as_text) for call in message.tool_calls]
    return given


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"].get("arguments", {})
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        with suppress(ValueError):  # not JSON: the template gets it unchanged
            arguments = parse_json(arguments) if arguments else {}
    return call | {"function": call["function"] | {"arguments": arguments}}


class _Marks:
    """The marker characters around the pieces of message i's content and thought."""

    def __init__(self, chat: _Chat, i: int):
        message = chat.messages[i]
        self.content = self._of(chat, message.content, message.train or bool(message.spans))
        self.thought = self._of(chat, message.reasoning, message.train or bool(message.reasoning_spans))
        self.change: dict[str, Any] = {}
        if self.content:
            self.change["content"] = marked(message.content, self.content)
        if self.thought:
            self.change |= dict.fromkeys(THOUGHT_KEYS, marked(message.reasoning, self.thought))

    @staticmethod
    def _of(chat: _Chat, text: str, wanted: bool) -> list[tuple[int, int, str, str]]:
        if not wanted or _blank(text):
            return []
        return [(*piece, next(chat.free), next(chat.free)) for piece in pieces(text)]


def _blank(content: str) -> bool:
    """Returns whether a content has no text, only white space and thinking tags."""
    return not THINK_TAG.sub("", content).strip()


def _locate(chat: _Chat, i: int, marks: _Marks) -> _Located:
    """Locates the trained range and the spans of message i in the rendered chat."""
    message, where, found = chat.messages[i], f"{chat.where}: messages[{i}]", _Located()
    ranges: list[tuple[int, int]] = []
    if marks.thought:
        at_C = _thought(chat, i, marks, where, found)
        if (at_C >= 0).any():
            ranges.append((_thought_start(chat, i, int(at_C[at_C >= 0][0])), int(at_C.max()) + 1))
    if marks.content:
        at_C = _content(chat, i, marks, where, found)
        if (at_C >= 0).any():
            ranges.append(_content_range(chat, at_C))
    if message.train and message.tool_calls:
        calls = _calls_range(chat, i, where, bool(ranges or not marks.thought))
        if any(start > calls[0] for start, _ in ranges):
            raise UserError(f"{where}: the chat template renders tool_calls before the content; leave one of them out")
        ranges.append(calls)
    elif (message.train or message.spans) and (not marks.content or not ranges):
        place = _blank_place(chat, i, message.content)
        if place is not None:
            start, end = place
            start = end if message.content.strip() else start  # white space alone is trained, tags are not
            ranges.append((start, end))
            found.spans += [Span(start + s.start, start + s.end, s.role) for s in message.spans if start < end]
    if message.train and ranges:
        found.trained = Trained(min(start for start, _ in ranges), max(end for _, end in ranges), message.weight)
    return found


def _content(chat: _Chat, i: int, marks: _Marks, where: str, found: _Located) -> np.ndarray:
    """Returns [C] int: the position of each code point of the content, -1 if it is dropped. Adds its spans to found."""
    message = chat.messages[i]
    stripped = message.content.strip()
    keeps_edges = stripped != message.content and chat.render({i: {"content": stripped}}) != chat.plain
    at_C = places(message.content, marks.content, chat.positions, chat.plain, keeps_edges, where)
    if message.train and _drops_thought(message.content, at_C, where):
        found.thought_dropped = True
    found.spans += _moved(message.spans, message.content, at_C, f"{where}: spans")
    return at_C


def _content_range(chat: _Chat, at_C: np.ndarray) -> tuple[int, int]:
    start, end = int(at_C[at_C >= 0][0]), int(at_C.max()) + 1
    # an empty thinking block is never content, even if the message has it too, or only its end
    start = next((past for first, tags_end, past in chat.empty_thoughts if first <= start < tags_end), start)
    return min(start, end), end


def _drops_thought(content: str, at_C: np.ndarray, where: str) -> bool:
    """Returns whether the template leaves out the content's thinking block. Raises UserError if it leaves out anything
    else."""
    lost_C = (np.diff(solid_counts(content)) > 0) & (at_C < 0)
    thought_C = np.diff(solid_counts(content)) > 0
    tags = [tag.span() for tag in THINK_TAG.finditer(content)]
    for start, end in tags:  # an empty block, or a tag that the template writes differently, is no loss
        lost_C[start:end] = thought_C[start:end] = False
    if not lost_C.any():
        return False
    past = next((start for start, _ in tags if content[start + 1] == "/"), 0)
    thought_C[past:] = False
    opened = next((end for start, end in tags if content[start + 1] != "/" and start < past), 0)
    if (lost_C == thought_C).all() and not thought_C[:opened].any():
        return True
    first = int(np.flatnonzero(lost_C)[0])
    raise UserError(
        f"{where}: the chat template drops a part of this content that is not exactly one thinking block "
        f"({content[first : first + 40]!r}…); leave it out, or {AS_TEXT}"
    )


def _thought(chat: _Chat, i: int, marks: _Marks, where: str, found: _Located) -> np.ndarray:
    """Returns [C] int: the position of each code point of the thought, all -1 if it is dropped. Adds its spans to
    found."""
    message = chat.messages[i]
    at_C = places(message.reasoning, marks.thought, chat.positions, chat.plain, False, f"{where}: reasoning_content")
    solid_C = np.diff(solid_counts(message.reasoning)) > 0
    if (at_C[solid_C] < 0).any():
        if (at_C >= 0).any():
            raise UserError(f"{where}: the chat template drops a part of reasoning_content; shorten it, or {AS_TEXT}")
        found.thought_dropped = message.train
    found.spans += _moved(message.reasoning_spans, message.reasoning, at_C, f"{where}: reasoning_spans")
    return at_C


def _thought_start(chat: _Chat, i: int, first: int) -> int:
    """Returns where a thought begins, including its opening tag or whatever else the template writes only before a
    thought. first: where its text begins."""
    marker = next(chat.free)
    without: dict[str, Any] = dict.fromkeys(THOUGHT_KEYS) | {"content": marker + chat.messages[i].content}
    try:
        before, found, _ = chat.render({i: without}).partition(marker)
    except UserError:
        before, found = "", ""
    start = _out_of_tag(chat.plain, common(chat.plain, before))
    head = chat.plain[:first].rstrip()
    # start is not before the end of head if the template writes an empty block in place of a missing thought
    if not found or start < chat.turn_start(i) or start >= len(head):
        start = next((tag.start() for tag in TAG.finditer(head) if tag.end() == len(head)), first)
    return min(start, first)


def _calls_range(chat: _Chat, i: int, where: str, with_thought: bool) -> tuple[int, int]:
    """Returns [start, end) of what the template writes for the calls of message i: the text that differs when a marker
    character replaces the calls. with_thought: whether the message's thought, if any, is written."""
    marker = next(chat.free)
    kept: dict[str, Any] = {} if with_thought else dict.fromkeys(THOUGHT_KEYS)
    change = kept | {"tool_calls": None, "content": chat.messages[i].content.rstrip() + marker}
    # Try without the later messages first: if the calls are missing, some templates refuse these or render them
    # differently. Other templates render the last message differently, so then try the whole chat.
    for upto in (i + 1, None):
        try:
            whole, other = chat.render({i: kept}, upto), chat.render({i: change}, upto)
        except UserError:
            continue
        before, found, after = other.partition(marker)
        start = common(whole, before)
        end = len(whole) - common(whole[start:][::-1], after[::-1])
        start, end = _out_of_tag(whole, start), _out_of_tag(whole, end)
        inside = all(call["function"]["name"] in whole[start:end] for call in chat.messages[i].tool_calls)
        whole_rest = upto is not None or whole.endswith(after)
        if found and inside and whole_rest and start >= chat.turn_start(i) and chat.plain.startswith(whole[:end]):
            return start, end
    raise UserError(
        f"{where}: the rendering of tool_calls cannot be located in the chat; write the calls into the "
        f"content, or {AS_TEXT}"
    )


def _out_of_tag(text: str, at: int) -> int:
    """Returns the start of the tag that `at` is inside of; `at` itself outside of tags."""
    low = max(0, at - 42)
    tags = ((low + tag.start(), low + tag.end()) for tag in TAG.finditer(text[low : at + 42]))
    return next((start for start, end in tags if start < at < end), at)


def _blank_place(chat: _Chat, i: int, content: str) -> tuple[int, int] | None:
    """Returns [start, end) of a content without text: of its white space and tags if the template keeps them, of what
    follows its last tag, or an empty range. Returns None if the template renders such a message differently."""
    opening, closing = next(chat.free), next(chat.free)
    past = max((tag.end() for tag in THINK_TAG.finditer(content)), default=0)
    for head, kept in (("", content), (content[:past], content[past:]), ("", "")):
        text = chat.render({i: {"content": f"{head}{opening}{kept}{closing}"}})
        if text.replace(opening, "").replace(closing, "") == chat.plain and text.count(opening) == 1:
            return text.index(opening), text.index(closing) - 1
    return None


def _moved(spans: Sequence[Span], content: str, at_C: np.ndarray, where: str) -> list[Span]:
    """Returns the spans as code points of the rendered text. Raises UserError if only part of a span is left."""
    solid_C = np.diff(solid_counts(content)) > 0
    moved = []
    for n, span in enumerate(spans):
        inside_C = at_C[span.start : span.end]
        placed = inside_C[inside_C >= 0]
        if (inside_C[solid_C[span.start : span.end]] < 0).any() and len(placed):
            raise UserError(
                f"{where}[{n}]: the chat template drops or rewrites part of this span ({span.role}, "
                f"{span.start} to {span.end}); end the span where the kept text ends, or {AS_TEXT}"
            )
        if len(placed):
            moved.append(Span(int(placed[0]), int(placed[-1]) + 1, span.role))
    return moved
