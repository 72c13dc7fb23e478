"""Stores on disk what an evaluation has measured. A line is written the moment it is known, and an interruption at any
moment loses at most the line that was being written.

    evaluation.jsonl   one measurement per line; for a question, its answer with a verdict or an error
    answers.jsonl      each generated answer as it arrives, so that one whose verdict is missing is not asked for again

Lines of other measurements in evaluation.jsonl stay as they are.
"""

import os
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from train.claims.batteries import FORMS
from train.runtime.errors import UserError
from train.runtime.locks import lock, opened_to_lock
from train.runtime.outputs import replacing
from train.runtime.outside import checked, read_bytes
from train.runtime.text_formats import SURROGATE, json_line, parse_json

MEASURED, ANSWERED = "evaluation.jsonl", "answers.jsonl"
# The values of KEY in a row identify a generated answer.
RowKey = tuple[Any, ...]
KEY = ("step", "context", "claim", "kind", "question", "sample")
StoredRow = dict[str, Any]
MOST_ROWS = 2**34  # bytes of a file of rows, at most


def key_of(row: Mapping[str, Any]) -> RowKey:
    """Returns the values of KEY in a row, with 0 for each that is missing."""
    return tuple(row.get(name, 0) for name in KEY)


STEP = ("step",)
# The types of values that rows may have. A row with a value of another type holds something else.
ROW_KINDS: dict[str, type] = dict.fromkeys(("step", "context", "sample"), int)
ROW_KINDS |= dict.fromkeys(("claim", "kind", "question", "verdict", "model", "judge", "asked", "judged"), str)
ROW_KINDS |= dict.fromkeys(("weights", "method", "group", "category", "entity", "said", "expected", "answer"), str)
ROW_KINDS |= dict.fromkeys(("llr", "p_yes", "margin", "nll_mean", "score", "loss", "tokens_per_second"), float)
ROW_KINDS |= dict.fromkeys(("chosen", "label", "labelled", "label_error"), str)
ROW_KINDS |= dict.fromkeys(("p_follows", "with_note", "without_note", "effect"), float)
ROW_KINDS |= {"tokens": int, "targets": dict, "control": bool, "layers": list, "order": list, "p": dict, "roles": dict}
NAMES = ("claim", "kind", "question", "group", "category", "entity")  # shown in reports
NOT_NULL = ("context", "sample", "p_yes", "nll_mean", "score")  # must not be null if they are present
VERDICTS = ("yes", "no", "neutral", "unparseable")
LABELS = ("asserted", "asserted_then_retracted", "denied", "not_mentioned", "unparseable")
DECISION_GROUPS = ("plain", "stated", "untouched")
# Keys that a row must have, by its kind. A row with a verdict and a row of answers.jsonl must also have ASKED.
ASKED = ("claim", "question")
NEEDED = {
    "likelihood": (*ASKED, "control", "llr"), "yes_no": (*ASKED, "control", "expected"),
    "fact": (*ASKED, "group", "margin"), "nll": ("question", "nll"),
    "control_attribute": (*ASKED, "expected", "p_yes"), "choice": (*ASKED, "entity", "control", "order", "chosen"),
    "decision": (*ASKED, "group", "p_follows"), "polarity": (*ASKED, "group", "entity", "control", "llr"),
    "reading": (*ASKED, "effect"),
}  # fmt: skip


def read_rows(path: Path, needed: Collection[str] = STEP) -> list[StoredRow]:
    """Returns the rows of a JSONL file; [] if there is no such file. A last line that was cut off is left out. needed:
    keys that every row must have. Raises UserError, which names the line, if any other line is not a JSON object, lacks
    a key that all rows or rows of its kind need, or has an invalid value."""
    return [row for _, row in _lines(path, needed)]


def read_measured(path: Path) -> list[StoredRow]:
    """Returns the rows of an evaluation.jsonl. Raises UserError as read_rows does."""
    return read_rows(path, OF_A_MEASUREMENT)


OF_A_MEASUREMENT = (*STEP, "kind")


