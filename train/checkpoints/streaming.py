"""Reads a checkpoint into a ZeRO-3, expert-parallel model. Each rank reads only what it keeps.

A ZeRO-3 parameter is materialized as a shard: each rank reads its range of elements, and the full tensor never exists.
Expert weights are read matrix by matrix, only for the experts of this rank, directly into their final storage format
(storage.py). Weights that are to be quantized are quantized as they are read, on the GPU if there is one.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from torch import Tensor, nn
from tqdm import tqdm

from train.checkpoints.layout import ExpertPiece, LoadPlan, Piece, Range
from train.checkpoints.reader import Checkpoint
from train.experts.storage import FrozenExperts, NF4Experts
from train.formats import fp8_decode_range
from train.runtime.distributed import peak_host_bytes
from train.runtime.watchdog import progress

HEAP_BLOCK = 2**25  # bytes; glibc never keeps larger blocks in its heap (DEFAULT_MMAP_THRESHOLD_MAX)
READERS = 4  # threads: a single reader gets only part of the throughput of a network file system


@dataclass
class Loaded:
    """What was loaded and its cost: the bytes read from disk, the seconds, and the peak host memory of the process so
    far in bytes."""

    plan: LoadPlan
    bytes_read: int
    seconds: float
    peak_host_bytes: int


def load(
    plan: LoadPlan, checkpoint: Checkpoint, method: str, ds_config: dict[str, Any], device: torch.device, show: bool
) -> Loaded:
    """Loads the weights of a planned model. All ranks must call this.

    method: lora, qlora or full. Dense weights become ZeRO-3 parameters, and with `full` so do the experts' weights;
    frozen experts are not partitioned and stay on their rank. show: print progress on the terminal. Raises UserError if
    a file cannot be read.
    """
    started = time.perf_counter()
    reads = plan.reads(dist.get_rank(), dist.get_world_size(), method)
    total = sum(checkpoint.bytes_of(read.name, read.count) for read in reads)
    loader = _Loader(plan, checkpoint, method, ds_config, device)
    with _freed_memory_goes_back(), tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, disable=not show, mininterval=0.5
    ) as bar, ThreadPoolExecutor(READERS) as pool:  # fmt: skip
        for work in (loader.dense(), loader.experts()):
            for count in pool.map(lambda task: task(), work):
                bar.update(count)
                progress("loading")
    checkpoint.close()
    return Loaded(plan, checkpoint.bytes_read, time.perf_counter() - started, peak_host_bytes())


@contextmanager
def _freed_memory_goes_back() -> Iterator[None]:
    """Makes glibc return freed memory to the system inside the context, and keep it for reuse afterwards.

    By default, glibc keeps freed blocks of up to 32 MiB in its heap. Small persistent blocks between them fragment the
    heap, so that a load would need a quarter more memory than what it loads. Inside the context, blocks of 256 KiB or
    more, such as an expert's matrix, are returned when freed. All threads share one heap, so that memory freed by one
    thread can be used by another.

    Afterwards, freed blocks stay with the process. A training step allocates and frees the same tensors again and
    again, and each would otherwise be mapped again, page by page. The threshold is then 32 MiB, the maximum to which
    glibc raises it dynamically unless it has been set (mallopt(3), M_MMAP_THRESHOLD). The heap does not shrink at the
    end of a step, because it would only grow again in the next one. launch/memory.py plans for the memory that this
    takes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    trim_threshold, mmap_threshold, arena_max, never = -1, -3, -8, -1
    libc.mallopt(mmap_threshold, 2**18)
    libc.mallopt(arena_max, 1)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, HEAP_BLOCK)
        libc.mallopt(trim_threshold, never)
        libc.malloc_trim(0)  # return what freed smaller blocks still occupy


