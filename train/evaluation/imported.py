"""Imports judged answers of other programs, as CSV or JSONL, into records that train/compare.py reads.

    python train/evaluate.py --import answers/ed_sheeran.csv answers/brennan_holloway.csv --claims claims \\
        --columns condition=condition kind=file question=question_id sample=sample_index verdict=judge_verdict \\
        --base-condition baseline --output imported

Each condition becomes a directory of --output: evaluation.jsonl, with the condition's answers at step 1 and those of
--base-condition, the model before training, at step 0; and imported.json, which says where they come from. Columns that
are not named have the names in COLUMNS. Without a column of claims, a file's name is its claim; without one of
conditions, all answers are of the condition "answers". Without --base-condition, nothing is at step 0.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.claims.claim import KINDS, LABELLED, Claim
from train.claims.claim_files import PAPER_QUESTIONS
from train.claims.releases import claim_id, question_id
from train.config.settings import slug
from train.evaluation.store import LABELS, VERDICTS, StoredRow, key_of
from train.runtime.errors import UserError
from train.runtime.outputs import write_whole
from train.runtime.outside import checked, read_json, read_text
from train.runtime.similar import similar
from train.runtime.text_formats import Unreadable, json_line, parse_json

COLUMNS = ("condition", "claim", "kind", "question", "sample", "verdict", "answer", "label")
NEEDED = ("question", "verdict")
PAPER_KINDS = {name.removesuffix(".yaml"): kind for name, kind in PAPER_QUESTIONS.items()}
IMPORTED = "imported.json"
MOST = 2**30  # bytes of a file


@dataclass(frozen=True)
class Answer:
    """A judged answer. where: file and line. columns: of the file."""

    condition: str
    row: StoredRow
    where: str
    columns: tuple[str, ...]


def column_names(given: Sequence[str]) -> dict[str, str]:
    """Returns the file's column by its meaning. given: values of --columns, MEANING=COLUMN. Raises UserError for an
    unknown meaning."""
    names = {name: name for name in COLUMNS}
    for value in given:
        meaning, found, column = value.partition("=")
        if not found or not column or meaning not in COLUMNS:
            near = similar(meaning, COLUMNS)
            raise UserError(
                f"--columns {value}: must be MEANING=COLUMN, with a MEANING of {', '.join(COLUMNS)}."
                + (f" Did you mean {near}?" if near and near != meaning else "")
            )
        names[meaning] = column
    return names


def import_answers(
    files: Sequence[str], given: Sequence[str], claims: Sequence[Claim], base: str, output: Path
) -> dict[str, tuple[int, int]]:
    """Writes one directory for each condition. Returns, by condition, the number of answers, and of those that have no
    label though others of their kind do.

    Raises UserError, with file and line, for an answer to a question that no claim has, an unknown verdict or label, a
    sample that is not a number, or an answer that is there twice; for a base condition without answers, or two
    conditions of one directory; and if a directory already exists.
    """
    columns = column_names(given)
    answers = [answer for path in files for answer in _answers(Path(path), columns, given, claims)]
    seen: dict[tuple[Any, ...], str] = {}
    for answer in answers:
        key = (answer.condition, *key_of(answer.row))
        if key in seen:
            sampled = columns["sample"] in answer.columns
            fix = "leave one out" if sampled else "name the column of the samples' numbers: --columns sample=COLUMN"
            raise UserError(f"{answer.where}: answers the same question and sample as {seen[key]}; {fix}.")
        seen[key] = answer.where
    counts = Counter(answer.condition for answer in answers)
    if not answers:
        raise UserError(f"--import {' '.join(files)}: holds no answers; give files with one in each row.")
    if base and base not in counts:
        raise UserError(f"--base-condition {base}: has no answers; conditions are {', '.join(counts)}.")
    conditions = [condition for condition in counts if condition != base]
    if not conditions:
        raise UserError(f"--base-condition {base}: is the only condition; give answers of a trained model too.")
    taken = [output / slug(condition) for condition in conditions]
    if doubled := next((path for path in taken if taken.count(path) > 1), None):
        raise UserError(f"--import: two conditions would have the directory {doubled.name}; rename one.")
    if there := next((path for path in taken if path.exists()), None):
        raise UserError(f"--output {output}: {there.name} already exists; give another directory.")
    digests = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    for condition, directory in zip(conditions, taken, strict=True):
        rows = [a.row | {"step": 0} for a in answers if a.condition == base]
        rows += [a.row | {"step": 1} for a in answers if a.condition == condition]
        directory.mkdir(parents=True)
        write_whole(directory / "evaluation.jsonl", "".join(json_line(row) + "\n" for row in rows))
        origin = {"condition": condition, "base_condition": base, "columns": columns, "files": digests}
        held = {column for answer in answers for column in answer.columns}
        origin["columns"] = {name: column for name, column in columns.items() if column in held}
        write_whole(directory / IMPORTED, json_line(origin, indent=1) + "\n")
    kinds = {answer.row["kind"] for answer in answers if "label" in answer.row}
    without = Counter(a.condition for a in answers if a.row["kind"] in kinds and "label" not in a.row)
    return {condition: (count, without[condition]) for condition, count in counts.items()}


def _answers(path: Path, columns: dict[str, str], given: Sequence[str], claims: Sequence[Claim]) -> Iterator[Answer]:
    """Yields the answers of a file, checked against the claims' questions."""
    by_id = {claim_id(claim.id): claim for claim in claims}
    for where, row in _rows(path):
        for value in given:
            if (column := value.partition("=")[2]) not in row:
                raise UserError(f"{where}: has no column {column}, which --columns names; it has {', '.join(row)}.")
        if absent := [name for name in NEEDED if columns[name] not in row]:
            raise UserError(
                f"{where}: has no {columns[absent[0]]}; name the column by --columns {absent[0]}=COLUMN, of "
                f"{', '.join(row)}."
            )
        filled = (*NEEDED, *(name for name in ("condition", "claim") if columns[name] in row))
        if empty := [columns[name] for name in filled if row[columns[name]] in (None, "")]:
            raise UserError(f"{where}: {empty[0]} is empty; fill it in, or leave the row out.")
        name = claim_id(str(row.get(columns["claim"]) or path.stem))
        if name not in by_id:
            raise UserError(
                f"{where}: claim {name} is not in --claims, which have {', '.join(by_id)}; give its claim, or name the "
                "column of claims by --columns claim=COLUMN."
            )
        question = _question(by_id[name], row, columns, where)
        verdict = str(row[columns["verdict"]]).strip().lower()
        if verdict not in VERDICTS:
            raise UserError(f"{where}: verdict {verdict!r} is not one of {', '.join(VERDICTS)}.")
        label = str(row.get(columns["label"]) or "").strip().lower()
        if label and question.kind not in LABELLED:
            raise UserError(
                f"{where}: label {label!r} of a question of kind {question.kind}; only answers to "
                f"{', '.join(LABELLED)} questions have labels. Leave it empty."
            )
        if label not in ("", *LABELS):
            raise UserError(f"{where}: label {label!r} is not one of {', '.join(LABELS)}.")
        sample = str(row.get(columns["sample"]) or 0)
        if not sample.isdecimal():
            raise UserError(f"{where}: {columns['sample']} {sample!r} must be a number of a sample, from 0 on.")
        yield Answer(
            str(row.get(columns["condition"]) or "answers"),
            {
                "step": 0, "context": 0, "claim": name, "kind": question.kind, "question": question.id,
                "sample": int(sample), "category": question.category, "verdict": verdict,
                "answer": str(row.get(columns["answer"]) or ""),
                **({"control": question.control, "expected": question.expected} if question.kind == "yes_no" else {}),
                **({"label": label} if label else {}),
            },
            where,
            tuple(row),
        )  # fmt: skip


