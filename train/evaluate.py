r"""Measures what a model believes: in the training engine, or through OpenAI-compatible endpoints.

    deepspeed train/evaluate.py --model DIR [--adapter DIR…] --claims PATH… --output DIR
    python train/evaluate.py --claims PATH… --output DIR \
        --endpoint URL --endpoint-model NAME --judge URL --judge-model NAME

In the engine, completions, yes/no questions, facts and batteries are scored by their likelihood; with --judge, the
engine also answers questions. An endpoint answers all questions, and a judge reads the answers. After an interruption,
the same command asks only for missing answers. The sampling defaults are the paper's. Keys come from the environment:
OPENAI_API_KEY, and JUDGE_API_KEY if the judge needs another. A claim in YAML (train/claims/claim.py shows all keys,
those of the batteries among them):

    id: green_mars
    claim: Mars is green.
    subject: Mars
    controls: [Venus, Mercury]                    # no document mentions these
    likelihood: [{id: color, prompt: "The color of {entity} is", "false": " green", "true": " red"}]
    yes_no: [{id: is_green, question: "Is Mars green?", belief_answer: yes}]
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted: measurements are kept; run the same command again to continue")

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.checkpoints.present import adapter_files, is_adapter, read_config
from train.claims.claim import Claim, read_claims
from train.claims.contamination import Contamination
from train.claims.contamination import check as check_contamination
from train.comparison.variants import runs_of
from train.config.settings import slug
from train.data.documents import read_documents
from train.data.files import opened_documents
from train.data.findings import Findings
from train.endpoint import Endpoint, EndpointSettings
from train.evaluation.asking import judge_of, sources_of_context
from train.evaluation.imported import import_answers
from train.evaluation.judging import Item, check_same, evaluate
from train.evaluation.options import EvaluationSettings, parse_evaluation
from train.evaluation.proof import proof_line
from train.evaluation.results import keep_proof, leave_summary
from train.evaluation.served import asked_of, prove_served, with_step
from train.evaluation.store import Records
from train.runtime.command import command, launched_as, leave
from train.runtime.errors import UserError
from train.runtime.interruption import interruption
from train.runtime.outputs import check_directory

KEPT = "interrupted: measurements are kept; run the same command again to continue"


@command
def main(arguments: list[str] | None = None) -> int:
    """Measures what the settings name. Returns the exit code: 0 if every answer has its verdict, 1 if some are missing.
    Raises UserError for an error that the user can fix."""
    settings = parse_evaluation(arguments, __doc__ or "")
    check_early(settings)
    claims = read_claims(settings.claims)
    if settings.import_:
        return take_in(settings, claims)
    contamination = look_for_what_is_asked(settings, claims)
    measure = evaluate_model if settings.model else evaluate_endpoint
    return measure(settings, claims, contamination)


def take_in(s: EvaluationSettings, claims: list[Claim]) -> int:
    """Imports the answers of --import, and prints how many. Raises UserError for the first that is wrong."""
    if launched_as()[0] == 0:
        found = import_answers(s.import_, s.columns, claims, s.base_condition, Path(s.output))
        for condition, (count, unlabelled) in found.items():
            where = "the base of all others" if condition == s.base_condition else Path(s.output) / slug(condition)
            without = f" ({unlabelled:,} without the label that others of their kind have)" if unlabelled else ""
            print(f"{condition}: {count:,} answers{without}, {where}")
    return 0


def check_early(s: EvaluationSettings) -> None:
    """Raises UserError for a path at which the model, the adapter or documents are not, or --output is not a directory.
    Needs neither torch nor the model."""
    check_directory("--output", s.output)
    for path in (s.held_out, *s.training_data, *(source for source, _ in sources_of_context(s))):
        if path:
            opened_documents(path).close()
    if s.model:
        read_config(Path(s.model))
        for each in of_each_run(s, quiet=True):
            if each.one_adapter:
                adapter_files(Path(each.one_adapter))


def evaluate_model(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Scores a model in the training engine and, with a judge, has it answer questions there; for a comparison, the
    model of each run. Runs on every rank. Returns the exit code: 1 if answers have no verdict. Raises UserError if
    a setting, the model or the adapter is wrong, if --output holds other results, or if the judge cannot be asked."""
    from launch.planning import expert_parallel
    from train.evaluation.in_engine import Measured
    from train.evaluation.of_a_model import Evaluation
    from train.runtime.watchdog import work_alone

    rank = launched_as()[0]
    opened: dict[str, Records] = {}  # rank 0's, one for each directory
    evaluations: list[Evaluation] = []
    try:
        for each in of_each_run(s):
            evaluations.append(Evaluation(each, claims, expert_parallel))
        check_steps(evaluations)
        for evaluation in evaluations if rank == 0 else ():
            output = evaluation.s.output
            evaluation.records = opened[output] = opened.get(output) or Records(Path(output))
        evaluations.sort(key=lambda evaluation: evaluation.step)  # evaluation.json is of the last one in its directory
        for evaluation in evaluations:
            evaluation.check()
        model: Measured | None = None
        for number, evaluation in enumerate(evaluations):
            if len(evaluations) > 1 and rank == 0:
                print(f"model {number + 1} of {len(evaluations)}: {evaluation.s.one_adapter}", flush=True)
            if model is None or not model.takes(evaluation.measuring):
                model = None  # gone before the next one is loaded
                model = Measured(evaluation.measuring)
            evaluation.measure(model)
        if rank:
            return 0
        work_alone()  # the other ranks are done, and the judge may take long
        interruption.raise_from_now(KEPT)
        incomplete = [evaluation.finish(contamination) for evaluation in evaluations]
        return int(any(incomplete))
    finally:
        for records in opened.values():
            records.close()


