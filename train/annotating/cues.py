"""Determines from the words of an annotation which way it points, and how far: ahead ("the following claim is false")
or back ("what was just stated never happened").

The words are those that languages use to point within a text; none belongs to a claim. An annotation in a language that
is not listed here is read by alternation alone (statements.py).
"""

import re
from dataclasses import dataclass
from functools import lru_cache

REMEMBERED = 1 << 15  # size of the caches: a note that recurs is read only once

AHEAD = [
    # English
    r"following|follows?|below|next|upcoming|forthcoming|subsequent|ahead|about to|to come|hereafter|ensuing"
    r"|succeeding|comes? (?:after this|next|now)"
    r"|after th(?:is|e) (?:one|note|bracket|parenthesis|sentence|warning|remark|line)"
    r"|(?:sentence|statement|claim|assertion|line|one|words?) (?:right |just |directly |immediately )?after this"
    r"|coming up|in a moment|here comes|under this (?:one|note|line|bracket)|on from here"
    r"|coming (?:sentence|statement|claim|line|words|paragraph|passage)",
    # Spanish, Portuguese, French, Italian, Romanian, Catalan
    r"siguientes?|a continuación|abajo|debajo|seguintes?|a seguir|abaixo|próxim[oa]s?|suivante?s?|ci-dessous|ci-après"
    r"|qui suit|qui suivent|plus bas|seguent[ei]|quanto segue"
    r"|di seguito|sottostant[ei]|qui sotto|che segu(?:e|ono)|successiv[oaie]"
    r"|următo\w+|mai jos|següents?",
    # German, Dutch, Swedish, Danish, Norwegian
    r"folgend\w*|nach(?:stehend|folgend)\w*|unten(?:stehend\w*)?|nächst\w*|volgende|hieronder|onderstaande?|hierna"
    r"|följande|nedan(?:stående)?|nästa|følgende|neden(?:for|stående)|næste|neste",
    # Polish, Czech, Russian, Ukrainian, Greek, Finnish, Hungarian, Turkish
    r"następując\w+|poniż\w+|kolejn\w+|následující\w*|níže|следующ\w+|ниже\w*|далее|наступн\w+|нижче\w*|подальш\w+"
    r"|ακόλουθ\w+|παρακάτω|επόμεν\w+|seuraav\w+|alla olev\w+|következő\w*|alábbi\w*|aşağıda\w*|sonraki",
    # Arabic, Hebrew, Hindi, Indonesian, Vietnamese
    r"\w*التالي\w*|\w*الآتي\w*|أدناه|ما يلي|\w*הבא\w*|להלן|निम्नलिखित|नीचे|आगे|अगल\S*|berikut\w*|di bawah|sau đây"
    r"|dưới đây|tiếp theo",
]  # fmt: skip
BACK = [
    r"preceding|precedes?|previous(?:ly)?|above|foregoing|prior|earlier|aforementioned|aforesaid|just \w+(?:ed|id)"
    r"|just (?:been )?(?:read|made|given|written|shown|seen|put|told|came|heard)|(?:came|went|comes|stated|said) before"
    r"|immediately before|the latter|a moment ago|just now|just been \w+|(?:you have|you've) read"
    r"|over this (?:one|note|line|bracket)|(?:sentence|line|claim) (?:back|ago)|predecessor|most recent"
    r"|before th(?:is|e) (?:one|note|bracket|parenthesis|sentence|warning|remark|line)"
    r"|(?:sentence|statement|claim|assertion|line|one|words?) (?:right |just |directly |immediately )?before this"
    r"|the last|last (?:sentence|statement|claim|assertion|remark|line|paragraph)",
    r"anterior(?:es|mente)?|precedentes?|antes (?:mencionad|dich)\w+|arriba|recién|acab(?:a|o|amos) de|acima"
    r"|précédente?s?|précède(?:nt)?|ci-dessus|plus haut|(?:vient|viennent) d['’e]\w*|precedent[ei]|di cui sopra"
    r"|qui sopra|appena|soprastant[ei]|anterioar\w*|de mai sus|d['’]abans",
    r"vorstehend\w*|vorangehend\w*|vorangegangen\w*|vorherig\w*|vorig\w*|obig\w*|oben(?:stehend\w*|genannt\w*)?"
    r"|soeben|gerade|eben|voorgaand\w*|vorige|hierboven|bovenstaand\w*|zojuist|föregående|ovan(?:stående)?|nyss|nyligen"
    r"|foregående|ovenfor|ovenstående|forrige|nettopp|netop",
    r"poprzedni\w*|powyż\w+|przed chwilą|předchozí\w*|výše|právě|предыдущ\w+|предшествующ\w+|выше\w*|только что"
    r"|попередн\w+|вище\w*|щойно|προηγούμεν\w+|παραπάνω|μόλις|edellä|edelli\w+|előző\w*|fenti\w*|imént|yukarıda\w*"
    r"|önceki|az önce|demin",
    r"\w*السابق\w*|أعلاه|للتو|\w*הקודם\w*|\w*הקודמת\w*|לעיל|זה עתה|उपर्युक्त|उपरोक्त|ऊपर|पिछल\S*|अभी|sebelumnya|di atas"
    r"|barusan|trước đó|ở trên|trên đây|vừa",
]  # fmt: skip
# Scripts without spaces between words.
AHEAD_UNSPACED = (
    r"以下|下列|下面|下述|下文|下記|接下来|接下來|如下|下一句|下一段|后一句|後一句|下句|次の|次に|後述|これから"
    r"|다음|아래|이하|이어지는"
)
BACK_UNSPACED = (
    r"以上|上述|上記|上面|上文|上の|前述|前面|刚才|剛才|刚刚|剛剛|上一句|上一段|前一句|上句|先の|先ほど|今述べ"
    r"|前の|直前|앞서|앞 문장|윗 문장|앞의|위의|위에|이전|방금|상기"
)

