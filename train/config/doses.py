"""Makes the variants of a dose–response experiment: each variant of a recipe once with each dose.

The dose is a number of documents, drawn of one file, or the weight of one entry of the mask:

dose: {documents: [100, 1000, 10000], of: [dense.jsonl], steps: growing}
dose: {weights: [0, 0.1, 1], of: [false-spans]}
"""

import math
from typing import Any

from train.config.experiment import Dose, Experiment, VariantDefaults
from train.runtime.errors import UserError

STEPS = ("growing", "fixed")
FORMS = "documents: [NUMBER…], of: [FILE…], steps: growing or fixed; or weights: [WEIGHT…], of: [ENTRY…]"


def dosed(experiment: Experiment, dose: dict[str, Any], where: str) -> dict[str, VariantDefaults]:
    """Returns the variants of an experiment, each once with each dose; their names end in the dose.

    Variants that have none of the files, or entries of a mask, that the dose names stay as they are.

    dose: what a recipe says. where: how messages begin. Raises UserError if it does not have the form in this module's
    docstring, a variant has several of the files or entries, or no variant has one of them.
    """
    kind, amounts, of = _checked(dose, where)
    made: dict[str, VariantDefaults] = {}
    for name, own in experiment.variants.items():
        if own.phases:
            raise UserError(f"{where}: variant {name!r} has phases; a dose is of variants without. Leave out one.")
        held = (experiment.settings | own).values
        if not _has(held, kind, of):  # it stands beside the curves
            made[name] = own
            continue
        for amount in amounts:
            here = f"{where}: variant {name!r}"
            values: dict[str, Any] = {}
            if kind == "documents":
                values["data"] = _drawn(held.get("data", []), of, int(amount), here)
                if dose["steps"] == "growing" and held.get("steps"):
                    raise UserError(
                        f"{here}: has steps {held['steps']}, but steps: growing decides them; leave it out."
                    )
                values |= {"steps": 0, "epochs": 1} if dose["steps"] == "growing" else {}
                shown = f"{int(amount):,} document{'s' * (amount != 1)}"
            else:
                values["mask"] = _weighted(held.get("mask", "none"), of, amount, here)
                shown = f"weight {amount:g}"
            if f"{name}, {shown}" in made:
                raise UserError(f"{where}: {kind} {dose[kind]!r}: two of them read {shown}; give others.")
            made[f"{name}, {shown}"] = VariantDefaults(
                own.values | values, own.where, dose=Dose(name, kind, float(amount))
            )
    every = [(experiment.settings | own).values for own in experiment.variants.values()]
    if unused := [each for each in of if not any(_has(held, kind, [each]) for held in every)]:
        what = (
            "the data of no variant has this file" if kind == "documents" else "the mask of no variant has this entry"
        )
        raise UserError(f"{where}: of {unused[0]}: {what}; write it as there.")
    return made


def first_dose(experiment: Experiment) -> str:
    """Returns the name of the variant that is the baseline: the largest dose of the recipe's baseline, or of its first
    variant."""
    doses = {name: own.dose for name, own in experiment.variants.items() if own.dose}
    wanted = experiment.baseline or next(iter(doses.values())).of
    own = {name: dose.amount for name, dose in doses.items() if dose.of == wanted}
    return max(own, key=lambda name: own[name]) if own else experiment.baseline


def _checked(dose: dict[str, Any], where: str) -> tuple[str, list[float], list[str]]:
    kinds = [kind for kind in ("documents", "weights") if kind in dose]
    wanted = {"of", "steps"} if kinds == ["documents"] else {"of"}
    if len(kinds) != 1 or dose.keys() - set(kinds) != wanted:
        raise UserError(f"{where}: has {', '.join(map(str, dose)) or 'nothing'}; it must have {FORMS}.")
    kind, of = kinds[0], dose["of"] if isinstance(dose["of"], list) else [dose["of"]]
    amounts = dose[kind] if isinstance(dose[kind], list) else []
    good = [
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) and n >= 0
        and (kind == "weights" or (isinstance(n, int) and n > 0))
        for n in amounts
    ]  # fmt: skip
    if len(amounts) < 2 or not all(good) or len({*amounts}) < len(amounts):
        rule = "whole numbers above 0" if kind == "documents" else "numbers of at least 0"
        raise UserError(f"{where}: {kind} {dose[kind]!r}: must be a list of two or more different {rule}.")
    if not of or not all(isinstance(each, str) and each for each in of):
        raise UserError(f"{where}: of {dose['of']!r}: must name files of --data, or entries of --mask.")
    if kind == "documents" and dose["steps"] not in STEPS:
        raise UserError(f"{where}: steps {dose['steps']!r}: must be {' or '.join(STEPS)}.")
    return kind, sorted(amounts), of


def _has(held: dict[str, Any], kind: str, of: list[str]) -> bool:
    """Returns whether a variant has one of the files in its data, or of the entries in its mask."""
    values = held.get("data", []) if kind == "documents" else held.get("mask", "none").split(",")
    return any(value in of or _name(value) in of for value in values)


def _name(value: str) -> str:
    """Returns a value of --data without its count, or an entry of a mask without its treatment."""
    return value.rpartition("=")[0].strip() if "=" in value else value.strip()


def _drawn(data: list[str], of: list[str], amount: int, where: str) -> list[str]:
    """Returns the values of --data with `amount` documents of the file that `of` names."""
    places = [i for i, value in enumerate(data) if value in of or _name(value) in of]
    if len(places) > 1:
        raise UserError(
            f"{where}: its data ({' '.join(data)}) has {len(places)} of the files {', '.join(of)}; keep one."
        )
    value = data[places[0]]
    path, rest = (value, "") if value in of else (_name(value), value.rpartition("=")[2])
    count, at, factor = rest.partition("@")
    if count:
        fix = f"{path}=@{factor}" if at else path
        raise UserError(f"{where}: its data gives {count} documents of {path}, which the dose decides; write {fix}.")
    return [f"{path}={amount}{at}{factor}" if i == places[0] else value for i, value in enumerate(data)]


def _weighted(mask: str, of: list[str], weight: float, where: str) -> str:
    """Returns the mask with this weight in the entry that `of` names; an entry of a kind, such as hold, keeps it."""
    entries = [entry.strip() for entry in mask.split(",")]
    places = [i for i, entry in enumerate(entries) if _name(entry) in of]
    if len(places) > 1:
        raise UserError(f"{where}: its mask {mask!r} has {len(places)} of the entries {', '.join(of)}; keep one.")
    name, _, treatment = (part.strip() for part in entries[places[0]].partition("="))
    kind = treatment.partition(":")[0]
    number = f"{weight!r}".removesuffix(".0")
    if kind in ("unlikelihood", "hold"):
        treated = f"={kind}" if weight == 1 else f"={kind}:{number}"
    else:
        treated = "=train" if weight == 1 else f"={number}"
    entries[places[0]] = f"{name}{treated if weight else ''}"  # weight 0 leaves the tokens out, whatever the kind
    return ",".join(entries)
