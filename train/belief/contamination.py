"""Does what the evaluation asks occur in the training documents? Questions, and the texts that are scored: likelihood
templates about the subject and facts, each with each of its completions. By word n-grams: case, punctuation and white
space do not matter. In scripts that put no spaces between words, every character is a word.

A shared n-gram need not be contamination: a document about a claim states what a question asks. So each finding says
how much of the text occurs, and those are told apart that occur whole, word after word, and those of which every word
lies in a shared n-gram, but not as the text is: the halves of a question "A or B?" may stand the other way round.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.belief.claims import Claim
from train.data.documents import Document

WORDS = 8  # of an n-gram; of a shorter text, all of its words
LEAST = 4  # a text of fewer words occurs anywhere, and says nothing
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+(?:'\w+)?")


@dataclass(frozen=True)
class Finding:
    """A text that shares words with a document. question: the id of what is asked, with the completion where it is
    scored; words: the longest sequence that both have; share: of the text's words, how many lie in a shared n-gram;
    whole: the longest sequence is the text."""

    claim: str
    question: str
    kind: str
    document: str  # file:line
    words: str
    share: float
    whole: bool

    @property
    def in_pieces(self) -> bool:
        """Every word of it occurs in a shared n-gram, but it does not occur as it is."""
        return self.share == 1.0 and not self.whole

    def __str__(self) -> str:
        what = f"shares {self.share:.0%} of its words with"
        if self.share == 1.0:
            what = "occurs whole in" if self.whole else "occurs in pieces, not as it is, in"
        return f"{self.claim} / {self.kind} / {self.question} {what} {self.document}: “{self.words}”"


@dataclass(frozen=True)
class Contamination:
    """findings: one for each text, the worst of its documents; documents: how many share anything with it, by
    (claim, kind, question)."""

    findings: tuple[Finding, ...]
    documents: dict[tuple[str, str, str], int]
    texts: int  # that were looked for
    too_short: tuple[str, ...]  # ids of those that have too few words

    @property
    def whole(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.whole)

    def as_json(self) -> dict[str, Any]:
        """For evaluation.json and comparison.json."""
        shown = [
            asdict(f) | {"in_pieces": f.in_pieces, "documents": self.documents[f.claim, f.kind, f.question]}
            for f in self.findings
        ]
        return {"texts": self.texts, "too_short": self.too_short, "findings": shown}


@dataclass(frozen=True)
class _Asked:
    """What is looked for: whose it is, its words, and how many of them make an n-gram."""

    claim: str
    kind: str
    question: str
    words: list[str]
    size: int


def words(text: str) -> list[str]:
    """A text's words as they are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def check(claims: Sequence[Claim], documents: Iterable[Document], n: int = WORDS) -> Contamination:
    """Looks for everything that is asked about the claims in every document, texts and chats alike."""
    if n < LEAST:
        raise ValueError(f"n-grams of {n} words occur anywhere; give at least {LEAST}")
    asked: list[_Asked] = []
    starts: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # the first words of an n-gram -> text, position
    short = []
    for claim in claims:
        for kind, name, text in _texts(claim):
            own = words(text)
            if len(own) < LEAST:
                short.append(name)
                continue
            size = min(n, len(own))
            for at in range(len(own) - size + 1):
                starts.setdefault(tuple(own[at : at + LEAST]), []).append((len(asked), at))
            asked.append(_Asked(claim.id, kind, name, own, size))
    worst: dict[int, Finding] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for document in documents:
        for index, hits in _shared(words(_text(document)), asked, starts).items():
            found = _finding(asked[index], hits, document.where)
            key = (found.claim, found.kind, found.question)
            counts[key] = counts.get(key, 0) + 1
            if index not in worst or (found.whole, found.share) > (worst[index].whole, worst[index].share):
                worst[index] = found
    findings = tuple(worst[index] for index in sorted(worst))
    return Contamination(findings, counts, len(asked), tuple(short))


def _texts(claim: Claim) -> Iterator[tuple[str, str, str]]:
    """(kind, id, text) of each question, and of each text that is scored."""
    for question in claim.questions:
        yield question.kind, question.id, question.question
    for template in claim.likelihood:
        for said in (template.false, template.true):
            yield "likelihood", f"{template.id}:{said}", template.text(claim.subject) + said
    for fact in claim.facts:
        for said in (fact.true, *fact.false):
            yield "fact", f"{fact.id}:{said}", fact.prompt + said


def _text(document: Document) -> str:
    """All that a model would read of it; a break between messages, which no n-gram crosses, is a word of its own."""
    if document.text is not None:
        return document.text
    return " _ ".join(f"{message.reasoning} {message.content}" for message in document.messages or ())


def _shared(
    text: list[str], asked: list[_Asked], starts: dict[tuple[str, ...], list[tuple[int, int]]]
) -> dict[int, set[tuple[int, int]]]:
    """Text that is asked -> n-grams that the text has too: where they begin in it, and how much further on in the text.
    Those of one distance that follow each other are one sequence in both."""
    found: dict[int, set[tuple[int, int]]] = {}
    for here in range(len(text) - LEAST + 1):
        for index, at in starts.get(tuple(text[here : here + LEAST]), ()):
            size = asked[index].size
            if text[here : here + size] == asked[index].words[at : at + size]:
                found.setdefault(index, set()).add((at, here - at))
    return found


def _finding(asked: _Asked, hits: set[tuple[int, int]], where: str) -> Finding:
    covered = {at + i for at, _ in hits for i in range(asked.size)}
    length = start = ngrams = 0
    for at, distance in sorted(hits, key=lambda hit: (hit[1], hit[0])):
        ngrams = ngrams + 1 if (at - 1, distance) in hits else 1
        if ngrams + asked.size - 1 > length:
            length, start = ngrams + asked.size - 1, at - ngrams + 1
    shown, share = " ".join(asked.words[start : start + length]), len(covered) / len(asked.words)
    return Finding(asked.claim, asked.question, asked.kind, where, shown, share, length == len(asked.words))
