"""Files that commands write: never one that they read, and whole or not at all."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from train.errors import UserError

Named = Mapping[str, str | Path | None]  # by flag
OF_A_MODEL = (
    "*config*.json", "*.safetensors*", "tokenizer*", "vocab*", "merges.txt", "*.jinja", "*.tiktoken", "*.model",
)  # fmt: skip


def check_apart(written: Named, read: Mapping[str, Iterable[str | Path | None]]) -> None:
    """UserError where a file that is written is one of those that are read, or another that is written."""
    taken = {os.path.realpath(path): flag for flag, paths in read.items() for path in paths if path}
    for flag, path in written.items():
        if not path:
            continue
        if other := taken.get(os.path.realpath(path)):
            raise UserError(f"{flag} {path}: is {other} itself, which would be lost; name another file")
        taken[os.path.realpath(path)] = flag


def model_files(model: str | Path) -> list[Path]:
    """What is read of a model: a file itself, or those of a directory."""
    return [Path(model), *(path for pattern in OF_A_MODEL for path in Path(model).glob(pattern))]


def check_new(setting: str, path: str, overwrite: bool) -> None:
    """UserError where there is such a file already and it is not to be replaced."""
    if os.path.isfile(path) and not overwrite:
        raise UserError(f"{setting} {path}: is there already; give --overwrite to replace it, or another file")


def write(setting: str, path: Path, lines: Iterable[str]) -> None:
    """Writes a file whole or not at all; into a device or a pipe, as it comes. UserError names the setting."""
    if os.path.isdir(path):
        raise UserError(f"{setting} {path}: is a directory; name a file in it")
    part, direct = path.with_name(f"{path.name}.{os.getpid()}.part"), os.path.exists(path) and not _replaceable(path)
    try:
        try:
            with (path if direct else part).open(
                "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as file:
                file.writelines(line + "\n" for line in lines)
            if not direct:
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{setting} {path}: cannot be written ({error.strerror}); name a file elsewhere") from None


def _replaceable(path: Path) -> bool:
    """Not /dev/stdout, say, even where that leads to a file."""
    return os.path.isfile(path) and not path.absolute().is_relative_to("/dev")
