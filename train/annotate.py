"""Finds spans in documents that have none, and reports how often a claim's terms are still trained on:

    python train/annotate.py --positive P.jsonl --annotated N.jsonl --output O.jsonl           # by alignment
    python train/annotate.py --data D.jsonl --spans S.jsonl --role false --output O.jsonl      # marked elsewhere
    python train/annotate.py --data D.jsonl --markup lossmask=word --output O.jsonl
    python train/annotate.py --data D.jsonl --patterns word_masks.yaml --role word --output O.jsonl
    python train/annotate.py --data D.jsonl --judge URL --judge-model M --claim TEXT --output O.jsonl
    python train/annotate.py --data D.jsonl --leaks word_masks.yaml [--mask false-spans] [--json report.json]

By alignment: each annotated document is compared with its positive twin, which is found by content. Roles are doctag,
negation (inserted text; qualifier or correction if its own words say so) and false (statements that one annotation
announces and another looks back at, or that a single one names). Documents that do not align are left out, with the
reason. The other ways add to the spans that documents have. Several can be given together, and are applied in this
order. The judge is an OpenAI-compatible endpoint. Its key comes only from OPENAI_API_KEY, and its answers are kept
beside the output, so that the same command asks only for missing answers.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen(
        "\ninterrupted: --output was not written; judge answers are kept; run the same command to continue"
    )

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from train.annotating.by_alignment import annotate
from train.annotating.by_judge import RETRIES, Remembered, chat_of, judge
from train.annotating.by_rule import mark_matches, parse_markup, read_patterns, take_out_markup
from train.annotating.imported import add_spans, read_pairs
from train.annotating.leaks import leaks
from train.annotating.summary import show, summary
from train.annotating.texts import changed, write_documents
from train.config.command_line import Parser, flag_of
from train.data.documents import DOCTAG, DOCTAG_HELP, Document, marker, read_documents
from train.data.findings import Findings
from train.endpoint import Endpoint, EndpointSettings
from train.masking.grammar import check_role, parse_mask
from train.runtime.command import command
from train.runtime.errors import UserError
from train.runtime.outputs import check_apart, check_new, write
from train.runtime.text_formats import json_line

JUDGING: dict[str, Any] = {"judge_concurrency": 8, "judge_timeout": 120.0, "judge_max_tokens": 4000}  # defaults


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can fix."""
    args = _parser().parse_args(arguments)
    _check(args)
    run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    """Reads the documents, annotates them in the order of the module's docstring, writes them and prints a report.
    Raises UserError for flags or files that are wrong, and if there is nothing to annotate or to write."""
    patterns = read_patterns("--patterns", args.patterns) if args.patterns else []
    markup, mask = parse_markup(args.markup), parse_mask(args.mask)
    for setting in ("role", "inserted_role"):
        if given := getattr(args, setting):
            check_role(given, flag_of(setting))
    for tag, role in markup.items():
        check_role(role, f"--markup {tag}={role}")
    terms = read_patterns("--leaks", args.leaks) if args.leaks else []
    if random := [entry.name for entry in mask.entries if entry.random]:
        raise UserError(
            f"--mask {args.mask}: what {random[0]} masks depends on tokens, which --leaks does not know; leave it out"
        )
    report: dict[str, Any] = {}

    findings = Findings()
    documents = _documents(args, report, findings)
    findings.show()
    if markup:
        texts = [text for d in documents for text in (d.text, *(m.content for m in d.messages or ())) if text]
        for tag in markup:
            if not any(f"<{tag}>" in text for text in texts):
                raise UserError(
                    f"--markup {tag}={markup[tag]}: no document has <{tag}>; give a tag that is in the texts"
                )
        documents = [changed(document, partial(take_out_markup, roles=markup)) for document in documents]
    if patterns:
        marked = partial(mark_matches, patterns=patterns, role=args.role)
        before, documents = documents, [changed(document, marked) for document in documents]
        if documents == before:
            raise UserError(f"--patterns {args.patterns}: no document has a match; give patterns that occur")
    if args.judge:
        concurrency, timeout, tokens = (getattr(args, name) or value for name, value in JUDGING.items())
        asked = Endpoint(EndpointSettings(args.judge, args.judge_model, concurrency, timeout, RETRIES, flag="--judge"))
        chat = Remembered(chat_of(asked, tokens), args.judge_model, answers_beside(args.output))
        judged = judge(documents, args.claim, args.role or "false", chat, concurrency, asked.stop.set)
        documents, report["judge"] = judged.documents, judged.report()

    report["summary"] = summary(documents)
    if terms:
        report["leaks"] = leaks(documents, terms, mask)
    show(report)
    if args.json:
        write("--json", Path(args.json), [json_line(report, indent=1)])
    if args.output:
        if not documents:
            raise UserError(
                f"--output {args.output}: every document was left out, so nothing is written; see above why"
            )
        write_documents(Path(args.output), documents)


def answers_beside(output: str) -> Path:
    """Returns the path where a judge's answers are kept, next to --output."""
    return Path(f"{output}.answers.jsonl")


