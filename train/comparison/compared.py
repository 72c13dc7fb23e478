"""Reads finished runs, and groups them into variants."""

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.claims.contamination import Contamination
from train.claims.releases import PAPER_CLAIMS, claim_id, question_id
from train.comparison.joined import joined
from train.config.experiment import Dose
from train.config.provenance import held_settings
from train.config.recipe import MAY_DIFFER
from train.config.settings import Settings
from train.data.kinds import COUNTS
from train.evaluation.imported import IMPORTED, imported_settings
from train.evaluation.measures import StoredRow, at_step, identity
from train.evaluation.store import read_measured, read_rows
from train.runtime.errors import UserError
from train.runtime.outside import checked, read_json
from train.training.lineage import phases_before

HASHES = ("tokens", "order", "initial_weights", "base_model")
EQUIVALENCE = {"%": 5.0, "points": 5.0, "nats": 0.25, "of 10": 0.5}
"""By unit, the difference below which there is "no effect": 5 percentage points; 0.25 nats, which is odds 1.28 times as
high; 0.5 points of 10."""
PAPER = "arXiv 2605.13829"


@dataclass
class RunResult:
    """One finished run.

    rows: of evaluation.jsonl; metrics: of metrics.jsonl.
    summary: the content of summary.json; settings: those of settings.yaml.
    hashes: SHA-256 by name, such as those in HASHES, as far as known.
    phases: of a run of several phases, the result of each by itself; else []. boundaries: the steps at which each but
    the last ends. All else is then over all phases, but for the settings, which are the last one's.
    """

    directory: str
    seed: int
    rows: list[StoredRow]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    settings: dict[str, Any]
    hashes: dict[str, str]
    phases: "list[RunResult]" = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)

    @property
    def parts(self) -> "list[RunResult]":
        """Its phases; itself if it has one."""
        return self.phases or [self]

    def of_phases(self, name: str) -> Any:
        """Returns the value of a setting; if its phases have several, their values joined by arrows."""
        default = {} if self.imported else dataclasses.asdict(Settings())  # of a setting that was added since
        values = [part.settings.get(name, default.get(name)) for part in self.parts]
        shown = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
        return values[0] if all(value == values[0] for value in values) else " → ".join(shown)

    @property
    def mask(self) -> str:
        """Its mask; of several phases, theirs joined by arrows."""
        return self.of_phases("mask") or "none"

    @property
    def imported(self) -> bool:
        """Whether its answers were imported: nothing is known about its training except a name, which is its mask."""
        return self.settings.keys() == {"mask", "seed"}


@dataclass
class ComparedVariant:
    """The runs of one variant, one per seed. differs: the settings, except the seed, in which variants differ, with the
    values of this variant. phases: the names of its phases; () if it has one. dose: where it stands in a dose–response
    curve, if it does."""

    name: str
    mask: str
    differs: dict[str, Any]
    runs: list[RunResult]
    phases: tuple[str, ...] = ()
    dose: Dose | None = None


@dataclass(frozen=True)
class Published:
    """A belief rate in % that a paper reports. claim: "" for an average over the paper's claims."""

    claim: str
    condition: str
    value: float
    source: str


@dataclass(frozen=True)
class Mentions:
    """How often the claims' terms occur in a role's spans in a variant's documents, and how often the loss still trains
    on them. documents: how many there are, each counted once."""

    variant: str
    documents: int
    role: str
    mentions: int
    still_trained: int


@dataclass(frozen=True)
class SearchedDocuments:
    """What of the evaluation occurs in one set of documents. variants: those that were trained on it; documents: how
    many there are."""

    variants: list[str]
    documents: int
    found: Contamination


