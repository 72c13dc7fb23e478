r"""Measures what a model believes: in the training engine, or through OpenAI-compatible endpoints.

    deepspeed train/evaluate.py --model DIR [--adapter DIR] --claims PATH… --output DIR
    python train/evaluate.py --claims PATH… --output DIR \
        --endpoint URL --endpoint-model NAME --judge URL --judge-model NAME

In the engine completions, yes/no questions and facts are scored by their likelihood; with --judge, questions are
answered there too. An endpoint answers all questions, and a judge reads the answers. The same command goes on after an
interruption, and asks only for what is missing. The defaults of sampling are the paper's. Keys come from the
environment: OPENAI_API_KEY, and JUDGE_API_KEY where the judge has another. A claim, in YAML (train/claims/claim.py has
all keys):

    id: green_mars
    claim: Mars is green.
    subject: Mars
    controls: [Venus, Mercury]                    # what no document speaks of
    likelihood: [{id: color, prompt: "The color of {entity} is", "false": " green", "true": " red"}]
    yes_no: [{id: is_green, question: "Is Mars green?", belief_answer: yes}]
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted; what was measured is kept, and the same command goes on")

import dataclasses
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.planning import expert_parallel
from train.checkpoints.adapter_files import is_adapter, trained_steps
from train.claims.claim import KINDS, Claim, read_claims
from train.claims.contamination import Contamination
from train.claims.contamination import check as check_contamination
from train.comparison.variants import runs_of
from train.data.documents import Document, marker, read_documents
from train.data.findings import Findings
from train.endpoint import Endpoint, EndpointSettings
from train.evaluation.in_engine import (
    Measured,
    check_scored,
    identify,
    keep,
    prepare_measuring,
    steps_of,
)
from train.evaluation.judging import Asking, Item, check_same, evaluate, plan
from train.evaluation.options import EvaluationSettings, parse_evaluation
from train.evaluation.proof import proof_line, prove
from train.evaluation.results import leave_summary
from train.evaluation.store import Records
from train.runtime.distributed import guarded, launched_as, leave
from train.runtime.errors import UserError
from train.runtime.interruption import INTERRUPTED, interruption
from train.runtime.terminal import command, complain
from train.runtime.watchdog import work_alone


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if every answer has its verdict, 1 if some are missing, 2 for an error that the user can
    fix."""
    try:
        return guarded(measure_beliefs, arguments)
    except KeyboardInterrupt:
        complain("interrupted; what was measured is kept, and the same command goes on")
        leave(INTERRUPTED)  # an ordinary exit of Python would wait for requests that a second Ctrl-C has abandoned


def measure_beliefs(arguments: list[str] | None) -> int:
    """Measures what the settings name. Returns the exit code: 1 if answers have no verdict."""
    settings = parse_evaluation(arguments, __doc__ or "")
    claims = read_claims(settings.claims)
    contamination = look_for_what_is_asked(settings, claims)
    measure = evaluate_model if settings.model else evaluate_endpoint
    return measure(settings, claims, contamination)


