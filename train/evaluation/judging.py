"""Asks every question as often as requested, has the answers judged, and stores both as they arrive.

    asked = plan(claims, kinds, settings)
    evaluate(asked, answerer, judge, records, settings)

The same calls after an interruption obtain only what is missing.
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

from train.claims.claim import Claim, Question
from train.claims.messages import Messages, asked, build_messages, conversation, judge_messages
from train.endpoint import Endpoint, NoAnswer, ended
from train.evaluation.store import Records, RowKey, StoredRow, key_of
from train.evaluation.verdicts import Verdict, parse_label, parse_letter, parse_score, parse_verdict, parse_yes_no
from train.runtime.errors import MayPass, UserError

MOST_FAILURES = 20  # failed requests in a row after which a run stops


class Answerer(Protocol):
    """A model that answers chats."""

    batch_size: int  # chats per call
    concurrency: int  # calls in flight at once

    def answers(self, chats: Sequence[Messages], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """Returns one answer for each chat, in order. Raises NoAnswer if this call has none, EndpointStopped if no call
        will have one."""
        ...


@dataclass(frozen=True)
class Asking:
    """How questions are asked and answers judged. The defaults are the paper's."""

    samples: int = 5  # answers to each question
    max_tokens: int = 5000
    temperature: float = 0.7
    judge_max_tokens: int = 6000
    judge_temperature: float = 1.0
    seed: int = 0
    documents: tuple[str, ...] = ()  # in context, before each question
    step: int = 0  # optimizer steps that the model was trained for
    model: str = ""  # the model that answers, as rows name it
    weights: str = ""  # a digest of the weights that a server has under this name, as far as it is known
    judge: str = ""  # the model that judges
    top_p: float | None = None
    body: dict[str, Any] | None = None  # further keys of each request to the model
    judge_body: dict[str, Any] | None = None


@dataclass(frozen=True)
class Item:
    """One answer to obtain."""

    claim: Claim
    question: Question
    sample: int
    row: StoredRow  # the part of its row that is known before there is an answer
    messages: Messages
    seed: int

    @property
    def key(self) -> RowKey:
        """The key of its row in Records."""
        return key_of(self.row)

    @property
    def judged(self) -> bool:
        """Whether a judge must read the answer."""
        return self.question.kind != "yes_no" and not self.question.options

    @property
    def labelled(self) -> bool:
        """Whether a judge must label the answer too."""
        return self.judged and self.question.kind in self.claim.labels

    def lacks_label(self, records: Records) -> bool:
        """Whether the answer has a verdict, but not yet the label that it must have."""
        held = records.rows.get(self.key)
        return self.labelled and held is not None and not held.get("error") and held.get("label") is None


def plan(claims: Sequence[Claim], kinds: Sequence[str], asking: Asking) -> list[Item]:
    """Returns every answer to obtain: all questions once, then all again, so that after an interruption all questions
    have about as many answers."""
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
    seed = zlib.crc32(json.dumps(names).encode()) & 0x7FFFFFFF  # differs between answers, stays the same on retry
    row: StoredRow = {
        "step": asking.step, "claim": claim.id, "kind": question.kind, "question": question.id, "sample": sample,
        "context": len(asking.documents), "category": question.category,
    }  # fmt: skip
    if question.kind == "yes_no":
        row |= {"control": question.control, "expected": question.expected}
    row["model"] = asking.model
    sampling: list[Any] = [asking.max_tokens, asking.temperature, asking.top_p, seed, asking.body]
    if asking.weights:
        row["weights"] = asking.weights
        sampling.append(asking.weights)
    row["asked"] = digest([asking.model, messages, *sampling])
    item = Item(claim, question, sample, row, messages, seed)
    if item.judged:
        judge = claim.judges[question.kind]
        row["judge"] = asking.judge
        sampling = [asking.judge_max_tokens, asking.judge_temperature, asking.judge_body]
        row["judged"] = digest([asking.judge, judge.prompt, judge.key, *sampling])
    if item.labelled:
        judge = claim.labels[question.kind]
        turns = [question.messages_prefix] if question.messages_prefix else []  # the judge of labels sees these
        row["labelled"] = digest([asking.judge, judge.prompt, judge.key, claim.claim, *turns, *sampling])
    return item


