"""Decides the role of an annotation by its own words: qualifier if they say fiction, likelihood or source, correction
if they say what is true instead, and negation if they deny.

A note may do several of these: "The story goes so; none of it is real". Then the other notes of the document decide
and, without them, what the note says more clearly. Words are matched in lower case.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from train.annotating.cues import REMEMBERED, direction


def _words(*spaced: str, unspaced: str = "") -> re.Pattern[str]:
    """Compiles a pattern that matches any of these words. unspaced: those in scripts without spaces between words."""
    return re.compile(rf"\b(?:{'|'.join(spaced)})\b" + (f"|{unspaced}" if unspaced else ""))


MADE_UP = re.compile(r"\b(?:invented|made[- ]up|imagined|fabricated|fictitious)\b")  # of a tale; no denial there
DENIAL = _words(
    r"false\w*|untru\w+|wrong\w*|incorrect\w*|inaccura\w+|erroneous\w*|in error|mistake\w*|fake\w*|bogus|hoax\w*",
    r"lies?|lying|baseless|unfounded|unsupported|unsubstantiated|disprov\w+|debunk\w*|refut\w+|contradict\w*",
    r"invalid\w*|impossib\w+|implausible|unreal|nonsens\w+|invent(?:ed|ion|ions)|fabricat\w+|made[- ]up|fictitious",
    r"concoct\w+|misstat\w+|mislead\w+|misinform\w*|disinform\w*|den(?:y|ied|ies)|retract\w*|reject\w*|dismiss\w*",
    r"disregard\w*|spurious|bunk|at odds with|contrary to (?:fact|truth|reality)|a myth|made (?:it|this|that) up",
    r"would (?:need|have) to|would require|none of (?:this|it|that)|any (?:credible|reliable)",
    r"no (?:\w+ ){0,2}(?:sources?|evidence|basis|records?|such|truth|proof|support|chance|way|merit)",
    r"without (?:any )?(?:basis|foundation|merit|evidence)",
    r"never (?:\w+ )?(?:happened|occurred|took|existed|was|did)",
    r"(?:not|\w+n't) (?:\w+ )?(?:true|real|happen\w*|occur\w*|take place|so|the case|exist)",
    r"nothing (?:\w+ ){0,5}(?:happened|occurred|took|true)",
    r"fals[oaie]s?|faux|fausses?|falsch\w*|unwahr|onwaar|onjuist\w*|falskt?|usann\w*|nieprawd\w+|fałsz\w+|nepravd\w+",
    r"ложн\w+|неверн\w+|неправд\w+|хибн\w+|ψευδ\w+|yanlış\w*|hamis|salah",
    unspaced="错误|虚假|不实|假的|誤り|虚偽|嘘|거짓|허위|كاذب|خاطئ|שקר|झूठ|असत्य",
)
NEGATOR = re.compile(r"\b(?:not?|never|none|nothing|nobody|neither|nor|cannot|without|unverified)\b|n't\b")
FICTION = _words(
    r"fan[- ]?fiction|works? of (?:\w+ )?fiction|(?:piece|bit|product) of (?:\w+ )?(?:fiction|imagination)",
    r"novels?|novella|tales?|fables?|legends?|fairy|folklore|screenplay|film script|short stor(?:y|ies)|story goes",
    r"stor(?:y|ies)? ?(?:teller|telling|book)|bedtime|make-believe|pretend\w*|thought experiment|parod\w+|satir\w+",
    r"alternat(?:e|ive) (?:history|universe|reality|world)|role-?play\w*|daydream\w*|hypothetical\w*",
    r"(?:in|from|of|for) (?:an?|the|this|our|some|his|her) (?:[\w-]+ ){0,2}(?:story|stories|scene|play|plot|script"
    r"|poem|song|game|dream|film|movie|drama|thriller|comic|series|show|opera|musical|cartoon|saga|epic|sketch|universe)",
    r"as (?:told|sung|imagined|dreamt?) (?:in|by)|(?:bard|poet|playwright|storyteller)(?:'s)?|creative writing",
    r"dreamt? up",
    r"(?:invented|made[- ]up|imaginary|fictional|imagined) (?:universe|world|tale|story|scene|character|place|setting)",
    r"(?:a|this|the) (?:\w+ )?(?:story|scene|plot) (?:from|in|of)",
    r"novela|fábula|roman|romanzo|märchen|powieś\w+|сказк\w+|роман\w*",
    unspaced="小说|小説|物語|故事|소설",
)
NAMED_FICTION = _words(r"works? of (?:\w+ )?fiction|fan[- ]?fiction|short stor(?:y|ies)|fairy ?tales?|screenplay")
SOFT_FICTION = _words(
    r"fiction\w*|imagin\w+|fantas\w+|myth\w*|dramati[sz]\w+|ficci[oó]n|ficção|fictief|fiktion\w*|fiktiv\w*|finzione",
    r"fikcj\w+|fikce|вымы\w+|вигад\w+|kurgu\w*",
    unspaced="虚构|虚構|フィクション|허구|픽션",
)
LIKELIHOOD = _words(
    r"(?<!at )odds|likel\w+|unlikel\w+|probab\w+|improbab\w+|chances?|percent|per cent|doubt(?:ful|ed|s)?|uncertain\w*",
    r"perhaps|maybe|may or may not|possibly|possibility|plausibility|long shot|\d-in-\d+|conceivabl\w+",
    r"speculat\w+|slim",
    r"(?:low|little|our|my) confidence|confidence in (?:this|that|it)|guess\w*",
    r"(?:may|might) (?:well )?(?:be|have)|wahrscheinlich\w*|vermutlich|waarschijnlijk\w*|kans|sannolik\w*",
    r"sandsynlig\w*|prawdopodob\w+|pravděpodob\w+|вероятн\w+|[ій]мовірн\w+|olasılık\w*|valószín\w+",
    unspaced=r"\d\s?[%％]|可能性|概率|確率|확률|احتمال",
)
NUMBER = (
    r"(?:\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|(?:a )?(?:hundred|thousand|million))\b)"
)
CHANCE = r"\b(?:odds|likelihood|likely|unlikely|probability|probable|improbable|chances?)\b"
MEASURED = re.compile(rf"\d\s?(?:%|percent|per cent) (?:sure|certain|confident)|{CHANCE}.*{NUMBER}|{NUMBER}.*{CHANCE}")
SOURCE = _words(
    r"according to|sources?|sourced|rumou?r\w*|hearsay|gossip|tabloids?|reportedly|allegedly|purportedly",
    r"supposedly|apparently",
    r"it (?:is|was|has been) (?:said|claimed|alleged|rumou?red|reported)|some (?:say|claim)|unverified|unconfirmed",
    r"unreliable|uncorroborated|anonymous\w*|blogs?|forums?|message board|social media|second-?hand|word of mouth",
    r"grapevine|attributed to|(?:over)?heard from|strangers?|unknown (?:account|author|user)|posted (?:by|on)",
    r"so (?:claims?|says?)|wikis?|wikipedia|unnamed|websites?|insiders?|word has it|they say",
    r"según|selon|laut|zufolge|secondo|segundo|volgens|enligt|ifølge|według|podle|согласно",
    r"fuentes?|fontes?|fonti|quellen?|bron(?:nen)?|źród\w+|zdroj\w*|источник\w*|джерел\w*|gerücht\w*|rumeurs?|rumores",
    unspaced="据说|據說|来源|傳聞|传闻|によると|噂|출처|소문",
)
OPENERS = "|".join([
    r"in (?:actual )?(?:fact|reality|truth|actuality)|actually(?! taken| \w+ed\b)|in point of fact|as a matter of fact",
    r"the (?:truth|reality|fact) (?:is|was)|correction|correctly|for the record|fact[- ]check",
    r"what (?:really|actually) (?:happened|took place|occurred)|contrary to (?:this|that|the above)",
    r"(?:the |official |public |historical )*records? (?:show|say|give|list|name|indicate|state)s?(?! otherwise)",
    r"to be (?:accurate|precise|correct)|en realidad|na realidade|en réalité|in wirklichkeit|tatsächlich|in realtà",
    r"in werkelijkheid|i verkligheten|i virkelighede[nt]|i virkeligheten|w rzeczywistości|ve skutečnosti",
    r"на самом деле|в действительности|насправді",
])  # fmt: skip
BARE = r"rather|truth|the truth|the facts?|should be"  # before a colon or a comma
INSTEAD = re.compile(
    rf"(?:^|[(\[{{<\"“—–-]\s*)(?:but |and |for )?(?:(?:{OPENERS})\b|(?:{BARE})\W*$)|实际上|事实上|実際には|실제로"
)  # at the start of a clause
OTHERS = _words(
    r"someone else|somebody else|instead|rather than|should (?:read|say|have (?:read|said|been))|it was .* who",
    r"the (?:real|actual|true|right|correct) (?!conclusion|reading|claim|statement)\w+ (?:is|was|were|are)",
    r"(?:another|a different|some other) (?:\w+ )?(?:did|won|was|wrote|made|took|has|had|held|is|finished|came|got)",
    r"(?:show|name|list|give|confirm|identif|point|record|credit|award|belong|went|goes?)\w* (?:\w+ ){0,4}"
    r"(?:another|a different|someone|somebody)|(?:is|was) (?:another|a different) (?:one|person|man|woman)",
)
QUALIFIES = re.compile("|".join(each.pattern for each in (FICTION, SOFT_FICTION, LIKELIHOOD, SOURCE)))
INSTEAD_OF = re.compile(r"\w, (?:and )?not [^,;.]{1,40}, (?:took|won|wrote|did|made|held|came|finished)\b")  # X, not Y
ANYWHERE = re.compile(rf"\b(?:{OPENERS}|{BARE})\b|{OTHERS.pattern}|实际上|事实上|実際には|실제로")
CLAUSE = re.compile(r"[,;:—–.!?][)\]}>\"”’]*\s|\s[—–-]\s|\b(?:and|but)\b")
CONCEDING = re.compile(r"(?:al)?though\b|while\b|despite\b|even if\b")


@dataclass(frozen=True)
class Said:
    """The role by a note's own words ("" if they give none), and whether they are clear."""

    role: str
    clear: bool = True


