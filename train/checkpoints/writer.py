"""Writes a safetensors file in pieces, from one process or from several that share a file system.

The header comes first and fixes every tensor's place, so that any process can write any range of elements at any time,
and none needs a whole tensor. The file has another name until it is complete.
"""

import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoints.reader import DTYPES
from train.errors import writing

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> dtype, shape; in the order of the file


class SafetensorsWriter:
    """A file of the tensors of `layout`. One process creates it; others open it after that."""

    def __init__(self, path: Path, layout: Layout, create: bool = True):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        header, position = {}, 0
        self.places: dict[str, tuple[torch.dtype, int]] = {}
        self.sizes = {name: torch.Size(shape).numel() for name, (_, shape) in layout.items()}
        self.written: Counter[str] = Counter()  # elements of each tensor, by this process
        for name, (dtype, shape) in layout.items():
            end = position + self.sizes[name] * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self.places[name], position = (dtype, position), end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        with writing(self.path):
            self.file = os.open(self.partial, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o666)
            if create:
                os.pwrite(self.file, struct.pack("<Q", len(text)) + text, 0)
                os.ftruncate(self.file, self.start + position)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Writes `values` [n] as elements start, start+1, … of tensor `name`, flattened, in its dtype."""
        dtype, position = self.places[name]
        data = values.detach().to("cpu", dtype).contiguous().view(-1)
        view = memoryview(data.view(torch.uint8).numpy().data) if data.numel() else memoryview(b"")
        offset = self.start + position + start * dtype.itemsize
        done = 0
        with writing(self.path):
            while done < len(view):
                done += os.pwrite(self.file, view[done : done + 2**30], offset + done)
        self.written[name] += data.numel()

    def check_whole(self) -> None:
        """Where one process writes the file: that it wrote as many elements of every tensor as there are."""
        short = {name: self.written[name] for name, size in self.sizes.items() if self.written[name] != size}
        assert not short, f"{self.path}: elements written {short} are not those of the header"

    def close(self) -> None:
        """Flushes what this process wrote to the disk."""
        with writing(self.path):
            os.fsync(self.file)
            os.close(self.file)

    def publish(self) -> None:
        """Gives the complete file its name: for one process, after all have closed it."""
        self.partial.rename(self.path)
        flush(self.path.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file that is whole whenever it is there: before, the earlier one is."""
    partial = path.with_name(path.name + ".partial")
    with writing(path), partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)


def publish_directory(partial: Path, final: Path) -> None:
    """Gives a directory, whose files are on the disk, its name, in the place of an earlier one."""
    flush(partial)
    remove(final)
    partial.rename(final)
    flush(final.parent)


def remove(directory: Path) -> None:
    """Removes a directory, if it is there. It loses its name first: what a kill leaves of it is not taken for whole."""
    doomed = directory.with_name(f"partial-{directory.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed)


def flush(path: Path) -> None:
    """Waits until a file's or a directory's changes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
