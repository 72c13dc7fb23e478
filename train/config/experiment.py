"""What recipes say together: the settings, the variants with their phases and doses, and how they are compared."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from train.runtime.errors import UserError


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


@dataclass(frozen=True)
class Phase:
    """A phase of a variant: its own settings, and whether the optimizer's state and the schedule of the learning rate
    go on from the phase before."""

    own: Defaults
    carry: bool = False
    go_on: bool = False


@dataclass(frozen=True)
class Dose:
    """Where a variant stands in a dose–response curve. of: the variant that it is a dose of, which is its curve. kind:
    documents or weights. amount: a number of documents, or a weight."""

    of: str
    kind: str
    amount: float


@dataclass
class VariantDefaults(Defaults):
    """The settings of a variant that are not those of all variants, and its phases by name; {} if it is trained in
    one."""

    phases: dict[str, Phase] = field(default_factory=dict)
    dose: Dose | None = None

    @property
    def all_values(self) -> set[str]:
        """The names of its own settings, and of those of its phases."""
        return {*self.values, *(name for phase in self.phases.values() for name in phase.own.values)}


@dataclass
class Experiment:
    """What recipes say together, by their keys."""

    settings: Defaults = field(default_factory=Defaults)
    variants: dict[str, VariantDefaults] = field(default_factory=dict)
    baseline: str = ""
    placebo: list[str] = field(default_factory=list)
    seeds: int = 0
