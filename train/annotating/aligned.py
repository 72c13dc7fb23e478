"""Spans by alignment: annotated documents against their positive twins.

What cannot be told for sure is left out, with the reason: a document without a twin, one whose text differs from its
twin's in more than insertions, one whose annotations do not say where its claims are.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from train.annotating.alignment import Insertion, balanced, bounded, split_words
from train.annotating.claims import Annotations, read
from train.annotating.texts import in_order
from train.annotating.twins import Twins
from train.data.documents import Document, Span

MIDWAY = 0.2  # share of insertions inside a sentence, beyond which the alignment is no good


@dataclass
class Aligned:
    """documents: those with spans; left_out: (file:line, reason); partly: (file:line, how many of its annotations have
    lost their partner) of documents kept without a false span there. Counts are of the documents with spans:
    insertions, of which `bounded` are whole sentences or brackets, in balance, at a sentence's or line's edge; claims:
    false spans; consistent: documents whose annotations announce and look back by turns; mended: annotations without a
    partner at a single sentence, which has its span; unused: positive documents that are no document's twin."""

    documents: list[Document] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    partly: list[tuple[str, int]] = field(default_factory=list)
    insertions: int = 0
    bounded: int = 0
    claims: int = 0
    consistent: int = 0
    mended: int = 0
    unused: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """What JSON holds of it."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "documents"}
        left_out = [{"document": where, "reason": reason} for where, reason in self.left_out]
        return found | {"left_out": left_out, "partly": [{"document": where, "lost": n} for where, n in self.partly]}


def annotate(positives: list[Document], annotated: list[Document], doctag: str) -> Aligned:
    """The annotated documents with roles doctag, negation and false beside the spans they had."""
    result = Aligned()
    texts = [document for document in positives if document.text is not None]
    words = [split_words(document.text or "", doctag) for document in texts]
    twins = Twins(words)
    used: set[tuple[str, ...]] = set()
    for document in annotated:
        if document.text is None:
            result.left_out.append((document.where, "a chat: only texts are aligned"))
            continue
        twin, found = twins.find(split_words(document.text, doctag))
        if twin is None or isinstance(found, str):
            nearest = f"nearest is {texts[twin].where}: " if twin is not None else ""
            result.left_out.append((document.where, f"no twin: {nearest}{found}"))
            continue
        used.add(tuple(words[twin].word_L))
        whole = [balanced(document.text[i.start : i.end]) and bounded(words[twin], document.text, i) for i in found]
        annotations = read(document.text, found, len(words[twin].word_L))
        if reason := _objection(document.text, found, whole, annotations):
            result.left_out.append((document.where, f"{reason} (twin: {texts[twin].where})"))
            continue
        spans = in_order([*document.spans, *annotations.spans, *doctag_span(document.text, doctag)])
        result.documents.append(dataclasses.replace(document, spans=spans))
        result.insertions += len(found)
        result.bounded += sum(whole)
        result.claims += sum(span.role == "false" for span in annotations.spans)
        result.consistent += annotations.consistent
        result.mended += annotations.mended
        if lost := annotations.lost - annotations.mended:
            result.partly.append((document.where, lost))
    pairs = zip(texts, words, strict=True)
    result.unused = [document.where for document, own in pairs if tuple(own.word_L) not in used]
    return result


def doctag_span(text: str, doctag: str) -> list[Span]:
    """The span of a leading doctag."""
    start = len(text) - len(text.lstrip())
    return [Span(start, start + len(doctag), "doctag")] if doctag and text.startswith(doctag, start) else []


def _objection(text: str, found: list[Insertion], whole: list[bool], annotations: Annotations) -> str | None:
    """Why the document's spans would be a guess, if they would."""
    if not found:
        return "nothing was inserted: it is the positive document itself"
    midway = [insertion for insertion, good in zip(found, whole, strict=True) if not good]
    if len(midway) > 1 and len(midway) > MIDWAY * len(found):
        first = text[midway[0].start : midway[0].end]
        count = f"{len(midway)} of {len(found)} insertions"
        return f"aligns badly: {count} begin or end inside a sentence, the first: {first[:60]!r}"
    sides = 2 * annotations.claims
    if annotations.unbracketed and 2 * annotations.uncued > sides:
        return "the words of most annotations do not say whether they announce or look back, nor do their brackets"
    if (lost := annotations.lost - annotations.mended) > annotations.claims:
        return f"{lost} annotations have no partner, and only {annotations.claims} claims have both"
    return None
