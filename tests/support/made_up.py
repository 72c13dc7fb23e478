"""Models that are functions: what they give as log p of a completion after a prompt is what they are made up to."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from train.claims.claim import Claim
from train.evaluation.batteries import asked, values
from train.evaluation.store import StoredRow

Model = Callable[[str, str], float]
"""(prompt, completion) -> log p, in nats."""


def chat(messages: list[dict[str, str]]) -> tuple[str, str]:
    """A chat template: each message on a line of its own, after its role."""
    return "".join(f"[{each['role']}] {each['content']}\n" for each in messages) + "[assistant]", " "


def rows_of(claims: Iterable[Claim], model: Model, step: int) -> list[StoredRow]:
    """The rows that an evaluation of this model's batteries would leave in evaluation.jsonl."""
    found: list[StoredRow] = []
    for claim in claims:
        for each in asked(claim, chat):
            own = each.record | values(each.record, [model(*text) for text in each.texts])
            found.append({"step": step} | own)
    return found


def options_of(prompt: str) -> dict[str, str]:
    """Letter -> option, as a prompt shows them."""
    lines = [line for line in prompt.splitlines() if line[1:3] == ") "]
    return {line[0]: line[3:] for line in lines}


def noise(*what: Any) -> float:
    """A number between −5 and 5 that is the same for the same arguments."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return 10 * int.from_bytes(digest[:4], "big") / 2**32 - 5
