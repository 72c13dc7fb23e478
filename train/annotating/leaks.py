"""Counts how often a claim's terms are still trained on under a mask, by role and document.

A run that leaves false spans out of the loss may still train on the claim: in sentences without a span, and inside
negations that repeat it.
"""

from typing import Any

from train.annotating.by_rule import matches
from train.annotating.texts import texts
from train.data.documents import Document, Span
from train.data.kinds import TermKind
from train.masking.grammar import Entry, Mask
from train.runtime.patterns import Pattern

BODY = "no role"


def leaks(documents: list[Document], patterns: list[Pattern], mask: Mask) -> dict[str, Any]:
    """Returns {"mask", "mentions", "trained", "roles": {role: {"mentions", "trained"}}, "documents": [{"document",
    "mentions", "trained", "roles": {role: trained}}]}.

    A mention is a match of the patterns. It counts as trained if the cross-entropy of any of its characters is in the
    loss. The mask's last entry that applies to a character, by the roles of the spans that cover it, decides; without
    such an entry it is in the loss. Messages that are not trained on have no trained mentions. A mention belongs to the
    role of the shortest span that contains it whole. `random:` entries depend on tokens, so they mask nothing here.
    Raises UserError if a search takes too long.
    """
    entries = [entry for entry in mask.entries if not entry.random]
    roles: dict[str, dict[str, int]] = {}
    rows = []
    for document in documents:
        row: dict[str, Any] = {"document": document.where, "mentions": 0, "trained": 0, "roles": {}}
        for text, spans, in_loss in texts(document):
            for start, end in matches(text, patterns):
                around = [span for span in spans if span.start < end and start < span.end]
                trained = in_loss and any(_trained(i, around, entries) for i in range(start, end))
                role = _role(start, end, around)
                counts = roles.setdefault(role, {"mentions": 0, "trained": 0})
                counts["mentions"] += 1
                counts["trained"] += trained
                row["mentions"] += 1
                row["trained"] += trained
                row["roles"][role] = row["roles"].get(role, 0) + trained
        rows.append(row)
    ordered = dict(sorted(roles.items(), key=lambda item: (item[0] == BODY, item[0])))
    total = {key: sum(row[key] for row in rows) for key in ("mentions", "trained")}
    return {"mask": mask.text, **total, "roles": ordered, "documents": rows}


def _trained(offset: int, spans: list[Span], entries: list[Entry]) -> bool:
    covering = {span.role for span in spans if span.start <= offset < span.end}
    reaching = [e for e in entries if e.kind == "all" or e.role in covering or (e.kind == "unspanned" and not covering)]
    return not reaching or (reaching[-1].weight > 0 and reaching[-1].term == TermKind.CROSS_ENTROPY)


def _role(start: int, end: int, spans: list[Span]) -> str:
    holding = [span for span in spans if span.start <= start and end <= span.end]
    return min(holding, key=lambda span: span.end - span.start).role if holding else BODY