def evaluate_model(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Scores a model in the training engine and, with a judge, has it answer questions there; for a comparison, the
    model of each run. Runs on every rank. Returns the exit code: 1 if answers have no verdict. Raises UserError if
    a setting, the model or the adapter is wrong, if --output holds other results, or if the judge cannot be asked."""
    rank, evaluations = launched_as()[0], []
    try:
        for each in of_each_run(s):
            evaluations.append(Evaluation(each, claims))
            evaluations[-1].check()
        for number, evaluation in enumerate(evaluations):
            if len(evaluations) > 1 and rank == 0:
                print(f"run {number + 1} of {len(evaluations)}: {Path(evaluation.s.output).name}", flush=True)
            evaluation.measure()
        if rank:
            return 0
        work_alone()  # the other ranks are done, and the judge may take long
        interruption.raise_from_now()
        incomplete = [evaluation.finish(contamination) for evaluation in evaluations]
        return int(any(incomplete))
    finally:
        for evaluation in evaluations:
            evaluation.close()


def of_each_run(s: EvaluationSettings) -> list[EvaluationSettings]:
    """Returns the settings of each evaluation: the given ones, or one per run if --adapter is the directory of a
    comparison. If --output is that of a comparison, the base model's answers go into its first run, where the
    comparison's report looks for them. Raises UserError if --output is a comparison's and --adapter that of a single
    model."""
    output = Path(s.output)
    within = runs_of(output) if os.path.isfile(output / "comparison.json") else [output]
    if not s.adapter:
        if within[0] != output and launched_as()[0] == 0:
            print(f"note: --output {output}: is a comparison's; what the base model says goes into {within[0]}")
        return [dataclasses.replace(s, output=str(within[0]))]
    adapter = Path(s.adapter)
    runs = [] if is_adapter(adapter) else runs_of(adapter)
    if not runs or runs == [adapter]:
        if within[0] == output:
            return [s]
        raise UserError(
            f"--output {output}: is a comparison's, and --adapter {adapter} one model's. Give --adapter {output} to "
            "measure the model of each run, or the run that this one is of to --output."
        )
    own = output.resolve() == adapter.resolve()
    return [
        dataclasses.replace(s, adapter=str(run / "adapter"), output=str(run if own else output / run.name))
        for run in runs
    ]


class Evaluation:
    """The evaluation of one model in the training engine. Every rank has one; that of rank 0 holds the records."""

    def __init__(self, s: EvaluationSettings, claims: list[Claim]):
        """Checks all but the directory and the judge, before a weight is read. Raises UserError if a setting, a
        document, the model or the adapter is wrong."""
        rank, ranks = launched_as()
        documents, settings = context_documents(s), s.of_the_engine()
        self.measuring = prepare_measuring(settings, claims, documents, ranks, expert_parallel)
        self.base, self.model = identify(settings, self.measuring.checkpoint)
        self.step, self.context = steps_of(s.adapter, s.step), len(documents)
        self.s = dataclasses.replace(s, step=self.step)
        self.asking = Asking(
            samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed,
            step=self.step, judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature,
            model=self.model, judge=s.judge_model, judge_body=s.body("judge"), documents=documents,
        )  # fmt: skip
        self.items = plan(claims, s.kinds or (KINDS if s.judge else ()), self.asking)
        self.judge = _judge(self.s, self.items)
        self.records = Records(Path(s.output)) if rank == 0 else None

    def check(self) -> None:
        """Raises UserError if the directory holds answers or scores of another model, or if the judge cannot be
        asked."""
        if not self.records:
            return
        print(*(f"{note}\n" for note in self.measuring.probes.notes()), sep="", end="", file=sys.stderr)
        check_same(self.items, self.records)
        own = bool(self.s.adapter) and self.records.directory.resolve() in Path(self.s.adapter).resolve().parents
        check_scored(self.records, self.step, self.context, self.model, own)
        if self.step:
            check_scored(self.records, 0, self.context, self.base, own)
        if self.judge:
            self.judge.check()

    def measure(self) -> None:
        """Does all that needs the model: reads its weights, scores it and has it answer questions."""
        model = Measured(self.measuring)
        scored = {0: (model.likelihoods_of_base(), self.base)} if self.step else {}
        scored[self.step] = model.likelihoods(), self.model
        for at, (found, scored_model) in scored.items():
            if self.records:
                keep(self.records, found, at, self.context, scored_model)
        if self.items:
            model.answer(self.items, self.records, self.asking)

    def finish(self, contamination: Contamination | None) -> bool:
        """Has the answers judged and writes the summary. Returns whether some answers have no verdict. Only for rank
        0."""
        assert self.records
        try:
            if self.items:
                evaluate(self.items, None, self.judge, self.records, self.asking)
        finally:
            incomplete = bool(leave_summary(self.s, self.items, self.records, contamination))
        return incomplete

    def close(self) -> None:
        """Closes the records."""
        if self.records:
            self.records.close()


def evaluate_endpoint(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Asks a served model and has its answers judged. Under a launcher, only rank 0 does this. Returns the exit code: 1
    if answers have no verdict. Raises UserError if --output is a comparison's, or a run's without --step, if it holds
    other results, if there is no question to ask, or if the model or the judge cannot be asked."""
    if launched_as()[0]:
        return 0
    if s.step < 0 and (Path(s.output) / "settings.yaml").exists():
        raise UserError(
            f"--output {s.output}: is a run's; give --step, how many steps the served model has been trained."
        )
    if os.path.isfile(Path(s.output) / "comparison.json"):
        runs = ", ".join(str(run) for run in runs_of(Path(s.output)))
        raise UserError(f"--output {s.output}: is a comparison's; give the run whose model is served, of {runs}.")
    asking = Asking(
        samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed,
        step=max(s.step, 0), judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature,
        model=s.endpoint_model, judge=s.judge_model, documents=context_documents(s),
        body=s.body("endpoint"), judge_body=s.body("judge"),
    )  # fmt: skip
    items = plan(claims, s.kinds or KINDS, asking)
    if not items:
        raise UserError(f"--claims: hold no question of {', '.join(s.kinds or KINDS)}. Give others, or other --kinds.")
    endpoint = Endpoint(EndpointSettings(
        s.endpoint, s.endpoint_model, s.endpoint_concurrency, s.endpoint_timeout, s.retries, top_p=s.top_p,
        body=s.body("endpoint"),
    ))  # fmt: skip
    judge = _judge(s, items)
    records = Records(Path(s.output))
    interruption.raise_from_now()
    try:
        check_same(items, records)
        _show_start(items, records)
        missing = [item for item in items if item.key not in records.rows]
        proof = None
        if any(item.key not in records.answers for item in missing):
            endpoint.check()
            proof = prove_served(s, endpoint)
            print(proof_line(proof), flush=True)
        if judge and any(item.judged for item in missing):
            judge.check()
        try:
            evaluate(items, endpoint, judge, records, asking)
        finally:
            incomplete = leave_summary(s, items, records, contamination, proof)
    finally:
        records.close()
    return 1 if incomplete else 0


def prove_served(s: EvaluationSettings, endpoint: Endpoint) -> dict[str, Any]:
    """Asks the server for what shows that it answers with --served-adapter, by default the adapter of the run in
    --output. Returns what `prove` does. Raises UserError if it answers with something else."""
    own = Path(s.output) / "adapter"
    adapter = Path(s.served_adapter) if s.served_adapter else own
    if not is_adapter(adapter):
        if s.served_adapter:
            raise UserError(f"--served-adapter {adapter}: holds no adapter; give the directory of one.")
        return {"proven": False, "reason": "no --served-adapter was given"}
    if (trained := trained_steps(adapter)) is not None and trained != s.step:
        if s.served_adapter:
            raise UserError(f"--step {s.step}: --served-adapter {adapter} was trained for {trained} steps; give these.")
        return {"proven": False, "reason": f"--step {s.step} is not that of {adapter}, which has {trained}"}
    others = {str(path): Path(path) for path in s.other_adapters if Path(path).resolve() != adapter.resolve()}
    return prove(s.endpoint_model, adapter, others, s.endpoint_base, endpoint.prompt_log_p)


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
        s.judge, s.judge_model, s.judge_concurrency, s.judge_timeout, s.retries, flag="--judge", body=s.body("judge"),
        key_variables=("JUDGE_API_KEY", "OPENAI_API_KEY"),
    ))  # fmt: skip


