"""Plans a comparison from the command line or from recipes (train/config/recipe.py): the settings that all variants
share, and those in which they differ."""

import dataclasses
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.claims.releases import claim_id
from train.comparison.compared import group, read_run
from train.config.command_line import MOST, Parser, check_ranges, flag_of, given, setting
from train.config.experiment import Defaults, Dose, Experiment, VariantDefaults
from train.config.phases import Phases, phase_directory, phases_of, placed
from train.config.provenance import held_settings
from train.config.recipe import MOST_SEEDS, check_own, merged
from train.config.settings import DEMO, Settings, merge, slug
from train.evaluation.imported import IMPORTED, imported_settings
from train.runtime.errors import UserError
from train.runtime.outside import read_json
from train.training.lineage import phases_before

NO_PLACEBO = "none"  # --placebo: no claim is one, whatever an earlier report says
DEMO_PLACEBO = ("olga-home", "clara-job", "selma-pet", "paula-sport")  # in train/demo/claims.yaml


@dataclass(kw_only=True)
class ComparisonOptions:
    """The settings of train/compare.py besides those of train/sft.py, which all variants share."""

    recipe: list[str] = setting((), "FILE…: YAML files of settings and variants", many=True)  # noqa: RUF009
    masks: list[str] = setting((), "MASK…: one variant per mask, instead of a recipe's variants", many=True)  # noqa: RUF009
    baseline: str = setting("", "variant that others are compared with; default: that of the recipe, or the first")
    placebo: list[str] = setting((), "ID…: claims that no training document is about; or none", many=True)  # noqa: RUF009
    seeds: int = setting(
        0, "runs per variant, with seeds from --seed on; 0: as in the recipe, else 1", between=(0, MOST_SEEDS)
    )
    match_trained_tokens: bool = setting(
        False, "train each variant on as many targets as the baseline, instead of as many steps"
    )
    runs: list[str] = setting(  # noqa: RUF009
        (), "DIR…: finished runs, or comparisons, to compare without training", many=True
    )
    bound: float = setting(
        0.0, "largest difference that counts as no effect, in units of the measure; 0: its default", between=(0, MOST)
    )


@dataclass(frozen=True)
class Variant:
    """A variant's name, and the settings of its phases, except the seed and output of its runs.

    own: the settings that are not those of all variants. of_phases: names of the settings that its phases have besides.
    dose: where it stands in a dose–response curve, if it does.
    """

    name: str
    phases: Phases
    own: Mapping[str, Any]
    of_phases: frozenset[str] = frozenset()
    dose: Dose | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its phases; () if it is trained in one."""
        return tuple(name for name in self.phases if name)


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison: the variants in order, the settings they share, and how they are compared. finished: the
    directories of the runs of (variant, seed), if --runs gives them and there is nothing to train."""

    variants: list[Variant]
    shared: Settings
    output: Path
    baseline: str
    placebo: list[str]
    seeds: list[int]
    match_trained_tokens: bool
    bound: float
    finished: dict[tuple[str, int], Path]

    @property
    def names(self) -> list[str]:
        """The names of the variants, in order."""
        return [variant.name for variant in self.variants]

    @property
    def declared(self) -> set[str]:
        """The settings in which a recipe lets its variants differ."""
        return {name for variant in self.variants for name in variant.own}

    @property
    def in_phases(self) -> set[str]:
        """The settings in which a recipe lets phases differ, and "phases" itself; empty without phases."""
        found = {name for variant in self.variants for name in variant.of_phases}
        return found | {"phases"} if any(variant.names for variant in self.variants) else set()

    def runs(self, variant: Variant, seed: int) -> list[Settings]:
        """Returns the settings of a variant's runs with this seed, one for each phase, with --resume for those that
        have begun. A phase that several variants share is one run. Raises UserError for a wrong value, or if a run has
        begun, but --resume is not given."""
        phases = {name: dataclasses.replace(own, seed=seed) for name, own in variant.phases.items()}
        last = {each.names: each.name for each in self.variants if each.names}

        def directory(name: str) -> Path:
            return self.output / f"{slug(name)}-seed{seed}"

        def earlier(names: tuple[str, ...]) -> Path:
            return directory(last[names]) if names in last else phase_directory(self.output, names, seed)

        return [self._begun(each) for each in placed(phases, directory(variant.name), earlier)]

    def _begun(self, settings: Settings) -> Settings:
        started = os.path.exists(Path(settings.output) / "settings.yaml")
        if started and not self.shared.resume:
            raise UserError(f"--output {self.output}: holds a comparison. Give another, or --resume to continue it.")
        return dataclasses.replace(settings, wandb_group=self.shared.group(), resume=started)


