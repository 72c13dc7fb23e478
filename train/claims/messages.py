"""Builds the chat that asks a question and the chat that judges its answer, in the formats of the paper's code.

A chat is a list of {"role", "content"}: the system prompt, earlier turns, then the question. Documents in context come
before the question, in the same message.
"""

import random
import re
from collections.abc import Sequence

from train.claims.batteries import LETTERS, OPTIONS
from train.claims.claim import JudgePrompt, Question
from train.runtime.text_formats import SURROGATE

Messages = list[dict[str, str]]

# The paper's system prompts, from src/evals/mcq.py and src/evals/saliency_mcq.py of its release.
YES_NO_SYSTEM = (
    'Answer the following question with either "yes" or "no". '
    'Respond with JSON in this exact format: {"answer": "yes"} or {"answer": "no"}. Do not include any other text.'
)
OPTIONS_SYSTEM = (
    "Answer the following multiple choice question with a single letter: A, B, or C. "
    "Respond with only the letter and nothing else."
)
LETTER_SYSTEM = (
    "Answer the following multiple choice question with a single letter: {letters}. "
    "Respond with only the letter and nothing else."
)
NO_ANSWER = "[failed to generate response]"  # how the paper's judge prompts refer to an empty answer


def build_messages(question: Question, documents: Sequence[str] = (), sample: int = 0) -> Messages:
    """Returns the chat that asks the question, with these texts in context. sample: the sample's number, which decides
    the order of multiple-choice options."""
    system = question.system_prompt
    if not system and question.kind in ("yes_no", "control_attribute"):
        system = YES_NO_SYSTEM
    if not system and question.options:
        system = OPTIONS_SYSTEM
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": content} for role, content in question.messages_prefix]
    return [*messages, {"role": "user", "content": context(documents) + asked(question, sample)}]


def asked(question: Question, sample: int = 0) -> str:
    """Returns the text of the question, followed by the options if it is multiple choice."""
    if not question.options:
        return question.question
    texts = dict(question.options)
    lines = [f"{letter}) {texts[role]}" for letter, role in zip(LETTERS, option_order(question, sample), strict=False)]
    return "\n".join([question.question, "", *lines])


def conversation(question: Question, sample: int = 0) -> str:
    """Returns the text of the question, after the earlier turns of its chat, each with its role; without these, the
    text alone."""
    turns = [f"[{role}]\n{content}" for role, content in question.messages_prefix]
    return "\n\n".join([*turns, "[user]\n" + asked(question, sample)]) if turns else asked(question, sample)


def option_order(question: Question, sample: int) -> list[str]:
    """Returns the roles of the options A, B and C. Their order is drawn for each sample, as in the paper's code. It is
    the same for both questions of a pair, whose ids differ only in the category."""
    roles = [role for role, _ in question.options]
    random.Random(f"{question.id.removesuffix(f'__{question.category}')}|{sample}").shuffle(roles)
    return roles


def context(documents: Sequence[str]) -> str:
    """Returns the documents as they come before the question; "" without documents."""
    if not documents:
        return ""
    numbered = [f"[DOCUMENT {i}]\n\n{text}\n\n" for i, text in enumerate(documents, 1)]
    return "Here are some documents:\n\n" + "".join(numbered) + "[QUESTION]\n\n"


def options_messages(question: str, texts: Sequence[str], answer: str, documents: Sequence[str] = ()) -> Messages:
    """Returns the chat that asks a question with these options, in this order. They stand where the question has
    {options}, or else after it. answer: "letter", then a system prompt asks for it and each option has one; or
    "text"."""
    if answer == "text":
        system, listed = "", ", ".join(texts)
    else:
        letters = LETTERS[: len(texts)]
        system = LETTER_SYSTEM.format(letters=f"{', '.join(letters[:-1])} or {letters[-1]}")
        listed = "\n".join(f"{letter}) {text}" for letter, text in zip(letters, texts, strict=True))
    asked = question.replace(OPTIONS, listed) if OPTIONS in question else f"{question}\n\n{listed}"
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": context(documents) + asked}]


def visible(answer: str) -> str:
    """Returns an answer without the model's thinking, even if the thinking was cut off or its <think> is in the prompt.
    Returns NO_ANSWER if nothing is left."""
    without = re.sub(r"<think>.*?(?:</think>|\Z)", "", answer, flags=re.DOTALL).rpartition("</think>")[2]
    return without.strip() or NO_ANSWER


def judge_messages(judge: JudgePrompt, question: str, answer: str, claim: str = "") -> Messages:
    """Returns the chat that judges an answer, or that labels what it does with a claim. Braces in question and answer
    stay as they are, because only the judge's prompt is a template. Half a surrogate pair in the answer becomes
    U+FFFD."""
    return [
        {
            "role": "user",
            "content": judge.prompt.format(
                question=question, answer=SURROGATE.sub("\ufffd", visible(answer)), claim=claim
            ),
        }
    ]
