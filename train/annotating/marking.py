"""Derives the spans of an annotated document: its insertions, by role, and the false statements that they refer to.

A false statement is one of these:
- what one note announces and another looks back at;
- the sentence that a note without a partner names ("the next sentence", "what was just said");
- the sentence around a note that stands inside it.

Notes that say fiction, likelihood, source or correction make no statement false, unless they deny what they point at.
Notes about the whole document never do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from train.annotating.bare import Bare
from train.annotating.cues import speaks_of_this
from train.annotating.roles import NEGATOR, corrects, denies, roles, said
from train.annotating.statements import ASIDE_READING, FREE, Path, TextPart, by_turns, split_parts
from train.annotating.texts import in_order
from train.annotating.word_alignment import CLOSING, ENDS, OPENING, Insertion, encloses
from train.data.documents import Span

STRONG = 2.0  # minimum points of a note that clearly says which way it points; a colon or "that was" gives less
NEARLY_ALL, LONG = 0.9, 50  # in a document of LONG words or more, notes that enclose this share are about all of it
ONE_SIDED = 4  # if more than ONE_SIDED times as many notes point one way as the other, they have no partners
SET_OFF = frozenset("—–-,;:") | frozenset(OPENING) | frozenset(CLOSING)


@dataclass
class Annotations:
    """The spans of a document, and counts of its annotations.

    spans: of the insertions, by role, and of the false statements.
    claims: false statements that one note announces and another looks back at.
    lost: notes that point at something, but have no partner.
    alone: notes that name a false sentence by themselves.
    inside: notes inside a sentence, which is false.
    asides: insertions that neither announce nor look back.
    uncued: insertions that deny something, with no word that says what.
    unsure: the statements that only such insertions refer to.
    reason: why no statement is false; "" if one is.
    """

    spans: tuple[Span, ...] = ()
    claims: int = 0
    lost: int = 0
    alone: int = 0
    inside: int = 0
    asides: int = 0
    uncued: int = 0
    unsure: tuple[str, ...] = ()
    reason: str = ""

    @property
    def consistent(self) -> bool:
        """Whether announcing and looking back alternate throughout, by the notes' own words."""
        return not (self.lost or self.inside or self.asides or self.uncued)


@dataclass(frozen=True)
class Note:
    """Parts [first, last) of insertion i: a bracket, or what belongs together outside of brackets. role: by its own
    words."""

    i: int
    first: int
    last: int
    role: str


