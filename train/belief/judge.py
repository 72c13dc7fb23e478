"""Asks all questions as often as wanted, has the answers judged, and keeps both as they come.

asked = plan(claims, kinds, settings)
evaluate(asked, answerer, judge, records, settings)     # again after an interruption: only what is missing
"""

import hashlib
import json
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tqdm import tqdm

from train.belief.claims import Claim, Question
from train.belief.endpoint import Endpoint, NoAnswer, ended
from train.belief.messages import Messages, asked, build_messages, judge_messages
from train.belief.records import Key, Records, Row, key_of
from train.belief.verdicts import Verdict, parse_letter, parse_score, parse_verdict, parse_yes_no
from train.errors import UserError

MOST_FAILURES = 20  # requests in a row without an answer, after which a run stops


class Answerer(Protocol):
    """A model that answers chats."""

    batch_size: int  # chats that one call should have
    concurrency: int  # calls that may be under way at once

    def answers(self, chats: Sequence[Messages], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """One answer for each chat, in order. NoAnswer where there is none, EndpointStopped where none will be."""
        ...


@dataclass(frozen=True)
class Asking:
    """How questions are asked and answers judged; the defaults are the paper's."""

    samples: int = 5  # answers to each question
    max_tokens: int = 5000
    temperature: float = 0.7
    judge_max_tokens: int = 6000
    judge_temperature: float = 1.0
    seed: int = 0
    documents: tuple[str, ...] = ()  # in context, before each question
    step: int = 0  # optimizer steps that the model was trained for
    model: str = ""  # what answers, as rows name it
    judge: str = ""  # what judges
    top_p: float | None = None
    body: dict[str, Any] | None = None  # further keys of each request to the model
    judge_body: dict[str, Any] | None = None


@dataclass(frozen=True)
class Item:
    """One answer that is wanted."""

    claim: Claim
    question: Question
    sample: int
    row: Row  # what its row holds before there is an answer
    messages: Messages
    seed: int

    @property
    def key(self) -> Key:
        return key_of(self.row)

    @property
    def judged(self) -> bool:
        """Whether a judge must read the answer."""
        return self.question.kind != "yes_no" and not self.question.options


def plan(claims: Sequence[Claim], kinds: Sequence[str], asking: Asking) -> list[Item]:
    """Every answer that is wanted: all questions once, then all again, so that an interruption leaves them even."""
    return [
        _item(claim, question, sample, asking)
        for sample in range(asking.samples)
        for claim in claims
        for question in claim.questions
        if question.kind in kinds
    ]


def _item(claim: Claim, question: Question, sample: int, asking: Asking) -> Item:
    messages = build_messages(question, asking.documents, sample)
    names = [asking.seed, claim.id, question.kind, question.id, sample]
    seed = zlib.crc32(json.dumps(names).encode()) & 0x7FFFFFFF  # another one for each, the same when it is asked again
    row: Row = {
        "step": asking.step, "claim": claim.id, "kind": question.kind, "question": question.id, "sample": sample,
        "context": len(asking.documents), "category": question.category,
    }  # fmt: skip
    if question.kind == "yes_no":
        row |= {"control": question.control, "expected": question.expected}
    row["model"] = asking.model
    sampling = [asking.max_tokens, asking.temperature, asking.top_p, seed, asking.body]
    row["asked"] = digest([asking.model, messages, *sampling])
    item = Item(claim, question, sample, row, messages, seed)
    if item.judged:
        judge = claim.judges[question.kind]
        row["judge"] = asking.judge
        sampling = [asking.judge_max_tokens, asking.judge_temperature, asking.judge_body]
        row["judged"] = digest([asking.judge, judge.prompt, judge.key, *sampling])
    return item


def digest(value: Any) -> str:
    """A part of the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_same(items: Sequence[Item], records: Records) -> None:
    """UserError where the directory holds an answer or verdict to the same question that was had in another way."""
    for item in items:
        for held in (records.rows.get(item.key, {}), records.answers.get(item.key, {})):
            for name in ("asked", "judged"):
                if name in held and held[name] != item.row.get(name):
                    which = f"{item.claim.id} / {item.question.id}, sample {item.sample}"
                    raise UserError(
                        f"--output {records.directory}: holds {which}, {_difference(held, item.row, name)}. Give what "
                        "was given then, or another directory."
                    )


def _difference(held: Row, row: Row, name: str) -> str:
    who, verb = ("model", "answered") if name == "asked" else ("judge", "judged")
    if held.get(who) != row.get(who):
        return f"{verb} by {who} {held.get(who)!r}, not {row.get(who)!r}"
    what = "question, documents or settings" if name == "asked" else "prompt or settings"
    return f"{verb} with other {what}"


def evaluate(
    items: Sequence[Item], answerer: Answerer | None, judge: Endpoint | None, records: Records, asking: Asking
) -> None:
    """Has every item answered and judged that records do not hold yet; without an answerer, judged alone. What fails
    gets a row with its error. UserError, EndpointStopped or KeyboardInterrupt ends it early, with everything kept that
    was had by then and what was under way."""
    check_same(items, records)
    todo = [item for item in items if item.key not in records.rows]
    records.ask_again({item.key for item in todo})
    bar = tqdm(total=len(items), initial=len(items) - len(todo), desc="evaluating", unit="answer", mininterval=0.5)
    run = _Run(answerer, judge, records, asking, bar)
    for endpoint in run.endpoints:
        endpoint.stop.clear()
    try:
        unjudged = [item for item in todo if item.key in records.answers]  # before the calls add to them
        run.ask([item for item in todo if item.key not in records.answers])
        for item in unjudged:
            run.judge(item)
        run.finish()
    except BaseException as error:
        run.wind_up(error)
        raise
    finally:
        bar.close()


class _Run:
    """The calls under way. Each keeps what it got before its thread takes the next one, so that a kill loses no more
    than what is under way."""

    def __init__(self, answerer: Answerer | None, judge: Endpoint | None, records: Records, asking: Asking, bar: Any):
        self.answerer, self.judging_model, self.records, self.asking, self.bar = answerer, judge, records, asking, bar
        self.endpoints = [each for each in (answerer, judge) if isinstance(each, Endpoint)]
        self.answering = ThreadPoolExecutor(answerer.concurrency) if answerer else None
        self.judging = ThreadPoolExecutor(judge.concurrency) if judge else None
        self.calls: dict[Future[bool], tuple[str, list[Item]]] = {}  # what for: "answer" or "judge"
        self.counting = threading.Lock()
        self.failures = self.errors = self.under_way = 0
        self.stopping = False  # calls that have not begun do nothing

    def ask(self, items: list[Item]) -> None:
        """Starts the calls for answers."""
        if self.answerer is not None and self.answering is not None:
            for start in range(0, len(items), self.answerer.batch_size):
                batch = items[start : start + self.answerer.batch_size]
                self._start(self.answering, "answer", batch, partial(self._answer, self.answerer, batch))

    def judge(self, item: Item) -> None:
        """An answer's verdict: read from it, or asked of the judge."""
        if not item.judged:
            answer, question = self._answer_to(item), item.question
            found = parse_letter(answer, question, item.sample) if question.options else None
            self._keep(item, found or parse_yes_no(answer, question.expected))
            self.bar.update()
        elif self.judging_model is not None and self.judging is not None and not self.stopping:
            self._start(self.judging, "judge", [item], partial(self._judge, self.judging_model, item))

    def _start(self, pool: ThreadPoolExecutor, what: str, items: list[Item], work: Callable[[], None]) -> None:
        self.calls[pool.submit(self._call, what, items, work)] = (what, items)

    # In the threads.

    def _call(self, what: str, items: list[Item], work: Callable[[], None]) -> bool:
        """Whether it succeeded. Its failure is kept; what ends the run is raised."""
        with self.counting:
            if self.stopping:
                return False
            self.under_way += 1
        try:
            work()
        except NoAnswer as error:
            if not self.stopping:
                self._failed(what, items, error)
            return False
        except BaseException:
            self.stopping = True
            raise
        finally:
            with self.counting:
                self.under_way -= 1
        with self.counting:
            self.failures = 0
        return True

    def _failed(self, what: str, items: list[Item], error: NoAnswer) -> None:
        for item in items:
            answer = self.records.answers.get(item.key, {}).get("answer")
            self.records.keep(item.row | {"answer": answer, "verdict": None, "error": f"{what}: {error}"})
        with self.counting:
            self.failures, self.errors = self.failures + 1, self.errors + len(items)
            if self.failures >= MOST_FAILURES and not self.stopping:
                self.stopping = True
                raise UserError(f"stopped: {self.failures} requests in a row had no answer; the last {what}: {error}.")

    def _answer(self, answerer: Answerer, items: list[Item]) -> None:
        a = self.asking
        texts = answerer.answers([item.messages for item in items], a.max_tokens, a.temperature, items[0].seed)
        for item, text in zip(items, texts, strict=True):
            row = {name: value for name, value in item.row.items() if name not in ("judge", "judged")}
            self.records.keep_answer(row | {"answer": text})

    def _judge(self, judge: Endpoint, item: Item) -> None:
        a, prompt, question = self.asking, item.claim.judges[item.question.kind], item.question
        chat = judge_messages(prompt, asked(question, item.sample), self._answer_to(item))
        text = judge.complete(chat, a.judge_max_tokens, a.judge_temperature, item.seed)
        if not text.strip():
            raise NoAnswer("the judge answered nothing: raise --judge-max-tokens if it thinks first")
        self._keep(item, (parse_score if question.kind == "coherence" else parse_verdict)(text, prompt.key))

    def _answer_to(self, item: Item) -> str:
        return str(self.records.answers[item.key]["answer"])

    def _keep(self, item: Item, found: Verdict) -> None:
        row = item.row | {"answer": self._answer_to(item), "verdict": found.verdict, "reason": found.reason}
        if found.score is not None:
            row["score"] = found.score
        if found.said:
            row["said"] = found.said
        self.records.keep(row)

    # Where the calls end.

    def finish(self) -> None:
        """Until nothing is under way."""
        while self.calls:
            for call in ended(self.calls, self.bar):
                self._ended(call, *self.calls.pop(call))
        for pool in (self.answering, self.judging):
            if pool is not None:
                pool.shutdown(wait=False)

    def _ended(self, call: "Future[bool]", what: str, items: list[Item]) -> None:
        if call.cancelled():
            return
        if not call.result():
            self.bar.set_postfix(errors=self.errors)
            self.bar.update(len(items))
        elif what == "answer":
            for item in items:
                self.judge(item)
        else:
            self.bar.update()

    def wind_up(self, error: BaseException) -> None:
        """After an error: no new calls; what is under way is waited for and kept, for it may have cost something. It is
        counted where it runs: an interrupt can fall between the start of a call and its place in `calls`."""
        with self.counting:
            self.stopping = True
            under_way = self.under_way
        for endpoint in self.endpoints:
            endpoint.stop.set()
        if under_way and isinstance(error, KeyboardInterrupt):
            print(f"\nwaiting for {under_way} requests under way (again Ctrl-C: leave them)", file=sys.stderr)
        for pool in (self.answering, self.judging):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        for call, of in self.calls.items():
            if not call.cancelled() and call.exception() is None:
                self._ended(call, *of)
