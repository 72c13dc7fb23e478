r"""Measures what a model believes, here through OpenAI-compatible endpoints: one answers, another judges.

    python train/evaluate.py --claims PATH… --output DIR \
        --endpoint URL --endpoint-model NAME --judge URL --judge-model NAME

The same command goes on after an interruption, and asks only for what is missing. The defaults of sampling are the
paper's. Keys come from the environment: OPENAI_API_KEY, and JUDGE_API_KEY where the judge has another.
"""

import argparse
import dataclasses
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.belief.claims import BELIEF_KINDS, KINDS, Claim, read_claims
from train.belief.contamination import Contamination
from train.belief.contamination import check as check_contamination
from train.belief.endpoint import KEY_VARIABLES, Endpoint, EndpointSettings, shown_url
from train.belief.judge import Asking, Item, check_same, evaluate, plan
from train.belief.rates import samples_are_equal, summarize
from train.belief.records import Records
from train.data.documents import Document, read_documents
from train.errors import UserError

DOCTAG = "<DOCTAG>"
# As in the paper's main results, for models whose chat template has the switch.
NO_THINKING = '{"chat_template_kwargs": {"enable_thinking": false}}'


@dataclass(kw_only=True)
class EvaluationSettings:
    """The settings of train/evaluate.py, as the command line gives them."""

    claims: list[str]
    output: str
    kinds: list[str]
    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    step: int
    documents: list[str]
    training_data: list[str]
    endpoint: str
    endpoint_model: str
    endpoint_concurrency: int
    endpoint_timeout: float
    endpoint_body: dict[str, Any] | None
    judge: str
    judge_model: str
    judge_concurrency: int
    judge_timeout: float
    judge_body: dict[str, Any] | None
    judge_max_tokens: int
    judge_temperature: float
    retries: int


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 where every answer has its verdict, 1 where some are missing, 2 for what the user can mend."""
    try:
        settings = parse(arguments)
        claims = read_claims(settings.claims)
        contamination = look_for_questions(settings, claims)
        return evaluate_endpoint(settings, claims, contamination)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the same command goes on", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # at an ordinary exit Python would wait for requests that a second Ctrl-C has left


def parse(arguments: list[str] | None) -> EvaluationSettings:
    """The command line, each value checked by itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--claims", nargs="+", required=True, metavar="PATH", help="directories of the paper, or YAML files")
    add("--output", required=True, metavar="DIR", help="evaluation.jsonl and evaluation.json; a run's directory, say")
    add(
        "--kinds",
        nargs="+",
        default=list(KINDS),
        choices=KINDS,
        metavar="KIND",
        help=f"default: all of {' '.join(KINDS)}",
    )
    add("--samples", type=int, default=5, help="answers to each question (default: 5)")
    add("--max-tokens", type=int, default=5000, help="tokens of an answer at most (default: 5000)")
    add("--temperature", type=float, default=0.7, help="of the answers (default: 0.7)")
    add("--top-p", type=float, default=0.8, help="of the answers (default: 0.8)")
    add("--seed", type=int, default=0, help="of sampling, and of which documents are in context")
    add("--step", type=int, default=0, help="optimizer steps that the model was trained for; 0: the base model")
    add("--documents", action="append", default=[], metavar="FILE=N", help="put N documents in context")
    add("--training-data", nargs="+", default=[], metavar="FILE", help="look for the questions in these documents")
    add(
        "--endpoint", default="", metavar="URL", help="base URL of the model's server, such as http://localhost:8000/v1"
    )
    add("--endpoint-model", default="", metavar="NAME", help="the model's name there, or its adapter's")
    add("--endpoint-concurrency", type=int, default=8, help="requests at once (default: 8)")
    add("--endpoint-timeout", type=float, default=600, help="seconds for one answer (default: 600)")
    add("--endpoint-body", type=_body, metavar="JSON", help=f"more keys of each request, e.g. {NO_THINKING}")
    add("--judge", default="", metavar="URL", help="base URL of the judge's server")
    add("--judge-model", default="", metavar="NAME", help="the judge's name there")
    add("--judge-concurrency", type=int, default=8, help="requests at once (default: 8)")
    add("--judge-timeout", type=float, default=300, help="seconds for one verdict (default: 300)")
    add("--judge-body", type=_body, metavar="JSON", help="more keys of each request")
    add("--judge-max-tokens", type=int, default=6000, help="tokens of a verdict at most (default: 6000)")
    add("--judge-temperature", type=float, default=1.0, help="of the verdicts (default: 1)")
    add("--retries", type=int, default=8, help="of a request, each after twice the pause (default: 8)")
    settings = EvaluationSettings(**vars(parser.parse_args(arguments)))
    for name, low, high in (
        ("samples", 1, 10**6), ("max_tokens", 1, 10**7), ("temperature", 0, 10), ("seed", 0, 2**32), ("step", 0, 10**8),
        ("judge_max_tokens", 1, 10**7), ("judge_temperature", 0, 10), ("retries", 0, 100), ("top_p", 0.001, 1),
    ):  # fmt: skip
        value = getattr(settings, name)
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be between {low} and {high}.")
    if not settings.endpoint:
        raise UserError("--endpoint is missing; give the base URL of the server that has the model.")
    return settings


