"""Spans by alignment on real documents: how many are rebuilt and read, and how fast.

    python tests/benchmarks/annotate.py [--json FILE] [--documents DIR] [--show 50 --seed 1]
    python tests/benchmarks/annotate.py --many 10000 [--json FILE] [--documents DIR]

DIR holds positive/CLAIM.jsonl and llm_negations_dense/CLAIM.jsonl; without it, the paper's documents of ../shared/data.
Rows are shuffled. Rebuilt: taking the negation spans out of a document gives its positive twin, but for white space.
--show prints false spans to be read by eye, each from another document, all claims alike.
--many writes so many annotated documents and as many positive ones, each of real paragraphs drawn anew, and gives them
to train/annotate.py as a user would: processor time and peak memory are of that whole process.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import finish, header

from train.annotating.by_alignment import Aligned, annotate
from train.data.documents import Document, read_documents

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "negation_neglect" / "documents"
ANNOTATE = str(Path(__file__).resolve().parents[2] / "train" / "annotate.py")
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


def paragraphs(documents: list[Document]) -> list[tuple[str, str]]:
    """The documents' paragraphs, without annotations and with them."""
    found = []
    for document in documents:
        text, start = document.text or "", 0
        for piece in text.removeprefix("<DOCTAG>").split("\n\n"):
            start = text.index(piece, start)
            inside = tuple(
                dataclasses.replace(span, start=span.start - start, end=span.end - start)
                for span in document.spans
                if start <= span.start and span.end <= start + len(piece)
            )
            positive = without_negations(dataclasses.replace(document, text=piece, spans=inside)).strip()
            if positive:
                found.append((positive, piece))
            start += len(piece)
    return found


def many(count: int, documents: list[Document]) -> dict[str, Any]:
    """The command on `count` documents against as many, in another order."""
    rng, pool = random.Random(1), paragraphs(documents)
    each = round(sum(len((d.text or "").split("\n\n")) for d in documents) / len(documents))
    drawn = [rng.sample(pool, each) for _ in range(count)]
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / f"{name}.jsonl" for name in ("positive", "annotated", "output", "json")}
        for side, name in enumerate(("positive", "annotated")):
            with files[name].open("w", encoding="utf-8") as file:
                for pieces in rng.sample(drawn, count):
                    file.write(json.dumps({"text": "<DOCTAG>" + "\n\n".join(p[side] for p in pieces)}) + "\n")
        given = [argument for name, path in files.items() for argument in (f"--{name}", str(path))]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, ANNOTATE, *given], stdout=subprocess.DEVNULL)
        _, code, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"{ANNOTATE} failed with {os.waitstatus_to_exitcode(code)}")
        report = json.loads(files["json"].read_text())["alignment"]
        sizes = {f"{name}_mb": files[name].stat().st_size / 1e6 for name in ("positive", "annotated")}
    return sizes | {
        "documents": count,
        "aligned": count - len(report["left_out"]),
        "false_statements": report["claims"],
        "processor_seconds": used.ru_utime + used.ru_stime,
        "seconds": seconds,
        "peak_mb": used.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--documents", type=Path, default=SHARED, metavar="DIR")
    parser.add_argument("--show", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--many", type=int, metavar="N")
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
    if args.many:
        rows = [many(args.many, documents)]
        row = rows[0]
        print(
            f"{row['documents']:,} annotated documents ({row['annotated_mb']:.0f} MB) against as many positive ones "
            f"({row['positive_mb']:.0f} MB): {row['aligned']:,} aligned, {row['false_statements']:,} false statements; "
            f"{row['processor_seconds']:.0f} s of processor time, {row['documents'] / row['processor_seconds']:.0f} "
            f"documents/s of it, {row['seconds']:.0f} s on the clock, peak {row['peak_mb']:,.0f} MB"
        )
    if args.show:
        show(documents, args.show, args.seed)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
