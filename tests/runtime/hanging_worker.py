"""A rank of two that count together until one of them hangs. Started by test_watchdog.py, with RANK and the like.

python hanging_worker.py DIRECTORY LIMIT RANK HOW    # which rank hangs, and how; DIRECTORY: where ranks meet first
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from train.runtime.command import leave
from train.runtime.distributed import start_distributed
from train.runtime.watchdog import progress, work_alone


def break_connections() -> None:
    """As a network does that fails for a moment: all to where ranks meet."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == int(os.environ["MASTER_PORT"]):
            with socket.socket(fileno=os.dup(connection.fd)) as to_the_store:
                to_the_store.shutdown(socket.SHUT_RDWR)


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
            until = time.monotonic() + 2 * limit
            if how == "gets on":
                while time.monotonic() < until:
                    time.sleep(limit / 8)
                    progress("a slow part")
            elif how == "is cut off":  # and works without a word
                break_connections()
                while time.monotonic() < until:
                    json.loads(json.dumps([{"number": number} for number in range(1000)]))
            elif how == "is stopped":
                time.sleep(limit / 3)  # until it has been heard of
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                time.sleep(600)
        if step == 2 and how == "hangs with others elsewhere":  # as ranks whose collectives a GPU waits for
            issued = dist.all_reduce(torch.ones(1), async_op=True)
            while not issued.is_completed():
                time.sleep(600)
        else:
            dist.all_reduce(torch.ones(1))
    if how == "gets on" and rank != hanging:  # the other one leaves
        work_alone()
        time.sleep(2 * limit)
    leave(0)
