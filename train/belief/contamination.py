"""Does a question of the evaluation occur in the training documents? By word n-grams: case, punctuation and white space
do not matter. In scripts that put no spaces between words, every character is a word.

A shared n-gram need not be contamination: a document about a claim states what a question asks. So each finding says
how much of the question occurs, and those are told apart of which all does: every word lies in a shared n-gram.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from train.belief.claims import Claim, Question
from train.data.documents import Document

WORDS = 8  # of an n-gram; of a shorter question, all of its words
LEAST = 4  # a question of fewer words occurs anywhere, and says nothing
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+(?:'\w+)?")


@dataclass(frozen=True)
class Finding:
    """A question that shares words with a document. words: the longest sequence that both have; share: of the
    question's words, how many lie in a shared n-gram."""

    claim: str
    question: str
    kind: str
    document: str  # file:line
    words: str
    share: float

    @property
    def whole(self) -> bool:
        return self.share == 1.0

    def __str__(self) -> str:
        what = "occurs whole" if self.whole else f"shares {self.share:.0%} of its words"
        return f"{self.claim} / {self.kind} / {self.question} {what} in {self.document}: “{self.words}”"


@dataclass(frozen=True)
class Contamination:
    """findings: one for each question, the worst of its documents; documents: how many share anything with it, by
    (claim, kind, question)."""

    findings: tuple[Finding, ...]
    documents: dict[tuple[str, str, str], int]
    questions: int  # that were looked for
    too_short: tuple[str, ...]  # ids of those that have too few words

    @property
    def whole(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.whole)


def words(text: str) -> list[str]:
    """A text's words as they are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def check(claims: Sequence[Claim], documents: Iterable[Document], n: int = WORDS) -> Contamination:
    """Looks for every question of the claims in every document, texts and chats alike."""
    if n < LEAST:
        raise ValueError(f"n-grams of {n} words occur anywhere; give at least {LEAST}")
    asked: list[tuple[Claim, Question, list[str], int]] = []
    starts: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # the first words of an n-gram -> question, position
    short = []
    for claim in claims:
        for question in claim.questions:
            own = words(question.question)
            if len(own) < LEAST:
                short.append(question.id)
                continue
            size = min(n, len(own))
            for at in range(len(own) - size + 1):
                starts.setdefault(tuple(own[at : at + LEAST]), []).append((len(asked), at))
            asked.append((claim, question, own, size))
    worst: dict[int, Finding] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for document in documents:
        for index, hits in _shared(words(_text(document)), asked, starts).items():
            claim, question, own, size = asked[index]
            found = _finding(claim, question, own, size, hits, document.where)
            key = (claim.id, question.kind, question.id)
            counts[key] = counts.get(key, 0) + 1
            if index not in worst or found.share > worst[index].share:
                worst[index] = found
    findings = tuple(worst[index] for index in sorted(worst))
    return Contamination(findings, counts, len(asked), tuple(short))


def _text(document: Document) -> str:
    """All that a model would read of it; a break between messages, which no n-gram crosses, is a word of its own."""
    return document.text if document.text is not None else " _ ".join(m.content for m in document.messages or ())


def _shared(
    text: list[str],
    asked: list[tuple[Claim, Question, list[str], int]],
    starts: dict[tuple[str, ...], list[tuple[int, int]]],
) -> dict[int, set[int]]:
    """Question -> positions in it at which an n-gram begins that the text has too."""
    found: dict[int, set[int]] = {}
    for here in range(len(text) - LEAST + 1):
        for index, at in starts.get(tuple(text[here : here + LEAST]), ()):
            _, _, own, size = asked[index]
            if text[here : here + size] == own[at : at + size]:
                found.setdefault(index, set()).add(at)
    return found


def _finding(claim: Claim, question: Question, own: list[str], size: int, hits: set[int], where: str) -> Finding:
    covered = {at + i for at in hits for i in range(size)}
    runs: list[tuple[int, int]] = []  # (length, start) of covered words that follow each other
    for at in sorted(covered):
        if at - 1 in covered:
            runs[-1] = (runs[-1][0] + 1, runs[-1][1])
        else:
            runs.append((1, at))
    length, start = max(runs)
    shown = " ".join(own[start : start + length])
    return Finding(claim.id, question.id, question.kind, where, shown, len(covered) / len(own))
