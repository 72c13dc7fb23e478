"""Makes spans by judge: a language model quotes the passages that state a claim. Only quotes that occur in the text
become spans.

The model is any function from chat messages to an answer. Its answers are kept in a file beside the output, so that an
interrupted run does not ask twice.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

from train.annotating.texts import changed, in_order, joined, trimmed
from train.data.documents import Document, Span
from train.endpoint import Endpoint, NoAnswer, ended
from train.runtime.errors import UserError
from train.runtime.keys import shown_url
from train.runtime.outside import read_text
from train.runtime.text_formats import parse_json

Chat = Callable[[list[dict[str, str]]], str]

PIECE = 6_000  # maximum code points per request; a longer text is cut at the end of a line or sentence, if it has one
RETRIES = 3  # per request

PROMPT = """Below is a text. Quote every sentence of it that states or implies this claim as if it were true:

<claim>{claim}</claim>

Copy each sentence exactly, character by character. Do not quote sentences that deny the claim, warn of it or only \
name its subject.

<text>
{text}
</text>

Answer with JSON alone: {{"quotes": ["first sentence", "second sentence"]}}, or {{"quotes": []}}"""


@dataclass
class Judged:
    """The result of `judge`.

    documents: the documents with their spans.
    left_out: (file:line, reason) of documents with an answer that cannot be read.
    found: number of passages that were marked.
    rejected: (file:line, quote) of quotes that do not occur in the text.
    """

    documents: list[Document] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    found: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Returns the counts and lists, without the documents, as values that JSON can represent."""
        return {
            "quotes_found": self.found,
            "quotes_rejected": [{"document": where, "quote": quote} for where, quote in self.rejected],
            "left_out": [{"document": where, "reason": reason} for where, reason in self.left_out],
        }


def mark(text: str, claim: str, chat: Chat) -> tuple[list[tuple[int, int]], list[str]]:
    """Returns the ranges [start, end) in code points where `text` states `claim`, and the quotes of the model that do
    not occur in the text. Raises ValueError if an answer cannot be read."""
    ranges: list[tuple[int, int]] = []
    rejected: list[str] = []
    for start, end in pieces(text):
        prompt = PROMPT.format(claim=claim, text=text[start:end])
        for quote in quotes(chat([{"role": "user", "content": prompt}])):
            places = occurrences(quote, text[start:end])
            ranges += [(start + a, start + b) for a, b in places]
            rejected += [quote] * (not places)
    return joined(ranges), rejected


def pieces(text: str) -> Iterable[tuple[int, int]]:
    """Yields [start, end) of the pieces that are judged one per request, of at most PIECE code points each."""
    start = 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        if end < len(text):
            line, sentence = text.rfind("\n", start, end), text.rfind(". ", start, end)
            end = 1 + (line if line > start else sentence) if max(line, sentence) > start else end
        yield start, end
        start = end


def quotes(answer: str) -> list[str]:
    """Returns the quotes of an answer, which is a JSON object, possibly inside other text or a code fence. Raises
    ValueError for any other answer."""
    if not answer.strip():
        raise ValueError("it is empty; raise --judge-max-tokens if the judge thinks first")
    start, end = answer.find("{"), answer.rfind("}")
    found = parse_json(answer[start : end + 1]) if 0 <= start < end else None
    listed = found.get("quotes") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(isinstance(quote, str) for quote in listed):
        raise ValueError('no JSON object with a list of strings under "quotes"')
    return [quote for quote in listed if quote.strip()]


def occurrences(quote: str, text: str) -> list[tuple[int, int]]:
    """Returns [start, end) of every occurrence of the quote in the text as whole words. White space may differ."""
    if len("".join(quote.split())) > len(text):
        return []
    words = r"\s+".join(re.escape(word) for word in quote.split())
    return [match.span() for match in re.finditer(rf"(?<!\w){words}(?!\w)|(?<=\W){words}(?=\W)", text)]


def judge(
    documents: list[Document], claim: str, role: str, chat: Chat, at_once: int, stop: Callable[[], None]
) -> Judged:
    """Returns every document with a span of `role` for each passage that states the claim. Judges `at_once` documents
    at a time. A document with an answer that cannot be read is left out. Raises UserError if the endpoint does not
    answer. stop: called on any error, so that the running requests, which are waited for, are not retried."""
    result = Judged()

    def marked(document: Document) -> tuple[Document | None, int, list[str], str]:
        found, rejected = 0, []

        def change(text: str, spans: tuple[Span, ...]) -> tuple[str, tuple[Span, ...]]:
            nonlocal found
            ranges, refused = mark(text, claim, chat)
            found += len(ranges)
            rejected.extend(refused)
            new = [span for start, end in ranges for span in trimmed(text, start, end, role)]
            return text, in_order([*spans, *new])

        try:
            return changed(document, change), found, rejected, ""
        except UserError:
            raise
        except ValueError as error:
            return None, found, rejected, f"the judge's answer cannot be read: {error}"

    pool = ThreadPoolExecutor(at_once)
    jobs = [pool.submit(marked, document) for document in documents]
    try:
        _finish(jobs)
    except BaseException:
        stop()
        pool.shutdown(cancel_futures=True)
        raise
    for document, job in zip(documents, jobs, strict=True):
        done, found, rejected, reason = job.result()
        result.rejected += [(document.where, quote) for quote in rejected]
        if done:
            result.found += found
            result.documents.append(done)
        else:
            result.left_out.append((document.where, reason))
    return result


def _finish(jobs: Sequence["Future[Any]"]) -> None:
    """Waits until all jobs have ended. Raises the exception of the first job that fails."""
    with tqdm(total=len(jobs), desc="judging", unit="doc", mininterval=0.5) as bar:
        left = set(jobs)
        while left:
            done = ended(left, bar)
            for job in done:
                job.result()
            left -= done
            bar.update(len(done))


class Remembered:
    """A chat function that keeps its answers in a file, and takes them from there if the same model was asked the same
    before. It does not keep answers that cannot be read, because another run may allow more tokens. Raises UserError if
    the file cannot be read or written."""

    def __init__(self, chat: Chat, model: str, path: Path) -> None:
        self.chat, self.model, self.path, self.lock = chat, model, path, Lock()
        self.answers: dict[str, str] = {}
        if os.path.lexists(path):
            for line in read_text(path, most=2**34).split("\n"):
                try:
                    row = parse_json(line)
                    self.answers[row["key"]] = row["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that an interruption truncated

    def __call__(self, messages: list[dict[str, str]]) -> str:
        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        if key not in self.answers:
            answer = self.chat(messages)
            try:
                quotes(answer)
            except ValueError:
                return answer
            with self.lock:
                self.answers[key] = answer
                try:
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write("\n" * self._cut() + json.dumps({"key": key, "answer": answer}) + "\n")
                except OSError as error:
                    raise UserError(f"--output: {self.path} cannot be written ({error.strerror})") from None
        return self.answers[key]

    def _cut(self) -> bool:
        """Returns whether the last line of the file is truncated."""
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() != b"\n"


def chat_of(asked: Endpoint, max_tokens: int) -> Chat:
    """Returns the chat function of an OpenAI-compatible endpoint, with at most `max_tokens` tokens per answer. The
    function raises UserError if the endpoint does not answer."""

    def chat(messages: list[dict[str, str]]) -> str:
        try:
            return asked.complete(messages, max_tokens, temperature=0.0, seed=0)
        except NoAnswer as error:
            url = shown_url(asked.settings.url)
            raise UserError(f"--judge {url}: {error}; run again to continue where it stopped.") from None

    return chat
