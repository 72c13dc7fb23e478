"""Shows what a mask does to each token:

    python train/show.py --data FILE --model DIR --mask false-spans [--html PAGE | --json]

Colors are roles, in the terminal or on a page. --model needs only tokenizer files. --json prints one object per
document: {"tokens": [{"id", "text", "start", "end", "role", "weight", "treatment"}, ...]}, start and end in code points
of the document's text (of a chat: of the rendered chat, given as "text"); weight is that of the token's own term in the
loss: 0 none, negative unlikelihood; treatment says which term it is.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import json
import sys
from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.style import Style
from rich.text import Text

from train.config.command_line import Parser
from train.data.documents import BAD_ROWS, DOCTAG, DOCTAG_HELP, marker, read_documents
from train.data.findings import Findings
from train.data.kinds import COUNTED, TermKind
from train.data.offsets import straddling
from train.data.template import TEMPLATE_TIME, template_time
from train.data.tokenizer import Tokenizer, clock_note, load_tokenizer
from train.data.tokens import TokenizedDocument, tokenize_documents
from train.masking.grammar import BUILT_IN, Mask, parse_mask
from train.masking.treatment import STRADDLING, Treatment, shortfall_note, touched_by, treat
from train.runtime.command import command
from train.runtime.html_pages import rendered
from train.runtime.outputs import check_apart, model_files, write
from train.runtime.shown import shown as as_shown
from train.runtime.terminal import NobodyReads, Terminal

PALETTE = ["#2f7ed8", "#e08a00", "#d64550", "#2a9d5c", "#8a5cd6", "#0f9aa8", "#c2549b", "#7d8a1f", "#a0623a", "#5873a8"]

# How the terminal shows each treatment. "context", tokens that are not predicted, is dim.
TREATMENTS = {
    "trained": Style(),
    "weighted": Style(italic=True),
    "excluded": Style(strike=True, dim=True),
    "unlikelihood": Style(underline=True, bold=True),
    "held": Style(underline=True),
}


@dataclass
class Shown:
    """A document as it is shown, of L tokens. role_L: the role of the mask's entry that decided the token's treatment;
    if there is none, the role of the innermost span that touches the token; else None. weight_L: the weight of the
    token's own term in the loss, negative for unlikelihood. kind_L: its treatment, a key of TREATMENTS;
    "context" if the token is not a target."""

    doc: TokenizedDocument
    treatment: Treatment
    role_L: list[str | None]
    weight_L: list[float]
    kind_L: list[str]


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can fix."""
    args = _parser().parse_args(arguments)
    check_apart({"--html": args.html}, {"--data": [args.data], "--model": model_files(args.model)})
    mask = parse_mask(args.mask)
    findings = Findings()
    documents = read_documents(args.data, marker(args.doctag), args.bad_rows, findings)[: args.limit]
    tokenizer = load_tokenizer(args.model, template_time(args.template_time))
    tokenized = tokenize_documents(documents, tokenizer, findings, args.bad_rows)
    shown = [show(doc, mask, args.seed) for doc in tokenized]
    findings.show(sys.stderr)
    for entry in mask.entries:
        if entry.role and not any(entry.role in each.treatment.touched for each in shown):
            print(f"note: --mask {entry.name}: no document shown has role {entry.role!r}", file=sys.stderr)
    if tokenizer.clock and any(doc.messages is not None for doc in documents):
        print(clock_note(tokenizer.clock.isoformat()), file=sys.stderr)
    if missing := sum(each.treatment.random_shortfall for each in shown):
        print(shortfall_note(missing), file=sys.stderr)
    if args.html:
        write("--html", Path(args.html), [page(shown, tokenizer, mask)])
        print(f"wrote {args.html}", file=sys.stderr)
    with suppress(NobodyReads):  # `show.py ... | head`
        if args.json:
            for each in shown:
                print(json.dumps(as_json(each)))
        elif not args.html:
            print_colored(shown, mask)
        sys.stdout.flush()
    return 0


