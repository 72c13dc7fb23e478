"""The process group of a training job."""

import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from launch.watchdog import watch
from train.errors import UserError, refused


def memory_status() -> dict[str, int]:
    """Bytes of this process by /proc/self/status: VmRSS resident now, of which RssFile are files' pages, mostly
    libraries' code; VmHWM, the most that was resident so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def peak_host_bytes() -> int:
    """The peak resident set of this process so far."""
    if Path("/proc/self/status").exists():  # getrusage has the peak of the process that started this one in it
        return memory_status()["VmHWM"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_host_bytes() -> bool:
    """Makes the peak what is resident now. False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM (proc(5))
    except OSError:
        return False
    return True


def allocated_since_start() -> int:
    """The most that this process took for itself since it joined the others. What libraries' code takes when first
    used is not among it."""
    return peak_host_bytes() - memory_status()["RssFile"] - at_start


at_start = 0  # bytes that this process had taken when it joined the others, for imports and documents


def start_distributed(timeout: float = 0) -> torch.device:
    """Joins all ranks in one process group, over gloo where there is no GPU; a script started without the launcher is a
    group of one. The ranks of a node divide its cores among them. timeout: seconds after which the watchdog ends
    ranks none of which gets on; 0: without it, and with torch's limit for a collective. -> this rank's
    device."""
    # Nothing here is compiled: DeepSpeed, which compiles an optimizer that is not used, need not import the compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":  # or every rank would use the first GPU
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
    # An all-reduce for inference on CPUs, which training never calls. DeepSpeed would compile it first, for a minute,
    # and its link command does not hold where the path to .venv has a space.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = accelerator.communication_backend_name()
    if timeout:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = watch(rank, ranks, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
        # A rank may wait for another's slow load; whoever hangs is the watchdog's business.
        for_ever = timedelta(days=7)
        store.set_timeout(for_ever)
        # And so in the groups that DeepSpeed creates, which have torch's default.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = for_ever
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=for_ever)
    deepspeed.init_distributed(backend, verbose=False)
    global at_start
    at_start = memory_status()["VmRSS"] - memory_status()["RssFile"]
    return torch.device(accelerator.current_device_name())


@contextmanager
def failing_together() -> Iterator[None]:
    """What fails inside on one rank fails on every rank, at the end of the block: no rank waits for one that is gone,
    and rank 0, whose the terminal is, tells which rank it was. UserError stays UserError; of another exception the
    others raise a RuntimeError. All ranks must enter, and nothing inside may wait for another rank."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = refused(error) if isinstance(error, OSError) else error
    told: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    user = isinstance(own, UserError)
    dist.all_gather_object(
        told, own and ((type(own), str(own)) if user else (RuntimeError, f"{type(own).__name__}: {own}"))
    )
    failed = {rank: what for rank, what in enumerate(told) if what}
    if own and not user:
        raise own  # with its traceback
    if failed:
        rank, (kind, message) = next(iter(failed.items()))
        everywhere = len(failed) == len(told) and len(set(failed.values())) == 1
        raise kind(message if everywhere else f"rank {rank}: {message}") from own


def anywhere(own: torch.Tensor) -> list[bool]:
    """own: what holds on this rank, [n]. -> which of it holds on any rank; the same on every rank. All ranks must call
    it."""
    own = own.to(torch.int32)
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return [bool(held) for held in own.tolist()]


def lost_another(error: RuntimeError) -> int:
    """Where gloo or the ranks' store says that another rank's process is gone: tells it. -> the exit code. Raises any
    other error."""
    if not re.search(r"gloo.*Connection (closed|reset) by peer", str(error)) and not isinstance(
        error, dist.DistNetworkError
    ):
        raise error
    time.sleep(3)  # where it was told to end, the launcher tells this one too, which then ends as it did
    rank = os.environ["RANK"]
    print(
        f"error: rank {rank}: the process of another rank is gone. What ended it stands above or in its log.",
        file=sys.stderr,
    )
    return 1


def leave(code: int) -> NoReturn:
    """Ends a process at once: in the interpreter's own end, threads of gloo that still hold a tensor of Python's have
    been seen to abort it, so that its code was another, and a thread that a disk does not answer is waited for."""
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it may be gone
            file.flush()
    os._exit(code)
