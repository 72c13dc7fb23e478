"""The tables of targets and NLL per role that a run shows."""

from typing import Any

from rich.table import Table

from train.data.kinds import counts_shown
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
    table = Table(title=title, title_justify="left", caption=UNSPANNED, caption_justify="left")
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
