"""The tables of targets and NLL per role that a run shows."""

from typing import Any

from rich.table import Table

from train.masking.treatment import STRADDLING, UNSPANNED


def token_table(tokens: dict[str, dict[str, int]], title: str) -> Table:
    """Returns a table of the number of targets per role and treatment."""
    table = Table(title=title, title_justify="left", caption=f"{UNSPANNED}; {STRADDLING}", caption_justify="left")
    table.add_column("role")
    for kind in ("total", "trained", "excluded", "unlikelihood", "straddling"):
        table.add_column(kind, justify="right")
    for role, counts in tokens.items():
        table.add_row(role, *(f"{counts[kind]:,}" for kind in counts))
    return table


def closing_table(summary: dict[str, Any]) -> Table:
    """Returns a table of the targets per role and treatment, and of the NLL per role at the first and last step."""
    title = f"--mask {summary['mask']}: {summary['steps']} steps"
    table = Table(title=title, title_justify="left", caption=UNSPANNED, caption_justify="left")
    for column in ("role", "targets", "trained", "excluded", "unlikelihood", "NLL first", "NLL last"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, counts in summary["tokens"].items():
        if counts["total"]:
            nll = summary["nll"].get(role, {})
            shown = [f"{nll[key]:.3f}" if nll.get(key) is not None else "–" for key in ("first", "last")]
            kinds = [f"{counts[kind]:,}" for kind in ("total", "trained", "excluded", "unlikelihood")]
            table.add_row(role, *kinds, *shown)
    return table
