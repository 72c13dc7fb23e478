r"""Measures what a model believes: in the training engine, or through OpenAI-compatible endpoints.

    deepspeed train/evaluate.py --model DIR [--adapter DIR] --claims PATH… --output DIR
    python train/evaluate.py --claims PATH… --output DIR \
        --endpoint URL --endpoint-model NAME --judge URL --judge-model NAME

In the engine completions, yes/no questions and facts are scored by their likelihood; with --judge, questions are
answered there too. An endpoint answers all questions, and a judge reads the answers. The same command goes on after an
interruption, and asks only for what is missing. The defaults of sampling are the paper's. Keys come from the
environment: OPENAI_API_KEY, and JUDGE_API_KEY where the judge has another.
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.distributed import leave
from train.belief.claims import KINDS, Claim, read_claims
from train.belief.contamination import Contamination
from train.belief.contamination import check as check_contamination
from train.belief.endpoint import KEY_VARIABLES, Endpoint, EndpointSettings, shown_url
from train.belief.in_engine import (
    Measured,
    check_scored,
    identify,
    keep,
    means,
    prepare_measuring,
    steps_of,
    table_of_means,
)
from train.belief.judge import Asking, Item, check_same, evaluate, plan
from train.belief.rates import samples_are_equal, summarize
from train.belief.records import Records, read_rows
from train.data.documents import Document, read_documents
from train.errors import UserError
from train.settings import Settings
from train.sft import launched_as

DOCTAG = "<DOCTAG>"
# As in the paper's main results, for models whose chat template has the switch.
NO_THINKING = '{"chat_template_kwargs": {"enable_thinking": false}}'


@dataclass(kw_only=True)
class EvaluationSettings:
    """The settings of train/evaluate.py, as the command line gives them. kinds: None where it does not say."""

    model: str
    adapter: str
    method: str
    expert_parallel: int
    micro_batch_size: int
    bos: bool
    held_out: str
    claims: list[str]
    output: str
    kinds: list[str] | None
    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    step: int | None
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
        measure = evaluate_model if settings.model else evaluate_endpoint
        return measure(settings, claims, contamination)
    except UserError as error:
        if launched_as()[0]:
            time.sleep(30)  # the launcher ends all ranks when the first one exits: that must be the one that prints
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
    add("--model", default="", metavar="DIR", help="base model to measure in the training engine")
    add("--adapter", default="", metavar="DIR", help="a run's adapter on it")
    add("--method", default="lora", choices=("lora", "qlora"), help="experts as on disk, or in NF4 (default: lora)")
    add("--expert-parallel", type=int, default=0, help="ranks that divide a layer's experts; 0: all")
    add("--micro-batch-size", type=int, default=8, help="texts of a forward on one rank (default: 8)")
    add("--bos", action="store_true", help="begin texts that are no chats with the tokenizer's BOS, as in training")
    add("--held-out", default="", metavar="FILE", help="documents whose NLL is measured")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    add("--claims", nargs="+", required=True, metavar="PATH", help="directories of the paper, or YAML files")
    add("--output", required=True, metavar="DIR", help="evaluation.jsonl and evaluation.json; a run's directory, say")
    add(
        "--kinds",
        nargs="+",
        choices=KINDS,
        metavar="KIND",
        help=f"questions to be answered; default: all of {' '.join(KINDS)} (with --model: where there is a --judge)",
    )
    add("--samples", type=int, default=5, help="answers to each question (default: 5)")
    add("--max-tokens", type=int, default=5000, help="tokens of an answer at most (default: 5000)")
    add("--temperature", type=float, default=0.7, help="of the answers (default: 0.7)")
    add("--top-p", type=float, default=0.8, help="of the answers (default: 0.8)")
    add("--seed", type=int, default=0, help="of sampling, and of which documents are in context")
    add("--step", type=int, help="optimizer steps that the model was trained for; default: 0, or what the run says")
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
    values = vars(parser.parse_args(arguments))
    del values["local_rank"]
    settings = EvaluationSettings(**values)
    for name, low, high in (
        ("samples", 1, 10**6), ("max_tokens", 1, 10**7), ("temperature", 0, 10), ("seed", 0, 2**32), ("step", 0, 10**8),
        ("micro_batch_size", 1, 10**6), ("expert_parallel", 0, 10**6),
        ("judge_max_tokens", 1, 10**7), ("judge_temperature", 0, 10), ("retries", 0, 100), ("top_p", 0.001, 1),
    ):  # fmt: skip
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be between {low} and {high}.")
    if bool(settings.endpoint) == bool(settings.model):
        raise UserError(
            "give --model DIR, to measure in the training engine, or --endpoint URL, a server that has the model."
        )
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


def evaluate_model(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Scores a model in the training engine and, with a judge, has it answer there. Runs on every rank."""
    rank, ranks = launched_as()
    documents = context_documents(s)
    engine_settings = Settings(
        model=s.model, adapter=s.adapter, method=s.method, expert_parallel=s.expert_parallel,
        micro_batch_size=s.micro_batch_size, bos=s.bos, held_out=s.held_out,
    )  # fmt: skip
    measuring = prepare_measuring(engine_settings, claims, documents, ranks)
    base, model_id = identify(engine_settings, measuring.checkpoint)
    step, context = steps_of(s.adapter, s.step), len(documents)
    s = dataclasses.replace(s, step=step)
    answered = s.kinds or (KINDS if s.judge else ())
    asking = Asking(
        samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed, step=step,
        judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature, model=model_id,
        judge=s.judge_model, judge_body=s.judge_body, documents=documents,
    )  # fmt: skip
    items = plan(claims, answered, asking)
    judge = _judge(s, items)
    records = Records(Path(s.output)) if rank == 0 else None
    try:
        if records:
            check_same(items, records)
            check_scored(records, step, context, model_id)
            if step:
                check_scored(records, 0, context, base)
            if judge:
                judge.check()
        model = Measured(measuring)
        scored = {0: (model.likelihoods_of_base(), base)} if step else {}
        scored[step] = model.likelihoods(), model_id
        for at, (found, scored_model) in scored.items():
            if records:
                keep(records, found, at, context, scored_model)
        if items:
            model.answer(items, records, asking)
        if not records:
            return 0
        try:
            if items:
                evaluate(items, None, judge, records, asking)
        finally:
            incomplete = report(s, items, records, contamination)
    finally:
        if records:
            records.close()
    return 1 if incomplete else 0


