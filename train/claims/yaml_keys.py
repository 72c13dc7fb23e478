"""Reads the keys of YAML mappings with their types checked. A wrong value raises a UserError that names file, key, rule
and fix."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from train.runtime.errors import UserError
from train.runtime.similar import similar

REQUIRED: Any = object()


class Keys:
    """The keys of one YAML mapping, each read with its type checked. Every error message begins with `where`."""

    def __init__(self, value: Any, where: str, known: Iterable[str], free: bool = False):
        self.where = where
        if not isinstance(value, dict):
            raise UserError(f"{where}: is {_kind(value)}, but must be keys with values.")
        # YAML reads `false:` and `true:` without quotes as booleans
        self.values = {str(k).lower() if isinstance(k, bool) else k: v for k, v in value.items()}
        if len(self.values) < len(value):
            twice = next(str(key).lower() for key in value if isinstance(key, bool) and str(key).lower() in value)
            raise UserError(f"{where}: has {twice} with and without quotes, which is the same key. Leave one out.")
        for key in () if free else self.values.keys() - set(known):
            raise UserError(f"{where}: unknown key {key!r}. {suggestion(key, known)}")

    def at(self, key: str) -> str:
        """Returns how messages name a key: its file, the keys that it lies under, and itself."""
        return f"{self.where}: {key}"

    def has(self, key: str) -> bool:
        """Returns whether a key is there and not empty."""
        return self.values.get(key) is not None

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """Returns a string that is not blank, exactly as it is written. Raises UserError for anything else."""
        if not self.has(key):
            if default is REQUIRED:
                raise UserError(f"{self.where}: {key} is missing. Add it; it is a text.")
            return str(default)
        return text_of(self.values[key], self.at(key))

    def yes_or_no(self, key: str) -> str:
        """Returns "yes" or "no". Raises UserError for anything else."""
        value = self.values.get(key)
        if isinstance(value, bool):  # YAML reads yes without quotes as True
            return "yes" if value else "no"
        if isinstance(value, str) and value.strip().lower() in ("yes", "no"):
            return value.strip().lower()
        raise UserError(f"{self.at(key)} is {'missing' if value is None else repr(value)}; it must be yes or no.")

    def items(self, key: str) -> list[tuple[Any, str]]:
        """Returns (value, where) for each item of a list; [] if the key is missing. Raises UserError for anything else,
        and for an empty list."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else _kind(value)
            raise UserError(f"{self.at(key)} is {found}; it must be a list with at least one item.")
        return [(item, f"{self.at(key)}[{i}]") for i, item in enumerate(value)]

    def switch(self, key: str) -> bool:
        """Returns a boolean, False if the key is missing. Raises UserError for anything else."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.at(key)} is {_kind(value)}; it must be true or false.")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns the texts of a list, () if the key is missing. Raises UserError for one that is there twice."""
        found = tuple(text_of(item, where) for item, where in self.items(key))
        if twice := [text for text, times in Counter(found).items() if times > 1]:
            raise UserError(f"{self.at(key)} holds {twice[0]!r} twice. Leave one out.")
        return found


def suggestion(key: Any, known: Iterable[str]) -> str:
    """Returns how a message about an unknown key ends: the key that was meant, or those that are known."""
    near = similar(str(key), known)
    return f"Did you mean {near}?" if near else f"Known keys: {', '.join(known)}."


def text_of(value: Any, where: str) -> str:
    """Returns a text that is not blank. Raises UserError for anything else."""
    if not isinstance(value, str):
        fix = f' Put it in quotes: "{value}".' if isinstance(value, int | float) else ""
        raise UserError(f"{where} is {_kind(value)}, but must be a text.{fix}")
    if not value.strip():
        raise UserError(f"{where} is empty. Write something, or leave it out.")
    return value


def _kind(value: Any) -> str:
    names = {bool: "a boolean (yes, no, true, false)", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "keys with values", type(None): "empty"}
    return names.get(type(value), f"a {type(value).__name__}")


def check_completions(prompt: str, completions: Sequence[str], where: str) -> None:
    """Raises UserError if the prompt ends with white space, or if the first completion, the true one, is also false."""
    if prompt[-1].isspace():
        raise UserError(f"{where}: prompt ends with white space; begin the completions with it instead, as tokens do.")
    if completions[0] in completions[1:]:
        raise UserError(f"{where}: {completions[0]!r} is both true and false. Change one of them.")
