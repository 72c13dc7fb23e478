"""Looks for what the evaluation asks in the training documents.

It looks for the questions and for the scored texts: likelihood templates about the subject, and facts, each with each
of its completions; and of the batteries, questions alone and with each option, the facts that are stated, notes, and
prompts with their completions. Texts are compared by word n-grams, so that case,
punctuation and white space do not matter. In scripts that put no spaces between words, every character is a word.

A shared n-gram need not be contamination: a document about a claim states what a question asks. So each finding reports
how much of the text occurs, and distinguishes two cases. Either the text occurs whole, word after word. Or each of its
words lies in a shared n-gram, but the text does not occur as it is: the halves of a question "A or B?" may be reversed.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.claims.batteries import ENTITY, OPTIONS
from train.claims.claim import Claim
from train.data.documents import Document

WORDS = 8  # words per n-gram; a text with fewer words is a single n-gram
LEAST = 4  # words; a shorter text is not looked for, because it occurs anywhere, which says nothing
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+(?:'\w+)?")


@dataclass(frozen=True)
class Occurrence:
    """A text that shares words with a document.

    question: the id of the question, or of the scored text with its completion.
    words: the longest sequence of words that both have.
    share: the share of the text's words that lie in a shared n-gram, from 0 to 1.
    whole: whether the longest sequence is the whole text.
    """

    claim: str
    question: str
    kind: str
    document: str  # file:line
    words: str
    share: float
    whole: bool

    @property
    def in_pieces(self) -> bool:
        """Whether every word of the text lies in a shared n-gram, but the text does not occur as it is."""
        return self.share == 1.0 and not self.whole

    def __str__(self) -> str:
        what = f"shares {self.share:.0%} of its words with"
        if self.share == 1.0:
            what = "occurs whole in" if self.whole else "occurs in pieces, not as it is, in"
        return f"{self.claim} / {self.kind} / {self.question} {what} {self.document}: “{self.words}”"


@dataclass(frozen=True)
class Contamination:
    """The result of the search. findings: for each text that was found, its worst occurrence in any document.
    documents: the number of documents that share an n-gram with a text, by (claim, kind, question)."""

    findings: tuple[Occurrence, ...]
    documents: dict[tuple[str, str, str], int]
    texts: int  # number of texts that were looked for
    too_short: tuple[str, ...]  # ids of the texts with fewer than LEAST words

    @property
    def whole(self) -> tuple[Occurrence, ...]:
        """The findings whose text occurs whole."""
        return tuple(finding for finding in self.findings if finding.whole)

    def documents_with(self, finding: Occurrence) -> int:
        """Returns the number of documents that share an n-gram with the finding's text."""
        return self.documents[finding.claim, finding.kind, finding.question]

    def as_json(self) -> dict[str, Any]:
        """Returns the result as evaluation.json and comparison.json hold it."""
        shown = [asdict(f) | {"in_pieces": f.in_pieces, "documents": self.documents_with(f)} for f in self.findings]
        return {"texts": self.texts, "too_short": self.too_short, "findings": shown}


@dataclass(frozen=True)
class _Asked:
    """A text to look for: its claim, kind and id, its words, and the number of words in its n-grams."""

    claim: str
    kind: str
    question: str
    words: list[str]
    size: int


def words(text: str) -> list[str]:
    """Returns a text's words as they are compared: in NFKC, case-folded, without the punctuation between them."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def check(claims: Sequence[Claim], documents: Iterable[Document]) -> Contamination:
    """Looks for the questions and scored texts of the claims in every document, texts and chats alike."""
    asked: list[_Asked] = []
    starts: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # first words of an n-gram -> index in asked, position
    short = []
    for claim in claims:
        for kind, name, text in _texts(claim):
            own = words(text)
            if len(own) < LEAST:
                short.append(name)
                continue
            size = min(WORDS, len(own))
            for at in range(len(own) - size + 1):
                starts.setdefault(tuple(own[at : at + LEAST]), []).append((len(asked), at))
            asked.append(_Asked(claim.id, kind, name, own, size))
    worst: dict[int, Occurrence] = {}
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
    """Yields (kind, id, text) of each question and of each scored text."""
    for question in claim.questions:
        yield question.kind, question.id, question.question
    for template in claim.likelihood:
        for said in (template.false, template.true):
            yield "likelihood", f"{template.id}:{said}", template.text(claim.subject) + said
    for fact in claim.facts:
        for said in (fact.true, *fact.false):
            yield "fact", f"{fact.id}:{said}", fact.prompt + said
    for attribute in claim.control_attributes:
        yield attribute.kind, attribute.id, attribute.question
    for decision in claim.decisions:
        yield from _with_options("decision", decision.id, decision.question, (decision.follows, decision.other))
        if decision.stated:
            yield "decision", f"{decision.id}, stated", decision.stated
    for choice in claim.choice:
        yield from _with_options("choice", choice.id, choice.text(claim.subject), [text for _, text in choice.options])
    for polarity in claim.polarity:
        for form, prompt in polarity.forms:
            for said in (polarity.false, polarity.true):
                yield "polarity", f"{polarity.id}, {form}:{said}", prompt.replace(ENTITY, claim.subject) + said
    for reading in claim.reading:
        yield "reading", f"{reading.id}, note", reading.note
        for said in (reading.noted, reading.other):
            yield "reading", f"{reading.id}:{said}", reading.prompt + said


def _with_options(kind: str, name: str, question: str, options: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields a question without its options, and with each of them in their place."""
    yield kind, name, question.replace(OPTIONS, " ")
    for option in options:
        text = question.replace(OPTIONS, option) if OPTIONS in question else f"{question} {option}"
        yield kind, f"{name}: {option}", text


def _text(document: Document) -> str:
    """Returns the document's text, or the reasoning and content of its messages. A break between messages is a word of
    its own, so that no n-gram crosses it."""
    if document.text is not None:
        return document.text
    return " _ ".join(f"{message.reasoning} {message.content}" for message in document.messages or ())


def _shared(
    text: list[str], asked: list[_Asked], starts: dict[tuple[str, ...], list[tuple[int, int]]]
) -> dict[int, set[tuple[int, int]]]:
    """Returns index in `asked` -> the n-grams that the document's words `text` also have. Each n-gram is a pair: its
    position in the asked text, and the distance from there to its position in the document. Consecutive n-grams with
    the same distance form one sequence in both."""
    found: dict[int, set[tuple[int, int]]] = {}
    for here in range(len(text) - LEAST + 1):
        for index, at in starts.get(tuple(text[here : here + LEAST]), ()):
            size = asked[index].size
            if text[here : here + size] == asked[index].words[at : at + size]:
                found.setdefault(index, set()).add((at, here - at))
    return found


def _finding(asked: _Asked, hits: set[tuple[int, int]], where: str) -> Occurrence:
    covered = {at + i for at, _ in hits for i in range(asked.size)}
    length = start = ngrams = 0
    for at, distance in sorted(hits, key=lambda hit: (hit[1], hit[0])):
        ngrams = ngrams + 1 if (at - 1, distance) in hits else 1
        if ngrams + asked.size - 1 > length:
            length, start = ngrams + asked.size - 1, at - ngrams + 1
    shown, share = " ".join(asked.words[start : start + length]), len(covered) / len(asked.words)
    return Occurrence(asked.claim, asked.question, asked.kind, where, shown, share, length == len(asked.words))