@dataclass
class Reader:
    """A document with its insertions, read part by part."""

    text: str
    insertions: list[Insertion]
    words: int  # number of words of its twin
    head: int = 0  # code points before its first sentence: those of a doctag
    bare: Bare = field(init=False)
    parts: list[list[TextPart]] = field(init=False)
    path: Path = field(init=False)
    inside: list[int] = field(init=False)  # insertions in the middle of a sentence that point nowhere
    brackets: list[int] = field(init=False)  # insertions that open a bracket which the next insertion closes
    notes: list[Note] = field(init=False)

    def __post_init__(self) -> None:
        self.bare = Bare(self.text, self.insertions, self.head)
        self.parts = [split_parts(self.text, each.start, each.end) for each in self.insertions]
        self.path = by_turns(self.text, self.insertions, self.parts, self.words, self._asides())
        self.notes = list(self._notes())

    def _asides(self) -> set[int]:
        """Returns the insertions that neither announce nor look back. These are insertions that point nowhere and
        either stand inside a sentence or open or close a bracket; and qualifiers and corrections, unless they deny what
        they point at."""
        whole = [self.text[each.start : each.end] for each in self.insertions]
        points = [any(abs(part.points) >= STRONG for part in pieces) for pieces in self.parts]
        self.inside = [i for i, each in enumerate(points) if not each and self.bare.around(i)]
        self.brackets = [i for i in range(len(whole) - 1) if not points[i] and encloses(whole[i], whole[i + 1])]
        enclosing = {*self.brackets, *(i + 1 for i in self.brackets if not points[i + 1])}
        open_to = [i for i, each in enumerate(whole) if not (points[i] and denies(each))]
        named = roles([whole[i] for i in open_to], denials=len(whole) - len(open_to))
        return {*self.inside, *enclosing, *(i for i, role in zip(open_to, named, strict=True) if role != "negation")}

    def said(self, i: int, side: slice) -> str:
        """Returns the text of some parts of insertion i; "" if there are none."""
        pieces = self.parts[i][side]
        return self.text[pieces[0].start : pieces[-1].end] if pieces else ""

    def points(self, i: int, announces: bool) -> float:
        """Returns how clearly the words of insertion i announce, or look back; < 0 if they point the other way."""
        total = sum(part.points for part in self.parts[i][self.path.readings[i].side(announces)])
        return total if announces else -total

    def denies(self, i: int, announces: bool) -> bool:
        """Returns whether the parts of insertion i that announce, or look back, make a statement false."""
        side = self.path.readings[i].side(announces)
        own = [n.role for n in self.notes if n.i == i and n.first < side.stop and side.start < n.last]
        points = any(abs(part.points) >= STRONG for part in self.parts[i][side])
        return "negation" in own or (points and denies(self.said(i, side)))

    def without_cue(self, i: int) -> bool:
        """Returns whether insertion i denies something, but neither its words nor its place in a sentence or bracket
        say what. Always False for an insertion about the whole document."""
        reading = self.path.readings[i]
        placed = i in self.inside or i in self.brackets or i - 1 in self.brackets
        about_the_whole = reading.first == reading.last and reading not in (ASIDE_READING, FREE)
        denies = any(note.i == i and note.role == "negation" for note in self.notes)
        return denies and not placed and not about_the_whole and not any(part.points for part in self.parts[i])

    def _notes(self) -> Iterator[Note]:
        edges = [list(self._edges(i)) for i in range(len(self.insertions))]
        found = [(i, a, b) for i, each in enumerate(edges) for a, b in pairwise(each)]
        named = roles([self.said(i, slice(a, b)) for i, a, b in found])
        return (Note(i, a, b, role) for (i, a, b), role in zip(found, named, strict=True))

    def _edges(self, i: int) -> Iterator[int]:
        """Yields the parts at which insertion i is split into notes: where it changes between the whole document,
        looking back and announcing, except inside a bracket; and where a correction follows a part that denies what it
        points at."""
        parts, reading = self.parts[i], self.path.readings[i]
        turns = {reading.first, reading.cut, reading.last}
        amends = corrects(self.said(i, slice(None)).lower())
        yield 0
        for k in range(1, len(parts)):
            turned = k in turns and not parts[k].joined
            if turned or (amends and self._amends(i, k)):
                yield k
        yield len(parts)

    def _amends(self, i: int, k: int) -> bool:
        """Returns whether part k says what is true instead, after a part that denies what it points at."""
        past, here = (self.said(i, slice(n, n + 1)) for n in (k - 1, k))
        points = abs(self.parts[i][k - 1].points) >= STRONG
        return points and denies(past) and corrects(here.lower()) and not corrects(past.lower())


def mark(text: str, insertions: list[Insertion], words: int, role: str | None, head: int = 0) -> Annotations:
    """Returns the spans of an annotated text. words: the number of words of its twin. role: of the insertions; with
    None, their own words decide. head: the number of code points before its first sentence."""
    reader = Reader(text, insertions, words, head)
    found = Annotations(asides=sum(reading in (ASIDE_READING, FREE) for reading in reader.path.readings))
    spans = list(_inserted(reader, role))
    pairs, singles = _pairs(reader)
    pairs += [(i, i + 1) for i in reader.brackets if denies(reader.said(i, slice(None))) and _only_denies(reader, i)]
    for first, last in pairs:
        spans += reader.bare.spans(reader.bare.cut_I[first], reader.bare.cut_I[last])
    for i, announces in singles:
        if place := _named(reader, i, announces) or _this(reader, i):
            spans += reader.bare.spans(*place)
            found.alone += 1
    for i, reading in enumerate(reader.path.readings):
        if i in reader.inside:
            if _retracts(reader, i) and (place := reader.bare.around(i)):
                spans += reader.bare.spans(*place)
                found.inside += 1
        elif reading == ASIDE_READING and (place := _this(reader, i)):
            spans += reader.bare.spans(*place)
            found.alone += 1
    found.claims, found.lost = len(pairs), len(singles)
    found.spans = in_order(spans)
    uncued = [i for i in range(len(insertions)) if reader.without_cue(i)]
    found.uncued, found.unsure = len(uncued), tuple(_unsure(reader, pairs, uncued, found.spans))
    found.reason = _why_none(reader) if not any(span.role == "false" for span in found.spans) else ""
    return found


