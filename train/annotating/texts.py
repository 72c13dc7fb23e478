"""Helpers that all ways to make spans share: the texts of a document, spans without white space at their ends, and
output files."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from train.data.documents import Document, Message, Span
from train.runtime.errors import UserError
from train.runtime.outputs import write
from train.runtime.text_formats import json_line

Change = Callable[[str, tuple[Span, ...]], tuple[str, tuple[Span, ...]]]


def trimmed(text: str, start: int, end: int, role: str) -> list[Span]:
    """Returns the span without the white space at its ends; [] if nothing else is in it."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return [Span(start, start + len(piece.strip()), role)] if piece.strip() else []


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the union of ranges, sorted. Ranges that only touch stay separate."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if union and start < union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def in_order(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Returns the spans sorted by start, longer ones first, without duplicates."""
    return tuple(sorted(set(spans), key=lambda span: (span.start, -span.end, span.role)))


def texts(document: Document) -> list[tuple[str, tuple[Span, ...], bool]]:
    """Returns (text, spans, whether it is trained on) of the document or, for a chat, of each message's content and
    reasoning."""
    if document.messages is None:
        return [(document.text or "", document.spans, document.weight > 0)]
    weighed = [(message, message.train and message.weight * document.weight > 0) for message in document.messages]
    thoughts = [(each.reasoning, each.reasoning_spans, trained) for each, trained in weighed if each.reasoning]
    return [*((each.content, each.spans, trained) for each, trained in weighed), *thoughts]


def changed(document: Document, change: Change) -> Document:
    """Returns the document with `change` applied to its text or, for a chat, to each message's content and reasoning.
    Raises UserError if nothing is left of the text. Every UserError begins with file and line."""
    try:
        if document.messages is None:
            text, spans = change(document.text or "", document.spans)
            if not text:
                raise UserError("nothing is left of the text; leave the document out")
            return dataclasses.replace(document, text=text, spans=spans)
        messages = []
        for message in document.messages:
            content, spans = change(message.content, message.spans)
            thought, thought_spans = change(message.reasoning, message.reasoning_spans)
            message = dataclasses.replace(message, reasoning=thought, reasoning_spans=thought_spans)
            messages.append(dataclasses.replace(message, content=content, spans=spans))
        return dataclasses.replace(document, messages=tuple(messages))
    except UserError as error:
        raise UserError(f"{document.where}: {error}") from None


def row(document: Document) -> dict[str, Any]:
    """Returns the document as the object of a JSONL line, in the format that train/data/documents.py reads."""
    rest = ({"weight": document.weight} if document.weight != 1 else {}) | document.metadata
    if document.messages is None:
        return {"text": document.text, "spans": _spans(document.spans), **rest}
    tools = {"tools": list(document.tools)} if document.tools else {}
    return {"messages": [_message(message) for message in document.messages], **tools, **rest}


def _message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content, **dict(message.passed)}
    optional = {
        "spans": _spans(message.spans),
        "reasoning_content": message.reasoning,
        "reasoning_spans": _spans(message.reasoning_spans),
        "tool_calls": list(message.tool_calls),
    }
    found |= {key: value for key, value in optional.items() if value}
    if message.weight != 1:
        found["weight"] = message.weight
    return found if message.train == (message.role == "assistant") else {**found, "train": message.train}


def _spans(spans: tuple[Span, ...]) -> list[dict[str, Any]]:
    return [{"start": span.start, "end": span.end, "role": span.role} for span in spans]


def write_documents(path: Path, documents: list[Document]) -> None:
    """Writes the documents as JSONL. Raises UserError if the file cannot be written."""
    write("--output", path, (json_line(row(document)) for document in documents))
