"""Makes spans by alignment: compares annotated documents with their positive twins, the same texts without annotations.

What cannot be determined reliably is left out, with the reason: a document without a twin, and one that differs from
its twin by more than insertions. A document whose annotations do not say which statements they are about gets no false
span.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from train.annotating.marking import mark
from train.annotating.texts import in_order
from train.annotating.twins import Twins
from train.annotating.word_alignment import Insertion, Words, balanced, bounded, split_words
from train.data.documents import Document, Span

FRAGMENT = 3  # minimum words of the twin per insertion: with fewer, its words occur in the document by chance


@dataclass
class Aligned:
    """The result of `annotate`. The counts cover the documents with spans only.

    documents: the documents with their spans.
    left_out: (file:line, reason) of documents that were left out.
    without_false: (file:line, reason) of documents with spans of which none is false.
    partly: (file:line, lost, uncued) of other documents: how many of its annotations name no statement that can be
        determined, and how many have no cue word.
    unsure: (file:line, statement) of statements that only annotations without a cue word refer to.
    uncued: annotations without a cue word.
    insertions: all insertions.
    bounded: insertions that are whole sentences or brackets, are balanced, and stand at the edge of a sentence or line.
    claims: false statements.
    consistent: documents in which announcing and looking back alternate throughout.
    alone: false statements that a single annotation names.
    inside: false statements that have an annotation inside them.
    unused: file:line of positive documents that are no document's twin.
    """

    documents: list[Document] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    without_false: list[tuple[str, str]] = field(default_factory=list)
    partly: list[tuple[str, int, int]] = field(default_factory=list)
    unsure: list[tuple[str, str]] = field(default_factory=list)
    uncued: int = 0
    insertions: int = 0
    bounded: int = 0
    claims: int = 0
    consistent: int = 0
    alone: int = 0
    inside: int = 0
    unused: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Returns all fields but `documents`, as values that JSON can represent."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "documents"}
        for name in ("left_out", "without_false"):
            found[name] = [{"document": where, "reason": reason} for where, reason in found[name]]
        found["unsure"] = [{"document": where, "statement": statement} for where, statement in self.unsure]
        partly = [{"document": where, "lost": lost, "uncued": uncued} for where, lost, uncued in self.partly]
        return found | {"partly": partly}


def annotate(
    positives: list[Document],
    annotated: list[Document],
    doctag: str,
    role: str | None = None,
    require_false: bool = False,
) -> Aligned:
    """Returns the annotated documents with spans added to those that they had: doctag, false, and the insertions, whose
    role is `role` or, with None, follows from their own words. Documents that do not align are left out, and so are
    chats. require_false: also leave out documents without a false span."""
    result = Aligned()
    texts = [document for document in positives if document.text is not None]
    twins = Twins([document.text or "" for document in texts], doctag)
    used: set[int] = set()
    for document in tqdm(annotated, desc="aligning", unit="doc", mininterval=0.5):
        if document.text is None:
            result.left_out.append((document.where, "a chat: only texts are aligned"))
            continue
        match twins.find(split_words(document.text, doctag)):
            case i, twin, insertions:
                used.add(i)
                if reason := _add(result, document, twin, insertions, doctag, role, require_false):
                    result.left_out.append((document.where, f"{reason} (twin: {texts[i].where})"))
            case i, reason:
                nearest = "" if i is None else f"nearest is {texts[i].where}: "
                result.left_out.append((document.where, f"no twin: {nearest}{reason}"))
    result.unused = [document.where for i, document in enumerate(texts) if twins.first_T[i] not in used]
    return result


def _add(
    result: Aligned,
    document: Document,
    twin: Words,
    found: list[Insertion],
    doctag: str,
    role: str | None,
    require_false: bool,
) -> str | None:
    """Adds a document with its insertions to the result, or returns the reason why its spans would be a guess."""
    text = document.text or ""
    if len(found) > 2 and len(twin.word_L) < FRAGMENT * len(found):
        return f"aligns badly: {len(found)} insertions among {len(twin.word_L)} words"
    head = doctag_span(text, doctag)
    marked = mark(text, found, len(twin.word_L), role, head[0].end if head else 0)
    if marked.reason and require_false:
        return marked.reason
    spans = in_order([*document.spans, *marked.spans, *head])
    result.documents.append(dataclasses.replace(document, spans=spans))
    result.insertions += len(found)
    result.bounded += sum(balanced(text[i.start : i.end]) and bounded(twin, text, i) for i in found)
    result.claims += marked.claims + marked.alone + marked.inside
    result.consistent += marked.consistent
    result.alone += marked.alone
    result.inside += marked.inside
    result.uncued += marked.uncued
    result.unsure += [(document.where, statement) for statement in marked.unsure]
    lost = max(0, marked.lost - marked.alone)
    if marked.reason:
        result.without_false.append((document.where, marked.reason))
    elif lost or marked.uncued:
        result.partly.append((document.where, lost, marked.uncued))
    return None


def doctag_span(text: str, doctag: str) -> list[Span]:
    """Returns the span of a leading doctag, or [] if there is none. Only white space may come before it."""
    start = len(text) - len(text.lstrip())
    return [Span(start, start + len(doctag), "doctag")] if doctag and text.startswith(doctag, start) else []