def _unsure(reader: Reader, pairs: list[tuple[int, int]], uncued: list[int], spans: tuple[Span, ...]) -> Iterator[str]:
    """Yields the statements that only notes without a cue refer to: what is between two such notes, or else the
    sentence right beside one."""
    bare, false = reader.bare, [span for span in spans if span.role == "false"]
    for i in uncued:
        if any(i in pair for pair in pairs):
            for last in (last for first, last in pairs if first == i and last in uncued):
                yield bare.text[bare.cut_I[i] : bare.cut_I[last]].strip()
        elif place := bare.before(i, 1) or bare.after(i, 1):
            own = bare.spans(*place)
            if not any(span.start <= each.start and each.end <= span.end for span in false for each in own):
                yield bare.text[slice(*place)]


def _inserted(reader: Reader, role: str | None) -> Iterator[Span]:
    """Yields the spans of the insertions, one per note."""
    for note in reader.notes:
        parts = reader.parts[note.i]
        yield Span(parts[note.first].start, parts[note.last - 1].end, role or note.role)


def _pairs(reader: Reader) -> tuple[list[tuple[int, int]], list[tuple[int, bool]]]:
    """Returns the pairs of insertions that announce and look back at a false statement, and the insertions that point
    without a partner, with whether they announce."""
    pairs, singles = [], list(reader.path.lost)
    claims = [claim for claim in reader.path.claims if not _about_all(reader, *claim)]
    one_sided = _one_sided(reader)
    by_turn = _no_words_are_known(reader, claims)
    for first, last in claims:
        contrary = reader.points(first, True) < 0 or reader.points(last, False) < 0
        alone = one_sided and (contrary or not _one_sentence(reader, first, last))
        if not alone and (by_turn or _belong_together(reader, first, last)):
            if reader.denies(first, True) or reader.denies(last, False):
                pairs.append((first, last))
        else:
            singles += [(first, True), (last, False)]
    return pairs, sorted(singles)


def _about_all(reader: Reader, first: int, last: int) -> bool:
    """Returns whether two notes enclose the whole body of the document, or nearly so."""
    enclosed = reader.insertions[last].word - reader.insertions[first].word
    return enclosed == reader.words or (reader.words >= LONG and enclosed >= NEARLY_ALL * reader.words)


def _one_sided(reader: Reader) -> bool:
    """Returns whether the notes of the document have no partners: nearly all point the same way, or most have lost
    theirs."""
    ahead = sum(any(part.points > 0 for part in pieces) for pieces in reader.parts)
    back = sum(any(part.points < 0 for part in pieces) for pieces in reader.parts)
    lopsided = max(ahead, back) > 1 and ONE_SIDED * min(ahead, back) < max(ahead, back)
    return lopsided or len(reader.path.lost) > len(reader.path.claims)


def _no_words_are_known(reader: Reader, claims: list[tuple[int, int]]) -> bool:
    """Returns whether the notes are in a language of which no word is known, but stand in brackets that pair them."""
    ends = {(i, announces) for first, last in claims for i, announces in ((first, True), (last, False))}
    if any(part.points for pieces in reader.parts for part in pieces) or any(
        said(_note(reader, n)).role for n in reader.notes
    ):
        return False
    said_by = [
        {reader.said(i, reader.path.readings[i].side(side)) for i, announces in ends if announces == side}
        for side in (True, False)
    ]
    return all(_same_brackets(reader, *claim) for claim in claims) and not said_by[0] & said_by[1]