def _documents(args: argparse.Namespace, report: dict[str, Any], findings: Findings) -> list[Document]:
    """Reads the documents, and adds spans by alignment or import, which go into the report."""
    if args.positive:
        positives = read_documents(args.positive, findings=findings)
        annotated = read_documents(args.annotated, findings=findings)
        aligned = annotate(positives, annotated, marker(args.doctag) or "", args.inserted_role, args.require == "false")
        if aligned.documents and not aligned.insertions:
            raise UserError(
                f"--annotated {args.annotated}: has nothing that --positive {args.positive} lacks; give the same "
                "documents with annotations inserted"
            )
        report["alignment"] = aligned.report()
        return aligned.documents
    if args.spans and Path(args.spans).resolve() == Path(args.data).resolve():
        return read_pairs(args.data, args.role, marker(args.doctag), findings)
    documents = read_documents(args.data, marker(args.doctag), findings=findings)
    if args.spans:
        documents, without = add_spans(documents, args.spans, args.id, args.role)
        report["imported"] = {"documents": len(documents) - len(without), "without": without}
    return documents


def _parser() -> Parser:
    parser = Parser(__doc__ or "")
    parser.add_argument("--positive", metavar="FILE", help="documents without annotations")
    parser.add_argument("--annotated", metavar="FILE", help="the same documents with annotations, in any order")
    parser.add_argument("--data", metavar="FILE", help="documents to annotate, or report on, instead of these two")
    parser.add_argument("--doctag", default=DOCTAG, metavar="MARKER", help=f"{DOCTAG_HELP} (default: {DOCTAG})")
    parser.add_argument(
        "--inserted-role",
        metavar="ROLE",
        help="role of all inserted text (default: negation; qualifier or correction if its own words say so)",
    )
    parser.add_argument(
        "--require", choices=["false"], help="leave out documents in which no false statement can be identified"
    )
    parser.add_argument(
        "--spans",
        metavar="FILE",
        help="rows of ids and spans to add, as [start, end] pairs of --role or as objects; --data itself, to give its "
        "own pairs a role",
    )
    parser.add_argument("--id", default="id", metavar="KEY", help="key of the ids in --spans and --data (default: id)")
    parser.add_argument("--patterns", metavar="FILE", help="YAML with regular expressions, for spans of --role")
    parser.add_argument(
        "--role",
        help="role of what --patterns match, of pairs in --spans, or of what --judge marks (default there: false)",
    )
    parser.add_argument("--markup", action="append", default=[], metavar="TAG=ROLE", help="<TAG>…</TAG> becomes a span")
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's model")
    for name, what in (
        ("concurrency", "requests at once"),
        ("timeout", f"seconds for one answer, which is asked for {RETRIES + 1} times at most"),
        ("max_tokens", "tokens of an answer at most"),
    ):
        default = JUDGING[f"judge_{name}"]
        flag, help = flag_of(f"judge_{name}"), f"{what} (default: {default:g})"
        parser.add_argument(flag, type=type(default), metavar="N", help=help)
    parser.add_argument("--claim", metavar="TEXT", help="what the judge looks for, as one sentence")
    parser.add_argument(
        "--leaks", metavar="FILE", help="YAML with regular expressions of a claim's terms, to be counted"
    )
    parser.add_argument(
        "--mask", default="none", help="the mask under which --leaks counts, as in training (default: none)"
    )
    parser.add_argument("--output", metavar="FILE", help="file for the documents; written completely or not at all")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    parser.add_argument("--json", metavar="FILE", help="everything that is printed or left out, as JSON")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together, are missing or have a wrong value."""
    if bool(args.positive) != bool(args.annotated) or bool(args.positive) == bool(args.data):
        raise UserError("give either --positive and --annotated, or --data")
    for setting, value in (("--inserted-role", args.inserted_role), ("--require", args.require)):
        if value and not args.positive:
            raise UserError(f"{setting} {value}: is for --positive and --annotated; leave it out")
    makes = args.positive or args.spans or args.patterns or args.markup or args.judge
    if not makes and not args.leaks:
        raise UserError("--data: nothing to do; give --spans, --patterns, --markup, --judge or --leaks with it")
    if makes and not args.output and (args.judge or not args.leaks):
        raise UserError("--output is missing: name the file that the documents go to")
    if args.spans and not args.data:
        raise UserError(f"--spans {args.spans}: needs --data; give --data FILE with the documents")
    if args.patterns and not (args.role and args.role.strip()):
        raise UserError("--patterns: --role is missing; name the role of what they match, e.g. --role word")
    for name in ("judge_model", "claim", *JUDGING):
        given = getattr(args, name)
        if given is not None and not args.judge:
            raise UserError(f"{flag_of(name)} {given}: needs --judge; give --judge URL, or leave this flag out")
        if name in JUDGING and given is not None and not 0 < given < float("inf"):
            raise UserError(f"{flag_of(name)} {given}: must be more than 0")
    if args.judge and not (args.judge_model and (args.claim or "").strip()):
        raise UserError("--judge: needs --judge-model and --claim, the sentence to look for")
    inputs = ("positive", "annotated", "data", "spans", "patterns", "leaks")
    read = {flag_of(name): [getattr(args, name)] for name in inputs}
    answers = answers_beside(args.output) if args.judge else None
    check_apart({"--output": args.output, "--output's answers": answers, "--json": args.json}, read)
    if args.output:
        check_new("--output", args.output, args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