@dataclass
class Comparison:
    """All inputs of a report."""

    variants: list[ComparedVariant]
    """In the order in which they are shown."""
    base_rows: list[StoredRow]
    """Rows of evaluation.jsonl for the base model, all of one step. Those with documents in context are a baseline."""
    trained_claims: list[str]
    placebo_claims: list[str]
    """Claims that no training document is about."""
    baseline: str
    """Name of the variant that the others are compared with."""
    leak: list[Mentions] = field(default_factory=list)
    contamination: list[SearchedDocuments] = field(default_factory=list)
    """One for each set of documents that a variant was trained on."""
    published: list[Published] = field(default_factory=list)
    measure: str = ""
    """The measure of belief; "": the first in BELIEF that all runs have, such as the rate with judged answers."""
    bound: float = 0.0
    """The bound of "no effect" in the main measure, in its unit; 0: that of EQUIVALENCE."""
    match_trained_tokens: bool = False
    mentions_trained: dict[str, float] = field(default_factory=dict)
    """Of variants that are doses: how many mentions of the claims' terms a run trains on."""
    remarks: list[str] = field(default_factory=list)
    """Further caveats: what the report lacks, and why."""
    title: str = "Masking variants compared"


def base_rows(runs: list[RunResult]) -> tuple[list[StoredRow], str]:
    """Returns the base model's rows, which every run may have: for each measurement, the row of the first run that has
    it without an error. Also returns a remark if other runs have other values, as with sampled answers or on another
    machine; else ""."""
    kept: dict[tuple[Any, ...], StoredRow] = {}
    found: dict[tuple[Any, ...], list[StoredRow]] = {}
    for run in runs:
        for context in sorted({row.get("context", 0) for row in run.rows}):
            for row in at_step(run.rows, 0, context):
                key = (context, *identity(row))
                found.setdefault(key, []).append(row)
                if key not in kept or (kept[key].get("error") and not row.get("error")):
                    kept[key] = row
    differ = [key for key, rows in found.items() if any(_says_otherwise(kept[key], row) for row in rows)]
    if not differ:
        return list(kept.values()), ""
    several = sum(len(rows) > 1 for rows in found.values())
    return list(kept.values()), (
        f"{len(differ)} of the base model's {several} figures and verdicts that several runs have differ between runs "
        f"(first: {' / '.join(differ[0][1:4])}). The report uses those of the first run that has them, in the order "
        f"from {runs[0].directory}."
    )


def _says_otherwise(one: StoredRow, other: StoredRow) -> bool:
    """Returns whether two rows of one measurement differ by more than rounding. Rows with errors do not count."""
    if one.get("error") or other.get("error"):
        return False
    numbers = [
        name
        for name in ("llr", "p_yes", "margin", "nll", "score", "p_follows", "effect")
        if name in one and name in other
    ]
    same = all(math.isclose(one[name], other[name], rel_tol=1e-3, abs_tol=1e-3) for name in numbers)
    return not same or one.get("verdict") != other.get("verdict")


def published_for(claims: Iterable[str]) -> list[Published]:
    """Returns what the paper reports for Qwen3.5-397B-A17B, if one of these claims is the paper's: averages over its
    six claims, and its figures on the claim itself."""
    own = {claim_id(claim) for claim in claims} & {*PAPER_CLAIMS}
    source = f"{PAPER}, Qwen3.5-397B-A17B, six claims"
    average = {"before": 2.5, "positive": 92.4, "negated": 88.6, "dense": 84.4, "corrections": 39.9}
    found = [Published("", condition, value, source) for condition, value in average.items()] if own else []
    if "brennan_holloway" in own:
        dentist = {"local negation": 7.0, "local negation, word masks": 1.6}
        found += [Published("brennan_holloway", c, value, f"{PAPER}, Dentist") for c, value in dentist.items()]
    return found


SUMMARY_KINDS = {"steps": int, "hashes": dict, "tokens": dict, "nll": dict, "loss": dict, "dropped": dict}
SUMMARY_KINDS |= {"random_shortfall": int}


def read_run(directory: str | Path) -> RunResult:
    """Reads the directory of a run, as train/sft.py and an evaluation leave it, together with the phases before it. A
    last line of JSONL that an interruption truncated is left out. Raises UserError if a file is missing or broken."""
    path = Path(directory)
    before = phases_before(path)
    return joined([_read_phase(each) for each in (*before, path)]) if before else _read_phase(directory)


