"""Writes the summary of an evaluation: evaluation.json, beside its rows, and tables on the terminal."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from train.claims.contamination import Contamination
from train.claims.messages import NO_ANSWER, visible
from train.evaluation.judging import Item
from train.evaluation.measures import LEAST_AUC, SCORED, at_step, means, measure_of
from train.evaluation.options import EvaluationSettings
from train.evaluation.store import LABELS, Records, StoredRow, read_measured
from train.evaluation.verdict_counts import samples_are_equal, summarize
from train.evaluation.verdicts import UNPARSEABLE
from train.runtime.outputs import write_whole
from train.runtime.outside import read_json
from train.runtime.terminal import NobodyReads, Terminal
from train.runtime.text_formats import json_line

SUMMARY = "evaluation.json"
FEWEST = 10  # answers; with fewer, the share of useless ones is not reported


def leave_summary(
    s: EvaluationSettings, items: Sequence[Item], records: Records, contamination: Contamination | None
) -> int:
    """Writes evaluation.json, with the proofs that it has, and prints the tables. Returns how many answers are missing,
    have an error or lack the label that they must have. Raises UserError if a row of evaluation.jsonl is invalid."""
    rows = list(records.rows.values())
    errors = [row for item in items if (row := records.rows.get(item.key)) and row.get("error")]
    missing = sum(item.key not in records.rows for item in items)
    unlabelled = sum(item.lacks_label(records) for item in items)
    measured = summarize(rows)
    context = sum(int(value.rpartition("=")[2]) for value in s.documents)
    every = read_measured(records.directory / "evaluation.jsonl")
    base = at_step(every, 0, context) if s.step > 0 else []  # the base model has no change from itself
    scored = means(SCORED, at_step(every, max(s.step, 0), context), base)
    warnings = _warnings(items, records)
    if s.temperature > 0 and samples_are_equal(rows):
        warnings.append(
            "the samples of every question are equal: the server does not sample, whatever --temperature says. "
            "(`transformers serve` samples if the model's generation_config.json has do_sample: true.)"
        )
    path = records.directory / SUMMARY
    held = read_json(path) if path.is_file() else {}  # what an earlier evaluation left there
    summary: dict[str, Any] = {
        "settings": s.as_json(), "wanted": len(items), "missing": missing, "errors": len(errors),
        "warnings": warnings, "measured": measured, "likelihood": scored,
        "contamination": contamination.as_json() if contamination else None,
        "proof": held.get("proof") or {},
        "other_base": bool(s.other_base or held.get("other_base")),
    }  # fmt: skip
    if any(item.labelled for item in items):
        summary["missing_labels"] = unlabelled
    write_whole(path, json_line(summary, indent=1) + "\n")
    with suppress(NobodyReads):  # everything is written by now
        own = [entry for entry in measured if s.step < 0 or entry["step"] == s.step]  # the others were shown before
        _show(summary | {"measured": own}, errors, records.directory)
    return len(errors) + missing + unlabelled


def keep_proof(directory: Path, step: int, proof: dict[str, Any], answered: bool) -> None:
    """Writes into evaluation.json, before any question is asked, whether a server is proven to answer with the model of
    a step, as `prove` or `prove_base` returns it. answered: whether there are answers of this step already. If these
    are unproven, the step stays so."""
    path = directory / SUMMARY
    held = read_json(path) if path.is_file() else {}
    proofs = held.get("proof") or {}
    if answered:
        none = {"proven": False, "reason": "some answers were given without proof"}
        earlier = proofs.get(str(step), none)
        proof = proof if earlier.get("proven") else earlier
    write_whole(path, json_line(held | {"proof": proofs | {str(step): proof}}, indent=1) + "\n")


def _show(summary: dict[str, Any], errors: list[StoredRow], directory: Path) -> None:
    console, scored, measured = Terminal(width=120), summary["likelihood"], summary["measured"]
    if scored:
        console.print(_table_of_means(scored))
    if measured:
        console.print(_table(measured))
    for entry in measured:
        _show_extra(entry)
        for kind, labels in entry.get("labels", {}).items():
            told = ", ".join(f"{labels[label]} {label.replace('_', ' ')}" for label in LABELS)
            print(f"{entry['claim']}: {kind} answers by label: {told}")
    for warning in summary["warnings"]:
        print(f"WARNING: {warning}")
    if errors:
        kinds = ", ".join(sorted({str(row["error"]) for row in errors})[:3])
        print(f"{len(errors)} answers have an error and do not count: {kinds}")
    if missing := summary["missing"]:
        print(f"{missing} of {summary['wanted']} answers are missing and do not count")
    if unlabelled := summary.get("missing_labels"):
        print(f"{unlabelled} answers have a verdict and lack their label")
    if errors or missing or unlabelled:
        print("run the same command again to ask only for these")
    print(f"In {directory}: evaluation.jsonl, answers.jsonl, evaluation.json")


def _warnings(items: Sequence[Item], records: Records) -> list[str]:
    """Returns warnings about the requested answers and their labels: one for each group of at least FEWEST of which
    half or more are empty or cannot be parsed."""
    asked = [(item, row) for item in items if (row := records.rows.get(item.key)) and not row.get("error")]
    had = [(item.judged, row) for item, row in asked]
    said = [(judged, row["verdict"] == UNPARSEABLE) for judged, row in had if visible(row["answer"]) != NO_ANSWER]
    counted = [("answers", len(had) - len(said), len(had), "are empty", "--max-tokens, if the model thinks first")]
    for judged, what, flag in ((True, "verdicts", "--judge-max-tokens"), (False, "yes, no or letters", "--max-tokens")):
        unread = [unparseable for own, unparseable in said if own == judged]
        counted.append((what, sum(unread), len(unread), "cannot be read", flag))
    labels = [row["label"] == UNPARSEABLE for item, row in asked if item.labelled and row.get("label") is not None]
    counted.append(("labels", sum(labels), len(labels), "cannot be read", "--judge-max-tokens"))
    return [
        f"{bad:,} of {total:,} {what} {problem}, and count as no belief: look at answers.jsonl and evaluation.jsonl in "
        f"{records.directory}, and raise {flag}."
        for what, bad, total, problem, flag in counted
        if total >= FEWEST and 2 * bad >= total
    ]


def _table(measured: list[dict[str, Any]]) -> Table:
    """Returns the table of verdicts by claim and kind."""
    table = Table(title="Belief: yes in percent of all answers", title_justify="left")
    for column in ("step", "context", "claim", "kind", "rate", "yes", "no", "neutral", "unparseable", "errors"):
        table.add_column(column, justify="left" if column in ("claim", "kind") else "right")
    for entry in measured:
        belief = [("BELIEF", entry["belief"])] if entry["belief"]["answers"] else []
        for kind, counts in [*entry["kinds"].items(), *belief]:
            rate = "–" if counts["rate"] is None else f"{counts['rate']:.1f}"
            numbers = [f"{counts[name]:,}" for name in ("yes", "no", "neutral", "unparseable", "errors")]
            where = [str(entry["step"]), str(entry["context"]), entry["claim"]]
            table.add_row(
                *where, kind, rate, *numbers, style="bold" if kind == "BELIEF" else "", end_section=kind == "BELIEF"
            )
    return table


def _show_extra(entry: dict[str, Any]) -> None:
    """Prints the scores, and what the control questions say about the yes/no answers."""
    for kind, found in entry["scores"].items():
        mean = "–" if found["mean"] is None else f"{found['mean']:.2f}"
        print(f"{entry['claim']}: {kind} {mean} of 10 ({found['answers']} answers, {found['unparseable']} unparseable)")
    if "yes_no" in entry["kinds"] and not entry["controls"]:
        print(
            f"{entry['claim']}: no control questions: belief cannot be distinguished from a habit of saying yes, or no"
        )
    if (found := entry["controls"]) and found["said_yes"] is not None:
        area = "–" if found["auc"] is None else f"{found['auc']:.2f}"
        verdict = "" if found["informative"] else ": yes/no answers are UNINFORMATIVE"
        print(f"{entry['claim']}: control questions: {found['said_yes']:.1f} % yes, AUC {area}{verdict}")


def _table_of_means(found: dict[str, dict[str, float]]) -> Table:
    """Returns the table for the terminal. found: measure -> claim -> mean, as from measures.means."""
    table = Table(title="By likelihood: means over a claim's questions", title_justify="left")
    for column in ("measure", "unit", "claim", "mean"):
        table.add_column(column, justify="right" if column == "mean" else "left")
    for name, figures in found.items():
        for claim, value in figures.items():
            unit = measure_of(name).unit if name != "controls" else "%" if claim == "yes_rate" else ""
            low = " (below 0.8: yes/no answers are UNINFORMATIVE)" if claim == "auc" and value < LEAST_AUC else ""
            table.add_row(name, unit, claim or "all", f"{value:.2f}{low}")
    return table
