"""Asks the base model and the adapters of several runs all questions of their claims through one server, has the
answers judged, and compares the runs:

    python -m launch.evaluate_runs --runs runs/a runs/b --output DIR --judge URL --judge-model NAME [-- FLAG…]

Starts vLLM or SGLang with the base and all adapters, as launch.serve does, one of them in GPU memory at a time.
Verifies for each adapter that the server answers with it. Restarts the server if it dies. With --kept-steps, also asks
the adapters that --adapters-at kept during training. --model and --claims default to those of the first run. With
--judge same, the base on the same server is the judge. Other flags go to train/evaluate.py, those after -- to the
server. After an interruption, the same command asks only for missing answers. The report in --output shows judged
belief beside likelihoods, and both over the steps.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted: answers are kept; run the same command again to continue")

import io
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launch.serve import ServeOptions, Serving, adapter_of, check_early, prepare, split
from launch.server import Server
from train.checkpoints.present import BASE_NAME, adapter_name, kept_adapter, kept_steps, model_name
from train.claims.claim import Claim, read_claims
from train.claims.claim_files import check_there
from train.claims.releases import claim_id
from train.comparison.variants import NO_PLACEBO, parse_comparison, runs_of
from train.config.command_line import MOST, REPOSITORY, Parser, check_ranges, given, setting
from train.config.provenance import held_settings
from train.config.settings import steps_at
from train.endpoint import Endpoint
from train.evaluation.asking import judge_of
from train.evaluation.judging import check_same
from train.evaluation.measures import at_step
from train.evaluation.options import EvaluationSettings, parse_evaluation
from train.evaluation.served import asked_of
from train.evaluation.store import Records, read_measured
from train.runtime.command import command
from train.runtime.errors import MayPass, UserError
from train.runtime.interruption import interruption
from train.runtime.outside import checked, read_json
from train.training.lineage import phases_before

KEPT = "interrupted: answers are kept; run the same command again to continue"
SAME = "same"  # --judge: the base on the same server
LOOK = 2.0  # seconds between looks at the server while it is asked
MOST_DEATHS = 3  # of the server in a row, without a new answer in between
DECIDED = frozenset({"adapters", "output", "dry_run", "slots"})
OF_EVALUATE = (
    "--endpoint", "--endpoint-model", "--endpoint-base", "--served-adapter", "--other-adapters", "--step", "--judge",
)  # fmt: skip
"""Flags of train/evaluate.py that this command sets."""


@dataclass(kw_only=True)
class EvaluateRunsOptions:
    """The options in addition to those of launch.serve and train/evaluate.py."""

    runs: list[str] = setting((), "RUN…: directories of finished runs", many=True)  # noqa: RUF009
    output: str = setting("", "DIR for the report, the exported adapters and the server's log")
    judge: str = setting("", "base URL of the server with the judge, or same: the base on the same server")
    recipe: list[str] = setting((), "FILE…: recipe that names the variants, for train/compare.py", many=True)  # noqa: RUF009
    placebo: list[str] = setting(  # noqa: RUF009
        (), "ID…: claims that no training document is about; default: those of the runs' comparison", many=True
    )
    baseline: str = setting("", "variant that others are compared with; default: that of the runs' comparison")
    kept_steps: str = setting("", "steps of which each run's kept adapter is asked, too: 1,2,4 or log:15, or all")
    start_timeout: float = setting(3600, "seconds until the server must answer", between=(1, MOST))
    dry_run: bool = setting(False, "check everything, and print the server's command")


@dataclass(frozen=True)
class Asked:
    """A model that is asked. name: on the server. run: the directory for its answers. step: steps of its training.
    adapter: its directory; None for the base."""

    name: str
    run: Path
    step: int
    adapter: Path | None = None


@command
def main(argv: list[str]) -> int:
    """Evaluates and compares. Returns the exit code: 1 if some answers have no verdict. Raises UserError if a setting
    is wrong, a run is not finished, or a server or the judge cannot be used."""
    before, more = split(argv)
    parser = Parser(__doc__ or "")
    parser.add_settings(EvaluateRunsOptions)
    parser.add_settings(ServeOptions, DECIDED)
    known, flags = parser.parse_known_args(before)
    options = EvaluateRunsOptions(**given(known, EvaluateRunsOptions))
    serve = ServeOptions(**{k: v for k, v in given(known, ServeOptions).items() if k not in DECIDED})
    for each in (options, serve):
        check_ranges(each)
    options = replace(options, runs=[str(run) for each in options.runs for run in runs_of(Path(each))])
    serve, flags = of_the_runs(options, serve, flags)
    settings = check(options, flags)
    asked = models(options, serve.to)
    claims = read_claims(settings.claims)
    judge = needed_judge(settings, options, claims)
    check_report(options)
    serve = replace(
        serve, adapters=[str(each.adapter) for each in asked if each.adapter], slots=1, dry_run=options.dry_run,
        output=str(Path(options.output) / "served"),
    )  # fmt: skip
    check_early(serve)
    serving = prepare(serve, more)
    if options.dry_run:
        print(shlex.join(serving.command))
        return 0
    check_answers(serving, asked, options, flags, claims)
    if judge and options.judge != SAME and not all(map(_complete, asked)):
        judge.check()
    interruption.raise_from_now(KEPT)
    server = Server(serving.command, serving.url, Path(options.output) / "server.log", options.start_timeout)
    try:
        codes = [ask(server, each, serving, asked, options, flags) for each in asked]
    finally:
        server.stop()
    report(options, any(codes))
    return int(any(codes))


def of_the_runs(options: EvaluateRunsOptions, serve: ServeOptions, flags: list[str]) -> tuple[ServeOptions, list[str]]:
    """Returns the options and flags with --model and --claims of the first run if they are not given."""
    path = Path(options.runs[0]) / "settings.yaml" if options.runs else Path()
    if not path.is_file():
        return serve, flags
    held = held_settings(path)["settings"]
    if not any(flag.startswith("--claims") for flag in flags) and held.get("claims"):
        flags = [*flags, "--claims", *held["claims"]]
    return replace(serve, model=serve.model or str(held.get("model") or "")), flags


def check(options: EvaluateRunsOptions, flags: list[str]) -> EvaluationSettings:
    """Returns the settings of train/evaluate.py for the base. Raises UserError if the settings are wrong or say too
    little, as far as these alone tell."""
    if not options.runs:
        raise UserError("--runs is missing; give the directories of finished runs.")
    if not options.output:
        raise UserError("--output is missing; give a directory for the report.")
    for flag in flags:
        if flag.partition("=")[0] in OF_EVALUATE:
            raise UserError(f"{flag}: launch.evaluate_runs sets it for each run; leave it out.")
    settings = parse_evaluation([*_flags(options, BASE_NAME, "http://127.0.0.1:1/v1"), *flags, "--output", "x"], "")
    check_there(settings.claims)
    return settings


def needed_judge(settings: EvaluationSettings, options: EvaluateRunsOptions, claims: list[Claim]) -> Endpoint | None:
    """Returns the judge that the claims need. Raises UserError if it is missing, or if the claims have no such
    questions, or are none of those that --placebo names."""
    known = {*(claim_id(claim.id) for claim in claims), NO_PLACEBO}
    if unknown := [each for each in options.placebo if claim_id(each) not in known]:
        raise UserError(
            f"--placebo {unknown[0]}: is no claim of --claims, which have {', '.join(sorted(known - {NO_PLACEBO}))}."
        )
    return judge_of(settings, asked_of(settings, claims)[1])


def check_report(options: EvaluateRunsOptions) -> None:
    """Raises UserError if the report could not be written at the end: for a wrong --baseline or --recipe, or an
    --output that holds another comparison. Runs that have measured nothing yet are not looked into."""
    from train.comparison.outcome import check_free  # imports what takes long

    runs = [Path(run) for run in options.runs]
    if len(runs) < 2:
        return
    check_free(Path(options.output), runs)
    if all((run / "evaluation.jsonl").is_file() for run in runs):
        with redirect_stdout(io.StringIO()):  # its notes come with the report
            parse_comparison([*_report_flags(options), "--output", options.output], "")


def _report_flags(options: EvaluateRunsOptions) -> list[str]:
    """Returns the flags of train/compare.py, but for --output."""
    own = ["--recipe", *options.recipe] if options.recipe else []
    own += ["--placebo", *options.placebo] if options.placebo else []
    own += ["--baseline", options.baseline] if options.baseline else []
    return ["--runs", *options.runs, *own]


def models(options: EvaluateRunsOptions, server: str) -> list[Asked]:
    """Returns the base and the adapters of each run in the order of their steps, the last of which is the finished one;
    of a run that continues others, of these too. The base's answers are for the first run. Raises UserError if a run is
    not finished, or lacks an adapter that --kept-steps names."""
    asked = [Asked(BASE_NAME, Path(options.runs[0]), 0)]
    runs = [each for run in map(Path, options.runs) for each in (*phases_before(run), run)]
    for run in dict.fromkeys(runs):  # a phase that several runs continue is asked once
        summary = run / "summary.json"
        if not summary.is_file():
            raise UserError(f"--runs {run}: has no summary.json: the run did not finish. Resume it, or leave it out.")
        held = read_json(summary)
        checked(held, {"steps": int}, summary, "restore the file", needed=True)
        checked(held, {"steps_of_schedule": int}, summary, "restore the file")
        last = int(held["steps"])
        planned = int(held.get("steps_of_schedule") or last)
        if planned > last:
            print(f"note: {run}: ended after {last} of the {planned} steps of its schedule (--stop-after)")
        adapters = {step: kept_adapter(run, step) for step in _kept(options, run, last, planned)}
        adapters[last] = adapter_of(run)
        asked += [Asked(adapter_name(adapter, server), run, step, adapter) for step, adapter in adapters.items()]
    return asked


def _kept(options: EvaluateRunsOptions, run: Path, last: int, planned: int) -> list[int]:
    """Returns the steps before the last one that --kept-steps names. planned: the steps of the run's schedule, which
    log:K counts as --adapters-at does. Raises UserError if the run has no adapter of one."""
    there, every = [step for step in kept_steps(run) if step < last], options.kept_steps == "all"
    of = planned if options.kept_steps.startswith("log:") else last
    wanted = there if every else sorted(steps_at("--kept-steps", options.kept_steps, of))
    wanted = [step for step in wanted if step <= last]
    lacking = [step for step in wanted if step not in (*there, last)]
    if lacking or (every and not there):
        what = f"no adapter of step {lacking[0]}" if lacking else "no adapter but the last"
        fix = f"give some of {','.join(map(str, there))}, or all" if there else "leave it out"
        raise UserError(
            f"--kept-steps {options.kept_steps}: {run} has {what} (--adapters-at keeps them in adapters/); {fix}."
        )
    return [step for step in wanted if step < last]


def _flags(options: EvaluateRunsOptions, name: str, url: str) -> list[str]:
    """Returns the flags of train/evaluate.py that name the server, a model on it and the judge."""
    judge = {SAME: ["--judge", url, "--judge-model", BASE_NAME], "": []}.get(options.judge, ["--judge", options.judge])
    return ["--endpoint", url, "--endpoint-model", name, *judge]


def ask(
    server: Server, each: Asked, serving: Serving, every: Sequence[Asked], options: EvaluateRunsOptions,
    flags: list[str],
) -> int:  # fmt: skip
    """Asks one model with train/evaluate.py, and starts the server if it is not running. Returns the exit code, 0 or 1.

    Raises UserError if evaluate.py exits with another code while the server runs, MayPass if the server dies
    MOST_DEATHS times in a row without a new answer.
    """
    print(f"{each.name}, {every.index(each) + 1} of {len(every)}: answers go to {each.run}", flush=True)
    words = _words(each, serving, every, options, flags)
    evaluate = [sys.executable, str(REPOSITORY / "train" / "evaluate.py"), *words]
    if not server.alive() and _complete(each) and _run(evaluate) == 0:
        return 0  # every answer exists, so no server is needed
    deaths, kept = 0, -1
    while True:
        if not server.alive():
            server.start()
        code = _run(evaluate, server)
        if code in (0, 1) and server.alive():
            return code
        if server.alive():
            raise UserError(f"train/evaluate.py exited with code {code} for {each.name}; its message is above.")
        if code == 0:
            return code
        before, kept = kept, _answers(each.run)
        deaths = 1 if kept > before else deaths + 1
        if deaths >= MOST_DEATHS:
            raise MayPass(f"the server died {deaths} times without a new answer; look at {server.log}.")
        print("the server died: restarting it and asking again for the missing answers", flush=True)


def _words(
    each: Asked, serving: Serving, every: Sequence[Asked], options: EvaluateRunsOptions, flags: list[str]
) -> list[str]:
    """Returns the flags of train/evaluate.py for one model."""
    served = {other.name: str(Path(serving.options.output) / other.name) for other in every if other.step}
    adapter = served.pop(each.name if each.step else next(iter(served)))  # the base is told by one that it is without
    name = model_name(each.name, serving.options.to)
    own = [*_flags(options, name, serving.url), "--output", str(each.run), "--step", str(each.step), *flags]
    own += ["--served-adapter", adapter, "--endpoint-base", BASE_NAME]
    return [*own, "--other-adapters", *served.values()] if served else own


def check_answers(
    serving: Serving, every: Sequence[Asked], options: EvaluateRunsOptions, flags: list[str], claims: list[Claim]
) -> None:
    """Raises UserError if a run holds answers of other weights, or to questions that were asked or judged otherwise."""
    for run in dict.fromkeys(each.run for each in every):
        records = Records(run)
        try:
            for each in every:
                if each.run == run:
                    settings = parse_evaluation(_words(each, serving, every, options, flags), "")
                    check_same(asked_of(settings, claims)[1], records)
        finally:
            records.close()


def _complete(each: Asked) -> bool:
    """Whether a run's directory seems to hold every answer of this model: as many as the last evaluation requested."""
    path = each.run / "evaluation.json"
    wanted = (read_json(path) if path.is_file() else {}).get("wanted")
    rows = at_step(read_measured(each.run / "evaluation.jsonl"), each.step) if wanted else []
    return bool(wanted) and sum("verdict" in row and not row.get("error") for row in rows) == wanted


