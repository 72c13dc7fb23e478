"""Reads training documents: JSONL, one document a line, in which character spans carry roles.

    {"text": "...", "spans": [{"start": 0, "end": 8, "role": "doctag"}]}
    {"messages": [{"role": "user", "content": "...", "spans": [], "train": false}, ...]}

Offsets are Unicode code points, end exclusive; spans may nest and overlap.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError

# Message keys that chat templates render, passed on or refused: leaving them out in silence would train on another
# conversation.
PASSED_MESSAGE_KEYS = ("name", "tool_call_id")
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Span:
    """Code points [start, end) of a text, and what they are."""

    start: int
    end: int
    role: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat; spans are offsets into content, train says whether its tokens are targets; passed: what else
    the chat template is given."""

    role: str
    content: str
    spans: tuple[Span, ...]
    train: bool
    passed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Document:
    """A text or a chat (one of the two is None), with the file and line it came from; spans belong to the text."""

    text: str | None
    messages: tuple[Message, ...] | None
    spans: tuple[Span, ...]
    metadata: dict[str, Any]
    path: str
    line: int

    @property
    def where(self) -> str:
        """file:line, as error messages begin."""
        return f"{self.path}:{self.line}"


def read_documents(path: str | Path, doctag: str | None = None) -> list[Document]:
    """Every document of a JSONL file, in order; blank lines are skipped. UserError names file and line.

    Where a text starts with `doctag` (a marker such as "<DOCTAG>") and no doctag span covers it, it gets that span.
    """
    if doctag == "":
        raise UserError("--doctag is empty: give the marker that documents start with, e.g. --doctag '<DOCTAG>'")
    documents = [_document(row, str(path), line, doctag) for line, row in _rows(path)]
    if not documents:
        raise UserError(f"{path}: the file holds no documents; write one JSON object a line")
    return documents


def _rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed JSON) of each line that is not blank."""
    try:
        # Lines end at \n alone: str.splitlines would also split at U+2028 inside a JSON string.
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not valid UTF-8 (byte {error.start} of the line); save the file as UTF-8"
                    ) from None
                if number == 1:
                    text = text.removeprefix("\ufeff")  # a byte order mark belongs to the file, not to the document
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not valid JSON ({error}); give one object a line") from None
                yield number, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of documents") from None


def _document(row: Any, path: str, line: int, doctag: str | None) -> Document:
    where = f"{path}:{line}"
    if not isinstance(row, dict):
        fix = "write one document a line, without [ and ]" if isinstance(row, list) else 'write {"text": ...} around it'
        raise UserError(f"{where}: a document is a JSON object, not {_kind(row)}; {fix}")
    if ("text" in row) == ("messages" in row):
        found = "both" if "text" in row else "neither"
        fix = "keep one" if found == "both" else "give one"
        raise UserError(f'{where}: a document has either "text" or "messages", this one has {found}; {fix}')
    metadata = {key: value for key, value in row.items() if key not in ("text", "messages", "spans")}

    if "messages" in row:
        if row.get("spans"):
            raise UserError(f'{where}: spans beside "messages" have no text; move them into their message')
        if row.get("tools"):
            raise UserError(f"{where}: tools are not supported; write what the model is to see into a content")
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            found = "an empty list" if messages == [] else _kind(messages)
            raise UserError(f"{where}: messages is {found}; give a list of at least one message")
        parsed = tuple(_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages))
        return Document(None, parsed, (), metadata, path, line)

    text = _string(row["text"], f"{where}: text")
    if not text:
        raise UserError(f"{where}: text is empty; leave the document out")
    spans = _spans(row.get("spans"), len(text), where)
    if doctag and text.startswith(doctag):
        covered = any(s.role == "doctag" and s.start == 0 and s.end >= len(doctag) for s in spans)
        spans = spans if covered else (Span(0, len(doctag), "doctag"), *spans)
    return Document(text, None, spans, metadata, path, line)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: a message is a JSON object with role and content, not {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise UserError(f'{where}: {key} is missing; a message has "role" and "content"')
    role = _string(message["role"], f"{where}: role")
    if not role:
        raise UserError(f'{where}: role is empty; give e.g. "user" or "assistant"')
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if message.get(key):
            raise UserError(f"{where}: {key} is not supported; write what the model is to see into content")
    passed = tuple((k, _string(message[k], f"{where}: {k}")) for k in PASSED_MESSAGE_KEYS if message.get(k) is not None)
    content = _string(message["content"], f"{where}: content")
    train = message.get("train", role == "assistant")
    if not isinstance(train, bool):
        raise UserError(f"{where}: train is {_kind(train)}; it is true or false")
    return Message(role, content, _spans(message.get("spans"), len(content), where), train, passed)


def _spans(value: Any, length: int, where: str) -> tuple[Span, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError(f'{where}: spans is {_kind(value)}; it is a list of {{"start", "end", "role"}}')
    return tuple(_span(span, length, f"{where}: spans[{i}]") for i, span in enumerate(value))


def _span(span: Any, length: int, where: str) -> Span:
    rule = "offsets are Unicode code points, end exclusive"
    if not isinstance(span, dict):
        raise UserError(f"{where}: a span is a JSON object with start, end and role, not {_kind(span)}")
    for key in ("start", "end"):
        if key not in span:
            raise UserError(f"{where}: {key} is missing; {rule}")
        # bool is a subclass of int, but `true` is no offset
        if not isinstance(span[key], int) or isinstance(span[key], bool):
            raise UserError(f"{where}: {key} {json.dumps(span[key])} is not an integer; {rule}")
        if span[key] < 0:
            raise UserError(f"{where}: {key} {span[key]} is negative; {rule}")
    start, end = span["start"], span["end"]
    if start >= end:
        raise UserError(f"{where}: start {start} is not before end {end}; {rule}")
    if end > length:
        raise UserError(f"{where}: end {end} is past the end of the text ({length} code points); {rule}")
    if "role" not in span:
        raise UserError(f'{where}: role is missing; say what the span is, e.g. "role": "false"')
    role = _string(span["role"], f"{where}: role")
    if not role.strip():
        raise UserError(f'{where}: role is empty; say what the span is, e.g. "role": "false"')
    return Span(start, end, role)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {_kind(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a surrogate pair (\\u{ord(value[error.start]):04x} at code point {error.start}), "
            "which is no character; write the whole pair or the character itself"
        ) from None
    return value


def _kind(value: Any) -> str:
    """A JSON value in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