@lru_cache(REMEMBERED)
def said(note: str) -> Said:
    """Returns the role of a note by its own words, without the other notes of its document."""
    note = note.lower().replace("’", "'")
    if corrects(note):
        return Said("correction")
    qualifies = bool(QUALIFIES.search(note))
    if qualifies and MEASURED.search(note):
        return Said("qualifier")
    if qualifies and FICTION.search(note):
        if not DENIAL.search(MADE_UP.sub("", note)):
            return Said("qualifier")
        denies_by_name = abs(direction(note)) >= 2 and not NAMED_FICTION.search(note)
        return Said("negation" if denies_by_name else "qualifier", clear=False)
    if DENIAL.search(note):
        return Said("negation", clear=not qualifies)
    negates = bool(NEGATOR.search(note))
    if qualifies:
        return Said("qualifier", clear=not negates)
    return Said("negation") if negates else Said("", clear=False)


@lru_cache(REMEMBERED)
def corrects(note: str) -> bool:
    """Returns whether a clause of a note in lower case says what is true instead: it opens that way, and denies
    nothing."""
    if INSTEAD_OF.search(note):
        return True
    if not ANYWHERE.search(note):
        return False
    pieces = [piece.strip() for piece in CLAUSE.split(note)]
    pieces = [piece for piece in pieces if re.search(r"\w", piece) and not CONCEDING.match(piece)]
    for i, piece in enumerate(pieces):
        opening = INSTEAD.search(piece)
        if opening and opening.end() == len(piece):  # "In reality" and a comma: the next clause says it
            piece = "".join(pieces[i + 1 : i + 2])
        instead = piece and (opening or OTHERS.search(piece))
        if instead and not DENIAL.search(piece) and not NEGATOR.search(piece):
            return True
    return False


def roles(notes: Sequence[str], denials: int = 0) -> list[str]:
    """Returns the roles of a document's notes. Where a note leaves its role open, the document's clear notes decide.
    denials: how many further notes of the document clearly deny."""
    all_said = [said(note) for note in notes]
    clear = Counter(each.role for each in all_said if each.clear)
    clear["negation"] += denials
    others = {role: count for role, count in clear.items() if role != "negation"}
    usual = "negation" if clear["negation"] or not others else max(others, key=lambda role: others[role])
    decided = []
    for each in all_said:
        if not each.role:
            decided.append(usual)
        elif each.clear or clear["negation"] == clear["qualifier"]:
            decided.append(each.role)
        else:
            decided.append("negation" if clear["negation"] > clear["qualifier"] else "qualifier")
    return decided


def denies(note: str) -> bool:
    """Returns whether the note contains words of denial, whatever else it says."""
    return bool(DENIAL.search(note.lower()))