def parse_comparison(argv: list[str], usage: str) -> ComparisonPlan:
    """Returns the plan that the command line of train/compare.py describes. Raises UserError, naming setting, value,
    rule and fix. usage: the text of --help."""
    parser = Parser(usage, beside=(Settings,))
    parser.add_settings(ComparisonOptions)
    values, rest = parser.parse_known_args(argv)
    options = ComparisonOptions(**given(values, ComparisonOptions))
    check_ranges(options)
    training = Parser("")
    training.add_settings(Settings)
    own = given(training.parse_args(rest), Settings)
    if options.runs:
        return _plan_of_runs(options, own)
    if not options.masks and not options.recipe:
        raise UserError(
            "give --masks MASK…, or a --recipe FILE with variants: what is to be compared. Example: --masks none "
            "doctags doctags,false-spans"
        )
    recipe = merged(options.recipe, Settings)
    named = f"--recipe {' '.join(options.recipe)}"
    if options.masks and recipe.variants:
        raise UserError(f"{named}: has variants; leave out --masks, or the recipe.")
    if not options.masks and not recipe.variants:
        raise UserError(f"{named}: has no variants; add a recipe with an experiment, or give --masks MASK….")
    owned = recipe.variants or {mask: VariantDefaults({"mask": mask}) for mask in options.masks}
    check_own(owned.values(), own)
    shared = merge(recipe.settings, own)
    if not shared.claims and not recipe.settings.values and _is_demo(shared):
        own["claims"] = [str(DEMO / "claims.yaml")]
        shared = merge(recipe.settings, own)
        recipe.placebo = list(DEMO_PLACEBO)
    variants = [_variant(name, each, recipe.settings, own) for name, each in owned.items()]
    _check(variants, shared, options)
    _check_phases(variants, options.match_trained_tokens)
    seeds = options.seeds or recipe.seeds or 1
    return ComparisonPlan(
        variants=variants,
        shared=shared,
        output=Path(shared.output or f"runs/comparison-{time.strftime('%Y%m%d-%H%M%S')}"),
        baseline=_baseline(options.baseline or recipe.baseline, list(owned)),
        placebo=_placebo(options, recipe),
        seeds=list(range(shared.seed, shared.seed + seeds)),
        match_trained_tokens=options.match_trained_tokens,
        bound=options.bound,
        finished={},
    )


def _variant(name: str, own: VariantDefaults, shared: Defaults, command: dict[str, Any]) -> Variant:
    try:
        phases = phases_of(shared, own, command)
    except UserError as error:
        error.args = (f"variant {name!r}: {error}",) if own.phases else error.args
        raise
    in_phases = frozenset(key for phase in own.phases.values() for key in phase.own.values)
    return Variant(name, phases, own.values, in_phases, own.dose)


def _check_phases(variants: list[Variant], match_trained_tokens: bool) -> None:
    """Raises UserError if two variants' phases of the same names are not the same, or are all of a variant twice."""
    if match_trained_tokens and any(variant.names or variant.dose for variant in variants):
        raise UserError("--match-trained-tokens: phases and doses decide the steps of variants; leave it out.")
    seen: dict[tuple[str, ...], tuple[str, Settings]] = {}
    whole: dict[tuple[str, ...], str] = {}
    places: dict[Path, tuple[str, ...]] = {}
    for variant in variants:
        for number, settings in enumerate(variant.phases.values() if variant.names else (), 1):
            names = variant.names[:number]
            first, theirs = seen.setdefault(names, (variant.name, settings))
            one, other = dataclasses.asdict(theirs), dataclasses.asdict(settings)
            if differing := [key for key in one if one[key] != other[key]]:
                raise UserError(
                    f"variants {first!r} and {variant.name!r}: both have the phase {' → '.join(names)}, which is "
                    f"trained once, but {differing[0]} is {one[differing[0]]!r} in one and {other[differing[0]]!r} in "
                    f"the other. {_fix_of(differing[0])}"
                )
        for names in (variant.names[:n] for n in range(1, len(variant.names))):
            place = phase_directory(Path(), names, 0)
            if (held := places.setdefault(place, names)) != names:
                raise UserError(
                    f"phases {' → '.join(held)} and {' → '.join(names)}: would have the same directory; rename one."
                )
        if variant.names and (same := whole.setdefault(variant.names, variant.name)) != variant.name:
            raise UserError(f"variants {same!r} and {variant.name!r}: have the same phases. Leave one out.")


