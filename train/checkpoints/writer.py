"""Writes a safetensors file in pieces, from one process or from several that share a file system.

The header is written first and fixes the location of every tensor. Any process can then write any range of elements at
any time, and none needs a full tensor. The file has a temporary name until it is complete.
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
from train.runtime.errors import writing
from train.runtime.outputs import flush

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> dtype, shape; in the order of the file


class SafetensorsWriter:
    """A safetensors file with the tensors of `layout`. One process creates it before the others open it.

    Methods that write raise an OSError that names the file, for example if the disk is full.
    """

    def __init__(self, path: Path, layout: Layout, create: bool = True):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        header, position = {}, 0
        self.places: dict[str, tuple[torch.dtype, int]] = {}
        self.sizes = {name: torch.Size(shape).numel() for name, (_, shape) in layout.items()}
        self.written: Counter[str] = Counter()  # elements of each tensor written by this process
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
        """Writes `values` of any shape, cast to the file's dtype, as elements start, start+1, … of flattened `name`."""
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
        """Asserts that this process wrote every tensor in full. Only for files that a single process writes."""
        short = {name: self.written[name] for name, size in self.sizes.items() if self.written[name] != size}
        assert not short, f"{self.path}: elements written {short} are not those of the header"

    def close(self) -> None:
        """Flushes what this process wrote to disk, and closes the file."""
        with writing(self.path):
            os.fsync(self.file)
            os.close(self.file)

    def publish(self) -> None:
        """Renames the complete file to its final name. One process calls this after all have closed the file."""
        self.partial.rename(self.path)
        flush(self.path.parent)


def publish_directory(partial: Path, final: Path) -> None:
    """Renames a directory, whose files are already flushed to disk, to its final name. Replaces an earlier one."""
    flush(partial)
    remove(final)
    partial.rename(final)
    flush(final.parent)


def remove(directory: Path) -> None:
    """Removes a directory if it exists.

    It is renamed first, so that the remains after a kill are not taken for a complete directory.
    """
    doomed = directory.with_name(f"partial-{directory.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed)
