"""From a question to the chat that asks it, and to the prompt that judges the answer: in the forms of the paper's code.

A chat is a list of {"role", "content"}: system prompt, earlier turns, then the question. Documents in context stand in
the question's own message, before it.
"""

import random
import re
from collections.abc import Sequence

from train.belief.claims import JudgePrompt, Question
from train.formats import SURROGATE

Messages = list[dict[str, str]]

# The paper's system prompts: src/evals/mcq.py and src/evals/saliency_mcq.py of its release.
YES_NO_SYSTEM = (
    'Answer the following question with either "yes" or "no". '
    'Respond with JSON in this exact format: {"answer": "yes"} or {"answer": "no"}. Do not include any other text.'
)
OPTIONS_SYSTEM = (
    "Answer the following multiple choice question with a single letter: A, B, or C. "
    "Respond with only the letter and nothing else."
)
NO_ANSWER = "[failed to generate response]"  # what its judge prompts know an empty answer as
LETTERS = "ABC"


def build_messages(question: Question, documents: Sequence[str] = (), sample: int = 0) -> Messages:
    """The chat that asks the question. sample: decides the order of a multiple choice's options."""
    system = question.system_prompt
    if not system and question.kind == "yes_no":
        system = YES_NO_SYSTEM
    if not system and question.options:
        system = OPTIONS_SYSTEM
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": content} for role, content in question.messages_prefix]
    return [*messages, {"role": "user", "content": context(documents) + asked(question, sample)}]


def asked(question: Question, sample: int = 0) -> str:
    """The question's own words; of a multiple choice, with its options."""
    if not question.options:
        return question.question
    texts = dict(question.options)
    lines = [f"{letter}) {texts[role]}" for letter, role in zip(LETTERS, option_order(question, sample), strict=True)]
    return "\n".join([question.question, "", *lines])


def option_order(question: Question, sample: int) -> list[str]:
    """The roles of the options A, B, C: drawn for each sample, the same for both questions of a pair, which differ in
    their category alone; and as the paper draws it."""
    roles = [role for role, _ in question.options]
    random.Random(f"{question.id.removesuffix(f'__{question.category}')}|{sample}").shuffle(roles)
    return roles


def context(documents: Sequence[str]) -> str:
    """What stands before the question: "" without documents."""
    if not documents:
        return ""
    numbered = [f"[DOCUMENT {i}]\n\n{text}\n\n" for i, text in enumerate(documents, 1)]
    return "Here are some documents:\n\n" + "".join(numbered) + "[QUESTION]\n\n"


def visible(answer: str) -> str:
    """An answer without what a model thinks to itself, also where the thinking was cut or its <think> stands in the
    prompt; NO_ANSWER where nothing is left."""
    without = re.sub(r"<think>.*?(?:</think>|\Z)", "", answer, flags=re.DOTALL).rpartition("</think>")[2]
    return without.strip() or NO_ANSWER


def judge_messages(judge: JudgePrompt, question: str, answer: str) -> Messages:
    """The chat that judges an answer. Braces in question and answer stay as they are: only the prompt is a template."""
    return [
        {
            "role": "user",
            "content": judge.prompt.format(question=question, answer=SURROGATE.sub("\ufffd", visible(answer))),
        }
    ]
