"""Adds spans that were marked elsewhere, from a file of rows:

    {"id": "doc-7", "spans": [[8, 60], {"start": 61, "end": 70, "role": "correction"}]}

Offsets are Unicode code points, end exclusive. A row belongs to the document with the same id or, if no row has an id,
to the document at the same position in the file.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from train.annotating.texts import changed, in_order, trimmed
from train.data.documents import Document, Span, documents_of
from train.data.files import file_rows
from train.data.findings import Findings
from train.masking.grammar import check_role
from train.runtime.errors import UserError
from train.runtime.text_formats import Unreadable

RULE = "give [start, end] pairs or objects with start, end and role"


def read_pairs(path: str, role: str | None, doctag: str | None, findings: Findings) -> list[Document]:
    """Returns the documents of a file whose own spans may be [start, end] pairs, which get `role`. White space at the
    ends of spans is cut off. findings: receives notes on the rows. Raises UserError, with file and line, for an invalid
    row or span, and for a pair if `role` is None."""
    rows = ((line, _with_objects(row, role, f"{path}:{line}")) for line, row in file_rows(path))
    documents = documents_of(rows, path, doctag, "error", findings)
    return [changed(document, _without_white_space) for document in documents]


def add_spans(documents: list[Document], path: str, key: str, role: str | None) -> tuple[list[Document], list[str]]:
    """Returns the documents with the spans of a file added, and file:line of the documents that the file has no row
    for. key: the name of the id in rows and documents. role: of spans that give none. Raises UserError, with file and
    line, for an invalid row or span, and for rows that do not match the documents."""
    rows = list(_rows(path))
    for where, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("spans"), list):
            raise UserError(f'{where}: a row is {{"{key}": …, "spans": […]}}, this one has no list of spans; {RULE}')
    named = sum(key in row for _, row in rows)
    if 0 < named < len(rows):
        where = next(where for where, row in rows if key not in row)
        raise UserError(f"{where}: {key} is missing, and other rows have it; give it to all rows or to none")
    place = _by_id(documents, rows, key) if named else _by_line(documents, rows, path)
    added = list(documents)
    for (where, row), i in zip(rows, place, strict=True):
        added[i] = _with_spans(added[i], row, role, where)
    held = set(place)
    return added, [document.where for i, document in enumerate(documents) if i not in held]


def _by_id(documents: list[Document], rows: list[tuple[str, Any]], key: str) -> list[int]:
    places: dict[str, int] = {}
    for i, document in enumerate(documents):
        if key in document.metadata:
            own = json.dumps(document.metadata[key])
            if own in places:
                first = documents[places[own]].where
                raise UserError(f"{document.where}: {key} {own} is also that of {first}; give each document its own")
            places[own] = i
    found = []
    for where, row in rows:
        own = json.dumps(row[key])
        if own not in places:
            raise UserError(
                f"{where}: no document has the {key} {own}; name the documents' key by --id, or fix the row"
            )
        found.append(places[own])
    return found


def _by_line(documents: list[Document], rows: list[tuple[str, Any]], path: str) -> list[int]:
    if len(rows) != len(documents):
        raise UserError(
            f"--spans {path}: has {len(rows)} rows without an id for {len(documents)} documents; give a row for each, "
            "in the same order, or ids"
        )
    return list(range(len(documents)))


def _with_spans(document: Document, row: dict[str, Any], role: str | None, where: str) -> Document:
    text = document.text
    if text is None:
        raise UserError(f"{where}: {document.where} is a chat, and offsets do not say into which message; leave it out")
    if isinstance(row.get("text"), str) and row["text"] != text:
        raise UserError(
            f"{where}: its text is not that of {document.where}; give the rows in the documents' order, or ids"
        )
    spans = [
        _span(_object(span, role, f"{where}: spans[{i}]"), text, f"{where}: spans[{i}]")
        for i, span in enumerate(row["spans"])
    ]
    return dataclasses.replace(document, spans=in_order([*document.spans, *spans]))


def _span(span: dict[str, Any], text: str, where: str) -> Span:
    start, end, role = span.get("start"), span.get("end"), span.get("role")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise UserError(
            f"{where}: [{json.dumps(start)}, {json.dumps(end)}) is not a range of the text of {len(text)} code points; "
            "offsets are Unicode code points from 0, end exclusive"
        )
    if not isinstance(role, str) or not role.strip():
        raise UserError(f"{where}: role {json.dumps(role)} is not a name; say what the span is, e.g. false")
    check_role(role, where)
    found = trimmed(text, start, end, role)
    if not found:
        raise UserError(f"{where}: [{start}, {end}) contains only white space; leave it out")
    return found[0]


def _without_white_space(text: str, spans: tuple[Span, ...]) -> tuple[str, tuple[Span, ...]]:
    found = [trimmed(text, span.start, span.end, span.role) for span in spans]
    for span, kept in zip(spans, found, strict=True):
        if not kept:
            raise UserError(f"[{span.start}, {span.end}) contains only white space; leave it out")
    return text, in_order(span for each in found for span in each)


def _object(span: Any, role: str | None, where: str) -> dict[str, Any]:
    """Returns a span as an object with start, end and role."""
    if isinstance(span, dict) and "role" in span:
        return span
    if not isinstance(span, dict) and not (isinstance(span, list) and len(span) == 2):
        raise UserError(f"{where}: {json.dumps(span)[:60]} is not a span; {RULE}")
    if role is None:
        raise UserError(f"{where}: {json.dumps(span)[:60]} has no role; give them one by --role, e.g. --role false")
    return {**span, "role": role} if isinstance(span, dict) else {"start": span[0], "end": span[1], "role": role}


def _texts(row: Any) -> Iterator[dict[str, Any]]:
    """Yields a document's row and its messages: everything that can have spans."""
    if isinstance(row, dict):
        messages = row.get("messages")
        yield from (each for each in (row, *(messages if isinstance(messages, list) else ())) if isinstance(each, dict))


def _with_objects(row: Any, role: str | None, where: str) -> Any:
    for each in _texts(row):
        if isinstance(each.get("spans"), list):
            each["spans"] = [_object(span, role, f"{where}: spans[{i}]") for i, span in enumerate(each["spans"])]
    return row


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yields (file:line, row) of each line that is not blank."""
    for line, row in file_rows(path):
        if isinstance(row, Unreadable):
            raise UserError(f"{path}:{line}: {row}")
        yield f"{path}:{line}", row
