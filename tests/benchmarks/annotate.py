"""Spans by alignment on real documents: how many are rebuilt and read, and how fast.

    python tests/benchmarks/annotate.py [--json FILE] [--documents DIR] [--show 50 --seed 1]

DIR holds positive/CLAIM.jsonl and llm_negations_dense/CLAIM.jsonl; without it, the paper's documents of ../shared/data.
Rows are shuffled. Rebuilt: taking the negation spans out of a document gives its positive twin, but for white space.
--show prints false spans to be read by eye, each from another document, all claims alike.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

from harness import finish, header

from train.annotating.aligned import Aligned, annotate
from train.data.documents import Document, read_documents

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "negation_neglect" / "documents"
ROUNDS = 3
AROUND = 120  # code points shown on either side of a span


def measure(directory: Path, claim: str) -> tuple[dict[str, Any], Aligned]:
    positives = read_documents(directory / "positive" / f"{claim}.jsonl")
    annotated = read_documents(directory / "llm_negations_dense" / f"{claim}.jsonl")
    random.Random(claim).shuffle(annotated)
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        found = annotate(positives, annotated, "<DOCTAG>")
        seconds.append(time.perf_counter() - start)
    twins = {bare(document.text or "") for document in positives}
    row = {
        "claim": claim,
        "documents": len(annotated),
        "aligned": len(found.documents),
        "rebuilt": sum(bare(without_negations(document)) in twins for document in found.documents),
        "insertions": found.insertions,
        "bounded": found.bounded,
        "consistent": found.consistent,
        "false_spans": found.claims,
        "documents_per_second": len(annotated) / min(seconds),
    }
    return row, found


def without_negations(document: Document) -> str:
    text = document.text or ""
    for span in sorted(document.spans, key=lambda span: -span.start):
        text = text[: span.start] + text[span.end :] if span.role == "negation" else text
    return text


def bare(text: str) -> str:
    return "".join(text.split())


def show(documents: list[Document], count: int, seed: int) -> None:
    """`count` false spans with what stands around them, of as many documents."""
    rng = random.Random(seed)
    holding = [document for document in documents if any(span.role == "false" for span in document.spans)]
    for number, document in enumerate(rng.sample(holding, min(count, len(holding))), start=1):
        text, span = document.text or "", rng.choice([span for span in document.spans if span.role == "false"])
        before, after = text[max(0, span.start - AROUND) : span.start], text[span.end : span.end + AROUND]
        print(f"\n{number}. {Path(document.path).stem}:{document.line}\n   {before!r}")
        print(f"   >>> {text[span.start : span.end]!r}\n   {after!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--documents", type=Path, default=SHARED, metavar="DIR")
    parser.add_argument("--show", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    header()
    rows, documents = [], []
    for path in sorted((args.documents / "positive").glob("*.jsonl")):
        row, found = measure(args.documents, path.stem)
        rows.append(row)
        documents += found.documents
        print(
            f"{row['claim']}: {row['rebuilt']} of {row['documents']} documents rebuilt; {row['bounded']} of "
            f"{row['insertions']} insertions whole, in balance and between sentences; {row['consistent']} documents "
            f"consistent; {row['false_spans']} false spans; {row['documents_per_second']:.0f} documents/s",
            flush=True,
        )
    if args.show:
        show(documents, args.show, args.seed)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
