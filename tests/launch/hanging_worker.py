"""Ranks that count together until rank 1 hangs, in one of several ways. Started by test_watchdog.py.

deepspeed --num_gpus 3 tests/launch/hanging_worker.py LIMIT HOW
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from launch.distributed import leave, start_distributed
from launch.watchdog import progress


def rank_1_hangs(how: str) -> None:
    """Python that goes on with something else, or a process that is stopped."""
    if how == "sleeps":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    _, limit, how = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    rank = int(os.environ["RANK"])
    if how == "never comes" and rank == 1:
        time.sleep(600)
    start_distributed(timeout=float(limit))
    for step in range(4):
        if rank == 2 and how == "is slow":
            for _ in range(6):  # three times the limit in all, but it gets on
                time.sleep(float(limit) / 2)
                progress(f"step {step}")
        if step == 3 and how in ("sleeps", "is stopped") and rank == (0 if limit.endswith(".5") else 1):
            rank_1_hangs(how)
        progress(f"step {step}")
        dist.all_reduce(torch.ones(1))
        if step == 0 and how == "is slow":
            break
    leave(0)
