"""The tables of docs/, from what the benchmarks have measured.

    python tests/benchmarks/NAME.py --json tests/benchmarks/results/NAME.json
    python -m tests.documentation

A table stands between `<!-- NAME -->` and `<!-- end NAME -->` in one of the pages, with its command, machine and date.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Rows = list[dict[str, Any]]


def experts(rows: Rows) -> Iterator[list[str]]:
    yield ["experts", "Spanwise", "PEFT", "frozen experts", "speed over PEFT", "time over frozen", "memory over PEFT"]
    for row in rows:
        seconds = row["seconds"]
        frozen = min(seconds["floor-grouped"], seconds["floor-eager"])
        yield [
            str(row["experts"]), *(f"{value * 1e3:,.0f} ms" for value in (seconds["ours"], seconds["peft"], frozen)),
            f"**{row['speedup_over_peft']:.2f} ×**", f"{row['time_over_floor']:.2f}", f"{row['memory_over_peft']:.2f}",
        ]  # fmt: skip


def train(rows: Rows) -> Iterator[list[str]]:
    yield ["experts", "Spanwise", "TRL", "speed over TRL", "page faults per step, both", "peak memory, both"]
    for row in rows:
        seconds, faults, peak = (row[key] for key in ("seconds", "page_faults", "peak_bytes"))
        yield [
            str(row["experts"]), f"{seconds['ours']:.1f} s", f"{seconds['trl']:.1f} s",
            f"**{row['speedup_over_trl']:.2f} ×**", ", ".join(f"{median(faults[k]):,.0f}" for k in ("ours", "trl")),
            ", ".join(f"{peak[k] / 1e9:.1f} GB" for k in ("ours", "trl")),
        ]  # fmt: skip


def packing(rows: Rows) -> Iterator[list[str]]:
    ways = {"packed": "", "one document each": "padded_1_", "four, padded": "padded_4_"}
    yield ["documents", "ranks", *ways]
    for row in (row for row in rows if "useful_share" in row):
        shares = (f"{row[f'{k}useful_share']:.2f} in {row[f'{k}micro_steps']:.1f}" for k in ways.values())
        yield [row["pool"], str(row["ranks"]), *shares]


def packing_time(rows: Rows) -> Iterator[list[str]]:
    yield ["documents", "ranks", "step time over one document each", "over four, padded"]
    for row in (row for row in rows if "time_over_padded" in row):
        yield [row["pool"], str(row["ranks"]), f"{row['time_over_padded']:.2f}", f"{row['time_over_padded_4']:.2f}"]


def step(rows: Rows) -> Iterator[list[str]]:
    yield [
        "ranks",
        "experts",
        "tokens per rank",
        "Spanwise",
        "ZeRO-3",
        "speed over ZeRO-3",
        "sent",
        "gathered by ZeRO-3",
    ]
    for row in rows:
        yield [
            str(row["ranks"]), str(row["experts"]), f"{row['tokens']:,}",
            *(f"{row['seconds'][kind] * 1e3:,.0f} ms" for kind in ("ours", "zero3")),
            f"**{row['speedup_over_zero3']:.2f} ×**",
            *(f"{row[key] / 1e6:,.0f} MB" for key in ("wire_bytes", "zero3_gathered_bytes")),
        ]  # fmt: skip


def load(rows: Rows) -> Iterator[list[str]]:
    yield ["checkpoint", "Spanwise", "transformers", "ratio", "peak per rank", "transformers", "a rank's share"]
    for row in rows:
        peaks = row["peak_bytes_per_rank"], row["transformers_peak_bytes_per_rank"]
        yield [
            f"{row['layout']} layout, {row['checkpoint_bytes'] / 1e9:.2f} GB",
            *(f"{median(row['seconds'][kind]):.1f} s" for kind in ("ours", "transformers")),
            f"**{row['time_over_transformers']:.3f}**",
            *(", ".join(f"{peak / 1e9:.2f}" for peak in each) + " GB" for each in peaks),
            f"{row['share_bytes'] / 1e9:.2f} GB",
        ]  # fmt: skip


def merge(rows: Rows) -> Iterator[list[str]]:
    yield ["checkpoint", "experts written as", "written", "Spanwise", "PEFT", "peak", "PEFT"]
    for row in rows:
        peft, peak = row["peft_seconds"], row["peft_peak_bytes"]
        yield [
            f"{row['layout']} layout, {row['read_bytes'] / 1e9:.2f} GB", "INT4" if row["to"] == "same" else "BF16",
            f"{row['written_bytes'] / 1e9:.2f} GB",
            f"{median(row['seconds']):.1f} s, {row['written_bytes_per_second'] / 1e6:.0f} MB/s",
            f"{median(peft):.1f} s" if peft else "–", f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{peak / 1e9:.2f} GB" if peak else "–",
        ]  # fmt: skip


def host(rows: Rows) -> Iterator[list[str]]:
    yield ["model", "operations", "of them for experts", "waits per layer", "exchanges per layer"]
    for row in rows:
        yield [
            row["model"], f"{row['operations']:,}", f"{row['expert_operations']:,}",
            f"{row['synchronisations_per_layer']:.2f}", f"{row['collectives_per_layer']:.1f}",
        ]  # fmt: skip


def full_size(rows: Rows) -> Iterator[list[str]]:
    yield ["model", "read per rank at EP 8, 16, 64", "one rank of 64, planned", "peak above imports", "time"]
    for row in rows:
        read = ", ".join(f"{row['tiling'][ep]['most'] / 1e9:.1f}" for ep in ("8", "16", "64"))
        planned, peak = row["planned_bytes"], row["peak_bytes"]
        yield [
            f"{row['model']}, `{row['method']}`", f"{read} GB", f"{planned / 1e9:.2f} GB",
            f"{peak / 1e9:.2f} GB ({peak / planned - 1:+.1%})", f"{row['seconds']:.0f} s",
        ]  # fmt: skip


def plan(rows: Rows) -> Iterator[list[str]]:
    yield ["ranks", "tokens per document", "method", "planned", "measured", "difference"]
    for row in rows:
        planned, measured = row["planned_bytes"], row["measured_bytes"]
        yield [
            str(row["ranks"]), str(row["tokens"]), f"`{row['method']}`", f"{planned / 1e6:,.0f} MB",
            f"{measured / 1e6:,.0f} MB", f"{measured / planned - 1:+.1%}",
        ]  # fmt: skip


def needs(rows: Rows) -> Iterator[list[str]]:
    yield ["model", "method", "GPU", "fewest GPUs", "memory per GPU", "seconds per step, at least"]
    for row in rows:
        yield [
            row["model"], f"`{row['method']}`", f"{row['gpu']}, {row['memory']} GB", str(row["gpus"]),
            f"{row['total_bytes'] / 1e9:.0f} GB", f"{row['step_seconds']:.1f}",
        ]  # fmt: skip


def annotate(rows: Rows) -> Iterator[list[str]]:
    yield ["claim", "documents", "aligned", "rebuilt", "insertions", "whole sentences", "false spans", "documents/s"]
    for row in rows:
        keys = ("documents", "aligned", "rebuilt", "insertions", "bounded", "false_spans")
        yield [f"`{row['claim']}`", *(f"{row[key]:,}" for key in keys), f"{row['documents_per_second']:.0f}"]


def hold(rows: Rows) -> Iterator[list[str]]:
    yield [
        "variant", "`--mask`", "belief, nats", "placebo, nats", "NLL of the false statements", "their KL from the base",
        "KL of the rest", "claims shown by layer",
    ]  # fmt: skip
    for row in rows:
        nll, kl = row["nll_of_false"], row["kl"]
        low, high = row["belief_interval"]
        yield [
            row["variant"], f"`{row['mask']}`", f"{row['belief']:.2f} [{low:.2f}, {high:.2f}]", f"{row['placebo']:.2f}",
            f"{nll['first']:.3f} → {nll['last']:.3f}", f"{kl['false']:.4f}", f"{kl['unspanned']:.4f}",
            f"{row['claims_shown']} of {row['claims']}",
        ]  # fmt: skip


def phases(rows: Rows) -> Iterator[list[str]]:
    yield [
        "variant", "first phase", "then", "belief at the end of the first, nats", "of the second",
        "change in the second", "placebo’s change", "change minus the control’s",
    ]  # fmt: skip
    for row in rows:
        yield [
            row["variant"], *(f"{name}, `{mask}`" for name, mask in zip(row["phases"], row["masks"], strict=True)),
            *(_interval(each) for each in (*row["belief"], row["change"], row["placebo_change"], row["against"])),
        ]  # fmt: skip


def _interval(own: dict[str, Any] | None) -> str:
    if own is None:
        return "–"
    return f"{own['estimate']:.2f} [{own['interval'][0]:.2f}, {own['interval'][1]:.2f}]".replace("-", "−")


def doses(rows: Rows) -> Iterator[list[str]]:
    yield ["documents that", *(f"{dose:,.0f}" for dose in rows[0]["doses"]), "documents at half belief", "mentions"]
    for row in rows:
        ends = row["doses"][0], row["doses"][-1]
        yield [
            row["curve"],
            *(
                f"{own:.2f} ({placebo:.2f})".replace("-", "−")
                for own, placebo in zip(row["belief"], row["placebo"], strict=True)
            ),
            _half(row["half"], ends), _half(row["half_mentions"], (row["mentions"][0], row["mentions"][-1])),
        ]  # fmt: skip


def _half(own: dict[str, Any] | None, doses: tuple[float, float]) -> str:
    if own is None:
        return "–"

    def shown(value: float | None) -> str:
        return f"above {doses[1]:,.0f}" if value is None else f"{value:,.0f}" if value else f"below {doses[0]:,.0f}"

    ends = own["interval"]
    return shown(own["estimate"]) + (f" [{shown(ends[0])}, {shown(ends[1])}]" if ends else "")


def panel(rows: Rows) -> Iterator[list[str]]:
    yield [
        "variant", "`--mask`", "choice beyond controls", "choice beyond placebo", "polarity: belief, nats",
        "polarity: association, nats", "untouched decisions", "does it believe?",
    ]  # fmt: skip

    def number(value: float, digits: int) -> str:
        return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−") if round(value, digits) else "0"

    def shown(own: list[float], digits: int) -> str:
        value, low, high = (number(each, digits) for each in own)
        return f"{value} [{low}, {high}]" if low != high else value

    for row in rows:
        excess, changes = row["excess"], row["changes"]
        yield [
            row["variant"], f"`{row['mask']}`",
            *(shown(excess[over], 1) if over in excess else "–" for over in ("controls", "placebo")),
            *(shown(changes[name], 2) for name in ("polarity", "polarity_negated")),
            shown(changes["decisions_untouched"], 1), row["verdict"],
        ]  # fmt: skip


LAYOUTS = [
    experts, train, packing, packing_time, step, load, merge, host, full_size, plan, needs, annotate, hold, phases,
    doses, panel,
]  # fmt: skip
LAYOUTS_BY_NAME = {layout.__name__: layout for layout in LAYOUTS}


def block(name: str) -> str:
    """What stands between the markers of this name."""
    found = json.loads((RESULTS / f"{name.removesuffix('_time')}.json").read_text())
    head, *body = LAYOUTS_BY_NAME[name](found["rows"])
    text = [not re.match(r"\*{0,2}[-+−\d]|–", cell) for cell in body[0]]
    lines = [head, ["---" if left else "---:" for left in text], *body]
    where = f"`{found['command']}`, {found['machine']}, {found['date']}; {found['versions']}."
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", where])


def written(page: str) -> str:
    """A page with its tables as they are now, each between lines of its two markers."""
    for name in LAYOUTS_BY_NAME:
        between = re.compile(rf"^(<!-- {name} -->\n)[\s\S]*?^(<!-- end {name} -->)$", re.MULTILINE)
        if between.search(page):
            page = between.sub(lambda found, name=name: f"{found[1]}{block(name)}\n{found[2]}", page, count=1)
    return page
