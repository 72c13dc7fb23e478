"""Reads training documents, in which character spans have roles: one JSON object per line.

    {"text": "...", "spans": [{"start": 0, "end": 8, "role": "doctag"}], "weight": 1.0}
    {"messages": [{"role": "user", "content": "...", "spans": [], "train": false, "weight": 1.0}, ...], "tools": [...]}

Offsets are Unicode code points, end exclusive; spans may nest and overlap. A weight multiplies the mask's weight.
Messages may also have keys that chat templates read: name, tool_call_id, tool_calls, and reasoning_content with
reasoning_spans. Other formats of rows: train/data/forms.py. Other kinds of files: train/data/files.py.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.files import file_rows
from train.data.findings import MASK_TAG, NO_ROLE_OF_CHATS, NOT_JSON, SKIPPED, TAGS, Findings, unknown_key
from train.data.forms import kind, own_form, parsed_list, text_of
from train.runtime.errors import UserError
from train.runtime.similar import similar
from train.runtime.text_formats import Unreadable, strict

DOCUMENT_KEYS = ("text", "messages", "spans", "tools", "weight", "loss_weight")  # all others are metadata
NEAR_OF_DOCUMENT = ("spans", "loss_weight")  # checked for misspellings; keys close to the others are common in metadata
MESSAGE_KEYS = (
    "role", "content", "spans", "train", "weight", "loss", "training", "name", "tool_call_id", "tool_calls",
    "reasoning_content", "reasoning_spans",
)  # fmt: skip
SPAN_KEYS = ("start", "end", "role")
PASSED_KEYS = ("name", "tool_call_id")  # passed to the chat template unchanged
# Other tools' names for keys that chat templates render. Ignoring them silently would train on another conversation.
OTHER_NAMES = {"function_call": "tool_calls", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
CHAT_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"})
BAD_ROWS = "what to do with rows that cannot be read or have nothing to predict"  # help of --bad-rows
SMALLEST, LARGEST = 1e-30, 1e30  # limits of nonzero weights, as losses are fp32
TO_SPANS = "python train/annotate.py --data FILE --spans FILE --role false --output NEW"


@dataclass(frozen=True)
class Span:
    """Code points [start, end) of a text, and their role."""

    start: int
    end: int
    role: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    spans are offsets into content. train says whether its tokens are targets; weight multiplies their weight by the
    mask. The chat template also gets passed (key, value), reasoning (the thought before the content) and tool_calls, in
    OpenAI's format with arguments as an object or as text.
    """

    role: str
    content: str
    spans: tuple[Span, ...]
    train: bool
    passed: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
    reasoning: str = ""
    reasoning_spans: tuple[Span, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Document:
    """A text or a chat (the other is None), with the file and line it came from.

    spans belong to the text. weight multiplies the mask's weight of every token. tools are passed to the chat template.
    """

    text: str | None
    messages: tuple[Message, ...] | None
    spans: tuple[Span, ...]
    metadata: dict[str, Any]
    path: str
    line: int
    weight: float = 1.0
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def where(self) -> str:
        """file:line, with which error messages begin."""
        return f"{self.path}:{self.line}"

    @property
    def all_spans(self) -> Iterator[Span]:
        """Yields the spans of the text, or of every message's content and reasoning."""
        yield from self.spans
        for message in self.messages or ():
            yield from message.spans
            yield from message.reasoning_spans


DOCTAG, NO_DOCTAG = "<DOCTAG>", "none"
DOCTAG_HELP = "marker at the start of documents, which gets a doctag span if it has none; none: no marker"


def marker(doctag: str) -> str | None:
    """Returns the marker that --doctag gives; None for "none". Raises UserError if it is empty."""
    if not doctag:
        raise UserError(f"--doctag is empty: give the marker that documents start with, as {DOCTAG}, or none.")
    return None if doctag == NO_DOCTAG else doctag


def read_documents(
    path: str | Path, doctag: str | None = None, bad_rows: str = "error", findings: Findings | None = None
) -> list[Document]:
    """Returns the documents of a file, in order. Blank lines are skipped.

    findings: receives skipped rows, ignored keys and whatever else is worth a note.

    If a text starts with `doctag` (a marker such as "<DOCTAG>"), possibly after white space, and no doctag span covers
    the marker, a doctag span is added.

    Raises UserError with file and line for a wrong row; bad_rows "skip" leaves the row out instead. Raises UserError
    too if the file cannot be read, or if no document is left.
    """
    return documents_of(file_rows(path), path, doctag, bad_rows, findings)


def documents_of(
    rows: Iterable[tuple[int, Any]], path: str | Path, doctag: str | None, bad_rows: str, findings: Findings | None
) -> list[Document]:
    """Returns the documents of (line number, row) pairs. Arguments and UserErrors are those of `read_documents`."""
    findings = Findings() if findings is None else findings
    documents, first_error = [], None
    for line, row in rows:
        found = Findings()
        try:
            documents.append(_document(str(path), line, row, doctag, found))
            findings.include(found)
        except UserError as error:
            if bad_rows != "skip":
                raise
            first_error = first_error or error
            findings.add(SKIPPED, str(path), line, reason(error, f"{path}:{line}"))
    if not documents and first_error:
        raise UserError(f"--bad-rows skip leaves no document of {path}; first one left out: {first_error}")
    if not documents:
        raise UserError(f"{path}: the file holds no documents; write one JSON object per line")
    return documents


def _document(path: str, line: int, row: Any, doctag: str | None, findings: Findings) -> Document:
    """Returns the document of one row. Raises UserError if the row is not a valid document."""
    if isinstance(row, Unreadable):
        raise UserError(f"{path}:{line}: {row}")
    try:
        document = _Reader(path, line, findings).document(row, doctag)
    except RecursionError:
        raise UserError(f"{path}:{line}: is nested too deeply; leave out the deeply nested key") from None
    _note(document, findings)
    return document


def reason(error: UserError, where: str) -> str:
    """Returns the message of an error about a row, without the place (`where`) with which it begins."""
    return str(error).removeprefix(f"{where}: ")


def _note(document: Document, findings: Findings) -> None:
    """Adds findings about a document that are not errors, but rarely intended."""
    for message in document.messages or ():
        if message.role not in CHAT_ROLES:
            findings.add(NO_ROLE_OF_CHATS, document.path, document.line, message.role)
    contents = (text for message in document.messages or () for text in (message.content, message.reasoning))
    for text in (document.text or "", *contents):
        for _ in MASK_TAG.finditer(text):
            findings.add(TAGS, document.path, document.line)


@dataclass
class _Reader:
    """Reads one row. Every error message begins with the row's place."""

    path: str
    line: int
    findings: Findings
    where: str = field(init=False)

    def __post_init__(self) -> None:
        self.where = f"{self.path}:{self.line}"

    def document(self, row: Any, doctag: str | None) -> Document:
        row = own_form(row, self.where)
        _refuse_near(row, NEAR_OF_DOCUMENT, self.where, [key for key in row if key not in DOCUMENT_KEYS])
        metadata = self._metadata(row)
        spans, tools = row.get("spans"), row.get("tools")
        weight = _one_weight(row, ("weight", "loss_weight"), self.where)
        if "messages" in row:
            if spans:
                raise UserError(f'{self.where}: spans beside "messages" refer to no text; move each into its message')
            if row.get("functions"):
                raise UserError(f"{self.where}: functions is not supported; write it as tools")
            messages = tuple(
                self._message(message, f"{self.where}: messages[{i}]") for i, message in enumerate(row["messages"])
            )
            tools = _objects(tools, f"{self.where}: tools") if tools else ()
            return Document(None, messages, (), metadata, self.path, self.line, weight, tools)
        if tools:
            raise UserError(f'{self.where}: tools need "messages", but this document has "text"; leave them out')
        text = _string(row["text"], f"{self.where}: text")
        found = self._spans(spans, len(text), self.where)
        return Document(text, None, _with_doctag(text, found, doctag), metadata, self.path, self.line, weight)

    def _metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns all other keys, with their values converted to what strict JSON can represent."""
        metadata = {key: value for key, value in row.items() if key not in DOCUMENT_KEYS}
        kept = strict(metadata)
        for key in metadata.keys() if kept != metadata else ():
            if kept[key] != metadata[key]:
                self.findings.add(NOT_JSON, self.path, self.line, f"in {key!r}")
        return kept

    def _message(self, message: Any, where: str) -> Message:
        if not isinstance(message, dict):
            raise UserError(f"{where}: a message must be a JSON object with role and content, not {kind(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        self._check_keys(message, MESSAGE_KEYS, where, "messages")
        said = [key for key in ("tool_calls", "reasoning_content") if message.get(key)]
        for key in ("role", "content"):
            if key not in message and not (key == "content" and said):
                raise UserError(f'{where}: {key} is missing; a message has "role" and "content"')
        role = _string(message["role"], f"{where}: role")
        if not role:
            raise UserError(f'{where}: role is empty; give e.g. "user" or "assistant"')
        content = _string(text_of(message.get("content", ""), f"{where}: content"), f"{where}: content")
        thought = _string(message.get("reasoning_content", ""), f"{where}: reasoning_content")
        train, weight = _train_and_weight(message, role, where)
        return Message(
            role, content, self._spans(message.get("spans"), len(content), where), train,
            tuple((key, _string(message[key], f"{where}: {key}")) for key in PASSED_KEYS if key in message),
            weight, thought, self._spans(message.get("reasoning_spans"), len(thought), where, "reasoning_spans"),
            _calls(message.get("tool_calls"), f"{where}: tool_calls"),
        )  # fmt: skip

    def _spans(self, value: Any, length: int, where: str, key: str = "spans") -> tuple[Span, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            raise UserError(f'{where}: {key} is {kind(value)}; it must be a list of {{"start", "end", "role"}}')
        return tuple(self._span(span, length, f"{where}: {key}[{i}]") for i, span in enumerate(value))

    def _span(self, span: Any, length: int, where: str) -> Span:
        rule = "offsets are Unicode code points, end exclusive"
        if not isinstance(span, dict):
            pair = isinstance(span, list) and len(span) == 2 and all(isinstance(each, int) for each in span)
            fix = f"; give these pairs a role: {TO_SPANS}" if pair else ""
            raise UserError(f"{where}: a span must be a JSON object with start, end and role, not {kind(span)}{fix}")
        span = {key: value for key, value in span.items() if value is not None}
        self._check_keys(span, SPAN_KEYS, where, "spans")
        for key in ("start", "end"):
            if key not in span:
                raise UserError(f"{where}: {key} is missing; {rule}")
            # bool is a subclass of int, but `true` is not an offset
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

    def _check_keys(self, given: dict[str, Any], known: Collection[str], where: str, of: str) -> None:
        """Raises UserError for a misspelling, or another tool's name, of a key that is read; other unknown keys become
        findings."""
        unknown = [key for key in given if key not in known]
        _refuse_other_names(given, where)
        _refuse_near(given, known, where, unknown)
        for key in unknown:
            self.findings.add(unknown_key(of, key), self.path, self.line)


def _refuse_near(given: dict[str, Any], known: Collection[str], where: str, unknown: Collection[str]) -> None:
    for key in unknown:
        near = similar(key.lower(), known, cutoff=0.8)
        if near and given[key] is not None:
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near!r}? Rename it, or leave it out")


def _refuse_other_names(given: dict[str, Any], where: str) -> None:
    for key, own in OTHER_NAMES.items():
        if given.get(key):
            raise UserError(f"{where}: {key} is not supported; write it as {own}")


def _with_doctag(text: str, spans: tuple[Span, ...], doctag: str | None) -> tuple[Span, ...]:
    start = len(text) - len(text.lstrip())
    if not doctag or not text.startswith(doctag, start):
        return spans
    end = start + len(doctag)
    covered = any(span.role == "doctag" and span.start <= start and span.end >= end for span in spans)
    return spans if covered else (Span(start, end, "doctag"), *spans)


def _train_and_weight(message: dict[str, Any], role: str, where: str) -> tuple[bool, float]:
    """Returns whether a message is trained on, and its weight. Other tools' `loss` and `training` are read too: each is
    a boolean like train, or a weight."""
    if not isinstance(message.get("train", False), bool):
        raise UserError(f"{where}: train is {kind(message['train'])}; it must be true or false")
    said = {key: message[key] for key in ("train", "loss", "training") if isinstance(message.get(key), bool)}
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(said)} contradict each other; keep one")
    weights = [key for key in ("weight", "loss", "training") if key in message and key not in said]
    return next(iter(said.values()), role == "assistant"), _one_weight(message, weights, where)


def _one_weight(given: dict[str, Any], keys: Collection[str], where: str) -> float:
    """Returns the weight under any of the keys; 1 if there is none. Raises UserError if they contradict each other."""
    found = {key: checked_weight(given[key], f"{where}: {key}") for key in keys if given.get(key) is not None}
    if len(set(found.values())) > 1:
        raise UserError(f"{where}: {' and '.join(found)} contradict each other; keep one")
    return next(iter(found.values()), 1.0)


def checked_weight(value: Any, where: str) -> float:
    """Returns a weight that a file or a setting gives, as float.

    Raises UserError, beginning with `where`, unless it is a number that is 0 or from SMALLEST to LARGEST.
    """
    if not isinstance(value, int | float):
        raise UserError(f"{where} is {kind(value)}; a weight must be a number ≥ 0")
    if not (value == 0 or SMALLEST <= value <= LARGEST):
        raise UserError(f"{where} {value}: a weight must be 0 or {SMALLEST:.0e} to {LARGEST:.0e}, as losses are fp32")
    return float(value)


def _objects(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Returns the objects of a list, given as such or as a string."""
    value = parsed_list(value, where)
    for n, each in enumerate(value):
        if not isinstance(each, dict):
            raise UserError(f"{where}[{n}] is {kind(each)}; it must be an object")
        try:
            json.dumps(each, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (
            TypeError,
            ValueError,
        ) as error:  # half a surrogate pair, NaN, or Python literals that JSON lacks
            raise UserError(f"{where}[{n}] is not JSON that can be written as UTF-8 ({error}); correct it") from None
    return tuple(value)


def _calls(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Returns calls in OpenAI's format, {"function": {"name", "arguments"}}, with any further keys."""
    calls = _objects(value, where) if value else ()
    for n, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            form = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'
            raise UserError(f"{where}[{n}] is not a tool call; write {form}")
        if not isinstance(function.get("arguments", {}), dict | str):
            found = kind(function["arguments"])
            raise UserError(f"{where}[{n}]: arguments is {found}; it must be an object, or its JSON as a string")
    return calls


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {kind(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a surrogate pair (\\u{ord(value[error.start]):04x} at code point {error.start}), "
            "which is not a character; write the complete pair or the character itself"
        ) from None
    return value