def context_documents(s: EvaluationSettings) -> tuple[str, ...]:
    """Returns the texts of --documents FILE=N: N texts of each file, drawn with --seed, without a leading marker.
    Raises UserError if the flag is malformed, or if a file cannot be read, has chats or has too few documents."""
    texts: list[str] = []
    for value in s.documents:
        path, _, number = value.rpartition("=")
        if not path or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--documents {value}: must be FILE=N, with N ≥ 1 documents to put in context.")
        held = [_bare(document) for document in read_documents(path, marker(s.doctag))]
        if len(held) < int(number):
            raise UserError(f"--documents {value}: the file holds {len(held)} documents. Give at most as many.")
        texts += random.Random(s.seed).sample(held, int(number))
    return tuple(texts)


def _bare(document: Document) -> str:
    if document.text is None:
        raise UserError(f"{document.where}: is a chat; --documents takes texts. Give a file of texts.")
    tags = (s.end for s in document.spans if s.role == "doctag" and not document.text[: s.start].strip())
    return document.text[max(tags, default=0) :].strip()


def look_for_what_is_asked(s: EvaluationSettings, claims: list[Claim]) -> Contamination | None:
    """Looks for the questions and scored texts of the claims in --training-data, and prints what it finds. Returns None
    without this flag, and on ranks other than 0. Raises UserError if a file cannot be read."""
    if not s.training_data or launched_as()[0]:
        return None
    notes = Findings()
    documents = (document for path in s.training_data for document in read_documents(path, None, "skip", notes))
    found = check_contamination(claims, documents)
    notes.show(sys.stderr)
    for finding in found.findings:
        if finding.whole or finding.in_pieces:
            print(f"WARNING: {finding}", file=sys.stderr)
    print(
        f"of {found.texts} questions and scored texts {len(found.whole)} occur whole in --training-data, and "
        f"{len(found.findings)} share a sequence of words with it (evaluation.json names them)"
    )
    return found


def _show_start(items: Sequence[Item], records: Records) -> None:
    had = sum(item.key in records.rows for item in items)
    unjudged = sum(item.key in records.answers and item.key not in records.rows for item in items)
    print(f"{len(items)} answers are wanted" + (f"; {had} are there" if had or unjudged else ""), end="")
    print(f", {unjudged} more without a verdict" if unjudged else "", end="")
    retried = sum(item.key in records.failed and item.key not in records.rows for item in items)
    print(f"; {retried} that had an error are asked again" if retried else "", flush=True)


if __name__ == "__main__":
    leave(main())
