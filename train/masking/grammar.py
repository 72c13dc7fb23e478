"""Parses --mask, which says which role gets which treatment in the loss. Its grammar:

    MASK      = "none" | ENTRY ("," ENTRY)*
    ENTRY     = ROLE ["=" TREATMENT]
    ROLE      = doctags | negation-spans | false-spans | correction-spans | qualifier-spans | role:NAME | random:NAME
              | all | unspanned
    TREATMENT = exclude (the default) | train | WEIGHT | unlikelihood | unlikelihood:ALPHA

`all` touches every token, `unspanned` the tokens that no span touches. If several entries touch a token, the last one
wins.
"""

import math
from dataclasses import dataclass

from train.data.documents import LARGEST, SMALLEST
from train.runtime.errors import UserError
from train.runtime.similar import similar

BUILT_IN = {
    "doctags": "doctag",
    "negation-spans": "negation",
    "false-spans": "false",
    "correction-spans": "correction",
    "qualifier-spans": "qualifier",
}

WITHOUT_ROLE = ("all", "unspanned")


@dataclass(frozen=True)
class Entry:
    """One entry of a mask.

    kind says what the entry touches: "role" the role's spans, "random" random runs of tokens as a control for the role,
    "all" all tokens, "unspanned" the tokens that no span touches; for the latter two, role is "". weight: > 0
    cross-entropy times it, 0 excluded, -alpha unlikelihood times alpha.
    """

    role: str
    kind: str
    weight: float

    @property
    def random(self) -> bool:
        """Whether the entry is a control, which depends on the seed and the tokens."""
        return self.kind == "random"

    @property
    def name(self) -> str:
        """The entry as written in --mask, without its treatment."""
        if self.random:
            return f"random:{self.role}"
        if not self.role:
            return self.kind
        plural = {role: name for name, role in BUILT_IN.items()}
        return plural.get(self.role, f"role:{self.role}")


@dataclass(frozen=True)
class Mask:
    """A parsed --mask: its canonical text, and its entries in the order in which they apply."""

    text: str
    entries: tuple[Entry, ...]


def parse_mask(text: str) -> Mask:
    """Returns the mask that the text of --mask describes. Raises UserError for an invalid entry; for an unknown name,
    the message has the nearest known one."""
    if text.strip() == "none":
        return Mask("none", ())
    entries = tuple(_entry(part.strip(), text) for part in text.split(","))
    return Mask(",".join(entry.name + _suffix(entry.weight) for entry in entries), entries)


def check_role(role: str, where: str) -> None:
    """Raises UserError if no mask can name the role: commas and = end a name, and white space around it is dropped."""
    if not role or role != role.strip() or "," in role or "=" in role:
        raise UserError(f"{where}: {role!r} cannot be named in --mask; give a role without commas, = and outer spaces")


def _entry(part: str, mask: str) -> Entry:
    name, equals, treatment = (piece.strip() for piece in part.partition("="))
    if not name:
        raise UserError(f"--mask {mask!r}: an entry is empty; write names separated by single commas, or none")
    if name == "none":
        raise UserError(f"--mask {mask!r}: none cannot be combined with other entries; leave out none or the others")
    weight = _weight(treatment, name, mask) if equals else 0.0
    if name in WITHOUT_ROLE:
        return Entry("", name, weight)
    kind, colon, role = name.partition(":")
    if colon and kind in ("role", "random"):
        role = role.strip()
        if not role:
            raise UserError(f"--mask {mask!r}: {name} does not name a role; write e.g. {kind}:false")
        return Entry(BUILT_IN.get(role, role) if kind == "random" else role, kind, weight)
    if name not in BUILT_IN:
        raise UserError(f"--mask {mask!r}: unknown name {name!r}{_suggestion(name)}")
    return Entry(BUILT_IN[name], "role", weight)


def _weight(treatment: str, name: str, mask: str) -> float:
    if treatment == "exclude":
        return 0.0
    if treatment == "train":
        return 1.0
    if treatment == "unlikelihood":
        return -1.0
    kind, colon, alpha = treatment.partition(":")
    if kind == "unlikelihood" and colon:
        return -_number(alpha, f"{name}={treatment}", mask) or 0.0  # "or" avoids a negative zero
    return _number(treatment, f"{name}={treatment}", mask) or 0.0


def _number(text: str, entry: str, mask: str) -> float:
    try:
        value = float(text)
    except ValueError:
        names = ["exclude", "train", "unlikelihood"]
        near = similar(text, names)
        hint = f" (did you mean {near}?)" if near else ""
        raise UserError(
            f"--mask {mask!r}: {text!r} in {entry} is not a treatment{hint}; "
            "write exclude, train, a weight, unlikelihood or unlikelihood:ALPHA"
        ) from None
    if not 0 <= value < math.inf:
        raise UserError(f"--mask {mask!r}: the weight {text} in {entry} must be finite and at least 0, e.g. 0.2")
    if value and not SMALLEST <= value <= LARGEST:
        raise UserError(
            f"--mask {mask!r}: the weight {text} in {entry} must be 0 or from {SMALLEST:.0e} to {LARGEST:.0e}, as "
            "losses are fp32; e.g. 0.2"
        )
    return value


def _suggestion(name: str) -> str:
    near = similar(name, [*BUILT_IN, *BUILT_IN.values(), *WITHOUT_ROLE, "none", "random:", "role:"], cutoff=0.5)
    plural = {role: alias for alias, role in BUILT_IN.items()}
    names = ", ".join(BUILT_IN)
    known = (
        f"the names are {names}, role:NAME for any other role, random:ROLE for its control, all, unspanned (what no "
        "span touches), or none"
    )
    return f" (did you mean {plural.get(near, near)}?); {known}" if near else f"; {known}"


def _suffix(weight: float) -> str:
    """Returns the treatment as canonical text; "" for the default."""
    if weight == 0:
        return ""
    if weight == 1:
        return "=train"
    if weight == -1:
        return "=unlikelihood"
    number = repr(abs(weight)).removesuffix(".0")
    return f"={number}" if weight > 0 else f"=unlikelihood:{number}"
