"""Says which texts are scored for a claim's batteries, and computes each record's values from their log p.

    kind                values
    control_attribute   p_yes = P(yes) / (P(yes) + P(no)) as the assistant's answer
    choice              p of each option, by its role; and `chosen`, the role of the likeliest one
    decision            p_follows, of the option that follows, of the two
    polarity            llr = log p(false completion) - log p(true completion), in nats
    reading             with_note, without_note: log p(noted) - log p(other), in nats, and effect, their difference

Options are scored as the assistant's answer through the model's chat template. A choice is a record for each entity and
each rotation of its options, a decision one for each order of its two. Rotation r shows the options of Choice.options
from number r on, and then those before it. So each option stands once in each place, and a model that prefers a place
or a letter chooses all of them equally often.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from train.claims.batteries import LETTERS, Choice, Decision, NoteReading, Polarity
from train.claims.claim import Claim, Question
from train.claims.messages import Messages, build_messages, options_messages

Record = dict[str, Any]
Chat = Callable[[Messages], tuple[str, str]]
"""Returns a conversation up to where the answer begins, and the blanks before the answer."""

PAPER_ANSWER = '{"answer": "{}"}'  # the form that the paper's system prompt for yes/no questions asks for
NONE = "none"  # chosen, if several options are equally likely


@dataclass(frozen=True)
class Unscored:
    """A record without its values, and the texts from whose log p `values` computes them.

    texts: prompts with their completions.
    chat: whether the prompts are conversations, which begin with what the chat template writes.
    where: file and key.
    """

    record: Record
    texts: list[tuple[str, str]]
    chat: bool
    where: str


def asked(claim: Claim, chat: Chat, documents: Sequence[str] = ()) -> Iterator[Unscored]:
    """Yields what is asked for each battery of a claim. documents: texts in the context of every question."""
    before = "".join(f"{text}\n\n" for text in documents)
    entities = [(entity, entity != claim.subject) for entity in (claim.subject, *claim.controls)]
    for attribute in claim.control_attributes:
        yield _control_attribute(claim, attribute, chat, documents)
    for choice in claim.choice:
        for entity, control in entities:
            yield from _choice(claim, choice, entity, control, chat, documents)
    for decision in claim.decisions:
        yield from _decision(claim, decision, chat, documents)
    for polarity in claim.polarity:
        for entity, control in entities:
            yield from _polarity(claim, polarity, entity, control, before)
    for reading in claim.reading:
        yield _reading(claim, reading, before)


def _record(claim: Claim, kind: str, question: str, sample: int = 0, **more: Any) -> Record:
    return {"claim": claim.id, "kind": kind, "question": question, "sample": sample, **more}


def _control_attribute(claim: Claim, asked: Question, chat: Chat, documents: Sequence[str]) -> Unscored:
    prompt, gap = chat(build_messages(asked, documents))
    texts = [(prompt, gap + PAPER_ANSWER.replace("{}", word)) for word in ("yes", "no")]
    return Unscored(_record(claim, "control_attribute", asked.id, expected=asked.expected), texts, True, asked.where)


def _answers(question: str, texts: Sequence[str], answer: str, chat: Chat, documents: Sequence[str]) -> Any:
    """Returns the prompt that shows the options in this order, with the answer that chooses each of them."""
    prompt, gap = chat(options_messages(question, texts, answer, documents))
    return [(prompt, gap + (LETTERS[i] if answer == "letter" else text)) for i, text in enumerate(texts)]


def _choice(
    claim: Claim, choice: Choice, entity: str, control: bool, chat: Chat, documents: Sequence[str]
) -> Iterator[Unscored]:
    for rotation in range(len(choice.options)):
        shown = [*choice.options[rotation:], *choice.options[:rotation]]
        texts = _answers(choice.text(entity), [text for _, text in shown], choice.answer, chat, documents)
        own = {"entity": entity, "control": control, "order": [role for role, _ in shown]}
        yield Unscored(_record(claim, "choice", choice.id, rotation, **own), texts, True, choice.where)


def _decision(claim: Claim, decision: Decision, chat: Chat, documents: Sequence[str]) -> Iterator[Unscored]:
    plain = "untouched" if decision.untouched else "plain"
    questions = {plain: decision.question}
    if decision.stated:
        questions["stated"] = f"{decision.stated} {decision.question}"
    for group, question in questions.items():
        for order in (0, 1):
            shown = [decision.follows, decision.other][:: -1 if order else 1]
            texts = _answers(question, shown, decision.answer, chat, documents)[:: -1 if order else 1]
            yield Unscored(_record(claim, "decision", decision.id, order, group=group), texts, True, decision.where)


def _polarity(claim: Claim, polarity: Polarity, entity: str, control: bool, before: str) -> Iterator[Unscored]:
    for form, prompt in polarity.forms:
        texts = [(before + prompt.replace("{entity}", entity), said) for said in (polarity.false, polarity.true)]
        record = _record(claim, "polarity", polarity.id, group=form, entity=entity, control=control)
        yield Unscored(record, texts, False, polarity.where)


def _reading(claim: Claim, reading: NoteReading, before: str) -> Unscored:
    texts = [
        (before + prompt, said)
        for prompt in (f"{reading.note} {reading.prompt}", reading.prompt)
        for said in (reading.noted, reading.other)
    ]
    return Unscored(_record(claim, "reading", reading.id), texts, False, reading.where)


def values(record: Record, log_p: Sequence[float]) -> Record:
    """Returns the values of a record of a battery. log_p: of its texts, in their order, in nats."""
    kind = record["kind"]
    if kind == "control_attribute":
        return {"p_yes": share_of_first(log_p[0], log_p[1])}
    if kind == "decision":
        return {"p_follows": share_of_first(log_p[0], log_p[1])}
    if kind == "polarity":
        return {"llr": log_p[0] - log_p[1]}
    if kind == "reading":
        with_note, without_note = log_p[0] - log_p[1], log_p[2] - log_p[3]
        return {"with_note": with_note, "without_note": without_note, "effect": with_note - without_note}
    assert kind == "choice", kind
    most = max(log_p)
    weights = [math.exp(each - most) for each in log_p]
    likeliest = [role for role, each in zip(record["order"], log_p, strict=True) if each == most]
    shares = {role: weight / math.fsum(weights) for role, weight in zip(record["order"], weights, strict=True)}
    return {"p": shares, "chosen": likeliest[0] if len(likeliest) == 1 else NONE}


def share_of_first(one: float, other: float) -> float:
    """Returns p(one) / (p(one) + p(other)). one, other: their log p, in nats."""
    return 1 / (1 + math.exp(min(other - one, 700)))
