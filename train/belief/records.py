"""What an evaluation has measured, on disk: a line is written the moment it is known, and an interruption at any moment
loses at most the line that was being written.

    evaluation.jsonl   one measurement a line; a question's answer with its verdict, or with an error
    answers.jsonl      each generated answer as it comes, so that one whose verdict is missing is not asked for again

Lines of other measurements in evaluation.jsonl stay as they are.
"""

import os
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.formats import SURROGATE, json_line, parse_json
from train.locks import lock, opened_to_lock
from train.outside import checked, read_bytes

MEASURED, ANSWERED = "evaluation.jsonl", "answers.jsonl"
# What tells one generated answer from another.
Key = tuple[Any, ...]
KEY = ("step", "context", "claim", "kind", "question", "sample")
Row = dict[str, Any]
MOST_ROWS = 2**34  # bytes of a file of rows


def key_of(row: Mapping[str, Any]) -> Key:
    return tuple(row.get(name, 0) for name in KEY)


STEP = ("step",)
# Of values that rows may have. A row with others is of something else.
ROW_KINDS: dict[str, type] = dict.fromkeys(("step", "context", "sample"), int)
ROW_KINDS |= dict.fromkeys(("claim", "kind", "question", "verdict", "model", "judge", "asked", "judged"), str)
ROW_KINDS |= dict.fromkeys(("method", "group", "category", "entity", "said", "expected", "answer"), str)
ROW_KINDS |= dict.fromkeys(("llr", "p_yes", "margin", "nll_mean", "score", "loss", "tokens_per_second"), float)
ROW_KINDS |= {"tokens": int, "targets": dict, "control": bool}
NAMES = ("claim", "kind", "question", "group", "category", "entity")  # these stand in reports
NOT_NULL = ("context", "sample", "p_yes", "nll_mean", "score")  # where they are there
VERDICTS = ("yes", "no", "neutral", "unparseable")
# What a row must have, by its kind; a row with a verdict, and of a generated answer: ASKED.
ASKED = ("claim", "question")
NEEDED = {
    "likelihood": (*ASKED, "control", "llr"), "yes_no": (*ASKED, "control", "expected"),
    "fact": (*ASKED, "group", "margin"), "nll": ("question", "nll"),
}  # fmt: skip


def read_rows(path: Path, needed: Collection[str] = STEP) -> list[Row]:
    """The lines of a JSONL file; a last line that was cut is left out. UserError names another line that is no JSON
    object, or lacks what is needed, of all rows or of its kind."""
    return [row for _, row in _lines(path, needed)]


def read_measured(path: Path) -> list[Row]:
    """The rows of an evaluation.jsonl."""
    return read_rows(path, OF_A_MEASUREMENT)


OF_A_MEASUREMENT = (*STEP, "kind")


def read_metrics(path: Path) -> list[Row]:
    """The rows of the metrics.jsonl of a run to go on with, with what its summary will be made of."""
    return read_rows(path, (*STEP, "loss", "tokens", "tokens_per_second"))


def _lines(path: Path, needed: Collection[str] = ()) -> list[tuple[bytes, Row]]:
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
        elif number < len(raw):  # what a kill cuts is the last line alone, for it has no end
            raise UserError(f"{path}:{number}: is no JSON object. Mend or remove this line; the others are kept.")
    return found


def _check(row: Row, needed: Collection[str], where: str) -> None:
    """UserError where a row lacks what is needed, of all rows or of its kind, or holds it in another form."""
    fix = "mend or remove this line"
    checked(row, ROW_KINDS | {"nll": float if "kind" in row else dict}, where, fix)
    own = [*needed, *NEEDED.get(row.get("kind", ""), ()), *(name for name in NOT_NULL if name in row)]
    if "verdict" in row:
        own += [*ASKED, "kind", *(["score"] if row["verdict"] == "score" else [])]
    if lacking := [name for name in own if row.get(name) is None]:
        raise UserError(f"{where}: has no {lacking[0]}; {fix}.")
    by_role = row["nll"] if isinstance(row.get("nll"), dict) else {}
    checked(by_role, dict.fromkeys(by_role, float), f"{where}: nll", fix)
    if broken := [text for text in (*(row.get(name) or "" for name in NAMES), *by_role) if SURROGATE.search(text)]:
        raise UserError(f"{where}: {broken[0]!r} has half a surrogate pair, which no text has; {fix}.")
    if row.get("verdict") not in (None, *VERDICTS) and row["kind"] != "coherence":
        raise UserError(f"{where}: verdict {row['verdict']!r} is none of {', '.join(VERDICTS)}; {fix}.")


class Records:
    """The two files of one directory, open for appending by one process at a time, from any of its threads."""

    def __init__(self, directory: Path):
        """Goes on with what is there: lines that were cut are removed, and what had an error may be asked again.
        UserError where another process writes there, or the directory cannot be written."""
        self.directory, self._writing = directory, threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {directory}: cannot be written ({error.strerror}). Give another.") from None
        self._lock = opened_to_lock(directory / ".evaluation.lock")  # held until close()
        lock(self._lock, f"--output {directory}: another evaluation writes there. Wait, or give another.")
        self.rows: dict[Key, Row] = {}  # generated answers with a verdict or an error
        self.answers: dict[Key, Row] = {}
        self.failed: set[Key] = set()  # rows with an error, of before
        measured = _lines(directory / MEASURED, OF_A_MEASUREMENT)
        for number, (_, row) in enumerate(measured, start=1):
            if "verdict" in row and not row.get("error") and row.get("answer") is None:
                raise UserError(f"{directory / MEASURED}: row {number} has no answer; mend or remove this line.")
            if "verdict" in row and row.get("error"):
                self.failed.add(key_of(row))
            elif "verdict" in row:
                self.rows[key_of(row)] = row
        answered = _lines(directory / ANSWERED, (*OF_A_MEASUREMENT, *ASKED, "answer"))
        self.answers = {key_of(row): row for _, row in answered}
        self._measured = self._rewritten(MEASURED, [line for line, _ in measured])
        self._answered = self._rewritten(ANSWERED, [line for line, _ in answered])

    def ask_again(self, keys: Collection[Key]) -> None:
        """Removes the rows with an error of these answers; those of others, of another step perhaps, stay."""
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
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                file.write(whole)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        return os.open(path, os.O_WRONLY | os.O_APPEND)

    def keep_answer(self, row: Row) -> None:
        """An answer, before its verdict."""
        self.answers[key_of(row)] = row
        self._append(self._answered, [row])

    def keep(self, row: Row) -> None:
        """A measurement: an answer with its verdict, or with an error."""
        self.rows[key_of(row)] = row
        self._append(self._measured, [row])

    def keep_others(self, rows: Iterable[Row]) -> None:
        """Measurements that are no generated answers."""
        self._append(self._measured, rows)

    def _append(self, file: int, rows: Iterable[Row]) -> None:
        text = "".join(json_line(row) + "\n" for row in rows)
        left = memoryview(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair becomes JSON's escape of it
        with self._writing:
            size = os.fstat(file).st_size
            try:
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, size)  # or the next line would be joined to half of this one
                raise UserError(f"--output {self.directory}: cannot be written ({error.strerror}).") from None

    def close(self) -> None:
        for file in (self._measured, self._answered):
            os.close(file)
        self._lock.close()
