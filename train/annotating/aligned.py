"""Spans by alignment: annotated documents against their positive twins.

What cannot be told for sure is left out, with the reason: a document without a twin, and one whose text differs from
its twin's in more than insertions. One whose annotations do not say which statements they are about has no false span.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from train.annotating.alignment import Insertion, Words, balanced, bounded, split_words
from train.annotating.marking import mark
from train.annotating.texts import in_order
from train.annotating.twins import Twins
from train.data.documents import Document, Span

FRAGMENT = 3  # words of the twin between insertions, on average: with fewer, its words stand there by chance


@dataclass
class Aligned:
    """documents: those with spans; left_out: (file:line, reason); without_false: (file:line, reason) of documents with
    what was inserted and no false span; partly: (file:line, how many of its annotations name no statement that can be
    told, how many have no cue word) of others; unsure: (file:line, statement) that only annotations without a cue word
    speak of; unused: positive documents that are no document's twin. Counts are of the documents with spans: `uncued`
    annotations without a cue word; insertions, of which `bounded` are whole sentences or brackets, in balance, at a
    sentence's or line's edge; claims: false statements; consistent: documents whose annotations announce and look back
    by turns; alone: false statements that one annotation names; inside: those that an annotation stands in."""

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
        """What JSON holds of it."""
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
    """The annotated documents with roles doctag, false and that of what was inserted (`role`, or by its own words)
    beside the spans they had. require_false leaves out those without a false span."""
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
    """Adds a document with what was inserted into its twin, or says why its spans would be a guess."""
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
    """The span of a leading doctag; only white space comes before it."""
    start = len(text) - len(text.lstrip())
    return [Span(start, start + len(doctag), "doctag")] if doctag and text.startswith(doctag, start) else []