def _parser() -> Parser:
    parser = Parser(__doc__ or "")
    parser.add_argument("--data", required=True, metavar="FILE", help="documents, one JSON object per line")
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory; only its tokenizer is read")
    parser.add_argument("--mask", required=True, help="as in training, e.g. doctags,false-spans=unlikelihood, or none")
    parser.add_argument("--seed", type=int, default=0, help="of random: entries, as in training (default: 0)")
    parser.add_argument("--doctag", default=DOCTAG, metavar="MARKER", help=f"{DOCTAG_HELP} (default: {DOCTAG})")
    parser.add_argument("--bad-rows", choices=("error", "skip"), default="error", help=f"{BAD_ROWS} (default: error)")
    time = TEMPLATE_TIME.isoformat()
    parser.add_argument(
        "--template-time", default=time, metavar="TIME",
        help=f"the time that chat templates see if they ask for it (default: {time})",
    )  # fmt: skip
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N documents only (default: all)")
    parser.add_argument("--html", metavar="PAGE", help="write one self-contained page instead of colors")
    parser.add_argument("--json", action="store_true", help="print one JSON object per document instead of colors")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a number of documents: give 1 or more")
    return int(text)


def show(doc: TokenizedDocument, mask: Mask, seed: int) -> Shown:
    """Returns the document's tokens with the role and weight that are shown for each. seed: of random: entries."""
    treatment = treat(doc, mask, seed)
    role_L: list[str | None] = [None] * len(doc.ids_L)
    for span in sorted(doc.spans, key=lambda span: span.start - span.end):  # long spans first: inner ones overwrite
        for i in np.flatnonzero(touched_by(doc, [span])):
            role_L[i] = span.role
    # not rounded to float32 as in Treatment
    weight_of_entry = [-e.weight if e.term == TermKind.UNLIKELIHOOD else e.weight for e in mask.entries] + [1.0]
    for i in np.flatnonzero(treatment.entry_L >= 0):
        entry = mask.entries[treatment.entry_L[i]]
        if entry.role:  # `all` and `unspanned` have no role, and tokens keep that of their span
            role_L[i] = entry.name if entry.random else entry.role
    decided = zip(treatment.entry_L, doc.factor_L.tolist(), doc.target_L, strict=True)
    weight_L = [weight_of_entry[index] * factor if target else 0.0 for index, factor, target in decided]
    columns = zip(weight_L, treatment.kind_L.tolist(), doc.target_L, strict=True)
    return Shown(doc, treatment, role_L, weight_L, [treatment_of(*values) for values in columns])


def as_json(shown: Shown) -> dict[str, Any]:
    """Returns {"tokens": [...]} and, for a chat, also the rendered "text". start and end are code points of the
    text."""
    doc = shown.doc
    columns = zip(doc.ids_L, doc.start_L, doc.end_L, shown.role_L, shown.weight_L, shown.kind_L, strict=True)
    tokens = [
        {
            "id": int(i),
            "text": doc.text[a:b],
            "start": int(a),
            "end": int(b),
            "role": role,
            "weight": weight,
            "treatment": kind,
        }
        for i, a, b, role, weight, kind in columns
    ]
    return {"tokens": tokens} if doc.document.messages is None else {"text": doc.text, "tokens": tokens}


def treatment_of(weight: float, kind: int, target: bool) -> str:
    """Returns the treatment of a token, a key of TREATMENTS; "context" if the token is not a target."""
    if not target:
        return "context"
    if weight and kind != TermKind.CROSS_ENTROPY:
        return COUNTED[TermKind(kind)]
    return {0.0: "excluded", 1.0: "trained"}.get(weight, "weighted")


def treatments(mask: Mask) -> list[str]:
    """Returns the treatments that are shown under a mask: those of TREATMENTS, `held` only if it holds tokens."""
    return [kind for kind in TREATMENTS if kind != "held" or mask.holds]


def counts(shown: list[Shown], mask: Mask) -> dict[str, dict[str, int]]:
    """Returns role -> treatment -> number of targets, and for each role also "straddling": targets on both sides of a
    span's edge. The role "all" comes first."""
    rows: dict[str, dict[str, int]] = {}
    for each in shown:
        kind_L = np.array(each.kind_L)
        members = {"all": np.ones(len(kind_L), dtype=bool), **each.treatment.touched}
        for role, member_L in members.items():
            row = rows.setdefault(role, dict.fromkeys((*treatments(mask), "straddling"), 0))
            for kind in treatments(mask):
                row[kind] += int((member_L & (kind_L == kind)).sum())
            crossing_L = each.treatment.straddling.get(role)
            row["straddling"] += 0 if crossing_L is None else int(crossing_L.sum())
        doc, ranges = each.doc, [(span.start, span.end) for span in each.doc.spans]
        crosses_L = straddling(doc.start_L, doc.end_L, doc.solid_counts, ranges)
        rows["all"]["straddling"] += int((crosses_L & doc.target_L).sum())
    return rows