def digest(value: Any) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_same(items: Sequence[Item], records: Records) -> None:
    """Raises UserError if the directory holds an answer to one of the items, its verdict, or the label that it must
    have, that was obtained in another way: from another model or judge, or with another prompt or settings."""
    for item in items:
        for held in (records.rows.get(item.key, {}), records.answers.get(item.key, {})):
            for name in ("asked", "judged", *["labelled"] * item.labelled):
                if name in held and held[name] != item.row.get(name):
                    which = f"{item.claim.id} / {item.question.id}, sample {item.sample}"
                    raise UserError(
                        f"--output {records.directory}: holds {which}, {_difference(held, item.row, name)}. Give what "
                        "was given then, or another directory."
                    )


def _difference(held: StoredRow, row: StoredRow, name: str) -> str:
    who, verb = {"asked": ("model", "answered"), "judged": ("judge", "judged"), "labelled": ("judge", "labelled")}[name]
    if held.get(who) != row.get(who):
        return f"{verb} by {who} {held.get(who)!r}, not {row.get(who)!r}"
    if name == "asked" and held.get("weights", "") != row.get("weights", ""):
        why = "another base or adapter, other --drop, or --served-adapter at one time and not at the other"
        return f"answered by weights that are not known to be those of {row['model']!r} now ({why})"
    what = "question, documents or settings" if name == "asked" else "prompt or settings"
    return f"{verb} with other {what}"


def evaluate(
    items: Sequence[Item], answerer: Answerer | None, judge: Endpoint | None, records: Records, asking: Asking
) -> None:
    """Answers, judges and labels every item that records do not hold yet. Without an answerer, it only judges; without
    a judge, it leaves answers that need one without a verdict. A failed request gets a row with its error; an answer
    whose label has failed keeps its verdict.

    UserError, EndpointStopped or KeyboardInterrupt ends it early. Everything obtained by then is kept, and so are the
    results of requests in flight. Raises UserError as check_same does, and after MOST_FAILURES failures in a row.
    """
    check_same(items, records)
    todo = [item for item in items if item.key not in records.rows]
    records.ask_again({item.key for item in todo})
    unlabelled = [item for item in items if item.lacks_label(records)]
    bar = tqdm(
        total=len(items),
        initial=len(items) - len(todo) - len(unlabelled),
        desc="evaluating",
        unit="answer",
        mininterval=0.5,
    )
    run = _Run(answerer, judge, records, asking, bar)
    for endpoint in run.endpoints:
        endpoint.stop.clear()
    try:
        unjudged = [item for item in todo if item.key in records.answers]  # before calls add more
        run.ask([item for item in todo if item.key not in records.answers])
        for item in unjudged:
            run.judge(item)
        for item in unlabelled:
            run.label(item)
        run.finish()
    except BaseException as error:
        run.wind_up(error)
        raise
    finally:
        bar.close()


