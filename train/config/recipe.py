"""Reads recipes: YAML files of settings and variants. Later recipes add to earlier ones, e.g. a model to an experiment.
A recipe has this format:

settings: {model: DIR, steps: 625, ...}         # settings of train/sft.py by name; the command line overrides them
variants:
  dense: {data: [dense.jsonl], mask: doctags}   # only settings that may differ: DIFFERING
baseline: dense                                 # the variant that the others are compared with; default: the first
placebo: [elizabeth_python]                     # ids of claims that no document is about
seeds: 3                                        # number of seeds
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from train.config.command_line import flag_of, nearest
from train.runtime.errors import UserError
from train.runtime.outside import read_yaml

MAY_DIFFER = ("mask", "loss_norm", "learning_rate")
"""Settings that define a variant; a variant and a seed define a run."""
DIFFERING = (*MAY_DIFFER, "data")
"""Settings in which variants may differ. An effect of different data is not an effect of the masks; the report says so
if variants differ in data."""
MOST_SEEDS = 1000
KEYS = {"settings": dict, "variants": dict, "baseline": str, "placebo": list, "seeds": int, "about": str}


def merged(paths: Collection[str], settings: Collection[str]) -> dict[str, Any]:
    """Returns the merged keys of recipes; later files override earlier ones. settings: names of train/sft.py's
    settings. Raises UserError for an invalid recipe, or if two recipes define the same variant."""
    keys: dict[str, Any] = {}
    for path in paths:
        for key, value in read_recipe(Path(path), settings).items():
            if key == "variants" and (twice := keys.get(key, {}).keys() & value.keys()):
                raise UserError(
                    f"--recipe {path}: variant {min(twice)!r} is in an earlier recipe too; name it otherwise."
                )
            keys[key] = keys.get(key, {}) | value if isinstance(value, dict) else value
    return keys


def chosen(paths: Collection[str], variant: str, settings: Collection[str], argv: Sequence[str]) -> dict[str, Any]:
    """Returns the settings of recipes by name, with those of the chosen variant if the recipes have variants. variant:
    its name, or its number from 0. settings: names of train/sft.py's settings. argv: the rest of the command line.
    Raises UserError for an invalid recipe, for an unknown variant, or if argv gives a setting in which variants
    differ."""
    keys = merged(paths, settings)
    variants: dict[str, dict[str, Any]] = keys.get("variants", {})
    if variant not in variants and variant.isdecimal() and int(variant) < len(variants):
        variant = list(variants)[int(variant)]
    if (variant or variants) and variant not in variants:
        known = "; ".join(variants) or "none; a recipe with variants is needed: --recipe FILE…"
        raise UserError(f"--variant {variant!r}: must be a name, or a number from 0, of the variants: {known}.")
    check_own(variants, argv)
    return keys.get("settings", {}) | variants.get(variant, {})


def check_own(variants: dict[str, dict[str, Any]], argv: Sequence[str]) -> None:
    """Raises UserError if a command line gives a setting in which variants differ: they would all become the same."""
    for name in dict.fromkeys(name for own in variants.values() for name in own):
        if given(name, argv):
            raise UserError(
                f"{flag_of(name)}: is what the variants differ in; leave it out, or change it in the recipe."
            )


def read_recipe(path: Path, settings: Collection[str]) -> dict[str, Any]:
    """Returns the keys of a recipe. Raises UserError if it does not have the format in this module's docstring; the
    values of settings are checked later. settings: names of train/sft.py's settings."""
    where = f"--recipe {path}"
    recipe = read_yaml(path, where)
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
        raise UserError(f"{where}: placebo must be a list of claims' ids, and {other[0]!r} is none.")
    for name in recipe.get("settings", {}):
        if name not in settings:
            raise UserError(
                f"{where}: settings: {name} is no setting of train/sft.py; {_nearest(str(name), settings)}."
            )
    for variant, own in recipe.get("variants", {}).items():
        if not isinstance(variant, str) or variant.isdecimal():
            raise UserError(f"{where}: variants: {variant!r} must be a name in words; numbers are places in the list.")
        if not isinstance(own, dict):
            raise UserError(f"{where}: variants: {variant} must be a mapping of settings, not {own!r}.")
        for name in own:
            if own[name] in (None, []):
                raise UserError(
                    f"{where}: variants: {variant}: {name} is empty; give a value, none as a word in quotes."
                )
            if name not in DIFFERING:
                raise UserError(
                    f"{where}: variants: {variant}: {name} must be the same in all variants, or their difference is "
                    f"not the mask's; put it under settings. Variants may differ in {', '.join(DIFFERING)}."
                )
    return recipe


def flags(values: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Returns settings as command-line words. Leaves out settings that the command line `but` gives, and False."""
    made: list[str] = []
    for name, value in values.items():
        flag = flag_of(name)
        if given(name, but) or value is False:
            continue
        made += [flag] if value is True else [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return made


def given(name: str, argv: Sequence[str]) -> bool:
    """Returns whether a command line gives a setting, as --NAME or --NAME=VALUE."""
    flag = flag_of(name)
    return any(word == flag or word.startswith(f"{flag}=") for word in argv)


def _nearest(word: str, known: Collection[str]) -> str:
    near = nearest(word, known)
    return f"did you mean {near}?" if near else f"known are {', '.join(known)}"
