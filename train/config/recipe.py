"""Reads recipes: YAML files of settings and variants. Later recipes add to earlier ones, e.g. a model to an experiment.
A recipe has this format:

settings: {model: DIR, steps: 625, ...}         # settings of train/sft.py by name; the command line overrides them
variants:
  dense: {data: [dense.jsonl], mask: doctags}   # only settings that may differ: DIFFERING
  held, then free:
    phases:                                     # trained one after the other, in this order
      held: {mask: "false-spans=hold", steps: 200}
      free: {mask: none, steps: 100, optimizer: reset, schedule: restart}
dose:                                           # every variant once with each of these doses
  documents: [100, 1000, 10000]                 # drawn of the file `of`, of which every variant has one
  of: [dense.jsonl]
  steps: growing                                # one pass over the documents; fixed: as many steps as in settings
baseline: dense                                 # the variant that the others are compared with; default: the first
placebo: [elizabeth_python]                     # ids of claims that no document is about
seeds: 3                                        # number of seeds

A phase has settings that may differ (IN_PHASES), which come on top of the variant's. The optimizer of a second or later
phase is new (reset) or goes on with its moments and step count (carry); the schedule of its learning rate begins anew
(restart), or the phases are pieces of one schedule (continue). Phases of the same name, after phases of the same names,
are one phase that is trained once.

The dose of a mask is the weight of one of its entries: dose: {weights: [0, 0.1, 1], of: [false-spans]}.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config.command_line import flag_of, nearest, typed
from train.config.doses import dosed, first_dose
from train.config.experiment import Defaults, Experiment, Phase, VariantDefaults
from train.runtime.errors import UserError
from train.runtime.outside import read_yaml

MAY_DIFFER = ("mask", "loss_norm", "learning_rate")
"""Settings that define a variant; a variant and a seed define a run."""
DIFFERING = (*MAY_DIFFER, "data")
"""Settings in which variants may differ. An effect of different data is not an effect of the masks; the report says so
if variants differ in data."""
IN_PHASES = (
    *DIFFERING, "steps", "epochs", "warmup_steps", "evaluate_every", "evaluate_at", "adapters_at",
)  # fmt: skip
"""Settings in which the phases of a variant may differ."""
HANDED_ON = {"optimizer": ("reset", "carry"), "schedule": ("restart", "continue")}
"""What a phase says of the one before it."""
MOST_SEEDS = 1000
KEYS = {
    "settings": dict, "variants": dict, "dose": dict, "baseline": str, "placebo": list, "seeds": int, "about": str,
}  # fmt: skip


def merged(paths: Sequence[str], cls: type) -> Experiment:
    """Returns what recipes say together; later files override earlier ones. cls: the dataclass of train/sft.py's
    settings. Raises UserError for an invalid recipe, or if two recipes define the same variant."""
    all_of_them = Experiment()
    dose: dict[str, Any] = {}
    for path in paths:
        lines: dict[tuple[str, ...], int] = {}
        recipe = read_recipe(Path(path), cls, lines)
        for name in ("baseline", "placebo", "seeds"):
            setattr(all_of_them, name, recipe.get(name, getattr(all_of_them, name)))
        all_of_them.settings |= _defaults(recipe.get("settings", {}), cls, path, lines, ("settings",))
        for name, own in recipe.get("variants", {}).items():
            if name in all_of_them.variants:
                raise UserError(f"--recipe {path}: variant {name!r} is also in an earlier recipe; rename it.")
            all_of_them.variants[name] = _variant(own, cls, path, lines, ("variants", name))
        dose = recipe.get("dose", dose)
    if dose:
        all_of_them.variants = dosed(all_of_them, dose, f"--recipe {' '.join(paths)}: dose")
        all_of_them.baseline = first_dose(all_of_them)
    return all_of_them


def _variant(
    own: dict[str, Any], cls: type, path: str, lines: Mapping[tuple[str, ...], int], above: tuple[str, ...]
) -> VariantDefaults:
    phases = {}
    for name, of_phase in own.get("phases", {}).items():
        settings = {key: value for key, value in of_phase.items() if key not in HANDED_ON}
        carry, go_on = (of_phase.get(key) == last for key, (_, last) in HANDED_ON.items())
        phases[name] = Phase(_defaults(settings, cls, path, lines, (*above, "phases", name)), carry, go_on)
    settings = {key: value for key, value in own.items() if key != "phases"}
    defaults = _defaults(settings, cls, path, lines, above)
    return VariantDefaults(defaults.values, defaults.where, phases)


def _defaults(
    own: dict[str, Any], cls: type, path: str, lines: Mapping[tuple[str, ...], int], above: tuple[str, ...]
) -> Defaults:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    made = Defaults()
    for name, value in own.items():
        made.where[name] = f"{path}:{lines[*above, name]}" if (*above, name) in lines else path
        made.values[name] = typed(fields[name], value, ": ".join((f"--recipe {made.where[name]}", *above)))
    return made


def chosen(
    paths: Sequence[str], variant: str, cls: type, given: Collection[str]
) -> tuple[Defaults, str, VariantDefaults]:
    """Returns the settings of recipes that hold for all variants, and name and own settings of the chosen variant, if
    the recipes have variants. variant: its name, or its number from 0. cls: the dataclass of train/sft.py's settings.
    given: the settings that the command line gives. Raises UserError for an invalid recipe, for an unknown variant, or
    if the command line gives a setting in which variants differ."""
    experiment = merged(paths, cls)
    variants = experiment.variants
    if variant not in variants and variant.isdecimal() and int(variant) < len(variants):
        variant = list(variants)[int(variant)]
    if (variant or variants) and variant not in variants:
        known = "; ".join(variants) or "none; a recipe with variants is needed: --recipe FILE…"
        raise UserError(f"--variant {variant!r}: must be a name, or a number from 0, of the variants: {known}.")
    check_own(variants.values(), given)
    return experiment.settings, variant, variants.get(variant, VariantDefaults())


def check_own(variants: Collection[VariantDefaults], given: Collection[str]) -> None:
    """Raises UserError if a command line gives a setting in which variants or phases differ: they would all become the
    same. given: the settings that it gives."""
    for name in sorted({name for own in variants for name in own.all_values}):
        if name in given:
            raise UserError(
                f"{flag_of(name)}: is what the variants differ in; leave it out, or change it in the recipe."
            )


def read_recipe(path: Path, cls: type, lines: dict[tuple[str, ...], int]) -> dict[str, Any]:
    """Returns the keys of a recipe. Raises UserError if it does not have the format in this module's docstring; the
    values of settings are checked later. cls: the dataclass of train/sft.py's settings. lines: receives the line of
    each value, by the keys on the way to it."""
    where, settings = f"--recipe {path}", [field.name for field in dataclasses.fields(cls)]
    recipe = read_yaml(path, where, lines=lines)
    if not isinstance(recipe, dict):
        raise UserError(f"{where}: must be a mapping with settings, variants or both.")
    for key, value in recipe.items():
        if key not in KEYS:
            raise UserError(f"{where}: {key} is not a key of a recipe; {_nearest(str(key), list(KEYS))}.")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} must be a {KEYS[key].__name__}, not {value!r}.")
    if not 0 <= recipe.get("seeds", 0) <= MOST_SEEDS:
        raise UserError(f"{where}: seeds {recipe['seeds']} must be from 0 to {MOST_SEEDS}.")
    if other := [claim for claim in recipe.get("placebo", []) if not isinstance(claim, str)]:
        raise UserError(f"{where}: placebo must be a list of claims' ids, and {other[0]!r} is not an id.")
    for name in recipe.get("settings", {}):
        if name not in settings:
            raise UserError(
                f"{where}: settings: {name} is not a setting of train/sft.py; {_nearest(str(name), settings)}."
            )
    for variant, own in recipe.get("variants", {}).items():
        _check_variant(variant, own, f"{where}: variants", settings)
    return recipe


def _check_variant(variant: Any, own: Any, where: str, settings: Collection[str]) -> None:
    if not isinstance(variant, str) or variant.isdecimal():
        raise UserError(f"{where}: {variant!r} must be a text other than a number; rename or quote it.")
    if not isinstance(own, dict):
        raise UserError(f"{where}: {variant} must be a mapping of settings, not {own!r}.")
    for name in own:
        if name not in (*settings, "phases"):
            near = _nearest(str(name), [*DIFFERING, "phases"])
            raise UserError(f"{where}: {variant}: {name} is not a setting of train/sft.py; {near}.")
        if name not in (*DIFFERING, "phases"):
            raise UserError(
                f"{where}: {variant}: {name} must be the same in all variants, or the mask is not the only cause of a "
                f"difference; put it under settings. Variants may differ in {', '.join(DIFFERING)} and phases."
            )
    if "phases" in own:
        _check_phases(own["phases"], f"{where}: {variant}: phases", settings)


def _check_phases(phases: Any, where: str, settings: Collection[str]) -> None:
    if not isinstance(phases, dict) or not phases:
        raise UserError(f"{where}: must be a mapping of names to settings, in the order of training; not {phases!r}.")
    for number, (name, own) in enumerate(phases.items()):
        here = f"{where}: {name}"
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: {name!r} must be a text; rename or quote it.")
        if not isinstance(own, dict):
            raise UserError(f"{here} must be a mapping of settings, not {own!r}.")
        for key in own:
            if key not in (*settings, *HANDED_ON):
                near = _nearest(str(key), [*IN_PHASES, *HANDED_ON])
                raise UserError(f"{here}: {key} is not a setting of a phase; {near}.")
            if key not in (*IN_PHASES, *HANDED_ON):
                raise UserError(
                    f"{here}: {key} cannot differ between phases; put it under settings. Phases may differ in "
                    f"{', '.join(IN_PHASES)}."
                )
        for key, values in HANDED_ON.items():
            if key in own and not number:
                raise UserError(f"{here}: {key} says what the phase before hands on; the first phase has none.")
            if number and own.get(key) not in values:
                raise UserError(
                    f"{here}: {key} is {own.get(key, 'not given')}; every phase after the first must say "
                    f"{key}: {values[0]} or {key}: {values[1]}."
                )


def _nearest(word: str, known: Collection[str]) -> str:
    near = nearest(word, known)
    return f"did you mean {near}?" if near else f"known are {', '.join(known)}"