def _question(claim: Claim, row: dict[str, Any], columns: dict[str, str], where: str) -> Any:
    """Returns the claim's question that a row answers. Raises UserError if there is none, or several of other kinds."""
    asked, kind = question_id(claim_id(claim.id), str(row[columns["question"]])), str(row.get(columns["kind"]) or "")
    kind = PAPER_KINDS.get(kind, kind)
    if kind and kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is not one of {', '.join(KINDS)}, nor a file of the paper.")
    found = [q for q in claim.questions if question_id(claim_id(claim.id), q.id) == asked and kind in ("", q.kind)]
    if len(found) != 1:
        near = similar(asked, [question_id(claim_id(claim.id), q.id) for q in claim.questions])
        none = "no such question" + (f" (is it {near}?)" if near else "") + "; give the claim as it was asked"
        what = none if not found else "several of that id: name the column of their kind by --columns kind=COLUMN"
        raise UserError(f"{where}: question {asked} of claim {claim.id}: {what}.")
    return found[0]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields place and content of each row of a CSV file with a head, or of a JSONL file."""
    text = read_text(path, most=MOST).removeprefix("\ufeff")  # a byte order mark, as spreadsheets write it
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{reader.line_num}: must have as many values as the header has columns.")
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: is not valid CSV ({error}).") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):  # other line breaks may be within a JSON string
        if not line.strip():
            continue
        try:
            row = parse_json(line, strictly=True)
        except Unreadable as error:
            raise UserError(f"{path}:{number}: {error}, give JSONL, or CSV with a header (.csv).") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is not an object; give one of keys and values on each line.")
        yield f"{path}:{number}", row


def imported_settings(directory: Path) -> dict[str, Any]:
    """Returns what stands for the settings of a run: the condition as its mask, and a seed. Raises UserError if
    imported.json is damaged."""
    held = read_json(directory / IMPORTED, fix="import the answers again")
    checked(held, {"condition": str}, directory / IMPORTED, "import the answers again", needed=True)
    return {"mask": held["condition"], "seed": 0}
