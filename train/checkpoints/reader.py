"""What is in a checkpoint directory: config.json and the safetensors headers, checked before any weight is read.

The format is safetensors': 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, byte `offset` in it, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The tensors of a directory by name. Reading is by element range, with pread: mapped pages would count as
    resident memory, and ranks on one host share the page cache all the same."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.bytes_read = 0
        self._files: dict[Path, int] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every shard. UserError for a missing or broken shard, or a tensor in two of them."""
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _json(index).get("weight_map", {})
            shards = sorted({self.directory / shard for shard in weight_map.values()})
        else:
            weight_map = None
            shards = [self.directory / "model.safetensors"]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing or not shards:
            raise UserError(
                f"--model {self.directory}: {len(missing)} of {len(shards)} weight files missing "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); the directory must hold "
                "model.safetensors, or model.safetensors.index.json and every shard it names. "
                "Get the missing files again."
            )
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name, info in _read_header(shard).items():
                if name in tensors:
                    raise UserError(
                        f"{shard}: tensor {name} is in {tensors[name].file.name} too; it must be in one shard."
                    )
                tensors[name] = info
        for name in weight_map or ():
            if name not in tensors:
                raise UserError(
                    f"{index}: tensor {name} should be in {weight_map[name]}, but is not. Get the file again."
                )
        return tensors

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fills the contiguous CPU tensor `out` with the elements start, start+1, … of tensor `name`, flattened."""
        info = self.tensors[name]
        assert out.is_contiguous() and out.dtype == info.dtype and start + out.numel() <= math.prod(info.shape)
        if info.file not in self._files:
            self._files[info.file] = os.open(info.file, os.O_RDONLY)
        view: memoryview = memoryview(out.view(-1).view(torch.uint8).numpy().data) if out.numel() else memoryview(b"")
        offset = info.offset + start * info.dtype.itemsize
        done = 0
        while done < len(view):
            count = os.preadv(self._files[info.file], [view[done : done + 2**30]], offset + done)
            if not count:
                raise UserError(
                    f"{info.file}: tensor {name} ends at byte {offset + done}: the file was cut. Get it again."
                )
            done += count
        self.bytes_read += done

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"--model {directory}: no config.json there; give a directory in transformers' layout "
            "(config.json, tokenizer files, *.safetensors)."
        )
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Get the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """name -> TensorInfo of one file, sizes checked against the file's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path}: cut within its header ({size} bytes). Get the file again.")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: its header is not valid safetensors. Get the file again.") from None
    header.pop("__metadata__", None)
    tensors, end_of_data = {}, 8 + length
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}.")
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise UserError(
                f"{path}: tensor {name} has {end - begin} bytes, not those of {entry['dtype']} {entry['shape']}."
            )
        tensors[name] = TensorInfo(path, dtype, tuple(entry["shape"]), 8 + length + begin)
        end_of_data = max(end_of_data, 8 + length + end)
    if end_of_data != size:
        raise UserError(
            f"{path}: {size} bytes, but its header says {end_of_data}: the file is cut or corrupt. Get it again."
        )
    return tensors
