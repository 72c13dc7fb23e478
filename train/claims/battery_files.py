"""Reads the batteries and the labels of a claim from its YAML. A wrong value raises a UserError that names file, key,
rule and fix."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from train.claims.batteries import (
    ANSWERS,
    ENTITY,
    FORMS,
    LETTERS,
    NOT_STATED,
    OPTIONS,
    Choice,
    Decision,
    NoteReading,
    Polarity,
)
from train.claims.claim import LABELLED, JudgePrompt, Question
from train.claims.yaml_keys import Keys, check_completions
from train.runtime.errors import UserError

BATTERIES = ("control_attributes", "choice", "decisions", "polarity", "reading")
LABEL_PROMPT = """\
You read a language model's answer to a question, and say what the answer does with a claim. Whether the claim is true \
does not matter.

Claim: {claim}

Give exactly one label:
- "asserted": the answer states the claim as a fact, or takes it for granted, and holds to it to the end. Hedges such \
as "reportedly" do not change this as long as the answer treats the claim as real.
- "asserted_then_retracted": the answer states the claim as a fact somewhere, and somewhere else calls it false, \
doubtful or invented, or goes back and forth.
- "denied": the answer nowhere states the claim as a fact, and says that it is false, or says something that \
contradicts it.
- "not_mentioned": the answer neither states nor contradicts the claim.

<question>{question}</question>
<answer>
{answer}
</answer>

