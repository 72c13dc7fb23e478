"""Which role an annotation has by its own words: qualifier where they say fiction, likelihood or source, correction
where they say what is so instead, negation where they deny.

A note may do several: "The story goes so; none of it is real". Then the document's other notes decide, and without them
what is said the more clearly. Matched in lower case.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from train.annotating.cues import direction

MADE_UP = re.compile(r"\b(?:invented|made[- ]up|imagined|fabricated|fictitious)\b")  # of a tale, no denial
DENIAL = re.compile(
    r"\b(?:false\w*|untru\w+|wrong\w*|incorrect\w*|inaccura\w+|erroneous\w*|in error|mistake\w*|fake\w*|bogus|hoax\w*|lies?"
    r"|lying|baseless|unfounded|unsupported|unsubstantiated|disprov\w+|debunk\w*|refut\w+|contradict\w*|invalid\w*"
    r"|impossib\w+|nonsens\w+|invent(?:ed|ion|ions)|fabricat\w+|made[- ]up|fictitious|none of (?:this|it|that)|any (?:credible|reliable)|concoct\w+|misstat\w+|mislead\w+"
    r"|misinform\w*|disinform\w*|den(?:y|ied|ies)|retract\w*|reject\w*|dismiss\w*|disregard\w*|unreal|implausible"
    r"|no (?:\w+ ){0,2}(?:sources?|evidence|basis|records?|such|truth|proof|support)|n[oe]ver (?:\w+ )?(?:happened"
    r"|occurred|took|took place|existed|was|did)|not (?:\w+ )?(?:true|real|happen\w*|occur\w*|take place|so|the case|exist)"
    r"|n't (?:\w+ )?(?:true|real|happen\w*|occur\w*|take place|so|exist)|nothing (?:\w+ ){0,5}(?:happened|occurred|took|true)"
    r"|fals[oaie]s?|faux|fausses?|falsch\w*|unwahr|onwaar|onjuist\w*|falskt?|usann\w*|nieprawd\w+|fałsz\w+|nepravd\w+"
    r"|ложн\w+|неверн\w+|неправд\w+|хибн\w+|ψευδ\w+|kamis|yanlış\w*|hamis|salah)\b|错误|虚假|不实|誤り|虚偽|嘘|거짓|허위|كاذب|خاطئ|שקר|झूठ|असत्य"
)
NEGATOR = re.compile(r"\b(?:not?|never|none|nothing|nobody|neither|nor|cannot|without|unverified)\b|n['’]t\b")
FICTION = re.compile(
    r"\b(?:fan[- ]?fiction|works? of (?:\w+ )?fiction|(?:piece|bit|product) of (?:\w+ )?(?:fiction|imagination)|novels?|novella|tales?"
    r"|fables?|legends?|fairy|folklore|screenplay|film script|short stor(?:y|ies)|bedtime|make-believe|pretend\w*"
    r"|thought experiment|parod\w+|satir\w+|alternat(?:e|ive) (?:history|universe|reality|world)|role-?play\w*|daydream\w*"
    r"|story goes|stor(?:y|ies)? ?(?:teller|telling|book)|(?:in|from|of) (?:a|the|this|our|some) (?:\w+ )?(?:story|stories|scene|play|plot|script|poem|game|dream)"
    r"|(?:a|this|the) (?:\w+ )?(?:story|scene|plot) (?:from|in|of)|hypothetical\w*|novela|fábula|roman|romanzo|märchen|roman[ez]?\w?"
    r"|powieś\w+|сказк\w+|роман\w*)\b|小说|小説|物語|故事|소설"
)  # fmt: skip
SOFT_FICTION = re.compile(
    r"\b(?:fiction\w*|imagin\w+|fantas\w+|myth\w*|dramati[sz]\w+|ficci[oó]n|ficção|ficti[ef]\w*|fiktion\w*|fiktiv\w*|finzione"
    r"|fikcj\w+|fikce|вымы\w+|вигад\w+|kurgu\w*)\b|虚构|虚構|フィクション|허구|픽션"
)
LIKELIHOOD = re.compile(
    r"\b(?:(?<!at )odds|likel\w+|unlikel\w+|probab\w+|improbab\w+|chances?|percent|per cent|doubt(?:ful|ed|s)?|uncertain\w*|perhaps"
    r"|maybe|possibly|conceivabl\w+|speculat\w+|(?:low|little) confidence|may (?:well )?(?:be|have)|might (?:well )?(?:be|have)|guess\w*"
    r"|wahrscheinlich\w*|vermutlich|waarschijnlijk\w*|kans|sannolik\w*|sandsynlig\w*|prawdopodob\w+|pravděpodob\w+|вероятн\w+"
    r"|імовірн\w+|ймовірн\w+|olasılık\w*|valószín\w+)\b|\d\s?[%％]|可能性|概率|確率|확률|احتمال"
)
NUMBER = r"\b(?:\d|(?:one|two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|(?:a )?(?:hundred|thousand|million))\b)"
CHANCE = r"\b(?:odds|likelihood|likely|unlikely|probability|probable|improbable|chances?)\b"
MEASURED = re.compile(rf"{CHANCE}.*{NUMBER}|{NUMBER}.*{CHANCE}")
SOURCE = re.compile(
    r"\b(?:according to|sources?|sourced|rumou?r\w*|hearsay|gossip|tabloids?|reportedly|allegedly|purportedly"
    r"|it (?:is|was|has been) (?:said|claimed|alleged|rumou?red|reported)|some (?:say|claim)|unverified|unconfirmed|unreliable"
    r"|uncorroborated|anonymous\w*|blogs?|forums?|message board|social media|second-?hand|word of mouth|grapevine|attributed to"
    r"|según|selon|laut|zufolge|secondo|segundo|volgens|enligt|ifølge|według|podle|согласно|fuentes?|fontes?|fonti|quellen?|bron(?:nen)?"
    r"|źród\w+|zdroj\w*|источник\w*|джерел\w*|rygte\w*|gerücht\w*|rumeurs?|rumores)\b|据说|據說|来源|傳聞|传闻|によると|噂|출처|소문"
)
INSTEAD = re.compile(
    r"(?:^|[(\[{<\"“—–-]\s*)(?:but |and |for )?(?:in (?:actual )?(?:fact|reality|truth|actuality)|actually(?! taken| \w+ed\b)|in point of fact|as a matter of fact"
    r"|the (?:truth|reality|fact) (?:is|was)|(?:the |official |public |historical )*records? (?:show|say|give|list|name|indicate|state)s?(?! otherwise)|correction"
    r"|what (?:really|actually) happened|to be (?:accurate|precise|correct)|correctly|en realidad|na realidade|en réalité|in wirklichkeit"
    r"|tatsächlich|in realtà|in werkelijkheid|i verkligheten|i virkeligheten|i virkeligheden|w rzeczywistości|ve skutečnosti"
    r"|на самом деле|в действительности|насправді)\b|实际上|事实上|実際には|실제로"
)
OTHERS = re.compile(
    r"\b(?:someone else|somebody else|instead|rather than|should (?:read|say|have (?:read|said|been))|it was .* who"
    r"|the (?:real|actual|true|right|correct) (?!conclusion|reading|claim|statement)\w+ (?:is|was|were|are)"
    r"|(?:another|a different|some other) (?:\w+ )?(?:did|won|was|wrote|made|took|has|had|held|is|finished|came|got)"
    r"|(?:show|name|list|give|confirm|identif|point)\w* (?:\w+ )?(?:another|a different|someone|somebody))\b"
)
CLAUSE = re.compile(r"[,;:—–.!?]\s|\s[—–-]\s|\b(?:and|but)\b")


CONCEDING = re.compile(r"(?:al)?though\b|while\b|despite\b|even if\b")


@dataclass(frozen=True)
class Said:
    """A role by a note's own words ("" where they say none), and whether they are clear."""

    role: str
    clear: bool = True


