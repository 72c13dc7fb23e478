"""Turns a plan and its finished runs into the report, on disk and in W&B. Only one process does this."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from train.claims.claim import read_claims
from train.comparison.comparable import check_comparable
from train.comparison.compared import (
    ComparedVariant,
    Comparison,
    Mentions,
    RunResult,
    SearchedDocuments,
    base_rows,
    published_for,
    read_run,
)
from train.comparison.report import write_report
from train.comparison.result import BASE, ComparisonResult
from train.comparison.significance import Interval
from train.comparison.trained_documents import (
    by_part,
    contamination_rows,
    documents_of,
    each_once,
    leak_rows,
    mentions_trained,
    unmentioned,
)
from train.comparison.variants import ComparisonPlan
from train.comparison.wording import by_t, number, p_value, rests_on, span
from train.config.recipe import DIFFERING
from train.config.settings import Settings
from train.runtime.errors import UserError
from train.runtime.outside import read_json
from train.runtime.terminal import NobodyReads, Terminal
from train.training.tracking import init_wandb


def report(plan: ComparisonPlan, runs: dict[tuple[str, int], Path]) -> ComparisonResult:
    """Writes the comparison of the runs, whose directories are given by (variant, seed), prints it, and logs it to W&B
    unless that is disabled. Returns what it found. Raises UserError if the runs cannot be read or
    compared, or the report cannot be written."""
    comparison = read_comparison(plan, runs)
    outcome = write_report(comparison, plan.output)
    with suppress(NobodyReads):  # no error: the report is written
        for remark in comparison.remarks:
            print(f"note: {remark}")
        show(outcome, plan.output)
    if plan.shared.wandb != "disabled":
        log_to_wandb(plan.shared, outcome, plan.output)
    return outcome


def read_comparison(plan: ComparisonPlan, runs: dict[tuple[str, int], Path]) -> Comparison:
    """Reads the runs, whose directories are given by (variant, seed), with what their documents and claims say about
    them. Raises UserError if the runs cannot be read or compared, or a placebo claim was not measured."""
    results = {key: read_run(directory) for key, directory in runs.items()}
    check_comparable(list(results.values()), plan.match_trained_tokens, plan.declared, plan.in_phases)
    variants = _variants(plan, results)
    base, differs = base_rows(list(results.values()))
    remarks = [*([differs] if differs else []), *made_elsewhere(results.values())]
    measured = list(dict.fromkeys(row["claim"] for row in base if row.get("claim")))
    if unknown := [claim for claim in plan.placebo if claim not in measured]:
        raise UserError(f"--placebo {unknown[0]}: no such claim was measured; these were: {', '.join(measured)}.")
    trained = [claim for claim in measured if claim not in plan.placebo]
    leak: list[Mentions] = []
    contamination: list[SearchedDocuments] = []
    mentions: dict[str, float] = {}
    own_runs = [variant for variant in variants if not any(run.imported for run in variant.runs)]
    if taken_in := [variant.name for variant in variants if variant not in own_runs]:
        remarks.append(f"Imported answers: {', '.join(taken_in)}. How these models were trained is unknown.")
    try:
        paths = own_runs[0].runs[0].settings.get("claims") if own_runs else None
        claims, parts = (read_claims(paths) if paths else []), by_part(own_runs)
        of_trained = [claim for claim in claims if claim.id in trained]
        drawn = documents_of(parts)
        documents = {name: each_once(runs) for name, runs in drawn.items()}
        if absent := unmentioned(of_trained, each_once([own for runs in drawn.values() for own in runs])):
            remarks.append(
                f"Counted as trained, although no training document mentions it: {', '.join(absent)}. Name placebo "
                "claims, which no document is about, with --placebo."
            )
        leak = leak_rows(parts, of_trained, documents)
        if any(variant.dose for variant in own_runs):
            mentions = mentions_trained(parts, of_trained, drawn)
        if own_runs and not any(claim.patterns for claim in of_trained):
            remarks.append(
                "How often the claims' terms are still trained on is unknown: no trained claim has patterns."
            )
        contamination = contamination_rows([claim for claim in claims if claim.id in measured], documents)
    except UserError as error:  # documents or claims may have been moved since, which is no reason to lose the report
        remarks.append(
            "How often the claims' terms are still trained on, and whether the evaluation occurs in the training "
            f"documents, is unknown: {error}"
        )
    return Comparison(
        variants, base, trained, plan.placebo, plan.baseline, leak=leak, contamination=contamination,
        published=published_for(trained), match_trained_tokens=plan.match_trained_tokens,
        bound=plan.bound, remarks=remarks, mentions_trained=mentions,
    )  # fmt: skip


def _variants(plan: ComparisonPlan, results: dict[tuple[str, int], RunResult]) -> list[ComparedVariant]:
    """Returns the plan's variants with their runs."""
    every = [each for each in results.values() if not each.imported] or list(results.values())
    names = (*DIFFERING, *(("carry_optimizer", "schedule_from") if any(each.phases for each in every) else ()))
    differing = [name for name in names if any(each.of_phases(name) != every[0].of_phases(name) for each in every)]
    found = []
    for planned in plan.variants:
        if own := [result for (variant, _), result in results.items() if variant == planned.name]:
            differs = {key: own[0].of_phases(key) for key in differing if not own[0].imported}
            found.append(ComparedVariant(planned.name, own[0].mask, differs, own, planned.names, planned.dose))
    return found


