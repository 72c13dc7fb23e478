"""Trains variants that differ in how the loss treats spans, from the same initial weights on the same tokens, measures
what each model believes, and writes one report.

    deepspeed train/compare.py --masks none doctags doctags,false-spans --claims claim.yaml --data documents.jsonl
    deepspeed train/compare.py --recipe train/recipes/demo.yaml --output runs/comparison
    python train/compare.py --runs runs/array-1 runs/array-2 ... --output runs/comparison    # of finished runs

Variants are those of --masks or of a --recipe. With --masks, a --recipe may hold settings alone, such as a model's.
With --runs, it names the variants, the baseline and the placebo. A recipe is YAML (train/config/recipe.py):

    settings: {model: DIR, steps: 625, data: [documents.jsonl=10000], claims: [claim.yaml]}
    variants:
      all of it: {mask: none}                     # the first is the baseline, unless there is baseline: NAME
      doctag out: {mask: doctags}
      false out: {mask: "doctags,false-spans"}
    seeds: 3

Accepts every setting of train/sft.py. Variants share all settings that --masks or the recipe does not vary. The base
model is read once. After an interruption, the same command with --resume continues the interrupted variant.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen()

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from train.comparison.variants import ComparisonPlan, parse_comparison
from train.config.provenance import held_wandb_id
from train.runtime.command import command, launched_as, leave
from train.runtime.interruption import interruption
from train.training.early import check_early, continued


@command
def main(argv: list[str]) -> None:
    """Checks every run before a weight is read, then trains the runs and compares them. With --runs, only compares.
    Raises UserError if a setting, a document, a claim or the model is wrong."""
    plan = parse_comparison(argv, __doc__ or "")
    if plan.shared.wandb != "disabled":
        held_wandb_id(plan.output)
    if plan.finished:
        compare(plan)
    else:
        for variant in plan.variants:
            for number, each in enumerate(plan.runs(variant, plan.seeds[0])):
                settings = continued(each, later=number > 0)
                # The default --output is rank 0's, and steps that match a budget are known only with the documents
                known = plan.shared.output and not plan.match_trained_tokens
                check_early(settings if known else replace(settings, output=""))
        train(plan)


def compare(plan: ComparisonPlan) -> None:
    """Compares the finished runs of --runs, on rank 0."""
    if launched_as()[0] == 0:
        from train.comparison.outcome import check_free, report  # takes seconds: after the checks that do not need it

        check_free(plan.output, plan.finished.values())
        report(plan, plan.finished)


def train(plan: ComparisonPlan) -> None:
    """Checks the runs with their documents and model, trains them, and compares them on rank 0."""
    from launch.planning import expert_parallel, planned_memory
    from train.comparison.outcome import report
    from train.comparison.training import checked_runs, in_training_order, train_all
    from train.runtime.distributed import from_first_rank, start_distributed
    from train.training.job import Known

    rank, ranks = launched_as()
    device = start_distributed(plan.shared.timeout)
    plan = replace(plan, output=from_first_rank(plan.output))  # its default contains the time of each rank
    known = Known(expert_parallel)
    runs = checked_runs(plan, ranks, rank == 0, known)
    if plan.shared.dry_run:
        return
    interruption.resume_by(f"--resume --output {shlex.quote(str(plan.output))}")
    train_all(in_training_order(runs.values()), ranks, device, known, planned_memory)
    if rank == 0:
        report(plan, {name: Path(phases[-1].output) for name, phases in runs.items()})


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