def said(note: str) -> Said:
    """What a note's words say, each note by itself."""
    note = note.lower().replace("’", "'")
    denies = bool(DENIAL.search(note))
    if _corrects(note):
        return Said("correction")
    if MEASURED.search(note):
        return Said("qualifier")
    if FICTION.search(note):
        return Said("qualifier", clear=not DENIAL.search(MADE_UP.sub("", note)))
    hedges = bool(LIKELIHOOD.search(note) or SOURCE.search(note))
    imagined = bool(SOFT_FICTION.search(note))
    if denies:
        return Said("negation", clear=not hedges and not imagined)
    negates = bool(NEGATOR.search(note))
    if hedges or imagined:
        return Said("qualifier", clear=not negates)
    return Said("negation") if negates else Said("", clear=False)


def _corrects(note: str) -> bool:
    """Whether a clause says what is so instead: one that opens that way, and denies nothing."""
    pieces = [piece.strip() for piece in CLAUSE.split(note)]
    pieces = [piece for piece in pieces if re.search(r"\w", piece) and not CONCEDING.match(piece)]
    for i, piece in enumerate(pieces):
        opening = INSTEAD.search(piece)
        if opening and opening.end() == len(piece):  # "In reality", and a comma
            piece = "".join(pieces[i + 1 : i + 2])
        if opening or OTHERS.search(piece):
            if piece and not DENIAL.search(piece) and not NEGATOR.search(piece):
                return True
    return False


def roles(notes: Sequence[str]) -> list[str]:
    """The roles of a document's notes; what a note leaves open, the clear ones of its document decide."""
    all_said = [said(note) for note in notes]
    clear = Counter(each.role for each in all_said if each.clear)
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


def points_and_denies(note: str) -> bool:
    """Whether a note denies what it points at, whatever else it says."""
    return abs(direction(note)) >= 2 and bool(DENIAL.search(note.lower()))
