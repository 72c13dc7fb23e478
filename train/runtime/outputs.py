"""Writes the output files of commands: never over an input file, and either completely or not at all."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from train.runtime.errors import UserError, writing

Named = Mapping[str, str | Path | None]  # path by flag
OF_A_MODEL = (
    "*config*.json", "*.safetensors*", "tokenizer*", "vocab*", "merges.txt", "*.jinja", "*.tiktoken", "*.model",
)  # fmt: skip


def check_apart(written: Named, read: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Raises UserError if a file to write is also an input file or the file of another output flag. Both arguments map
    flags to paths."""
    taken = {os.path.realpath(path): flag for flag, paths in read.items() for path in paths if path}
    for flag, path in written.items():
        if not path:
            continue
        if other := taken.get(os.path.realpath(path)):
            raise UserError(f"{flag} {path}: is {other} itself, which would be lost; name another file")
        taken[os.path.realpath(path)] = flag


def model_files(model: str | Path) -> list[Path]:
    """Returns the paths that are read for a model: `model` itself, and the model's files in it if it is a directory."""
    return [Path(model), *(path for pattern in OF_A_MODEL for path in Path(model).glob(pattern))]


def check_new(setting: str, path: str, overwrite: bool) -> None:
    """Raises UserError if the file exists already and `overwrite` is not set. setting: its flag, for the message."""
    if os.path.isfile(path) and not overwrite:
        raise UserError(f"{setting} {path}: already exists; give --overwrite to replace it, or another file")


def check_directory(setting: str, path: str | Path) -> None:
    """Raises UserError if the path cannot be a directory, as it or one above it is a file. setting: its flag, for the
    message."""
    absolute = Path(path).absolute()
    there = next(each for each in (absolute, *absolute.parents) if os.path.lexists(each))
    if not os.path.isdir(there):
        raise UserError(f"{setting} {path}: cannot be written ({there} is not a directory). Give another.")


@contextmanager
def replacing(path: Path, suffix: str = "partial") -> Iterator[IO[bytes]]:
    """Opens a file for writing that takes the place of `path` once the block has ended and all of it is on disk. Until
    then, and if the block fails, an earlier file stays as it was. suffix: of the file that is written to."""
    partial = path.with_name(f"{path.name}.{suffix}")
    try:
        with writing(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    with suppress(PermissionError):  # a directory that may be written to, but not read
        flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file atomically: until it is complete, an earlier file of that name stays in place."""
    with replacing(path) as file:
        file.write(text.encode())


def flush(path: Path) -> None:
    """Waits until the changes to a file or a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(setting: str, path: Path, lines: Iterable[str]) -> None:
    """Writes lines to a file, each with a line break added. The file appears completely or not at all; a device or a
    pipe gets the lines one by one. Raises UserError, which names the setting, if the path is a directory or cannot be
    written."""
    if os.path.isdir(path):
        raise UserError(f"{setting} {path}: is a directory; name a file in it")
    direct = os.path.exists(path) and not _replaceable(path)
    try:
        with path.open("wb") if direct else replacing(path, f"{os.getpid()}.part") as file:
            file.writelines((line + "\n").encode("utf-8", "backslashreplace") for line in lines)
    except OSError as error:
        raise UserError(f"{setting} {path}: cannot be written ({error.strerror}); name a file elsewhere") from None


def _replaceable(path: Path) -> bool:
    """Returns whether a path is a file that may be replaced. /dev/stdout may not, even if it leads to a file."""
    return os.path.isfile(path) and not path.absolute().is_relative_to("/dev")