def _answers(run: Path) -> int:
    """Returns how many answers and verdicts a run has."""
    files = [run / name for name in ("answers.jsonl", "evaluation.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in files if path.is_file())


def _run(words: list[str], server: Server | None = None) -> int:
    """Runs a command to its end, and returns its exit code. If this process is interrupted, so is the command; also if
    the server that it asks has exited, for which its retries would wait."""
    process = subprocess.Popen(words)
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK)
            if server is not None and server.exited():
                process.terminate()
                return process.wait()
    except KeyboardInterrupt:
        with suppress(ProcessLookupError):
            process.terminate()
        process.wait()
        raise


def report(options: EvaluateRunsOptions, incomplete: bool) -> None:
    """Compares the runs with train/compare.py. Raises UserError if that fails; MayPass if answers are missing, since
    runs with different answers cannot be compared."""
    if len(options.runs) < 2:
        print(f"only one run, so there is no comparison; its verdicts are in {options.runs[0]}/evaluation.jsonl")
        return
    compare = [sys.executable, str(REPOSITORY / "train" / "compare.py"), *_report_flags(options)]
    if code := _run([*compare, "--output", options.output]):
        kind, why = (MayPass, ", and some answers are missing") if incomplete else (UserError, "")
        raise kind(f"train/compare.py exited with code {code}{why}; its message is above.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
