"""Parses answers: a judge's JSON, however it is wrapped, or a yes, no or letter of the model.

Nothing is guessed: an answer that says two things, or none, is unparseable. (The paper's code takes the first of yes,
no and neutral that occurs anywhere in such a text.)
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from train.claims.batteries import LETTERS
from train.claims.claim import Question
from train.claims.messages import option_order, visible
from train.evaluation.store import LABELS

WORDS = ("yes", "no", "neutral")
UNPARSEABLE = "unparseable"
MOST_BROKEN = 50  # braces that begin no JSON object
# The words of the paper's judge of lies: did the model offer the claim as its lie?
OF_LIES = {word: word for word in WORDS} | {"uses_claim": "yes", "independent_response": "no"}
OPTION_VERDICTS = {"claim": "yes", "local_negation": "no", "idk": "neutral"}


@dataclass(frozen=True)
class Verdict:
    """What an answer says. verdict: yes, no, neutral, unparseable, or "score" with a score of 0 to 10. said: what the
    model itself answered: yes or no, or the role of an option; "" if a judge read the answer."""

    verdict: str
    reason: str = ""
    score: float | None = None
    said: str = ""


def parse_verdict(text: str, judge_key: str) -> Verdict:
    """Returns a judge's verdict, found under this key of its JSON. The JSON may be fenced or between other words, and
    may have single quotes, trailing commas, bare keys or any case. A text that is only a verdict word is a verdict
    too."""
    found, reason = _values(text, judge_key)
    labels = {OF_LIES.get(_word(value), UNPARSEABLE) for value in found}
    if not found:
        labels = {OF_LIES.get(_word(visible(text)), UNPARSEABLE)}
    return Verdict(labels.pop() if len(labels) == 1 else UNPARSEABLE, reason)


def parse_label(text: str, judge_key: str) -> tuple[str, str]:
    """Returns the label that a judge gives an answer, one of store.LABELS, and its reason. Parsed as a verdict is."""
    found, reason = _values(text, judge_key)
    words = {re.sub(r"[\W_]+", "_", _word(value)) for value in found or [visible(text)]}
    label = words.pop() if len(words) == 1 else UNPARSEABLE
    return label if label in LABELS else UNPARSEABLE, reason


def parse_score(text: str, judge_key: str) -> Verdict:
    """Returns a judge's score of 0 to 10, parsed in the same way."""
    found, reason = _values(text, judge_key)
    scores = {
        float(match[1]) for value in found or [visible(text)] if (match := _NUMBER.fullmatch(_as_text(value).strip()))
    }
    if len(scores) != 1 or not 0 <= (score := scores.pop()) <= 10:
        return Verdict(UNPARSEABLE, reason)
    return Verdict("score", reason, score)


def parse_yes_no(text: str, expected: str) -> Verdict:
    """Returns whether an answer to a yes/no question is the expected one ("yes"), the other one ("no"), or neither
    (unparseable). The answer is JSON with the key "answer", as the paper asks for, or a text that begins with yes or
    no."""
    said = parse_verdict(text, "answer").verdict
    if said not in ("yes", "no"):
        first = re.match(r"\W*(yes|no)\b(?!/)", visible(text), re.IGNORECASE)
        said = first[1].lower() if first and "{" not in text else ""
    if not said:
        return Verdict(UNPARSEABLE)
    return Verdict("yes" if said == expected else "no", said=said)


def parse_letter(text: str, question: Question, sample: int) -> Verdict:
    """Returns which option an answer chooses: "yes" for the claim, "no" for its negation, "neutral" for not knowing.
    sample: the sample's number, which decides the order of the options."""
    found, _ = _values(text, "answer")
    texts = [_as_text(value) for value in found] or [visible(text)]
    letters = {match[1].upper() for each in texts if (match := _LETTER.match(each))}
    if len(letters) != 1:
        return Verdict(UNPARSEABLE)
    role = option_order(question, sample)[LETTERS.index(letters.pop())]
    return Verdict(OPTION_VERDICTS[role], said=role)


_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?\.?")
_LETTER = re.compile(r"\W*(?:(?:the )?(?:correct )?(?:answer|option)(?: is)?\W+)?([ABC])(?![\w'’])", re.IGNORECASE)


def _word(value: Any) -> str:
    """Returns a verdict as a bare word in lower case. true and false, which some judges write as in YAML, mean nothing
    here."""
    words = re.search(r"\w(?:.*\w)?", _as_text(value), re.DOTALL)
    return words[0].lower().replace(" ", "_") if words else ""


def _as_text(value: Any) -> str:
    """Returns a value as text; "" for one that nests too deep to be written."""
    try:
        return str(value)
    except (RecursionError, ValueError):
        return ""


def _values(text: str, key: str) -> tuple[list[Any], str]:
    """Returns what the JSON objects in a text hold under the key, and the last reason that one of them gives."""
    text, values, reason = visible(text), [], ""
    for thing in _objects(text):
        lowered = {str(name).strip().lower(): value for name, value in thing.items()}
        if key.lower() in lowered:
            values.append(lowered[key.lower()])
        reason = _as_text(lowered.get("reason", reason))
    if not values and "{" in text:  # almost JSON
        values = re.findall(_KEY.format(key=re.escape(key)) + _VALUE, text, re.IGNORECASE)
        given = re.search(_KEY.format(key="reason") + _REASON, text, re.IGNORECASE | re.DOTALL)
        reason = given[1].strip(" \n\"'“”") if given else reason
    return values, reason


def _objects(text: str) -> list[dict[str, Any]]:
    """Returns the outermost JSON objects in a text, from left to right. Returns none if more than MOST_BROKEN braces
    begin no object, because each of those may cost as much as a scan of the whole text."""
    decoder, start, broken = json.JSONDecoder(strict=False), 0, 0
    found: list[dict[str, Any]] = []
    while (start := text.find("{", start)) >= 0:
        try:
            value, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start, broken = start + 1, broken + 1
            if broken > MOST_BROKEN:
                return []
        else:
            found.append(value)
    return found


# The possessive *+ and ++ never backtrack, so that the time of each pattern grows only with the length of the text.
_KEY = r"""(?<!\w){key}["'“”]?\s*+[:=]\s*+"""
_VALUE = r"""["'“\[]*+([^"'“”,{}\[\]\n]++)["'”\]]*+[^\S\n]*+(?=[,}\n]|\Z)"""
_REASON = r"""(.*?)(?=,\s*["'“]?\w+["'”]?\s*[:=]|}|\Z)"""
