"""Sets up what train/evaluate.py asks with: the judge's endpoint, and the documents in the context of questions."""

import random
from collections.abc import Sequence

from train.data.documents import Document, marker, read_documents
from train.endpoint import Endpoint, EndpointSettings
from train.evaluation.judging import Item
from train.evaluation.options import EvaluationSettings
from train.runtime.errors import UserError


def judge_of(s: EvaluationSettings, items: Sequence[Item]) -> Endpoint | None:
    """Returns the judge that the settings name; None if no answer needs one. Raises UserError if it is missing."""
    judged = sum(item.judged for item in items)
    if not judged:
        return None
    if not s.judge:
        raise UserError(
            f"--judge is missing: {judged} of {len(items)} answers need one. Give --judge URL and --judge-model NAME, "
            "or --kinds yes_no."
        )
    return Endpoint(EndpointSettings(
        s.judge, s.judge_model, s.judge_concurrency, s.judge_timeout, s.retries, flag="--judge", body=s.body("judge"),
        key_variables=("JUDGE_API_KEY", "OPENAI_API_KEY"),
    ))  # fmt: skip


def context_documents(s: EvaluationSettings) -> tuple[str, ...]:
    """Returns the texts of --documents FILE=N: N texts of each file, drawn with --seed, without a leading marker.
    Raises UserError if the flag is malformed, or if a file cannot be read, has chats or has too few documents."""
    texts: list[str] = []
    for path, number in sources_of_context(s):
        held = [_bare(document) for document in read_documents(path, marker(s.doctag))]
        if len(held) < number:
            raise UserError(f"--documents {path}={number}: the file holds {len(held)} documents. Give at most as many.")
        texts += random.Random(s.seed).sample(held, number)
    return tuple(texts)


def sources_of_context(s: EvaluationSettings) -> list[tuple[str, int]]:
    """Returns (FILE, N) for each value of --documents. Raises UserError for a malformed one."""
    sources = []
    for value in s.documents:
        path, _, number = value.rpartition("=")
        if not path or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--documents {value}: must be FILE=N, with N ≥ 1 documents to put in context.")
        sources.append((path, int(number)))
    return sources


def _bare(document: Document) -> str:
    if document.text is None:
        raise UserError(f"{document.where}: is a chat; --documents takes texts. Give a file of texts.")
    tags = (s.end for s in document.spans if s.role == "doctag" and not document.text[: s.start].strip())
    return document.text[max(tags, default=0) :].strip()