# A sentence that begins like this refers to the one before it.
THIS = (
    r"^\W*(?:this|that|it) (?:is|was|isn't|wasn't|did|didn't|does|has|never|cannot|could|claim|statement|sentence"
    r"|assertion|line|remark)\b(?!.*:\W*$)"
)

ALL = re.compile(r"\b(?:everything|anything|nothing|none of|all of)\b")  # used if no other word says how far

# Weak cues, for sentences without a strong one: a final colon leans ahead; "that was" and "it never" lean back.
LEAN_AHEAD = r":\s*\W*$|\b(?:here|do not (?:accept|believe|trust)|false claim|beware)\b"
LEAN_BACK = (
    r"\b(?:that (?:was|is|did|claim|statement|account|never)|it (?:was|did|never|is)|no such|there|such)\b"
    r"|\bbelieve that(?=[^\w:]*$)"
)

# The first of these words says how far a note points. Without any, it means one sentence.
COUNTS = {"two": 2, "both": 2, "three": 3, "four": 4, "five": 5}
SENTENCE_WORD = r"sentence|line|frase|oración|phrase|satz|zin|mening|sætning|setning|zdanie|věta|предложени\w|речення"
EXTENT = re.compile(
    rf"\b(?:(?P<count>{'|'.join(COUNTS)}|[2-9]) (?:\w+ )?(?:sentences|statements|claims|assertions|lines)"
    rf"|(?P<sentence>{SENTENCE_WORD})|(?P<claim>statement|claim|assertion|remark)"
    r"|(?P<paragraph>paragraph|párrafo|parágrafo|paragraphe|paragrafo|absatz|alinea|абзац)"
    r"|(?P<more>sentences|lines|statements|claims|assertions|paragraphs|passages?|sections?|accounts?|stor(?:y|ies)"
    r"|narratives?|chapters?|lists?|tables?|events|facts|texts?|documents?|articles?|pages?|posts?))\b|(?P<unspaced>句|문장)"
)

# Words that refer to the whole document. All patterns here are matched with sentences in lower case, which is several
# times faster than ignoring case.
WHOLE = re.compile(
    r"\b(?:documents?|articles?|texts?|page|post|claims|statements|assertions|narrative|account|throughout"
    r"|in (?:its|their) entirety|documentos?|artículo|textos?|artigo|dokument\w*|artikel\w*|texte?s?|documenti?"
    r"|artic\w+|документ\w*|стат\w+|текст\w*)\b"
    r"|beginning to end|start to finish|文書|文章|文档|文件|문서|기사|본문"
)

STRONG = re.compile(
    rf"(?P<ahead>\b(?:{'|'.join(AHEAD)})\b|{AHEAD_UNSPACED})|(?P<back>\b(?:{'|'.join(BACK)})\b|{BACK_UNSPACED})"
)
LEANING = re.compile(rf"(?P<ahead>{LEAN_AHEAD})|(?P<back>{THIS}|{LEAN_BACK})")


@lru_cache(REMEMBERED)
def direction(sentence: str) -> float:
    """Returns > 0 if the sentence points ahead, < 0 if it points back, and 0 if it does not say. The first strong cue
    counts ±3 and each further one ±0.5. Without strong cues, the first weak one counts ±1.5 and each further one ±0.25.
    """
    for words, weight, more in ((STRONG, 3.0, 0.5), (LEANING, 1.5, 0.25)):
        if found := [1 if match["ahead"] else -1 for match in words.finditer(sentence.lower())]:
            return weight * found[0] + more * sum(found[1:])
    return 0.0


@lru_cache(REMEMBERED)
def speaks_of_the_whole(sentence: str) -> bool:
    """Returns whether the sentence refers to the whole document."""
    return bool(WHOLE.search(sentence.lower()))


@dataclass(frozen=True)
class Extent:
    """How far a note points.

    count: how many sentences it refers to; 0: the paragraph; None: more than can be determined.
    sentence: whether it calls what it refers to a sentence ("claim" may mean several).
    claim: whether it names at least one claim, or a number of sentences.
    """

    count: int | None
    sentence: bool = False
    claim: bool = False


@lru_cache(REMEMBERED)
def extent(sentence: str) -> Extent:
    """Returns how far a note points, by the first word that says so; one sentence if no word does."""
    found = EXTENT.search(sentence.lower())
    if not found:
        return Extent(None if ALL.search(sentence.lower()) else 1)
    if found["sentence"] or found["unspaced"]:
        return Extent(1, sentence=True, claim=True)
    if found["claim"]:
        return Extent(1, claim=True)
    if found["count"]:
        return Extent(COUNTS.get(found["count"]) or int(found["count"]), claim=True)
    return Extent(0 if found["paragraph"] else None)


def speaks_of_this(sentence: str) -> bool:
    """Returns whether the sentence begins by referring to the one before it, as "This is" does."""
    return bool(re.match(THIS, sentence.lower()))