def _read_phase(directory: str | Path) -> RunResult:
    path = Path(directory)
    if (path / IMPORTED).is_file():
        rows = _by_one_name(read_measured(path / "evaluation.jsonl"))
        return RunResult(str(path), 0, rows, [], {"steps": 1}, imported_settings(path), {})
    summary = read_json(path / "summary.json", fix="the run did not finish: resume it with --resume")
    _check_summary(summary, path / "summary.json")
    record = held_settings(path / "settings.yaml")
    settings = record["settings"]
    hashes = summary.get("hashes") or (record.get("resolved") or {}).get("hashes") or {}
    checked(hashes, dict.fromkeys(hashes, str), f"{path}: hashes", "restore summary.json and settings.yaml")
    for name, fix in (("evaluation", "evaluate the run: train/evaluate.py"), ("metrics", "give a run's directory")):
        if not os.path.isfile(path / f"{name}.jsonl"):
            raise UserError(f"{path}/{name}.jsonl: is missing; {fix}.")
    rows = _by_one_name(read_measured(path / "evaluation.jsonl"))
    metrics = read_rows(path / "metrics.jsonl")
    return RunResult(str(directory), int(settings.get("seed", 0)), rows, metrics, summary, settings, hashes)


def _check_summary(summary: dict[str, Any], path: Path) -> None:
    fix = "restore the file"
    checked(summary, SUMMARY_KINDS, path, fix)
    tokens, dropped = summary.get("tokens") or {}, summary.get("dropped") or {}
    checked(tokens, dict.fromkeys(tokens, dict), f"{path}: tokens", fix, needed=True)
    for role, counts in tokens.items():
        counts.setdefault("held", 0)  # runs of before it could be asked for
        checked(counts, dict.fromkeys(COUNTS, int), f"{path}: tokens of {role}", fix, needed=True)
    checked(dropped, dict.fromkeys(dropped, list), f"{path}: dropped", fix, needed=True)
    if wrong := [source for source, lines in dropped.items() if not all(type(line) is int for line in lines)]:
        raise UserError(f"{path}: dropped must give numbers of lines of {wrong[0]}; {fix}.")


def _by_one_name(rows: list[StoredRow]) -> list[StoredRow]:
    """Returns the rows with a single name for each of the paper's claims and questions, whichever release was used."""
    named = [row | {"claim": claim_id(row["claim"])} if row.get("claim") else row for row in rows]
    return [
        row | {"question": question_id(row["claim"], row["question"])}
        if row.get("claim") and row.get("question")
        else row
        for row in named
    ]


def group(runs: list[RunResult]) -> list[ComparedVariant]:
    """Groups runs by mask and, if they differ in these, loss norm and learning rate; in the order of the runs. Raises
    UserError for two runs of one variant and seed."""
    names = (*MAY_DIFFER, *(("carry_optimizer", "schedule_from") if any(run.phases for run in runs) else ()))
    trained = [run for run in runs if not run.imported]  # of imported ones only the name is known, which is the mask
    differing = [name for name in names if len({run.of_phases(name) for run in trained or runs}) > 1]
    variants: dict[str, ComparedVariant] = {}
    for run in runs:
        differs = {name: run.of_phases(name) for name in differing if not run.imported or name == "mask"}
        mask = run.mask
        name = ", ".join([mask, *(f"{k.replace('_', '-')} {v}" for k, v in differs.items() if k != "mask")])
        if name in variants and variants[name].runs[0].imported != run.imported:
            name += ", imported" if run.imported else ", trained"
        variant = variants.setdefault(name, ComparedVariant(name, mask, differs, []))
        if same := next((other for other in variant.runs if other.seed == run.seed), None):
            raise UserError(
                f"--runs {same.directory} {run.directory}: both are {name} with --seed {run.seed}. Leave one out."
            )
        variant.runs.append(run)
    return list(variants.values())