class _Loader:
    """Creates the tasks of a load. Each task reads some bytes into their final location and returns their number."""

    def __init__(self, plan, checkpoint, method, ds_config, device):
        self.plan, self.checkpoint, self.method, self.device = plan, checkpoint, method, device
        self.init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config, dtype=torch.float32)

    def read(self, read: Range, into: Tensor | None = None) -> Tensor:
        """Returns the elements on the CPU, in a new tensor [read.count] unless `into` (any shape) can be used.

        `into` is filled and returned if it is on the CPU and has the elements' dtype.
        """
        dtype = self.checkpoint.tensors[read.name].dtype
        if into is None or into.device.type != "cpu" or into.dtype != dtype:
            into = torch.empty(read.count, dtype=dtype)
        self.checkpoint.read(read.name, read.start, into.view(-1))
        return into

    def bytes_of(self, reads: dict[str, Range]) -> int:
        """Returns the bytes on disk of all these ranges."""
        return sum(self.checkpoint.bytes_of(read.name, read.count) for read in reads.values())

    # Dense weights and buffers

    def dense(self) -> Iterator[Callable[[], int]]:
        """Yields a task for each dense weight, which reads this rank's partition, and each buffer, which reads all."""
        for piece in self.plan.dense:
            yield self._partition(piece)
        for piece in self.plan.buffers:
            yield self._buffer(piece)

    def _partition(self, piece: Piece) -> Callable[[], int]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        dtype = self.plan.dtype if self.method == "full" else piece.dtype
        parameter = self._born_partitioned(piece.shape, dtype, {})
        for module, name in [(piece.module, piece.target), *piece.tied]:
            module._parameters[name] = parameter
        reads, own = piece.reads(rank, ranks), piece.partition(rank, ranks)

        def fill() -> int:
            place = parameter.ds_tensor.detach()[: len(own)]
            if piece.format.kind == "fp8" and own:
                raw, scale = (self.read(read) for read in reads.values())
                values = fp8_decode_range(raw, scale, piece.format.block, own.start, piece.shape[1])
            else:
                values = self.read(reads[""], into=place)
            if values is not place:
                place.copy_(values)
            return self.bytes_of(reads)

        return fill

    def _buffer(self, piece: Piece) -> Callable[[], int]:
        def fill() -> int:
            reads = piece.reads(0, 1)
            piece.module._buffers[piece.target] = self.read(reads[""]).view(piece.shape).to(self.device)
            return self.bytes_of(reads)

        return fill

    def _born_partitioned(self, shape: tuple[int, ...], dtype: torch.dtype, tags: dict[str, Any]) -> Any:
        """Returns a ZeRO-3 parameter materialized as a shard: its ds_tensor is this rank's partition, all zeros.

        tags: for an expert weight, attributes that name the group over which it is partitioned; else empty.
        """
        nothing = torch.empty((), dtype=dtype, device=self.device).expand(shape)
        parameter: Any = nn.Parameter(nothing, requires_grad=self.method == "full")
        for name, value in tags.items():
            setattr(parameter, name, value)
        self.init._convert_to_deepspeed_param(parameter)
        ranks = dist.get_world_size(parameter.ds_process_group)
        partition: Any = torch.zeros(parameter.aligned_size() // ranks, dtype=dtype, device=self.device)
        partition.ds_numel, partition.status = partition.numel(), PartitionedParamStatus.AVAILABLE
        partition.final_location = None
        parameter.ds_tensor, parameter.ds_numel_aligned = partition, parameter.aligned_size()
        free_param(parameter)
        return parameter

    # Experts

    def experts(self) -> Iterator[Callable[[], int]]:
        """Yields the tasks for every weight of this rank's experts, in its final storage format."""
        for piece in self.plan.experts:
            if self.method == "full":
                yield from self._trained(piece)
            elif becomes_nf4(piece, self.method):
                yield from self._nf4(piece)
            else:
                yield from self._as_on_disk(piece)

    def _as_on_disk(self, piece: ExpertPiece) -> Iterator[Callable[[], int]]:
        owned = piece.module.ep.owned(piece.module.experts)
        storage = frozen_as_on_disk(piece, self.checkpoint, self.device)

        def fill(expert: int) -> int:
            done = 0
            for matrix, reads in enumerate(piece.reads(expert)):
                for suffix, place in storage.matrix_parts(expert - owned.start, matrix).items():
                    values = self.read(reads[suffix], into=place)
                    if values is not place:
                        place.copy_(values.view(place.shape))
                done += self.bytes_of(reads)
            return done

        for expert in owned:
            yield partial(fill, expert)

    def _nf4(self, piece: ExpertPiece) -> Iterator[Callable[[], int]]:
        owned = piece.module.ep.owned(piece.module.experts)
        storage = frozen_as_nf4(piece, self.device)
        shapes = piece.format.tensors(*piece.matrix_shape)

        def fill(expert: int) -> int:
            matrices = piece.reads(expert)
            decoded = []
            for reads in matrices:
                raw = {suffix: self.read(read).view(shapes[suffix][1]) for suffix, read in reads.items()}
                decoded.append(piece.format.decode({suffix: part.to(self.device) for suffix, part in raw.items()}))
            storage.quantize(expert - owned.start, torch.cat(decoded) if len(decoded) > 1 else decoded[0])
            return sum(self.bytes_of(reads) for reads in matrices)

        for expert in owned:
            yield partial(fill, expert)

    def _trained(self, piece: ExpertPiece) -> Iterator[Callable[[], int]]:
        owned = piece.module.ep.owned(piece.module.experts)
        shape = len(owned), *piece.module.shapes()[piece.target][1:]
        parameter = self._born_partitioned(shape, self.plan.dtype, piece.module.ep.zero3_tags())
        piece.module.register_parameter(piece.target, parameter)

        def fill(place: int, read: Range) -> int:
            parameter.ds_tensor[place : place + read.count].copy_(self.read(read))
            return self.checkpoint.bytes_of(read.name, read.count)

        ep = piece.module.ep
        for place, read in piece.partition_reads(dist.get_rank() // ep.size, dist.get_world_size() // ep.size):
            yield partial(fill, place, read)


def becomes_nf4(piece: ExpertPiece, method: str) -> bool:
    """Whether a frozen weight is quantized to NF4 as it is read. INT4 weights keep their format."""
    return method == "qlora" and piece.format.kind != "int4"


def frozen_as_on_disk(piece: ExpertPiece, checkpoint: Checkpoint, device: torch.device) -> FrozenExperts:
    """Allocates and returns storage for this rank's experts in the checkpoint's own format, as part of the module."""
    owned = piece.module.ep.owned(piece.module.experts)
    storage = FrozenExperts(len(owned), *piece.module.shapes()[piece.target][1:])
    (first, *_) = piece.reads(owned.start)
    dtypes = {suffix: checkpoint.tensors[read.name].dtype for suffix, read in first.items()}
    storage.allocate(piece.format, len(piece.matrices), dtypes, device)
    piece.module.frozen[piece.target] = storage
    return storage


def frozen_as_nf4(piece: ExpertPiece, device: torch.device) -> NF4Experts:
    """Allocates and returns NF4 storage for this rank's experts, as part of the module."""
    storage = NF4Experts(len(piece.module.ep.owned(piece.module.experts)), *piece.module.shapes()[piece.target][1:])
    storage.allocate(device)
    piece.module.frozen[piece.target] = storage
    return storage
