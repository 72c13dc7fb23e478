"""The network between all ranks of a job, tried before it is relied on: every rank in a process of its own, over NCCL
where there are GPUs and gloo where there are none.

    python -m launch.network    # one rank; preflight.py starts them, and says in the environment which one it is

A rank prints a line of JSON as it leaves a stage, so that after a time limit it is known where each one stood. What
hangs in a collective can only be killed: hence processes that are not preflight's own.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from launch.interruption import interruption

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
MEBIBYTES = {"nccl": 256, "gloo": 8}  # of a rank's tensor
REPEATS = 3


def try_ranks(first: int, local: int, ranks: int, store: tuple[str, int], deadline: float) -> list[dict[str, Any]]:
    """Starts this node's ranks first, first+1, … and kills what is not done by the deadline (of time.monotonic).
    store: address of the TCPStore at which all ranks meet. -> of each rank: the stages that it has left, with
    GB/s of the collectives; `standing`, the stage that it has not left; `error`, the last line that it said of it."""
    environment = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": store[0], "MASTER_PORT": str(store[1]),
        "TIME_LIMIT": str(max(1, int(deadline - time.monotonic()))),
        "TORCHELASTIC_RUN_ID": "preflight",  # as a launcher's, ranks end when this process is gone
    }  # fmt: skip
    with ExitStack() as stack:
        started = []
        for index in range(local):
            own = {"RANK": str(first + index), "LOCAL_RANK": str(index)}
            # Files: a pipe that nobody reads fills up, with NCCL_DEBUG=INFO for one, and its rank would wait for ever.
            said = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(2)]
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.network"], env=os.environ | environment | own,
                stdin=subprocess.DEVNULL, stdout=said[0], stderr=said[1],
            )  # fmt: skip
            stack.callback(process.kill)  # where an interruption ends the wait for it
            started.append((process, said))
        found = []
        for index, (process, said) in enumerate(started):
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # one that a driver holds does not even end
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
    """GB/s over the busiest link, for tensors of `size` bytes a rank: 2 (n-1)/n of them for an all-reduce, (n-1)/n for
    an all-to-all (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, "bus bandwidth")."""
    share = (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)
    return share * size / seconds / 1e9


def main() -> None:
    """One rank, through every stage."""
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

    # 4,096 ones sum to a number that BF16 holds exactly.
    ones = torch.ones(4096 if backend == "nccl" else 256, 4096, dtype=torch.bfloat16, device=device)
    if not bool((ones @ ones.T == 4096).all()):
        raise RuntimeError("a product of matrices of ones is wrong: this device computes wrongly")
    _leave("computing", 0.0)

    count = MEBIBYTES[backend] * 2**18 // ranks * ranks
    x_N, y_N = torch.full((count,), rank + 1.0, device=device), torch.empty(count, device=device)
    dist.all_reduce(x_N)  # this first one also connects, and is not timed
    _check("all-reduce", x_N, torch.full_like(x_N, ranks * (ranks + 1) / 2))
    seconds = _seconds(lambda: dist.all_reduce(x_N), device)
    _leave("all-reduce", bandwidth("all-reduce", count * 4, ranks, seconds))

    x_N.fill_(rank)
    dist.all_to_all_single(y_N, x_N)
    _check("all-to-all", y_N, torch.arange(ranks, device=device).repeat_interleave(count // ranks).to(y_N))
    seconds = _seconds(lambda: dist.all_to_all_single(y_N, x_N), device)
    _leave("all-to-all", bandwidth("all-to-all", count * 4, ranks, seconds))

    exchange_with_zero_splits(ExpertGroup(ranks, rank, dist.group.WORLD), device)
    dist.barrier()  # a rank's memory is read by others until the last is done
    _settle(device)
    _leave("zero splits", 0.0)


def exchange_with_zero_splits(group: ExpertGroup, device: torch.device) -> None:
    """An all-to-all as tokens take it, in which the first rank sends nothing and the last one gets nothing, and one in
    which nobody sends anything."""
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
        raise RuntimeError(f"{kind}: what arrived is not what was sent")


def _seconds(collective: Callable[[], Any], device: torch.device) -> float:
    """The mean time of a call."""
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