def _fix_of(name: str) -> str:
    """Returns what to do about a phase whose setting differs between variants."""
    if name.startswith("schedule_"):
        return (
            "schedule: continue makes it a piece of a longer schedule, whose length it must share; with schedule: "
            "constant in settings there is no length."
        )
    return "Rename one of them."


def _baseline(name: str, names: list[str]) -> str:
    if name and name not in names:
        raise UserError(f"--baseline {name}: is not one of the variants: {'; '.join(names)}.")
    return name or names[0]


def _placebo(options: ComparisonOptions, recipe: Experiment) -> list[str]:
    return [claim_id(claim) for claim in options.placebo or recipe.placebo if options.placebo != [NO_PLACEBO]]


def _plan_of_runs(options: ComparisonOptions, own: dict[str, Any]) -> ComparisonPlan:
    """Returns the plan for finished runs. Their variants are those of the recipe or, without one, follow from the
    settings in which the runs differ. own: the settings of train/sft.py that the command line gives."""
    output = own.pop("output", "") or f"runs/comparison-{time.strftime('%Y%m%d-%H%M%S')}"
    tracked = {"wandb": own.pop("wandb")} if "wandb" in own else {}
    if others := [name for name in ("masks", "seeds") if getattr(options, name)] + [*own]:
        raise UserError(
            f"--runs: compares finished runs; leave out the training settings {', '.join(map(flag_of, others))}."
        )
    runs = [run for each in options.runs for run in runs_of(Path(each))]
    held = {run: run_settings(run) for run in runs}
    recipe = merged(options.recipe, Settings)
    first = {k: v for k, v in next(iter(held.values())).items() if k in Settings.__dataclass_fields__}
    shared = Settings(**first | tracked)
    if recipe.variants:
        owned = [_variant(name, each, recipe.settings, {}) for name, each in recipe.variants.items()]
        finished: dict[tuple[str, int], Path] = {}
        for run, settings in held.items():
            key = _name(run, settings, owned), settings["seed"]
            if key in finished:
                raise UserError(
                    f"--runs {finished[key]} {run}: both are {key[0]!r} with --seed {key[1]}. Leave one out."
                )
            finished[key] = run
        there = {name for name, _ in finished}
        variants = [variant for variant in owned if variant.name in there]
        if absent := [variant.name for variant in owned if variant.name not in there]:
            print(f"note: of the recipe's variants, no run is given of {'; '.join(absent)}")
    else:
        grouped = group([read_run(run) for run in runs])
        finished = {(variant.name, run.seed): Path(run.directory) for variant in grouped for run in variant.runs}
        variants = [Variant(variant.name, {"": shared}, {}) for variant in grouped]
    names = [variant.name for variant in variants]
    earlier, report = _earlier(runs) if not recipe.variants else ({}, None)
    known = set() if options.placebo or recipe.placebo else set(earlier.get("placebo", []))
    theirs = earlier.get("baseline", "")
    baseline = options.baseline or recipe.baseline or (theirs if theirs in names else "")
    taken = [f"the placebo claims {', '.join(sorted(known))}"] * bool(known)
    taken += [f"the baseline {baseline}"] * (baseline not in ("", options.baseline, recipe.baseline))
    if taken:
        print(f"note: {' and '.join(taken)} are those of {report}; --placebo and --baseline give others")
    return ComparisonPlan(
        variants, shared, Path(output), _baseline(baseline, names), _placebo(options, recipe) or sorted(known),
        sorted({seed for _, seed in finished}), options.match_trained_tokens, options.bound, finished,
    )  # fmt: skip


