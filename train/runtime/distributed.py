"""Sets up and shuts down the process group of a training job, and reports errors across its ranks."""

import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from train.runtime.errors import UserError, refused
from train.runtime.watchdog import watch


def memory_status() -> dict[str, int]:
    """Returns the memory counters of this process from /proc/self/status (proc(5)), in bytes. VmRSS is the resident set
    now. RssFile is its file-backed part, mostly code of libraries. VmHWM is the peak of the resident set so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def peak_host_bytes() -> int:
    """Returns the peak resident set of this process so far, in bytes."""
    if Path("/proc/self/status").exists():  # getrusage includes the peak of the parent process
        return memory_status()["VmHWM"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_host_bytes() -> bool:
    """Resets the peak resident set to the current one. Returns False if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM (proc(5))
    except OSError:
        return False
    return True


def allocated_since_start() -> int:
    """Returns the peak memory, in bytes, that this process has allocated since it joined the process group. Excludes
    file-backed pages: code of libraries becomes resident only on first use."""
    return peak_host_bytes() - memory_status()["RssFile"] - at_start


at_start = 0  # bytes that imports and documents took before this process joined the process group


def start_distributed(timeout: float = 0) -> torch.device:
    """Joins all ranks in one process group and returns the device of this rank. The backend is gloo if there is no GPU.
    A script started without the launcher forms a group of one rank. Unless OMP_NUM_THREADS is set, the ranks of a node
    share its CPU cores equally. timeout: the watchdog ends the job after this many seconds in which no rank makes
    progress; 0 starts no watchdog and keeps torch's timeout for collectives. Raises RuntimeError if rank 0 cannot be
    reached within the timeout."""
    # Nothing here is compiled. DeepSpeed would import the compiler for an optimizer that is not used.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":  # otherwise every rank would use the first GPU
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
    # An all-reduce for inference on CPUs, which training never calls. DeepSpeed would first compile it for a minute,
    # and its link command fails if the path to .venv contains a space.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = accelerator.communication_backend_name()
    if timeout:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = watch(rank, ranks, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
        # A rank may have to wait while another one loads slowly. Detecting a hang is the watchdog's job.
        for_ever = timedelta(days=7)
        store.set_timeout(for_ever)
        # The groups that DeepSpeed creates use torch's default timeout.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = for_ever
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=for_ever)
    deepspeed.init_distributed(backend, verbose=False)
    global at_start
    at_start = memory_status()["VmRSS"] - memory_status()["RssFile"]
    return torch.device(accelerator.current_device_name())


@contextmanager
def failing_together() -> Iterator[None]:
    """Makes every rank fail at the end of the block if one rank failed inside it. So no rank waits for one that is
    gone, and rank 0, which owns the terminal, reports which rank failed. A UserError is raised as its own type on all
    ranks, and an OSError as the UserError of `refused`. For any other exception, the other ranks raise a RuntimeError.
    All ranks must enter the block, and nothing inside it may wait for another rank."""
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
        raise own  # keeps its traceback
    if failed:
        rank, (kind, message) = next(iter(failed.items()))
        everywhere = len(failed) == len(told) and len(set(failed.values())) == 1
        raise kind(message if everywhere else f"rank {rank}: {message}") from own


def anywhere(own: torch.Tensor) -> list[bool]:
    """Returns, for each of n flags, whether it is set on any rank; the result is the same on every rank. own: the flags
    of this rank, [n], on its device. All ranks must call it."""
    own = own.to(torch.int32)
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return [bool(held) for held in own.tolist()]


def lost_another(error: RuntimeError) -> int:
    """Reports that the process of another rank is gone, and returns the exit code. This applies to an error by which
    gloo or the TCP store says so. Re-raises any other error."""
    if not re.search(r"gloo.*Connection (closed|reset) by peer", str(error)) and not isinstance(
        error, dist.DistNetworkError
    ):
        raise error
    time.sleep(3)  # if that rank was asked to shut down, the launcher asks this one too, which then ends alike
    rank = os.environ["RANK"]
    print(
        f"error: rank {rank}: the process of another rank has exited. The cause is above or in its log.",
        file=sys.stderr,
    )
    return 1


def from_first_rank(value: Any) -> Any:
    """Broadcasts the value of rank 0 and returns it on every rank. Use it for what ranks may see differently: their
    clocks differ, and network file systems show new files late. The value must be picklable. All ranks must call it."""
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]
