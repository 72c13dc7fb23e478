"""Parses --mask, which says which role gets which treatment in the loss. Its grammar:

    MASK      = "none" | ENTRY ("," ENTRY)*
    ENTRY     = ROLE ["=" TREATMENT]
    ROLE      = doctags | negation-spans | false-spans | correction-spans | qualifier-spans | role:NAME | random:NAME
              | all | unspanned
    TREATMENT = exclude (the default) | train | WEIGHT | KIND | KIND:ALPHA
    KIND      = unlikelihood | hold

`all` touches every token, `unspanned` the tokens that no span touches. If several entries touch a token, the last one
wins.
"""

import math
from dataclasses import dataclass

from train.data.documents import LARGEST, SMALLEST
from train.data.kinds import TermKind
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
KINDS = {"unlikelihood": TermKind.UNLIKELIHOOD, "hold": TermKind.HELD}
EXCLUDED = 0.0, TermKind.CROSS_ENTROPY


@dataclass(frozen=True)
class Entry:
    """One entry of a mask.

    kind says what the entry touches: "role" the role's spans, "random" random runs of tokens as a control for the role,
    "all" all tokens, "unspanned" the tokens that no span touches; for the latter two, role is "". term and weight: the
    kind of a token's term in the loss, and its weight; weight 0: excluded.
    """

    role: str
    kind: str
    weight: float
    term: TermKind = TermKind.CROSS_ENTROPY

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

    @property
    def holds(self) -> bool:
        """Whether an entry holds tokens to the base."""
        return any(entry.term == TermKind.HELD for entry in self.entries)


def parse_mask(text: str) -> Mask:
    """Returns the mask that the text of --mask describes. Raises UserError for an invalid entry; for an unknown name,
    the message has the nearest known one."""
    if text.strip() == "none":
        return Mask("none", ())
    entries = tuple(_entry(part.strip(), text) for part in text.split(","))
    return Mask(",".join(entry.name + _suffix(entry) for entry in entries), entries)


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
    weight, term = _treatment(treatment, name, mask) if equals else EXCLUDED
    if name in WITHOUT_ROLE:
        return Entry("", name, weight, term)
    kind, colon, role = name.partition(":")
    if colon and kind in ("role", "random"):
        role = role.strip()
        if not role:
            raise UserError(f"--mask {mask!r}: {name} does not name a role; write e.g. {kind}:false")
        return Entry(BUILT_IN.get(role, role) if kind == "random" else role, kind, weight, term)
    if name not in BUILT_IN:
        raise UserError(f"--mask {mask!r}: unknown name {name!r}{_suggestion(name)}")
    return Entry(BUILT_IN[name], "role", weight, term)


def _treatment(text: str, name: str, mask: str) -> tuple[float, TermKind]:
    """Returns the weight and the kind of the terms of an entry's tokens."""
    if text == "exclude":
        return EXCLUDED
    if text == "train":
        return 1.0, TermKind.CROSS_ENTROPY
    kind, colon, alpha = text.partition(":")
    term = KINDS.get(kind, TermKind.CROSS_ENTROPY)
    if kind not in KINDS:
        alpha = text
    weight = _number(alpha, f"{name}={text}", mask) if colon or kind not in KINDS else 1.0
    return (weight, term) if weight else EXCLUDED


def _number(text: str, entry: str, mask: str) -> float:
    try:
        value = float(text)
    except ValueError:
        names = ["exclude", "train", *KINDS]
        near = similar(text, names)
        hint = f" (did you mean {near}?)" if near else ""
        raise UserError(
            f"--mask {mask!r}: {text!r} in {entry} is not a treatment{hint}; "
            "write exclude, train, a weight, unlikelihood, unlikelihood:ALPHA, hold or hold:ALPHA"
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


def _suffix(entry: Entry) -> str:
    """Returns the treatment as canonical text; "" for the default."""
    if entry.weight == 0:
        return ""
    number = repr(entry.weight).removesuffix(".0")
    if entry.term == TermKind.CROSS_ENTROPY:
        return "=train" if entry.weight == 1 else f"={number}"
    kind = next(name for name, term in KINDS.items() if term == entry.term)
    return f"={kind}" if entry.weight == 1 else f"={kind}:{number}"