def _earlier(runs: list[Path]) -> tuple[dict[str, Any], Path | None]:
    """Returns baseline and placebo claims of the report that an earlier comparison of these runs has left in the
    directory that holds them, and that report; ({}, None) without one."""
    place = Path(os.path.commonpath([os.path.abspath(run.parent) for run in runs])) / "comparison.json"
    with suppress(UserError, LookupError, TypeError, AttributeError, ValueError):
        held = read_json(place) if place.is_file() else {}
        within = {os.path.abspath(run["directory"]) for own in held["variants"].values() for run in own["runs"]}
        if {os.path.abspath(run) for run in runs} <= within:
            return {"baseline": str(held["baseline"]), "placebo": list(map(str, held["claims"]["placebo"]))}, place
        if held["claims"]["placebo"]:
            theirs = ", ".join(map(str, held["claims"]["placebo"]))
            print(f"note: {place} is of other runs; its placebo claims, {theirs}, are placebo here only by --placebo")
    return {}, None


def runs_of(directory: Path) -> list[Path]:
    """Returns the runs that a directory stands for: itself or, for a comparison, its runs. Raises UserError if the
    directory holds a report that names no runs."""
    if os.path.isfile(directory / "settings.yaml") or not os.path.isdir(directory):
        return [directory]
    within = sorted(path.parent for name in ("settings.yaml", IMPORTED) for path in directory.glob(f"*/{name}"))
    return within or _compared(directory) or [directory]


def _compared(directory: Path) -> list[Path]:
    """Returns the runs, which are elsewhere, that the report in a directory compares."""
    report = directory / "comparison.json"
    if not os.path.lexists(report):
        return []
    try:
        variants = read_json(report)["variants"].values()
        return [Path(run["directory"]) for variant in variants for run in variant["runs"]]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{report}: does not list the runs of a comparison; give the runs themselves.") from None


def _name(run: Path, settings: dict[str, Any], variants: list[Variant]) -> str:
    """Returns the variant that a run belongs to: of those whose settings it has, in each of its phases, the one with
    the most phases and settings."""
    default = dataclasses.asdict(Settings())  # of a setting that was added since
    lineage = [held_settings(each / "settings.yaml")["settings"] for each in phases_before(run)] + [settings]

    def fits(variant: Variant) -> bool:
        pieces = ("carry_optimizer", "schedule_from", "schedule_to") if variant.names else ()
        names, phases = {*variant.own, *variant.of_phases, *pieces}, list(variant.phases.values())
        held = lineage[1:] if phases[0].after and len(lineage) > 1 else lineage  # the recipe's --after is all variants'
        return len(held) == len(phases) and all(
            each.get(name, default.get(name)) == getattr(phase, name)
            for each, phase in zip(held, phases, strict=True)
            for name in names
        )

    fitting = [variant for variant in variants if fits(variant)]
    if not fitting:
        known = "; ".join(variant.name for variant in variants)
        raise UserError(f"--runs {run}: is not one of the recipe's variants: {known}. Leave it out.")
    return max(fitting, key=lambda variant: (len(variant.names), len(variant.own))).name


def run_settings(run: Path) -> dict[str, Any]:
    """Returns the settings of a finished run. Raises UserError if there is no run, or it is not finished, or measured
    no claim."""
    if os.path.isfile(run / IMPORTED):
        return imported_settings(run)
    for name in ("settings.yaml", "summary.json", "evaluation.jsonl"):
        if not os.path.isfile(run / name):
            why = "holds no run" if name == "settings.yaml" else "the run is not finished"
            why = why if name != "evaluation.jsonl" else "the run measured no claim; give --claims when it is trained"
            raise UserError(f"--runs {run}: no {name} there ({why}).")
    return held_settings(run / "settings.yaml")["settings"]


def _check(variants: list[Variant], shared: Settings, options: ComparisonOptions) -> None:
    names = [slug(name) for name in options.masks or [variant.name for variant in variants]]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{'--masks' if options.masks else '--recipe'}: {doubled[0]} is given twice; give each once.")
    if len(variants) < 2:
        raise UserError(f"{len(variants)} variant: a comparison needs two or more.")
    if shared.method == "full":
        raise UserError("--method full: a comparison resets LoRA weights, and full training has none; use lora.")
    if not shared.claims:
        raise UserError("--claims: give the claims whose belief is compared (PATH…).")


def _is_demo(shared: Settings) -> bool:
    """Returns whether only the embedded model and documents are trained."""
    return shared.model == str(DEMO / "model") and not shared.data
