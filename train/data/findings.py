"""Findings about documents that readers of the results should know: they are counted, shown and kept with the run."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

SHOWN = 5  # places of a finding that are printed; summary.json lists all

SKIPPED = "rows left out by --bad-rows skip"
NO_TARGET = "documents without anything to predict (no trained message, or all of it cut away)"
NO_ROLE_OF_CHATS = 'messages with a role that is not one of chats; they are trained on only with "train": true'
TAGS = "mask tags left in texts and trained on as text; python train/annotate.py --markup turns them into spans"
NOT_JSON = "values in metadata that JSON cannot represent, kept as null (NaN, bytes) or as text (dates)"
THOUGHT_DROPPED = "trained messages whose thinking block the chat template drops"
UNWRITTEN = "messages that the chat template does not render, so the model does not see them"
UNENDED = (
    "trained messages without a trained special token at their end, so the model does not learn to stop; use a chat "
    "template that ends turns with the tokenizer's EOS or, for the end of a chat, --eos"
)

# Tags that other tools write around text that they mask, and roles of spans written as tags.
MASK_TAG = re.compile(
    r"</?(?:(?:[\w-]*[_-])?(?:no|un)?(?:loss|mask)[\w-]*|false|negation|correction|qualifier)>", re.IGNORECASE
)


def unknown_key(of: str, key: str) -> str:
    """Returns the finding that messages or spans (`of`) have an unknown key."""
    return f"{of} with the unknown key {key!r}, which is ignored"


@dataclass
class Findings:
    """places: finding -> (path, line, detail or "") of each occurrence."""

    places: dict[str, list[tuple[str, int, str]]] = field(default_factory=dict)

    def add(self, what: str, path: str, line: int, detail: str = "") -> None:
        """Adds one occurrence of a finding."""
        self.places.setdefault(what, []).append((path, line, detail))

    def include(self, other: "Findings") -> None:
        """Adds all findings of another."""
        for what, places in other.places.items():
            self.places.setdefault(what, []).extend(places)

    def lines(self) -> list[str]:
        """Returns one note per finding, with its count and its first places."""
        notes = []
        for what, places in self.places.items():
            each = (f"{path}:{line}" + (f" ({detail})" if detail else "") for path, line, detail in places)
            named = list(dict.fromkeys(each))
            more = f" and {len(named) - SHOWN:,} more" if len(named) > SHOWN else ""
            notes.append(f"note: {len(places):,} {what}: {', '.join(named[:SHOWN])}{more}")
        return notes

    def show(self, file: TextIO | None = None) -> None:
        """Prints the notes, one per line, to `file` or else to stdout."""
        for line in self.lines():
            print(line, file=file)

    def summary(self) -> dict[str, Any]:
        """Returns finding -> {"count", "lines": {path: [line]}, "details": {detail: count}}, as in summary.json."""
        return {what: _summary(places) for what, places in self.places.items()}


def _summary(places: list[tuple[str, int, str]]) -> dict[str, Any]:
    paths = {path: None for path, _, _ in places}
    lines = {path: sorted({line for other, line, _ in places if other == path}) for path in paths}
    details = Counter(detail for _, _, detail in places if detail)
    return {"count": len(places), "lines": lines} | ({"details": dict(details)} if details else {})
