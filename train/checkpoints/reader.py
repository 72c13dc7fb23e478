"""Reads checkpoint directories: checks config.json and the safetensors headers first, then reads ranges of tensors.

The safetensors format is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and
the data (https://github.com/huggingface/safetensors#format).
"""

import hashlib
import math
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoints.present import read_config
from train.runtime.errors import UserError
from train.runtime.outside import opened, read_bytes, read_json
from train.runtime.text_formats import parse_json

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


LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of one tensor and its location: `file` and the byte `offset` in it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class _Reader:
    """Reads element ranges with pread. Thread-safe.

    Memory-mapped pages would count as resident memory, and ranks on one host share the page cache with pread as well.
    """

    tensors: dict[str, TensorInfo]

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fills `out` with elements start, start+1, … of the flattened tensor `name`.

        `out` must be a contiguous CPU tensor of any shape in the stored dtype.
        Raises UserError if the file cannot be read or was truncated after its header was read.
        """
        info = self.tensors[name]
        assert out.is_contiguous() and out.dtype == info.dtype and start + out.numel() <= math.prod(info.shape)
        view: memoryview = memoryview(out.view(-1).view(torch.uint8).numpy().data) if out.numel() else memoryview(b"")
        offset = info.offset + start * info.dtype.itemsize
        done = 0
        try:
            descriptor = self._open(info.file)
            while done < len(view):
                count = os.preadv(descriptor, [view[done : done + 2**30]], offset + done)
                if not count:
                    raise UserError(
                        f"{info.file}: tensor {name} ends at byte {offset + done}: the file is truncated. Get it again."
                    )
                done += count
        except OSError as error:
            raise UserError(
                f"{info.file}: tensor {name} cannot be read at byte {offset + done} ({error.strerror}). Check the "
                "disk it is on, or get the file again."
            ) from None
        with self._lock:
            self.bytes_read += done

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]

    def close(self) -> None:
        """Closes all files. A later read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class TensorFile(_Reader):
    """The tensors of one safetensors file. Raises UserError if the file cannot be read or is not valid."""

    def __init__(self, path: Path):
        super().__init__()
        self.tensors = _read_header(path)


class Checkpoint(_Reader):
    """A checkpoint directory: its configuration, and its tensors by name.

    Raises UserError if config.json is missing or invalid. The weight files are not checked until `tensors` is accessed.
    """

    def __init__(self, directory: str | Path):
        super().__init__()
        self.directory = Path(directory)
        self.config = read_config(self.directory)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of config.json, of every tensor's name, dtype and shape, and of a sample of its values.

        The sample is 512 bytes in the middle of each tensor or, of stacked matrices, of each matrix. That is enough to
        distinguish two models without reading them completely. Raises UserError if a file cannot be read.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        by_file: dict[Path, list[tuple[str, TensorInfo]]] = {}
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            by_file.setdefault(info.file, []).append((name, info))
        with ThreadPoolExecutor(8) as threads:  # on a network file system, each read waits for the network
            samples = {name: values for part in threads.map(_samples, by_file.values()) for name, values in part}
        digest = hashlib.sha256(read_bytes(self.directory / "config.json"))
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + samples[name])
        return digest.hexdigest()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:  # type: ignore[override]  # computed on first access
        """Every tensor of every shard, by name.

        Raises UserError if a shard is missing, corrupt or not in the index, if a tensor is in two shards, or if index
        and shards disagree on where a tensor is.
        """
        index = self.directory / "model.safetensors.index.json"
        weight_map: dict[str, str] | None = None
        shards = [self.directory / "model.safetensors"]
        if os.path.lexists(index):
            weight_map = _weight_map(index)
            shards = sorted({self.directory / shard for shard in weight_map.values()})
            if others := sorted({*self.directory.glob("*.safetensors")} - {*shards}):
                raise UserError(  # for example model.safetensors, which transformers would read instead
                    f"{others[0]}: is not listed in {index.name} beside it, so it is unclear which files hold the "
                    "model. Move the other files to another directory."
                )
        missing = [shard.name for shard in shards if not os.path.isfile(shard)]
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
        for name in () if weight_map is None else weight_map.keys() | tensors.keys():
            listed, found = (weight_map or {}).get(name), tensors[name].file.name if name in tensors else None
            if listed != found:
                raise UserError(
                    f"{index}: tensor {name} should be in {listed or 'no shard'}, but is in {found or 'none'}. "
                    "Get index and shards again, from the same revision."
                )
        return tensors

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor, or float32 if it is missing: layout.py reports all missing tensors at once."""
        return self.tensors[name].dtype if name in self.tensors else torch.float32

    def bytes_of(self, name: str, count: int) -> int:
        """Returns the bytes on disk of `count` elements of a tensor."""
        return count * self.tensors[name].dtype.itemsize


SAMPLE = 512  # bytes


def _samples(tensors: list[tuple[str, TensorInfo]]) -> list[tuple[str, bytes]]:
    """Returns the sampled bytes of each tensor of one file, as `Checkpoint.fingerprint` describes them."""
    out = []
    with opened(tensors[0][1].file) as file:
        for name, info in tensors:
            stack = info.shape[0] if len(info.shape) == 3 and info.shape[0] else 1
            size = math.prod(info.shape) * info.dtype.itemsize // stack
            taken = min(SAMPLE, size)
            starts = (info.offset + index * size + (size - taken) // 2 for index in range(stack))
            out.append((name, b"".join(os.pread(file.fileno(), taken, start) for start in starts)))
    return out


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the file name of each tensor's shard from model.safetensors.index.json. Raises UserError if invalid."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and "/" not in shard and shard.endswith(".safetensors") for shard in weight_map.values()
    ):
        raise UserError(f"{index}: weight_map must give a file *.safetensors of this directory for each tensor.")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the TensorInfo of each tensor in one file, by name.

    Raises UserError if the header is invalid, or if the tensors do not fill the file without gaps or overlaps.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or length > LONGEST_HEADER:
            raise UserError(f"{path}: truncated within its header ({size} bytes). Get the file again.")
        try:
            header = parse_json(file.read(length).decode("utf-8"), strictly=True)
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = {name: (*entry["data_offsets"],) for name, entry in entries.items()}
            shapes = {name: (*entry["shape"],) for name, entry in entries.items()}
            if not all(type(n) is int and n >= 0 for numbers in (*spans.values(), *shapes.values()) for n in numbers):
                raise ValueError("sizes are whole numbers")
            ordered = sorted((begin, end, name) for name, (begin, end) in spans.items())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path}: its header is not valid safetensors. Get the file again.") from None
    tensors, position = {}, 0
    for begin, end, name in ordered:
        dtype = DTYPES.get(str(entries[name].get("dtype")))
        if dtype is None:
            raise UserError(
                f"{path}: tensor {name} has dtype {entries[name].get('dtype')}; known are {', '.join(DTYPES)}."
            )
        if begin != position or end - begin != math.prod(shapes[name]) * dtype.itemsize:
            raise UserError(
                f"{path}: tensor {name} lies at bytes {begin} to {end}, where {entries[name]['dtype']} "
                f"{list(shapes[name])} at byte {position} belongs; the file is corrupt. Get it again."
            )
        tensors[name], position = TensorInfo(path, dtype, shapes[name], 8 + length + begin), end
    if (end_of_data := 8 + length + position) != size:
        cut = next((f", within tensor {name}" for _, end, name in ordered if 8 + length + end > size), "")
        raise UserError(
            f"{path}: {size} bytes, but its header says {end_of_data}: the file is truncated{cut} or corrupt. "
            "Get it again."
        )
    return tensors
