"""Writes a safetensors file in pieces, from one process or from several that share a file system.

The header comes first and fixes every tensor's place, so that any process can write any range of elements at any time,
and none needs a whole tensor. The file has another name until it is complete.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoints.reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> dtype, shape; in the order of the file


class SafetensorsWriter:
    """A file of the tensors of `layout`. One process creates it; others open it after that."""

    def __init__(self, path: Path, layout: Layout, create: bool = True):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        header, position = {}, 0
        self.places: dict[str, tuple[torch.dtype, int]] = {}
        for name, (dtype, shape) in layout.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self.places[name], position = (dtype, position), end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
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
        while done < len(view):
            done += os.pwrite(self.file, view[done : done + 2**30], offset + done)

    def close(self) -> None:
        """Flushes what this process wrote to the disk."""
        os.fsync(self.file)
        os.close(self.file)

    def publish(self) -> None:
        """Gives the complete file its name: for one process, after all have closed it."""
        self.partial.rename(self.path)
        flush(self.path.parent)


def flush(path: Path) -> None:
    """Waits until a file's or a directory's changes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
