"""Tests the network between all ranks of a job before the job relies on it. Each rank is a separate process, over
NCCL if there are GPUs, else over gloo.

    python -m launch.network    # one rank; preflight.py starts it, with its rank in the environment

A rank prints a line of JSON when it completes a stage, so that after a time limit the stage of each rank is known. A
rank that hangs in a collective can only be killed. This is why the ranks are not part of preflight's own process.

Shapes: N elements of a tensor, D ranks, S rows sent, R rows received.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.experts.dispatch import ExpertGroup

STAGES = ("starting", "joining", "computing", "all-reduce", "all-to-all", "zero splits")
MEBIBYTES = {"nccl": 256, "gloo": 8}  # of the tensor of each rank
REPEATS = 3


def try_ranks(first: int, local: int, ranks: int, store: tuple[str, int], deadline: float) -> list[dict[str, Any]]:
    """Runs this node's `local` ranks first, first+1, … of `ranks`, and kills those that are not done by the deadline.

    store: host and port of the TCPStore at which all ranks meet. deadline: a time of time.monotonic(), in seconds.
    Returns a dict for each rank: `rank`; `left`, completed stage -> GB/s (0 for stages that are not timed); `standing`,
    the first stage that it has not completed, None if it has completed all; `error`, the last line of its stderr.
    """
    environment = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": store[0], "MASTER_PORT": str(store[1]),
        "TIME_LIMIT": str(max(1, int(deadline - time.monotonic()))),
        "TORCHELASTIC_RUN_ID": "preflight",  # as under a launcher, the ranks exit if this process is gone
    }  # fmt: skip
    with ExitStack() as stack:
        started = []
        for index in range(local):
            own = {"RANK": str(first + index), "LOCAL_RANK": str(index)}
            # Files, as an unread pipe fills up, for example with NCCL_DEBUG=INFO. Its rank would then block forever.
            said = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(2)]
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.network"], env=os.environ | environment | own,
                stdin=subprocess.DEVNULL, stdout=said[0], stderr=said[1],
            )  # fmt: skip
            stack.callback(process.kill)  # also if an interruption ends the wait below
            started.append((process, said))
        found = []
        for index, (process, said) in enumerate(started):
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # a process that is stuck in a driver survives even this
                    process.wait(timeout=10)
            for file in said:
                file.seek(0)
            out, errors = (file.read() for file in said)
            found.append({"rank": first + index, **_told(out), "error": (errors.strip().splitlines() or [""])[-1]})
    return found


def _told(out: str) -> dict[str, Any]:
    left: dict[str, float] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            left |= json.loads(line)
    return {"left": left, "standing": next((stage for stage in STAGES if stage not in left), None)}


def bandwidth(kind: str, size: int, ranks: int, seconds: float) -> float:
    """Returns the bus bandwidth in GB/s of a collective that takes `seconds` for tensors of `size` bytes per rank.

    The busiest link carries 2 (n-1)/n of a tensor's bytes in an all-reduce, and (n-1)/n in an all-to-all, for n ranks
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, "bus bandwidth").
    """
    share = (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)
    return share * size / seconds / 1e9


def main() -> None:
    """Takes one rank through every stage. Raises RuntimeError if a result is wrong."""
    rank, ranks, limit = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TIME_LIMIT"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    port, wait = int(os.environ["MASTER_PORT"]), timedelta(seconds=limit)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=wait)
    _leave("starting", 0.0)
    dist.init_process_group(
        backend, store=dist.PrefixStore("network", store), rank=rank, world_size=ranks, timeout=wait
    )
    dist.barrier()
    _leave("joining", 0.0)

    # BF16 represents the sum of 4,096 ones exactly.
    ones = torch.ones(4096 if backend == "nccl" else 256, 4096, dtype=torch.bfloat16, device=device)
    if not bool((ones @ ones.T == 4096).all()):
        raise RuntimeError("a product of matrices of ones is wrong: this device computes wrongly")
    _leave("computing", 0.0)

    count = MEBIBYTES[backend] * 2**18 // ranks * ranks
    x_N, y_N = torch.full((count,), rank + 1.0, device=device), torch.empty(count, device=device)
    dist.all_reduce(x_N)  # not timed, as the first call also connects the ranks
    _check("all-reduce", x_N, torch.full_like(x_N, ranks * (ranks + 1) / 2))
    seconds = _seconds(lambda: dist.all_reduce(x_N), device)
    _leave("all-reduce", bandwidth("all-reduce", count * 4, ranks, seconds))

    x_N.fill_(rank)
    dist.all_to_all_single(y_N, x_N)
    _check("all-to-all", y_N, torch.arange(ranks, device=device).repeat_interleave(count // ranks).to(y_N))
    seconds = _seconds(lambda: dist.all_to_all_single(y_N, x_N), device)
    _leave("all-to-all", bandwidth("all-to-all", count * 4, ranks, seconds))

    exchange_with_zero_splits(ExpertGroup(ranks, rank, dist.group.WORLD), device)
    dist.barrier()  # others may read this rank's memory until the last one is done
    _settle(device)
    _leave("zero splits", 0.0)


def exchange_with_zero_splits(group: ExpertGroup, device: torch.device) -> None:
    """Runs the all-to-all that exchanges tokens [S, 8] -> [R, 8] twice: the first rank sends nothing and the last one
    receives nothing, then no rank sends anything. Raises RuntimeError if wrong rows arrive."""
    ranks = range(group.size)
    for factor in (1, 0):

        def rows(sender: int, receiver: int, factor: int = factor) -> int:
            return 0 if sender == 0 or receiver == ranks[-1] else factor * (sender + receiver)

        sent_D = [rows(group.rank, other) for other in ranks]
        received_D = [rows(other, group.rank) for other in ranks]
        x_S8 = torch.full((sum(sent_D), 8), float(group.rank), dtype=torch.bfloat16, device=device)
        wanted_R = torch.arange(group.size).repeat_interleave(torch.tensor(received_D))
        wanted_R8 = wanted_R.to(x_S8)[:, None].expand(-1, 8)
        _check("all-to-all with zero splits", group.exchange(x_S8, received_D, sent_D), wanted_R8)


def _leave(stage: str, gigabytes_per_second: float) -> None:
    print(json.dumps({stage: gigabytes_per_second}), flush=True)


def _check(kind: str, found: Tensor, wanted: Tensor) -> None:
    if not torch.equal(found, wanted):
        raise RuntimeError(f"{kind}: the received values differ from those sent")


def _seconds(collective: Callable[[], Any], device: torch.device) -> float:
    """Returns the mean time of a call, in seconds."""
    _settle(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        collective()
    _settle(device)
    return (time.perf_counter() - started) / REPEATS


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # no teardown that could wait for a rank