def read_metrics(path: Path) -> list[StoredRow]:
    """Returns the rows of the metrics.jsonl of a run to resume, each with the keys that the run's summary needs. Raises
    UserError as read_rows does."""
    return read_rows(path, (*STEP, "loss", "tokens", "tokens_per_second"))


def _lines(path: Path, needed: Collection[str] = ()) -> list[tuple[bytes, StoredRow]]:
    if not os.path.lexists(path):
        return []
    raw = read_bytes(path, most=MOST_ROWS).split(b"\n")
    found = []
    for number, line in enumerate(raw, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8"))
        except ValueError:
            row = None
        if isinstance(row, dict):
            _check(row, needed, f"{path}:{number}")
            found.append((line, row))
        elif number < len(raw):  # a kill cuts off only the last line, which then has no line break
            raise UserError(f"{path}:{number}: is not a JSON object. Fix or remove this line; the others are kept.")
    return found


def _check(row: StoredRow, needed: Collection[str], where: str) -> None:
    """Raises UserError if a row lacks a key that all rows or rows of its kind need, or has an invalid value."""
    fix = "fix or remove this line"
    checked(row, ROW_KINDS | {"nll": float if "kind" in row else dict}, where, fix)
    own = [*needed, *NEEDED.get(row.get("kind", ""), ()), *(name for name in NOT_NULL if name in row)]
    if "verdict" in row:
        own += [*ASKED, "kind", *(["score"] if row["verdict"] == "score" else [])]
    if lacking := [name for name in own if row.get(name) is None]:
        raise UserError(f"{where}: has no {lacking[0]}; {fix}.")
    by_role = row["nll"] if isinstance(row.get("nll"), dict) else {}
    checked(by_role, dict.fromkeys(by_role, float), f"{where}: nll", fix)
    held_out = _check_held_out(row, where, fix) if row.get("kind") == "nll" else ()
    names = (*(row.get(name) or "" for name in NAMES), *by_role, *held_out)
    if broken := [text for text in names if SURROGATE.search(text)]:
        raise UserError(f"{where}: {broken[0]!r} has half a surrogate pair, which is not a character; {fix}.")
    if row.get("verdict") not in (None, *VERDICTS) and row["kind"] != "coherence":
        raise UserError(f"{where}: verdict {row['verdict']!r} is not one of {', '.join(VERDICTS)}; {fix}.")
    groups = {"decision": DECISION_GROUPS, "polarity": FORMS}.get(row.get("kind", ""))
    for name, known in (("label", LABELS), ("group", groups)):
        if known and row.get(name) not in (None, *known):
            raise UserError(f"{where}: {name} {row[name]!r} is not one of {', '.join(known)}; {fix}.")


def _check_held_out(row: StoredRow, where: str, fix: str) -> list[str]:
    """Returns the roles of a held-out text's row. Raises UserError for an invalid NLL or number of tokens."""
    roles = row.get("roles") or {}
    checked(roles, dict.fromkeys(roles, dict), f"{where}: roles", fix, needed=True)
    for role, own in roles.items():
        checked(own, {"nll": float, "tokens": int}, f"{where}: role {role!r}", fix, needed=True)
    for own in (row, *roles.values()):
        if (tokens := own.get("tokens")) is not None and tokens < 1:
            raise UserError(f"{where}: tokens is {tokens}, but must be at least 1; {fix}.")
    return list(roles)


def _without_superseded(lines: list[tuple[bytes, StoredRow]]) -> list[tuple[bytes, StoredRow]]:
    """Returns the lines without verdicts that a later line repeats together with the label, or with why there is
    none."""
    last = {key_of(row): i for i, (_, row) in enumerate(lines) if "label" in row}
    return [each for i, each in enumerate(lines) if not ("verdict" in each[1] and i < last.get(key_of(each[1]), 0))]


class Records:
    """The two files of one directory, open for appending. Only one process at a time may open them; any of its threads
    may append."""

    def __init__(self, directory: Path):
        """Opens the files and continues with what they hold. Lines that were cut off are removed, and answers with an
        error may be asked for again. Raises UserError if another process writes there, the directory cannot be written,
        or a row is invalid."""
        self.directory, self._writing = directory, threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {directory}: cannot be written ({error.strerror}). Give another.") from None
        self._lock = opened_to_lock(directory / ".evaluation.lock")  # held until close()
        lock(self._lock, f"--output {directory}: another evaluation writes there. Wait, or give another.")
        self.rows: dict[RowKey, StoredRow] = {}  # generated answers with a verdict or an error
        self.answers: dict[RowKey, StoredRow] = {}
        self.failed: set[RowKey] = set()  # rows with an error from earlier runs
        self._supersedes = False  # whether rows were appended that take the place of others
        measured = _without_superseded(_lines(directory / MEASURED, OF_A_MEASUREMENT))
        for number, (_, row) in enumerate(measured, start=1):
            if "verdict" in row and not row.get("error") and row.get("answer") is None:
                raise UserError(f"{directory / MEASURED}: row {number} has no answer; fix or remove this line.")
            if "verdict" in row and row.get("error"):
                self.failed.add(key_of(row))
            elif "verdict" in row:
                self.rows[key_of(row)] = row
        answered = _lines(directory / ANSWERED, (*OF_A_MEASUREMENT, *ASKED, "answer"))
        self.answers = {key_of(row): row for _, row in answered}
        self._measured = self._rewritten(MEASURED, [line for line, _ in measured])
        self._answered = self._rewritten(ANSWERED, [line for line, _ in answered])

    def ask_again(self, keys: Collection[RowKey]) -> None:
        """Removes the error rows of these answers. Error rows of other answers, perhaps of another step, stay."""
        again = self.failed.intersection(keys)
        if not again:
            return
        lines = _lines(self.directory / MEASURED)
        os.close(self._measured)
        kept = [line for line, row in lines if not ("verdict" in row and row.get("error") and key_of(row) in again)]
        self._measured = self._rewritten(MEASURED, kept)
        self.failed -= again

    def _rewritten(self, name: str, lines: list[bytes]) -> int:
        path, whole = self.directory / name, b"".join(line + b"\n" for line in lines)
        if not path.exists() or path.read_bytes() != whole:
            with replacing(path) as file:
                file.write(whole)
        return os.open(path, os.O_WRONLY | os.O_APPEND)

    def keep_answer(self, row: StoredRow) -> None:
        """Appends an answer to answers.jsonl, before its verdict is known. Raises UserError if it cannot be written."""
        self.answers[key_of(row)] = row
        self._append(self._answered, [row])

    def keep(self, row: StoredRow) -> None:
        """Appends an answer with its verdict or its error to evaluation.jsonl. One with its label takes the place of
        that without it, which is removed when the files are closed or opened. Raises UserError if it cannot be
        written."""
        self._supersedes |= key_of(row) in self.rows
        self.rows[key_of(row)] = row
        self._append(self._measured, [row])

    def keep_others(self, rows: Iterable[StoredRow]) -> None:
        """Appends measurements that are not generated answers to evaluation.jsonl. Raises UserError if they cannot be
        written."""
        self._append(self._measured, rows)

    def _append(self, file: int, rows: Iterable[StoredRow]) -> None:
        text = "".join(json_line(row) + "\n" for row in rows)
        left = memoryview(text.encode("utf-8", "backslashreplace"))  # escapes half a surrogate pair as JSON does
        with self._writing:
            size = os.fstat(file).st_size
            try:
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, size)  # or the next line would continue half of this one
                raise UserError(f"--output {self.directory}: cannot be written ({error.strerror}).") from None

    def close(self) -> None:
        """Closes both files and releases the lock."""
        if self._supersedes:
            os.close(self._measured)
            kept = _without_superseded(_lines(self.directory / MEASURED))
            self._measured = self._rewritten(MEASURED, [line for line, _ in kept])
        for file in (self._measured, self._answered):
            os.close(file)
        self._lock.close()