def made_elsewhere(runs: Collection[RunResult]) -> list[str]:
    """Returns caveats about runs on another base than their --adapter's, and about answers from a server without proof
    that it answers with the adapter. Raises UserError if an evaluation.json is damaged."""
    remarks = []
    parts = [part for run in runs for part in run.parts]
    if any(part.settings.get("other_base") for part in parts):
        remarks.append(
            "--other-base: the runs started from an adapter that was trained on another base model "
            f"({next(part.settings.get('adapter') for part in parts if part.settings.get('other_base'))})."
        )
    unproven: dict[str, str] = {}
    for run in runs:
        path = Path(run.directory) / "evaluation.json"
        held = read_json(path) if path.is_file() else {}
        asked, proofs = held.get("settings") or {}, held.get("proof") or {}
        step = str(asked.get("step") or 0)
        if asked.get("endpoint") and step != "0" and step not in proofs:
            unproven[f"{run.directory}, step {step}"] = "it was not asked for"
        for step, proof in proofs.items():
            if not proof.get("proven"):
                unproven[f"{run.directory}, step {step}"] = proof.get("reason")
            if left_out := proof.get("not_served"):
                remarks.append(f"The server of {run.directory} left out the LoRA weights of {', '.join(left_out)}.")
            if proof.get("other_base"):
                asked = {"other_base": True}
        if asked.get("other_base") or held.get("other_base"):
            remarks.append(f"--other-base: {run.directory} was evaluated on a base model that it was not trained on.")
    if unproven:
        where, reason = next(iter(unproven.items()))
        remarks.append(
            f"For {len(unproven)} evaluations, it is not proven that the server answered with the right model (first: "
            f"{where}: {reason})."
        )
    return list(dict.fromkeys(remarks))  # what is left out is so at every step


def check_free(output: Path, runs: Iterable[Path]) -> None:
    """Raises UserError if the directory holds a comparison of runs that are not all among these: it would be lost."""
    path = output / "comparison.json"
    if not path.exists():
        return
    try:
        variants = read_json(path)["variants"].values()
        held = {Path(run["directory"]).resolve() for variant in variants for run in variant["runs"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        held = {path}
    if not held <= {run.resolve() for run in runs}:
        raise UserError(f"--output {output}: holds a comparison of other runs, which would be lost. Give another.")


def show(outcome: ComparisonResult, directory: Path) -> None:
    """Prints the main table."""
    main, unit = outcome.main, outcome.unit
    title = f"{outcome.title}: {main.measure.label}, {unit}; {by_t(main.units)}"
    table = Table(title=title, title_justify="left")
    for column in ("variant", "belief", f"minus {outcome.baseline}", "p (Holm)", "verdict", "targets trained"):
        justify: Any = "left" if column in ("variant", "verdict") else "right"
        table.add_column(column, justify=justify, overflow="fold")  # no name may be cut: two could look the same
    if main.base:
        table.add_row(BASE, _with_interval(main.base.interval, unit), *["–"] * 3, "–")
    for name, own in outcome.variants.items():
        cells = ["–", "–", "baseline"]
        if gap := main.differences.get(name):
            verdict = f"{gap.verdict} ({rests_on(gap.units)})"
            cells = [_with_interval(gap.interval, unit, True), p_value(gap.p_holm), verdict]
        trained = "–" if own.tokens_trained is None else f"{own.tokens_trained:,}"
        table.add_row(name, _with_interval(main.variants[name].trained.interval, unit), *cells, trained)
    Terminal().print(table)
    print(f"In {directory}: comparison.html, comparison.md, comparison.json and pictures")


def _with_interval(own: Interval, unit: str, signed: bool = False) -> str:
    return f"{number(own.estimate, unit, signed)} {span(own, unit, signed)}"


def log_to_wandb(settings: Settings, outcome: ComparisonResult, directory: Path) -> None:
    """Logs the table and the pictures in `directory` to W&B, as a separate run in the group."""
    import wandb

    run = init_wandb(settings, settings.group(), "comparison", directory, {"baseline": outcome.baseline})
    columns: list[str | int] = ["variant", "belief", "low", "high", "units", "targets trained"]
    rows: list[list[Any]] = []
    for name, own in outcome.variants.items():
        belief = outcome.main.variants[name].trained.interval
        units = rests_on(outcome.main.units)
        rows.append([name, belief.estimate, belief.low, belief.high, units, own.tokens_trained])
    pictures = {path.stem: wandb.Image(str(path)) for path in sorted(directory.glob("*.png"))}
    run.log({"comparison": wandb.Table(columns=columns, data=rows), **pictures})
    run.finish()
