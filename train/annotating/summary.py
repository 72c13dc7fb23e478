"""Reports the result of train/annotate.py, as numbers and on the terminal."""

from collections import Counter
from typing import Any

from rich.table import Table

from train.annotating.texts import joined, texts
from train.data.documents import Document
from train.runtime.terminal import Terminal

SHOWN = 20  # maximum number of documents left out, or quotes rejected, that are listed; --json lists all


def summary(documents: list[Document]) -> dict[str, Any]:
    """Returns {"documents", "characters", "roles": {role: {"documents", "spans", "characters", "share"}}}, where share
    is the fraction of all characters. Characters that two spans of one role share count once."""
    total = 0
    spans, characters, holding = Counter[str](), Counter[str](), Counter[str]()
    for document in documents:
        seen = set()
        for text, own, _ in texts(document):
            total += len(text)
            for role in {span.role for span in own}:
                ranges = [(span.start, span.end) for span in own if span.role == role]
                spans[role] += len(ranges)
                characters[role] += sum(end - start for start, end in joined(ranges))
                seen.add(role)
        holding.update(seen)
    counts = {"documents": holding, "spans": spans, "characters": characters}
    roles: dict[str, Any] = {
        role: {name: counter[role] for name, counter in counts.items()} | {"share": characters[role] / total}
        for role in sorted(spans)
    }
    return {"documents": len(documents), "characters": total, "roles": roles}


def show(report: dict[str, Any]) -> None:
    """Prints a report of train/annotate.py: first what was left out, then the results."""
    console = Terminal(soft_wrap=True)
    if "alignment" in report:
        _show_alignment(console, report["alignment"], report["summary"]["documents"])
    if "imported" in report:
        _show_imported(console, report["imported"])
    if "judge" in report:
        _show_judge(console, report["judge"])
    _show_summary(console, report["summary"])
    if "leaks" in report:
        _show_leaks(console, report["leaks"])


def _show_alignment(console: Terminal, found: dict[str, Any], written: int) -> None:
    _show_listed(console, "left out", found["left_out"])
    _show_listed(console, "without false spans", found["without_false"])
    for each in found["partly"][:SHOWN]:
        lost = f"{each['lost']} annotations without a partner refer to no sentence that can be identified"
        uncued = f"{each['uncued']} annotations have no word that says what they are about"
        said = "; ".join(text for text, count in ((lost, each["lost"]), (uncued, each["uncued"])) if count)
        console.print(f"partly resolved: {each['document']}: {said}")
    _show_more(console, "partly resolved", found["partly"])
    for each in found["unsure"][:SHOWN]:
        said = f"only an annotation without such a word refers to {each['statement'][:100]!r}"
        console.print(f"unsure: {each['document']}: {said}")
    _show_more(console, "unsure", found["unsure"])
    out, without = len(found["left_out"]), len(found["without_false"])
    console.print(
        f"annotated documents: {written + out}, aligned {written}, of them without false spans {without}, "
        f"left out {out}; positive documents without one: {len(found['unused'])}\n"
        f"insertions: {found['insertions']:,}, whole sentences at a sentence's edge {found['bounded']:,}\n"
        f"documents in which announcing and looking back alternate throughout: {found['consistent']} of {written}; "
        f"partly resolved: {len(found['partly'])}\n"
        f"annotations without a cue word: {found['uncued']:,}; statements that only these refer to: "
        f"{len(found['unsure']):,}\n"
        f"false statements: {found['claims']:,}, of them named by a single annotation {found['alone']:,}, "
        f"around an annotation {found['inside']:,}"
    )


def _show_imported(console: Terminal, found: dict[str, Any]) -> None:
    for where in found["without"][:SHOWN]:
        console.print(f"without a row: {where}")
    _show_more(console, "without a row", found["without"])
    console.print(f"spans imported: documents {found['documents']}, without a row {len(found['without'])}")


def _show_judge(console: Terminal, found: dict[str, Any]) -> None:
    _show_listed(console, "left out", found["left_out"])
    for each in found["quotes_rejected"][:SHOWN]:
        console.print(f"rejected: {each['document']}: not in the text: {each['quote']!r}")
    _show_more(console, "rejected", found["quotes_rejected"])
    console.print(f"judge: passages marked {found['quotes_found']}, quotes rejected {len(found['quotes_rejected'])}")


def _show_listed(console: Terminal, what: str, rows: list[dict[str, Any]]) -> None:
    for each in rows[:SHOWN]:
        console.print(f"{what}: {each['document']}: {each['reason']}")
    _show_more(console, what, rows)


def _show_more(console: Terminal, what: str, rows: list[Any]) -> None:
    if len(rows) > SHOWN:
        console.print(f"{what}: {len(rows) - SHOWN} more, all of them by --json FILE")


def _show_summary(console: Terminal, found: dict[str, Any]) -> None:
    table = Table("role", *("documents", "spans", "characters", "share"), title=f"{found['documents']:,} documents")
    for role, row in found["roles"].items():
        counts = (f"{row[name]:,}" for name in ("documents", "spans", "characters"))
        table.add_row(role, *counts, f"{row['share']:.1%}")
    console.print(table)


def _show_leaks(console: Terminal, found: dict[str, Any]) -> None:
    table = Table("mentions in", "all", "trained", title=f"mentions trained under --mask {found['mask']}")
    for role, row in [*found["roles"].items(), ("all", found)]:
        table.add_row(role, f"{row['mentions']:,}", f"{row['trained']:,}")
    console.print(table)
    leaking = sum(row["trained"] > 0 for row in found["documents"])
    console.print(f"documents that train on a mention: {leaking} of {len(found['documents'])}")