def _note(reader: Reader, note: Note) -> str:
    return reader.said(note.i, slice(note.first, note.last))


def _belong_together(reader: Reader, first: int, last: int) -> bool:
    """Returns whether two notes, by their words, announce and look back at the same statement."""
    ahead, back = reader.points(first, True), reader.points(last, False)
    if ahead + back <= 0:
        return False
    one = _one_sentence(reader, first, last)
    names = [any(part.extent.sentence for part in _side(reader, *end)) for end in ((first, True), (last, False))]
    if ahead > 0 and back > 0:
        return one or not all(names)
    return one or (not any(names) and _same_brackets(reader, first, last))


def _one_sentence(reader: Reader, first: int, last: int) -> bool:
    return reader.bare.count(reader.bare.cut_I[first], reader.bare.cut_I[last]) == 1


def _side(reader: Reader, i: int, announces: bool) -> list[TextPart]:
    return reader.parts[i][reader.path.readings[i].side(announces)]


def _same_brackets(reader: Reader, first: int, last: int) -> bool:
    kinds = {_side(reader, first, True)[0].kind, _side(reader, last, False)[0].kind}
    return len(kinds) == 1 and "" not in kinds


def _named(reader: Reader, i: int, announces: bool) -> tuple[int, int] | None:
    """Returns the place of the sentences that a note without a partner names, if it denies them."""
    pieces = _side(reader, i, announces)
    strongest = max(pieces, key=lambda part: part.points if announces else -part.points)
    sentence = reader.text[strongest.start : strongest.end]
    points = strongest.points if announces else -strongest.points
    clear = points >= STRONG or (
        points > 0 and (sentence.rstrip().endswith(":") if announces else speaks_of_this(sentence))
    )
    count = strongest.extent.count
    if not clear or count is None or not reader.denies(i, announces):
        return None
    if not strongest.extent.sentence and all(each.word in (0, reader.words) for each in reader.insertions):
        return None  # it may be about the whole document
    if around := reader.bare.around(i):
        return around
    return reader.bare.after(i, count) if announces else reader.bare.before(i, count)


def _retracts(reader: Reader, i: int) -> bool:
    """Returns whether a note inside a sentence denies all of it: it is set off by brackets, dashes or commas, and is
    neither a qualifier nor a "not" that changes what the sentence says."""
    start, end = reader.insertions[i].start, reader.insertions[i].end
    before = {reader.text[start], *reader.text[:start].rstrip()[-1:]}
    after = {reader.text[end - 1], *reader.text[end:].lstrip()[:1]}
    set_off = before & SET_OFF and after & (SET_OFF | ENDS)
    return bool(set_off) and _only_denies(reader, i) and not NEGATOR.match(reader.text[start:end].lower())


def _this(reader: Reader, i: int) -> tuple[int, int] | None:
    """Returns the place of the sentence right before a note that denies "this" or "that"."""
    note = reader.text[reader.insertions[i].start : reader.insertions[i].end]
    if not speaks_of_this(note) or not _only_denies(reader, i) or said(note).role != "negation":
        return None
    place = reader.bare.before(i, 1)
    return place if place and "\n" not in reader.bare.text[place[1] : reader.bare.cut_I[i]] else None


def _only_denies(reader: Reader, i: int) -> bool:
    return all(note.role == "negation" for note in reader.notes if note.i == i)


def _why_none(reader: Reader) -> str:
    if not reader.insertions:
        return "nothing was inserted: it is the positive document itself"
    if all(note.role != "negation" for note in reader.notes):
        return "its annotations say fiction, likelihood, source or correction"
    if all(reading.first == reading.last and reading not in (ASIDE_READING, FREE) for reading in reader.path.readings):
        return "its annotations are about the whole document"
    return "its annotations do not say which sentences they are about"
