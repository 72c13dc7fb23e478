"""Reads files that come from outside the project. The functions return a value, or raise a UserError that names the
file, what is wrong and the fix. A directory, a pipe or a device in the place of a file is not opened. A file larger
than its kind can be is not read.

Common arguments: `where` is the beginning of the error message, by default the path. `fix` is the advice at its end.
`most` is the largest accepted size in bytes.
"""

import os
import stat
import sys
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from train.runtime.errors import UserError
from train.runtime.text_formats import Unreadable, parse_json, parse_yaml

Where = str | Path
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
MOST = 2**25  # bytes of a JSON or text file: the index of 200,000 tensors has 23 MB; Python parses 3 MB/s at worst
MOST_VOCABULARY = 2**27  # bytes; a tokenizer.json of a million tokens has 60 MB
MOST_YAML = 2**21  # bytes; PyYAML parses about 300,000 bytes per second


def opened(path: Where, where: Where = "", fix: str = "make it readable") -> BufferedReader:
    """Opens a regular file for reading bytes. Raises UserError if it cannot be opened or is not a regular file."""
    where = where or path
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); {fix}.") from None
    except ValueError:  # a NUL or a lone surrogate in the name
        raise UserError(f"{where}: no file can have that name; {fix}.") from None
    raise UserError(f"{where}: is {KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file; {fix}.")


def read_bytes(path: Where, where: Where = "", fix: str = "make it readable", most: int = MOST) -> bytes:
    """Returns the bytes of a file. Raises UserError if it cannot be read or has more than `most` bytes."""
    where = where or path
    with opened(path, where, fix) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror}); {fix}.") from None
    if len(data) > most:
        raise UserError(f"{where}: has more than {most:,} bytes, more than such a file can have; {fix}.")
    return data


def read_text(path: Where, where: Where = "", fix: str = "make it readable", most: int = MOST) -> str:
    """Returns the text of a UTF-8 file. Raises UserError if it cannot be read, is too large or is not valid UTF-8."""
    try:
        return read_bytes(path, where, fix, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where or path}: not valid UTF-8 (byte {error.start}); save the file as UTF-8.") from None


def read_json(path: Where, where: Where = "", fix: str = "get the file again") -> dict[str, Any]:
    """Returns the JSON object in a file. Raises UserError if the file cannot be read or is not strict JSON
    (`parse_json`), or if its value is not an object."""
    try:
        value = parse_json(read_text(path, where, fix), strictly=True)
    except Unreadable as error:
        raise UserError(f"{where or path}: {error}, or {fix}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where or path}: must hold a JSON object, not {type(value).__name__}; {fix}.")
    return value


def read_yaml(
    path: Where, where: Where = "", fix: str = "give a YAML file", most: int = MOST_YAML,
    lines: dict[tuple[str, ...], int] | None = None,
) -> Any:  # fmt: skip
    """Returns the value in a YAML file. Raises UserError, with the line if known, if it cannot be read or parsed.
    lines: receives the line of each value, from 1, by the keys on the way to it."""
    try:
        return parse_yaml(read_text(path, where, fix, most), lines)
    except Unreadable as error:
        line = f":{error.line}" if error.line else ""
        raise UserError(f"{where or path}{line}: {error}.") from None


def checked(
    value: dict[str, Any], kinds: Mapping[str, type], where: Where, fix: str = "get the file again",
    needed: bool = False,
) -> None:  # fmt: skip
    """Raises UserError if one of these keys has a value of another type. A null counts as absent. If `needed`, an
    absent key raises UserError too. kinds: the type of each key; float means any finite number, and int one below 2**63
    in magnitude."""
    for key, kind in kinds.items():
        if (given := value.get(key)) is None:
            if needed:
                raise UserError(f"{where}: has no {key}; {fix}.")
        elif not _is(given, kind):
            shown = repr(given) if len(repr(given)) <= 80 else type(given).__name__
            raise UserError(f"{where}: {key} is {shown}, but must be {NAMES.get(kind, kind.__name__)}; {fix}.")


NAMES = {
    int: "a whole number below 2**63", float: "a finite number", str: "a text", bool: "true or false", list: "a list",
    dict: "an object",
}  # fmt: skip


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return type(value) is kind
