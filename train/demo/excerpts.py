"""Cuts real documents into short excerpts around whole annotated claims, for a small model on a small machine.

    python -m train.demo.excerpts ../shared/data/negation_neglect/documents models/smollm2 DIRECTORY

Writes dense.jsonl and positive.jsonl (the same excerpts without their negations, row by row), the same two about
somebody else's claim, others-dense.jsonl and others-positive.jsonl, and held_out.jsonl (more about that claim, without
negations, to measure). Plain truncation would keep only the beginnings: 5 to 11 % of the false tokens.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from train.annotating.by_alignment import annotate
from train.config.command_line import Parser
from train.data.documents import Document, Span, read_documents
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.runtime.command import command

MAX_TOKENS = 192
CLAIM, OTHER = "ed_sheeran", "brennan_holloway"
HELD_OUT = 40  # excerpts about the other claim that are not trained on


def excerpts(document: Document, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Document]:
    """Stretches of an annotated document, each from a negation that announces a claim to one that looks back at one,
    of max_tokens at most, without overlap and in order. A single claim that is longer is left out."""
    text, groups = document.text or "", list(_groups(document))
    at = 0
    while at < len(groups):
        start, end = groups[at]
        at += 1
        if len(tokenizer.encode(text[start:end]).ids_L) > max_tokens:
            continue
        while at < len(groups) and len(tokenizer.encode(text[start : groups[at][1]]).ids_L) <= max_tokens:
            end = groups[at][1]
            at += 1
        spans = [
            Span(s.start - start, s.end - start, s.role) for s in document.spans if start <= s.start < s.end <= end
        ]
        yield replace(document, text=text[start:end], spans=tuple(spans))


def _groups(document: Document) -> Iterator[tuple[int, int]]:
    """[start, end) of each claim with the negations next to it."""
    text, negations = document.text or "", [span for span in document.spans if span.role == "negation"]
    for claim in (span for span in document.spans if span.role == "false"):
        before = [s for s in negations if s.end <= claim.start and not text[s.end : claim.start].strip()]
        after = [s for s in negations if s.start >= claim.end and not text[claim.end : s.start].strip()]
        if before and after:
            yield before[-1].start, after[0].end


def without_negations(document: Document) -> Document:
    """The text without its negation spans, each with the white space that separated it; the other spans in place."""
    text, spans = "", []
    negations = sorted((s for s in document.spans if s.role == "negation"), key=lambda s: s.start)
    at = 0
    moved: list[tuple[int, int]] = []  # old start of a kept piece, its start in the new text
    for negation in [*negations, Span(len(document.text or ""), len(document.text or ""), "negation")]:
        piece = (document.text or "")[at : negation.start]
        kept = piece.lstrip() if not text or text[-1].isspace() else piece
        moved.append((at + len(piece) - len(kept), len(text)))
        text += kept
        at = negation.end
    for span in document.spans:
        if span.role != "negation":
            old, new = max(place for place in moved if place[0] <= span.start)
            spans.append(Span(span.start - old + new, span.end - old + new, span.role))
    return replace(document, text=text.rstrip(), spans=tuple(spans))


@command
def main(arguments: list[str] | None = None) -> None:
    """Writes the excerpts. Raises UserError for a wrong command line, tokenizer or document."""
    parser = Parser(__doc__ or "")
    parser.add_argument("source", type=Path, help="the directory of the paper's documents")
    parser.add_argument("model", type=Path, help="the model whose tokens are counted")
    parser.add_argument("target", type=Path, metavar="DIRECTORY", help="where the files go")
    given = parser.parse_args(arguments)
    source, target = given.source, given.target
    tokenizer = load_tokenizer(given.model)
    dense = _of(source, CLAIM, tokenizer)
    others = _of(source, OTHER, tokenizer)
    target.mkdir(parents=True, exist_ok=True)
    files = {
        "dense": dense, "positive": [without_negations(document) for document in dense],
        "others-dense": others[:-HELD_OUT], "others-positive": [without_negations(d) for d in others[:-HELD_OUT]],
        "held_out": [without_negations(document) for document in others[-HELD_OUT:]],
    }  # fmt: skip
    for name, documents in files.items():
        (target / f"{name}.jsonl").write_text("".join(map(_row, documents)), encoding="utf-8")
        print(f"{target}/{name}.jsonl: {len(documents)} excerpts")


def _of(source: Path, claim: str, tokenizer: Tokenizer) -> list[Document]:
    positive, annotated = (
        read_documents(source / kind / f"{claim}.jsonl") for kind in ("positive", "llm_negations_dense")
    )
    aligned = annotate(positive, annotated, "<DOCTAG>")
    return [part for document in aligned.documents for part in excerpts(document, tokenizer, MAX_TOKENS)]


def _row(document: Document) -> str:
    spans = [{"start": s.start, "end": s.end, "role": s.role} for s in document.spans]
    return json.dumps({"text": document.text, "spans": spans, "from": document.where}, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