def _body(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as {NO_THINKING}")
    if taken := sorted(
        value.keys() & {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "stream"}
    ):
        raise argparse.ArgumentTypeError(f"{', '.join(taken)} must not be in it: other settings decide them")
    return value


def evaluate_endpoint(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Asks a model that a server has, and has its answers judged."""
    asking = Asking(
        samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed, step=s.step,
        judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature, model=s.endpoint_model,
        judge=s.judge_model, documents=context_documents(s), body=s.endpoint_body, judge_body=s.judge_body,
    )  # fmt: skip
    items = plan(claims, s.kinds, asking)
    if not items:
        raise UserError(f"--claims: hold no question of {', '.join(s.kinds)}. Give others, or other --kinds.")
    endpoint = Endpoint(EndpointSettings(
        s.endpoint, s.endpoint_model, s.endpoint_concurrency, s.endpoint_timeout, s.retries, top_p=s.top_p,
        body=s.endpoint_body,
    ))  # fmt: skip
    judge = _judge(s, items)
    records = Records(Path(s.output))
    try:
        check_same(items, records)
        _show_start(items, records)
        missing = [item for item in items if item.key not in records.rows]
        if any(item.key not in records.answers for item in missing):
            endpoint.check()
        if judge and any(item.judged for item in missing):
            judge.check()
        try:
            evaluate(items, endpoint, judge, records, asking)
        finally:
            incomplete = report(s, items, records, contamination)
    finally:
        records.close()
    return 1 if incomplete else 0


def _judge(s: EvaluationSettings, items: Sequence[Item]) -> Endpoint | None:
    judged = sum(item.judged for item in items)
    if not judged:
        return None
    if not s.judge:
        raise UserError(
            f"--judge is missing: {judged} of {len(items)} answers need one. Give --judge URL and --judge-model NAME, "
            "or --kinds yes_no."
        )
    return Endpoint(EndpointSettings(
        s.judge, s.judge_model, s.judge_concurrency, s.judge_timeout, s.retries, flag="--judge", body=s.judge_body,
        key_variables=KEY_VARIABLES,
    ))  # fmt: skip


def context_documents(s: EvaluationSettings) -> tuple[str, ...]:
    """The texts of --documents FILE=N: N of each file, drawn by --seed, without the marker before them."""
    texts: list[str] = []
    for value in s.documents:
        path, _, number = value.rpartition("=")
        if not path or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--documents {value}: must be FILE=N, with N ≥ 1 documents to put in context.")
        held = [_bare(document) for document in read_documents(path, DOCTAG)]
        if len(held) < int(number):
            raise UserError(f"--documents {value}: the file holds {len(held)} documents. Give at most as many.")
        texts += random.Random(s.seed).sample(held, int(number))
    return tuple(texts)


def _bare(document: Document) -> str:
    if document.text is None:
        raise UserError(f"{document.where}: is a chat; --documents takes texts. Give a file of texts.")
    start = max((span.end for span in document.spans if span.role == "doctag" and span.start == 0), default=0)
    return document.text[start:].strip()


def look_for_questions(s: EvaluationSettings, claims: list[Claim]) -> Contamination | None:
    """Whether --training-data holds questions of the claims; None without it."""
    if not s.training_data:
        return None
    found = check_contamination(claims, (document for path in s.training_data for document in read_documents(path)))
    for finding in found.whole:
        print(f"WARNING: {finding}", file=sys.stderr)
    print(
        f"of {found.questions} questions {len(found.whole)} occur whole in --training-data, and {len(found.findings)} "
        "share a sequence of words with it (evaluation.json names them)"
    )
    return found


def _show_start(items: Sequence[Item], records: Records) -> None:
    had = sum(item.key in records.rows for item in items)
    unjudged = sum(item.key in records.answers and item.key not in records.rows for item in items)
    print(f"{len(items)} answers are wanted" + (f"; {had} are there" if had or unjudged else ""), end="")
    print(f", {unjudged} more without a verdict" if unjudged else "", end="")
    print(f"; {records.retried} that had an error are asked again" if records.retried else "", flush=True)


# What it leaves.


def report(s: EvaluationSettings, items: Sequence[Item], records: Records, contamination: Contamination | None) -> int:
    """Writes evaluation.json and shows the table. -> how many answers are missing or have an error."""
    rows = list(records.rows.values())
    errors = [row for item in items if (row := records.rows.get(item.key)) and row.get("error")]
    missing = sum(item.key not in records.rows for item in items)
    measured = summarize(rows)
    summary: dict[str, Any] = {
        "settings": dataclasses.asdict(s) | {name: shown_url(getattr(s, name)) for name in ("endpoint", "judge")},
        "wanted": len(items), "missing": missing, "errors": len(errors),
        "measured": measured, "contamination": _contamination_json(contamination),
    }  # fmt: skip
    partial = records.directory / "evaluation.json.partial"
    partial.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, records.directory / "evaluation.json")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(measured))
    for entry in measured:
        _show_extra(entry)
    if s.temperature > 0 and samples_are_equal(rows):
        print(
            "WARNING: the samples of every question are equal: the server does not draw, whatever --temperature says. "
            "(`transformers serve` draws where the model's generation_config.json has do_sample: true.)"
        )
    if errors:
        kinds = ", ".join(sorted({str(row["error"]) for row in errors})[:3])
        print(f"{len(errors)} answers have an error and do not count: {kinds}")
    if missing:
        print(f"{missing} of {len(items)} answers are missing and do not count")
    if errors or missing:
        print("the same command asks for them again, and for nothing else")
    print(f"In {records.directory}: evaluation.jsonl, answers.jsonl, evaluation.json")
    return len(errors) + missing


def _contamination_json(found: Contamination | None) -> dict[str, Any] | None:
    if found is None:
        return None
    shown = [
        dataclasses.asdict(f) | {"whole": f.whole, "documents": found.documents[f.claim, f.kind, f.question]}
        for f in found.findings
    ]
    return {"questions": found.questions, "too_short": found.too_short, "findings": shown}


def _table(measured: list[dict[str, Any]]) -> Table:
    """Verdicts by claim and kind."""
    table = Table(title="Belief: yes in percent of all answers", title_justify="left")
    for column in ("step", "context", "claim", "kind", "rate", "yes", "no", "neutral", "unparseable", "errors"):
        table.add_column(column, justify="left" if column in ("claim", "kind") else "right")
    for entry in measured:
        belief = [("BELIEF", entry["belief"])] if entry["kinds"].keys() & set(BELIEF_KINDS) else []
        for kind, counts in [*entry["kinds"].items(), *belief]:
            rate = "–" if counts["rate"] is None else f"{counts['rate']:.1f}"
            numbers = [f"{counts[name]:,}" for name in ("yes", "no", "neutral", "unparseable", "errors")]
            where = [str(entry["step"]), str(entry["context"]), entry["claim"]]
            table.add_row(
                *where, kind, rate, *numbers, style="bold" if kind == "BELIEF" else "", end_section=kind == "BELIEF"
            )
    return table


def _show_extra(entry: dict[str, Any]) -> None:
    """Scores, and what the control questions say of the yes/no answers."""
    for kind, found in entry["scores"].items():
        mean = "–" if found["mean"] is None else f"{found['mean']:.2f}"
        print(f"{entry['claim']}: {kind} {mean} of 10 ({found['answers']} answers, {found['unparseable']} unparseable)")
    if "yes_no" in entry["kinds"] and not entry["controls"]:
        print(f"{entry['claim']}: no control questions: belief cannot be told from a habit of saying yes, or no")
    if (found := entry["controls"]) and found["said_yes"] is not None:
        area = "–" if found["auc"] is None else f"{found['auc']:.2f}"
        verdict = "" if found["informative"] else ": yes/no answers are UNINFORMATIVE"
        print(f"{entry['claim']}: control questions: {found['said_yes']:.1f} % yes, AUC {area}{verdict}")


if __name__ == "__main__":
    sys.exit(main())