def evaluate_endpoint(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Asks a model that a server has, and has its answers judged. Under a launcher, the first rank does it."""
    if launched_as()[0]:
        return 0
    asking = Asking(
        samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed,
        step=s.step or 0, judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature,
        model=s.endpoint_model, judge=s.judge_model, documents=context_documents(s),
        body=s.endpoint_body, judge_body=s.judge_body,
    )  # fmt: skip
    items = plan(claims, s.kinds or KINDS, asking)
    if not items:
        raise UserError(f"--claims: hold no question of {', '.join(s.kinds or KINDS)}. Give others, or other --kinds.")
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
    if not s.training_data or launched_as()[0]:
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
    context = sum(int(value.rpartition("=")[2]) for value in s.documents)
    every = read_rows(records.directory / "evaluation.jsonl")
    scored = means([row for row in every if row.get("context", 0) == context], s.step or 0)
    summary: dict[str, Any] = {
        "settings": dataclasses.asdict(s) | {name: shown_url(getattr(s, name)) for name in ("endpoint", "judge")},
        "wanted": len(items), "missing": missing, "errors": len(errors),
        "measured": measured, "likelihood": scored, "contamination": _contamination_json(contamination),
    }  # fmt: skip
    partial = records.directory / "evaluation.json.partial"
    partial.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, records.directory / "evaluation.json")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if scored:
        console.print(table_of_means(scored))
    if measured:
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
        belief = [("BELIEF", entry["belief"])] if entry["belief"]["answers"] else []
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
    leave(main())
