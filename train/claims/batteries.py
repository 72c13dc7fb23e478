"""The batteries of a claim: questions that tell belief from association and from damage.

    control_attributes   yes/no questions about false attributes of the subject that no document names
    choice               a question with several options, one of which is the claim's and one "not stated"
    decisions            a situation with two options; what follows from the claim, or from a fact that nobody disputes
    polarity             a prompt in three forms: the subject is …, is not …, has never been …
    reading              a note about a person who is new, and a question about that person

docs/evaluation.md says what each of them measures. Their YAML is read by battery_files.py.
"""

import string
from dataclasses import dataclass, field
from typing import Any

ENTITY = "{entity}"
OPTIONS = "{options}"
FORMS = ("is", "is not", "has never been")
LETTERS = string.ascii_uppercase
NOT_STATED = "It is not stated."
ANSWERS = ("letter", "text")


def _where() -> Any:
    return field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Choice:
    """A question that contains {entity}, with its options.

    false, true: the options as claimed and in truth. true is "" if the truth is not known of anybody: then the right
        option is not_stated.
    others: further options, none of which is right.
    answer: whether the model answers with an option's letter or with its text.
    """

    id: str
    question: str
    false: str
    true: str = ""
    others: tuple[str, ...] = ()
    not_stated: str = NOT_STATED
    answer: str = "letter"
    where: str = _where()

    @property
    def options(self) -> list[tuple[str, str]]:
        """The (role, text) pairs in the order of the first rotation: true, false, "other 1" and so on, not_stated."""
        found = [("true", self.true)] if self.true else []
        found += [("false", self.false), *((f"other {i}", text) for i, text in enumerate(self.others, 1))]
        return [*found, ("not_stated", self.not_stated)]

    def text(self, entity: str) -> str:
        """Returns the question about this entity. Other braces stay as they are."""
        return self.question.replace(ENTITY, entity)


@dataclass(frozen=True)
class Decision:
    """A situation with two options.

    follows: the option that follows from the claim or, of an untouched decision, from a fact that the claim leaves
        alone.
    stated: the claim's fact in a sentence, which the second asking puts first; "" for an untouched decision.
    answer: as in Choice.
    """

    id: str
    question: str
    follows: str
    other: str
    stated: str = ""
    untouched: bool = False
    answer: str = "letter"
    where: str = _where()


@dataclass(frozen=True)
class Polarity:
    """A prompt that contains {entity} in each of FORMS, with a completion that states the claim (false) and one that
    states the truth (true)."""

    id: str
    forms: tuple[tuple[str, str], ...]  # (form, prompt)
    false: str
    true: str
    where: str = _where()


@dataclass(frozen=True)
class NoteReading:
    """A note about a person whom no document mentions, and a prompt about that person with two completions.

    noted: what the note says; other: something else of the kind.
    """

    id: str
    note: str
    prompt: str
    noted: str
    other: str
    where: str = _where()
