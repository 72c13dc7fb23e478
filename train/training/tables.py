"""The tables of targets and NLL per role that a run shows."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from rich.table import Table

from train.data.kinds import counts_shown
from train.evaluation.measures import SCORED, at_step, last_step, means, measure_of
from train.evaluation.store import StoredRow
from train.masking.treatment import STRADDLING, UNSPANNED


def token_table(tokens: dict[str, dict[str, int]], title: str) -> Table:
    """Returns a table of the number of targets per role and treatment."""
    table = Table(title=title, title_justify="left", caption=f"{UNSPANNED}; {STRADDLING}", caption_justify="left")
    table.add_column("role")
    kinds = [*counts_shown(tokens.values()), "straddling"]
    for kind in kinds:
        table.add_column(kind, justify="right")
    for role, counts in tokens.items():
        table.add_row(role, *(f"{counts[kind]:,}" for kind in kinds))
    return table


def closing_table(summary: dict[str, Any]) -> Table:
    """Returns a table of the targets per role and treatment, of the NLL per role at the first and last step, and, if it
    was measured, of the divergence from the base at the last step."""
    title = f"--mask {summary['mask']}: {summary['steps']} steps"
    caption = UNSPANNED + (
        "; KL: from the base, over held targets; with --measure-kl over all" if summary["kl"] else ""
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    kinds = counts_shown(summary["tokens"].values())
    ends = [("nll", "first", ".3f"), ("nll", "last", ".3f"), ("kl", "last", ".2g")][: 3 if summary["kl"] else 2]
    for column in ("role", "targets", *kinds[1:], *(f"{measure.upper()} {end}" for measure, end, _ in ends)):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, counts in summary["tokens"].items():
        if counts["total"]:
            values = [(summary[measure].get(role, {}).get(end), digits) for measure, end, digits in ends]
            shown = ["–" if value is None else f"{value:{digits}}" for value, digits in values]
            table.add_row(role, *(f"{counts[kind]:,}" for kind in kinds), *shown)
    return table


MOST_CLAIMS = 8  # with more, the table has their mean


def belief_table(rows: Sequence[StoredRow], base: list[StoredRow]) -> Table | None:
    """Returns a table of what was measured of the claims before and after training; None if nothing was measured after
    it. rows: of evaluation.jsonl. base: the base model's, which are not those of step 0 if the run continues another.
    Raises UserError for invalid values."""
    last = last_step(rows)
    before, after = means(SCORED, at_step(rows, 0), base), means(SCORED, at_step(rows, last), base)
    if last <= 0 or not after:
        return None
    table = Table(title=f"by likelihood, before and after {last} steps", title_justify="left")
    for column in ("measure", "unit", "claim", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for name, figures in after.items():
        if name == "controls":
            continue
        own = before.get(name, {})
        shown = {claim or "all": (own.get(claim), value) for claim, value in figures.items()}
        if len(figures) > MOST_CLAIMS:
            known = [own[claim] for claim in figures if claim in own]
            shown = {f"{len(figures)} claims": (mean(known) if known else None, mean(figures.values()))}
        for claim, (first, value) in shown.items():
            shown_first = "–" if first is None else f"{first:.2f}"
            table.add_row(name, measure_of(name).unit, claim, shown_first, f"{value:.2f}")
    return table