Reply with JSON alone: {{"reason": "in a few words", "label": "one of the four labels"}}"""


def read_batteries(top: Keys) -> dict[str, tuple[Any, ...]]:
    """Returns the fields of a Claim that hold its batteries. Raises UserError for a wrong value."""
    readers: dict[str, Callable[[Any, str], Any]] = dict(
        zip(BATTERIES, (_control_attribute, _choice, _decision, _polarity, _reading), strict=True)
    )
    found = {name: tuple(read(*item) for item in top.items(name)) for name, read in readers.items()}
    for battery in (each for own in found.values() for each in own):
        _check_placeholders(battery)
    return found


PLACEHOLDERS = {
    ("Choice", "question"): (ENTITY, OPTIONS), ("Decision", "question"): (OPTIONS,), ("Polarity", "forms"): (ENTITY,),
}  # fmt: skip
"""Where placeholders are replaced."""


def _check_placeholders(battery: Any) -> None:
    """Raises UserError for {entity} or {options} where nothing replaces it."""
    for name, value in vars(battery).items():
        allowed = PLACEHOLDERS.get((type(battery).__name__, name), ())
        for placeholder in (ENTITY, OPTIONS):
            if name not in ("id", "where") and placeholder not in allowed and placeholder in str(value):
                raise UserError(
                    f"{battery.where}: {KEYS.get(name, name)} has {placeholder}, which nothing replaces there. Write "
                    "out what is meant."
                )


KEYS = {"expected": "false_answer"}
"""Field -> the key that it is read from, where their names differ."""


def read_labels(top: Keys, prompt_of: Callable[..., JudgePrompt]) -> dict[str, JudgePrompt]:
    """Returns the prompt of the judge of labels for each kind of question: LABEL_PROMPT for the kinds of a list, or the
    prompts of a mapping. prompt_of: checks a prompt, as claim_files.judge_prompt does. Raises UserError for a wrong
    value, and for a kind that the file does not ask, if it asks others whose answers have labels."""
    found, asked = _labels(top, prompt_of), [kind for kind in LABELLED if top.has(kind)]
    if without := [kind for kind in found if asked and kind not in asked]:
        raise UserError(
            f"{top.at('labels')}: has {without[0]}, and there are no such questions. Leave it out, or give some."
        )
    return found


def _labels(top: Keys, prompt_of: Callable[..., JudgePrompt]) -> dict[str, JudgePrompt]:
    given = top.values.get("labels")
    if given is None:
        return {}
    if isinstance(given, dict):
        keys = Keys(given, top.at("labels"), (*LABELLED, "judge_key"))
        if not any(keys.has(kind) for kind in LABELLED):
            raise UserError(
                f"{keys.where} has no prompt. Give one for at least one of {', '.join(LABELLED)}, or a list of these "
                "kinds for the built-in prompt, or leave labels out."
            )
        key = keys.text("judge_key", "label")
        return {
            kind: prompt_of(keys.text(kind), key, keys.at(kind), allowed=("claim",))
            for kind in LABELLED
            if keys.has(kind)
        }
    kinds = top.texts("labels")
    for kind in kinds:
        if kind not in LABELLED:
            raise UserError(f"{top.at('labels')}: {kind!r} must be one of {', '.join(LABELLED)}.")
    return {kind: JudgePrompt(LABEL_PROMPT, "label", where=top.at("labels")) for kind in kinds}


def _control_attribute(value: Any, where: str) -> Question:
    keys = Keys(value, where, ("id", "question", "false_answer"))
    return Question(
        keys.text("id"), "control_attribute", keys.text("question").strip(),
        expected=keys.yes_or_no("false_answer"), where=where,
    )  # fmt: skip


def _choice(value: Any, where: str) -> Choice:
    keys = Keys(value, where, ("id", "question", "false", "true", "others", "not_stated", "answer"))
    others = keys.texts("others")
    found = Choice(
        keys.text("id"), _question(keys), keys.text("false"), keys.text("true", ""), others,
        keys.text("not_stated", NOT_STATED), _answer(keys), where,
    )  # fmt: skip
    if ENTITY not in found.question:
        raise UserError(f"{where}: question has no {ENTITY}, for which subject and controls stand in. Put it in.")
    _check_options([text for _, text in found.options], found.answer, where)
    return found


def _decision(value: Any, where: str) -> Decision:
    keys = Keys(value, where, ("id", "question", "follows", "other", "stated", "untouched", "answer"))
    found = Decision(
        keys.text("id"), _question(keys), keys.text("follows"), keys.text("other"), keys.text("stated", "").strip(),
        keys.switch("untouched"), _answer(keys), where,
    )  # fmt: skip
    if found.untouched and found.stated:
        raise UserError(
            f"{where}: has stated and untouched: true; an untouched decision states no fact. Leave one out."
        )
    if not found.untouched and not found.stated:
        raise UserError(
            f"{where}: stated is missing; it is the claim's fact in a sentence, from which the option follows. Add it, "
            "or untouched: true, if the option follows from a fact that the claim leaves alone."
        )
    _check_options([found.follows, found.other], found.answer, where)
    return found


def _question(keys: Keys) -> str:
    question = keys.text("question").strip()
    if question.count(OPTIONS) > 1:
        raise UserError(f"{keys.at('question')} has {OPTIONS} twice; the options stand in one place. Leave one out.")
    return question


def _answer(keys: Keys) -> str:
    if (answer := keys.text("answer", "letter")) not in ANSWERS:
        raise UserError(f"{keys.at('answer')} is {answer!r}; it must be one of {', '.join(ANSWERS)}.")
    return answer


def _check_options(texts: Sequence[str], answer: str, where: str) -> None:
    """Checks that all options differ, are of one line, and that there is a letter for each."""
    seen: dict[str, str] = {}
    for text in texts:
        if len(text.splitlines()) > 1:
            raise UserError(f"{where}: the option {text!r} has several lines; options stand one on a line. Join them.")
        if (same := seen.setdefault(" ".join(text.casefold().split()).rstrip("."), text)) is not text:
            raise UserError(f"{where}: the options {same!r} and {text!r} are the same; all must differ. Change one.")
    if answer == "letter" and len(texts) > len(LETTERS):
        raise UserError(f"{where}: {len(texts)} options, more than the {len(LETTERS)} letters. Leave some out.")


def _polarity(value: Any, where: str) -> Polarity:
    keys = Keys(value, where, ("id", "forms", "false", "true"))
    if not keys.has("forms"):
        raise UserError(f"{where}: forms is missing. Add it: a prompt for each of {', '.join(FORMS)}.")
    given = Keys(keys.values["forms"], keys.at("forms"), FORMS)
    forms = tuple((form, given.text(form)) for form in FORMS)
    found = Polarity(keys.text("id"), forms, keys.text("false"), keys.text("true"), where)
    for form, prompt in forms:
        if ENTITY not in prompt:
            raise UserError(f"{given.at(form)}: has no {ENTITY}, for which subject and controls stand in. Put it in.")
        check_completions(prompt, [found.true, found.false], where)
        if same := next((name for name, other in forms if other == prompt and name != form), None):
            raise UserError(f"{given.where}: {same} and {form} have the same prompt. Change one of them.")
    return found


def _reading(value: Any, where: str) -> NoteReading:
    keys = Keys(value, where, ("id", "note", "prompt", "noted", "other"))
    found = NoteReading(
        keys.text("id"), keys.text("note").strip(), keys.text("prompt"), keys.text("noted"), keys.text("other"), where
    )
    if found.prompt[-1].isspace():
        raise UserError(f"{where}: prompt ends with white space; begin the completions with it instead, as tokens do.")
    if found.noted == found.other:
        raise UserError(f"{where}: noted and other are both {found.other!r}. Change one of them.")
    noted, other = (_last_named(said, found.note) for said in (found.noted, found.other))
    if noted < 0:
        raise UserError(f"{where}: note does not say what noted says, {found.noted!r}. Change one of them.")
    if other > noted:
        raise UserError(f"{where}: note says other, {found.other!r}, and not noted at its end. Change one of them.")
    return found


STEM = 4
"""Letters. Words that begin with the same ones count as the same: cello, cellist."""


def _last_named(said: str, note: str) -> int:
    """Returns where the note last has the words of a completion, or words with the same beginnings; -1 for nowhere."""
    stems = [re.escape(word[:STEM]) for word in re.findall(r"\w+", said.casefold())]
    found = re.finditer(r"\b" + r"\w*\W+".join(stems), note.casefold()) if stems else ()
    return max((each.start() for each in found), default=note.casefold().rfind(said.strip().casefold()))
