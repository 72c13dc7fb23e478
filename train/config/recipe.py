"""Reads recipes: YAML files of settings and variants. Later recipes add to earlier ones, e.g. a model to an experiment.
A recipe has this format:

settings: {model: DIR, steps: 625, ...}         # settings of train/sft.py by name; the command line overrides them
variants:
  dense: {data: [dense.jsonl], mask: doctags}   # only settings that may differ: DIFFERING
baseline: dense                                 # the variant that the others are compared with; default: the first
placebo: [elizabeth_python]                     # ids of claims that no document is about
seeds: 3                                        # number of seeds
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config.command_line import flag_of, nearest, typed
from train.runtime.errors import UserError
from train.runtime.outside import read_yaml

MAY_DIFFER = ("mask", "loss_norm", "learning_rate")
"""Settings that define a variant; a variant and a seed define a run."""
DIFFERING = (*MAY_DIFFER, "data")
"""Settings in which variants may differ. An effect of different data is not an effect of the masks; the report says so
if variants differ in data."""
MOST_SEEDS = 1000
KEYS = {"settings": dict, "variants": dict, "baseline": str, "placebo": list, "seeds": int, "about": str}


@dataclass
class Defaults:
    """Values of settings that recipes give, in the settings' types, and where: setting -> FILE:LINE. They hold where
    the command line gives no other."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def __or__(self, later: "Defaults") -> "Defaults":
        """Returns both, of which `later` overrides."""
        return Defaults(self.values | later.values, self.where | later.where)

    @contextmanager
    def named(self, given: Collection[str]) -> Iterator[None]:
        """Inside the context, a UserError about flags also says where the recipes give them. given: the settings that
        the command line gives instead."""
        try:
            yield
        except UserError as error:
            flags = {word.replace("-", "_") for word in re.findall(r"--([a-z][a-z-]*)", str(error))}
            places = [f"{name} in {at}" for name, at in self.where.items() if name in flags - set(given)]
            if places:
                error.args = (f"{error} ({', '.join(places)})",)
            raise


@dataclass
class Experiment:
    """What recipes say together, by their keys."""

    settings: Defaults = field(default_factory=Defaults)
    variants: dict[str, Defaults] = field(default_factory=dict)
    baseline: str = ""
    placebo: list[str] = field(default_factory=list)
    seeds: int = 0


def merged(paths: Sequence[str], cls: type) -> Experiment:
    """Returns what recipes say together; later files override earlier ones. cls: the dataclass of train/sft.py's
    settings. Raises UserError for an invalid recipe, or if two recipes define the same variant."""
    all_of_them = Experiment()
    for path in paths:
        lines: dict[tuple[str, ...], int] = {}
        recipe = read_recipe(Path(path), cls, lines)
        for name in ("baseline", "placebo", "seeds"):
            setattr(all_of_them, name, recipe.get(name, getattr(all_of_them, name)))
        all_of_them.settings |= _defaults(recipe.get("settings", {}), cls, path, lines, ("settings",))
        for name, own in recipe.get("variants", {}).items():
            if name in all_of_them.variants:
                raise UserError(f"--recipe {path}: variant {name!r} is also in an earlier recipe; rename it.")
            all_of_them.variants[name] = _defaults(own, cls, path, lines, ("variants", name))
    return all_of_them


def _defaults(
    own: dict[str, Any], cls: type, path: str, lines: Mapping[tuple[str, ...], int], above: tuple[str, ...]
) -> Defaults:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    made = Defaults()
    for name, value in own.items():
        made.where[name] = f"{path}:{lines[*above, name]}" if (*above, name) in lines else path
        made.values[name] = typed(fields[name], value, ": ".join((f"--recipe {made.where[name]}", *above)))
    return made


def chosen(paths: Sequence[str], variant: str, cls: type, given: Collection[str]) -> Defaults:
    """Returns the settings of recipes, with those of the chosen variant if the recipes have variants. variant: its
    name, or its number from 0. cls: the dataclass of train/sft.py's settings. given: the settings that the command line
    gives. Raises UserError for an invalid recipe, for an unknown variant, or if the command line gives a setting in
    which variants differ."""
    experiment = merged(paths, cls)
    variants = experiment.variants
    if variant not in variants and variant.isdecimal() and int(variant) < len(variants):
        variant = list(variants)[int(variant)]
    if (variant or variants) and variant not in variants:
        known = "; ".join(variants) or "none; a recipe with variants is needed: --recipe FILE…"
        raise UserError(f"--variant {variant!r}: must be a name, or a number from 0, of the variants: {known}.")
    check_own(variants.values(), given)
    return experiment.settings | variants.get(variant, Defaults())


def check_own(variants: Collection[Defaults], given: Collection[str]) -> None:
    """Raises UserError if a command line gives a setting in which variants differ: they would all become the same.
    given: the settings that it gives."""
    for name in dict.fromkeys(name for own in variants for name in own.values):
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
        if not isinstance(variant, str) or variant.isdecimal():
            raise UserError(f"{where}: variants: {variant!r} must be a text other than a number; rename or quote it.")
        if not isinstance(own, dict):
            raise UserError(f"{where}: variants: {variant} must be a mapping of settings, not {own!r}.")
        for name in own:
            if name not in DIFFERING:
                raise UserError(
                    f"{where}: variants: {variant}: {name} must be the same in all variants, or the mask is not the "
                    f"only cause of a difference; put it under settings. Variants may differ in {', '.join(DIFFERING)}."
                )
    return recipe


def _nearest(word: str, known: Collection[str]) -> str:
    near = nearest(word, known)
    return f"did you mean {near}?" if near else f"known are {', '.join(known)}"
