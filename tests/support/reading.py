"""Documents as they are read, and their targets."""

import json
from typing import Any

from train.data.documents import Document, read_documents
from train.data.findings import Findings
from train.data.tokens import TokenizedDocument


def targets(doc: TokenizedDocument) -> str:
    """The text of each run of targets, runs separated by |."""
    parts, was_target, past = [], False, 0
    for start, end, target in zip(doc.start_L, doc.end_L, doc.target_L, strict=True):
        if target:
            parts.append(("|" if parts and not was_target else "") + doc.text[max(past, start) : end])
        was_target, past = target, max(past, end)
    return "".join(parts)


def read(tmp_path, *rows: Any, findings: Findings | None = None) -> list[Document]:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_documents(tmp_path / "d.jsonl", findings=findings)