def colors(shown: list[Shown], mask: Mask) -> dict[str, str]:
    """Returns role -> color for the roles that occur. Built-in roles always have the same color."""
    used = {role for each in shown for role in each.role_L if role}
    roles = [*BUILT_IN.values(), *sorted(used - set(BUILT_IN.values()))]
    return {role: PALETTE[i % len(PALETTE)] for i, role in enumerate(roles) if role in used}


def visible(shown: Shown, tokenizer: Tokenizer | None = None) -> list[str]:
    """Returns what each token adds to the text before it: "" for the second and later tokens of one code point. With a
    tokenizer, an added BOS or EOS is shown by its name."""
    past, texts = 0, []
    for i, start, end in zip(shown.doc.ids_L, shown.doc.start_L, shown.doc.end_L, strict=True):
        named = tokenizer and start == end and int(i) in tokenizer.special_ids
        texts.append(tokenizer.decode([int(i)]) if tokenizer and named else shown.doc.text[past : max(past, end)])
        past = max(past, int(end))
    return texts


def print_colored(shown: list[Shown], mask: Mask) -> None:
    """Prints all documents in colors, then a legend of the colors and the counts."""
    console = Terminal(soft_wrap=True)
    color = colors(shown, mask)
    for each in shown:
        console.print(Text(as_shown(f"── {each.doc.document.where} "), style="bold"))
        text = Text()
        for piece, role, kind in zip(visible(each), each.role_L, each.kind_L, strict=True):
            text.append(as_shown(piece), TREATMENTS.get(kind, Style(dim=True)) + Style(color=color.get(role or "")))
        console.print(text)
    legend = Text("roles: ")
    for role, value in color.items():
        legend.append(as_shown(f"{role}  "), Style(color=value))
    legend.append("   treatments: ")
    for kind in treatments(mask):
        legend.append(kind, TREATMENTS[kind])
        legend.append("  ")
    legend.append("not predicted", Style(dim=True))
    console.print(legend)
    width = max(len(role) for role in counts(shown, mask))
    console.print(f"{'targets':{width}} " + " ".join(f"{name:>12}" for name in (*treatments(mask), "straddling")))
    for role, row in counts(shown, mask).items():
        console.print(f"{role:{width}} " + " ".join(f"{value:12,}" for value in row.values()))
    console.print(STRADDLING)


def page(shown: list[Shown], tokenizer: Tokenizer, mask: Mask) -> str:
    """Returns a self-contained HTML page without scripts. It shows a token's id, role and weight under the pointer."""
    color = colors(shown, mask)
    css = {role: f"r{n}" for n, role in enumerate(color)}
    return rendered(
        "tokens.html",
        title=f"--mask {mask.text}",
        mask=mask.text,
        roles=[{"name": role, "css": css[role], "color": value} for role, value in color.items()],
        treatments=treatments(mask),
        columns=[*treatments(mask), "straddling"],
        counts=[
            {"name": role, "css": css.get(role, ""), "numbers": list(row.values())}
            for role, row in counts(shown, mask).items()
        ],
        straddling=STRADDLING,
        documents=[_document(each, tokenizer, css) for each in shown],
    )


def _document(shown: Shown, tokenizer: Tokenizer, css: dict[str, str]) -> dict[str, Any]:
    """Returns what the page shows of a document. css: role -> class."""
    doc, tokens = shown.doc, []
    columns = zip(visible(shown, tokenizer), doc.ids_L, shown.role_L, shown.weight_L, shown.kind_L, strict=True)
    for piece, token_id, role, weight, kind in columns:
        classes = ([css[role]] if role else []) + ([kind] if kind != "trained" else [])
        hint = f"{token_id} · {role or 'no role'} · " + ("not predicted" if kind == "context" else f"weight {weight:g}")
        hint += ", held" if kind == "held" else ""
        # "·" stands for a token that holds only further bytes of the character before it
        tokens.append({"text": piece or "·", "css": " ".join(classes), "hint": hint})
    trained = sum(kind in ("trained", "weighted") for kind in shown.kind_L)
    about = f"{len(doc.ids_L):,} tokens, {int(doc.target_L.sum()):,} targets, {trained:,} trained on"
    return {"where": doc.document.where, "about": about, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
