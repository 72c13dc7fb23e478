"""A rank of two that count together until one of them hangs. Started by test_watchdog.py, with RANK and the like.

python hanging_worker.py DIRECTORY LIMIT RANK HOW    # which rank hangs, and how; DIRECTORY: where ranks meet first
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launch.distributed import leave, start_distributed
from launch.watchdog import progress

if __name__ == "__main__":
    directory, limit, hanging, how = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
    rank = os.environ["RANK"]
    (directory / rank).touch()
    while len(list(directory.iterdir())) < 2:  # imports take longer than the limit may
        time.sleep(0.01)
    if how == "comes" and rank == hanging:
        time.sleep(600)
    start_distributed(timeout=limit)
    for step in range(3):
        progress(f"step {step}")
        if step == 2 and rank == hanging:
            if how == "gets on":  # for twice the limit
                for _ in range(16):
                    time.sleep(limit / 8)
                    progress("a slow part")
            elif how == "is stopped":
                time.sleep(limit / 3)  # until it has been heard of
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                time.sleep(600)
        dist.all_reduce(torch.ones(1))
    leave(0)