class _Run:
    """The calls in flight. Each stores its result before its thread takes the next call, so that a kill loses only the
    calls in flight."""

    def __init__(self, answerer: Answerer | None, judge: Endpoint | None, records: Records, asking: Asking, bar: Any):
        self.answerer, self.judging_model, self.records, self.asking, self.bar = answerer, judge, records, asking, bar
        self.endpoints = [each for each in (answerer, judge) if isinstance(each, Endpoint)]
        self.answering = ThreadPoolExecutor(answerer.concurrency) if answerer else None
        self.judging = ThreadPoolExecutor(judge.concurrency) if judge else None
        self.calls: dict[Future[bool], tuple[str, list[Item]]] = {}  # call -> its purpose: "answer", "judge" or "label"
        self.counting = threading.Lock()
        self.failures = self.errors = self.under_way = 0
        self.stopping = False  # calls that have not begun do nothing

    def ask(self, items: list[Item]) -> None:
        """Starts the calls that obtain answers."""
        if self.answerer is not None and self.answering is not None:
            for start in range(0, len(items), self.answerer.batch_size):
                batch = items[start : start + self.answerer.batch_size]
                self._start(self.answering, "answer", batch, partial(self._answer, self.answerer, batch))

    def judge(self, item: Item) -> None:
        """Obtains an answer's verdict: parses it from the answer, or starts a call to the judge."""
        if not item.judged:
            answer, question = self._answer_to(item), item.question
            found = parse_letter(answer, question, item.sample) if question.options else None
            self._keep(item, found or parse_yes_no(answer, question.expected))
            self.bar.update()
        elif self.judging_model is not None and self.judging is not None and not self.stopping:
            self._start(self.judging, "judge", [item], partial(self._judge, self.judging_model, item))

    def label(self, item: Item) -> None:
        """Starts a call to the judge for the label of an answer that has its verdict."""
        if self.judging_model is not None and self.judging is not None and not self.stopping:
            self._start(self.judging, "label", [item], partial(self._label, self.judging_model, item))

    def _start(self, pool: ThreadPoolExecutor, what: str, items: list[Item], work: Callable[[], None]) -> None:
        self.calls[pool.submit(self._call, what, items, work)] = (what, items)

    # These methods run in the threads.

    def _call(self, what: str, items: list[Item], work: Callable[[], None]) -> bool:
        """Returns whether the call succeeded. Stores a failure as a row, and raises an error that ends the run."""
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
            if what == "label":
                self.records.keep(self.records.rows[item.key] | {"label": None, "label_error": str(error)})
                continue
            answer = self.records.answers.get(item.key, {}).get("answer")
            failed = item.row | {"answer": answer, "verdict": None, "error": f"{what}: {error}"}
            failed.pop("labelled", None)
            self.records.keep(failed)
        with self.counting:
            self.failures, self.errors = self.failures + 1, self.errors + len(items)
            if self.failures >= MOST_FAILURES and not self.stopping:
                self.stopping = True
                kind = MayPass if error.passing else UserError
                raise kind(f"stopped: {self.failures} requests in a row had no answer; the last {what}: {error}.")

    def _answer(self, answerer: Answerer, items: list[Item]) -> None:
        a = self.asking
        texts = answerer.answers([item.messages for item in items], a.max_tokens, a.temperature, items[0].seed)
        for item, text in zip(items, texts, strict=True):
            row = {name: value for name, value in item.row.items() if name not in ("judge", "judged", "labelled")}
            self.records.keep_answer(row | {"answer": text})

    def _judge(self, judge: Endpoint, item: Item) -> None:
        a, prompt, question = self.asking, item.claim.judges[item.question.kind], item.question
        chat = judge_messages(prompt, asked(question, item.sample), self._answer_to(item))
        text = judge.complete(chat, a.judge_max_tokens, a.judge_temperature, item.seed)
        if not text.strip():
            raise NoAnswer("the judge answered nothing: raise --judge-max-tokens if it thinks first")
        self._keep(item, (parse_score if question.kind == "coherence" else parse_verdict)(text, prompt.key))

    def _label(self, judge: Endpoint, item: Item) -> None:
        a, prompt, question = self.asking, item.claim.labels[item.question.kind], item.question
        held = self.records.rows[item.key]
        chat = judge_messages(prompt, conversation(question, item.sample), str(held["answer"]), item.claim.claim)
        text = judge.complete(chat, a.judge_max_tokens, a.judge_temperature, item.seed)
        if not text.strip():
            raise NoAnswer("the judge answered nothing: raise --judge-max-tokens if it thinks first")
        label, reason = parse_label(text, prompt.key)
        row = {name: value for name, value in held.items() if name != "label_error"}
        self.records.keep(row | {"labelled": item.row["labelled"], "label": label, "label_reason": reason})

    def _answer_to(self, item: Item) -> str:
        return str(self.records.answers[item.key]["answer"])

    def _keep(self, item: Item, found: Verdict) -> None:
        row = item.row | {"answer": self._answer_to(item), "verdict": found.verdict, "reason": found.reason}
        row.pop("labelled", None)  # until there is a label
        if found.score is not None:
            row["score"] = found.score
        if found.said:
            row["said"] = found.said
        self.records.keep(row)

    # These methods collect finished calls.

    def finish(self) -> None:
        """Collects results until no call is in flight."""
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
        elif what == "judge" and items[0].labelled and not self.stopping:
            self.label(items[0])
        else:
            self.bar.update()

    def wind_up(self, error: BaseException) -> None:
        """Stops after an error. Starts no new calls, but waits for the calls in flight and stores their results, which
        may have cost money. Calls count themselves as they run, because an interrupt can come between the start of a
        call and its entry in `calls`."""
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