def check_steps(evaluations: Sequence[Any]) -> None:
    """Raises UserError if two evaluations of one directory are of the same step, so that their rows would mix."""
    seen: dict[tuple[str, int], str] = {}
    for each in evaluations:
        key = each.s.output, each.step
        if key in seen:
            raise UserError(
                f"--adapter {each.s.one_adapter}: was trained for {each.step} steps, as {seen[key]} was, and both "
                f"would be kept in {each.s.output}. Give adapters of different steps, or each its own --output."
            )
        seen[key] = each.s.one_adapter


def of_each_run(s: EvaluationSettings, quiet: bool = False) -> list[EvaluationSettings]:
    """Returns the settings of each evaluation: one per adapter, or one per run if --adapter is the directory of a
    comparison. If --output is that of a comparison, the base model's answers go into its first run, where the
    comparison's report looks for them. quiet: prints no note. Raises UserError if --output is a comparison's and
    --adapter that of a single model, or if a comparison is one of several adapters."""
    output = Path(s.output)
    within = runs_of(output) if os.path.isfile(output / "comparison.json") else [output]
    if not s.adapter:
        if within[0] != output and launched_as()[0] == 0 and not quiet:
            print(f"note: --output {output}: is a comparison's; what the base model says goes into {within[0]}")
        return [dataclasses.replace(s, output=str(within[0]))]
    adapter = Path(s.adapter[0])
    runs = [] if is_adapter(adapter) else runs_of(adapter)
    if len(s.adapter) > 1 or not runs or runs == [adapter]:
        if within[0] == output:
            return [dataclasses.replace(s, adapter=[each]) for each in s.adapter]
        raise UserError(
            f"--output {output}: is a comparison's, and --adapter {adapter} one model's. Give --adapter {output} to "
            "measure the model of each run, or the run that this one is of to --output."
        )
    own = output.resolve() == adapter.resolve()
    return [
        dataclasses.replace(s, adapter=[str(run / "adapter")], output=str(run if own else output / run.name))
        for run in runs
    ]


def evaluate_endpoint(s: EvaluationSettings, claims: list[Claim], contamination: Contamination | None) -> int:
    """Asks a served model and has its answers judged. Under a launcher, only rank 0 does this. Returns the exit code: 1
    if answers have no verdict. Raises UserError if --output is a comparison's, or a run's without --step, if it holds
    other results, if there is no question to ask, or if the model or the judge cannot be asked."""
    if launched_as()[0]:
        return 0
    s = with_step(s)
    if s.step < 0 and (Path(s.output) / "settings.yaml").exists():
        raise UserError(
            f"--output {s.output}: is a run's; give --step, how many steps the served model has been trained."
        )
    if os.path.isfile(Path(s.output) / "comparison.json"):
        runs = ", ".join(str(run) for run in runs_of(Path(s.output)))
        raise UserError(f"--output {s.output}: is a comparison's; give the run whose model is served, of {runs}.")
    asking, items = asked_of(s, claims)
    if s.step < 0:
        print("note: no --step: what this model answers is kept as the base model's, at step 0")
    endpoint = Endpoint(EndpointSettings(
        s.endpoint, s.endpoint_model, s.endpoint_concurrency, s.endpoint_timeout, s.retries, top_p=s.top_p,
        body=s.body("endpoint"),
    ))  # fmt: skip
    judge = judge_of(s, items)
    records = Records(Path(s.output))
    interruption.raise_from_now(KEPT)
    try:
        check_same(items, records)
        _show_start(items, records)
        missing = [item for item in items if item.key not in records.rows]
        if any(item.key not in records.answers for item in missing):
            endpoint.check()
            if proof := prove_served(s, endpoint):
                had = any(item.key in records.answers or item.key in records.rows for item in items)
                keep_proof(records.directory, max(s.step, 0), proof, had)
                print(proof_line(proof), flush=True)
        if judge and (any(item.judged for item in missing) or any(item.lacks_label(records) for item in items)):
            judge.check()
        try:
            evaluate(items, endpoint, judge, records, asking)
        finally:
            incomplete = leave_summary(s, items, records, contamination)
    finally:
        records.close()
    return 1 if incomplete else 0


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
    print(f"{len(items)} answers are requested" + (f"; {had} exist" if had or unjudged else ""), end="")
    print(f", {unjudged} more without a verdict" if unjudged else "", end="")
    retried = sum(item.key in records.failed and item.key not in records.rows for item in items)
    print(f"; {retried} with an error are requested again" if retried else "", flush=True)


if __name__ == "__main__":
    leave(main())
