"""The watchdog on real ranks, of which one hangs, is stopped, or never starts."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.ranks import Forked, run
from train.runtime.local import free_port
from train.runtime.watchdog import ranks_behind

WORKER = Path(__file__).with_name("hanging_worker.py")


def ranks(directory: Path, *arguments: str) -> list[Forked]:
    """The two ranks of the worker, started."""
    directory.mkdir()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Forked(
            WORKER,
            str(directory),
            *arguments,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_hangs_or_is_stopped_end_and_name_it_but_not_for_one_that_is_slow(tmp_path):
    cases = [
        *[("1", "hangs"), ("1", "hangs with others elsewhere"), ("1", "is stopped"), ("0", "is stopped")],
        *[("1", "comes"), ("1", "gets on"), ("1", "is cut off")],
    ]
    slow = {"gets on", "is cut off"}
    jobs = {case: ranks(tmp_path / " ".join(case), "5", *case) for case in cases}
    try:
        said, blamed = {}, {}
        for (hanging, how), job in jobs.items():
            waiting = job[1 - int(hanging)]
            said[hanging, how] = waiting.communicate(timeout=300)[1]
            assert waiting.returncode == (0 if how in slow else 1), said[hanging, how]
            if how == "is stopped":
                stopped, continued = job[int(hanging)], time.monotonic()
                stopped.send_signal(signal.SIGCONT)
                blamed[hanging] = stopped.communicate(timeout=300)[1], time.monotonic() - continued
                assert stopped.returncode
    finally:
        for job in jobs.values():
            for process in job:
                process.kill()

    elsewhere = said["1", "hangs with others elsewhere"]
    assert "rank 1 kept the others waiting" in elsewhere and "all_reduce" not in elsewhere
    hangs = said["1", "hangs"]
    assert "no rank has made progress for 5 s (--timeout): rank 1 kept the others waiting." in hangs
    assert "rank 1: step 2, in tests/runtime/hanging_worker.py:" in hangs
    assert "in all_reduce" in hangs  # its own stack
    assert "rank 1 did not respond" in said["1", "is stopped"]
    assert "rank 1: step 2, in tests" in said["1", "is stopped"]
    assert "rank 0, which hosts the store shared by the ranks, does not answer" in said["0", "is stopped"]
    assert "rank 1 did not respond" in said["1", "comes"] and "rank 1: no status received" in said["1", "comes"]
    assert not any("no rank has made progress" in said["1", how] for how in slow)
    # A rank that was stopped does not count that time: it finds the other one gone, or waits for the whole limit.
    assert not any("no rank has made progress" in text and seconds < 5 for text, seconds in blamed.values())


def test_the_rank_to_blame_is_the_one_that_others_wait_for_and_that_waits_for_none():
    together = {"groups": 4, "0/0": 10, "1/0": 5}
    assert ranks_behind({0: together, 1: together}) == []
    assert ranks_behind({0: together, 1: together | {"0/0": 9}}) == [1]
    # Two groups of two within all four: rank 3 has not come to the exchange of its group, for which rank 2 waits. So
    # neither is at the next collective of all, for which ranks 0 and 1 wait.
    first, second = {"groups": 4, "0/0": 11, "1/0": 5}, {"groups": 4, "0/0": 10, "2/2": 5}
    assert ranks_behind({0: first, 1: first, 2: second, 3: second | {"2/2": 4}}) == [3]
    # NCCL's do not keep a rank's host waiting, so that rank 2 may have issued it all the same.
    assert ranks_behind({0: first, 1: first, 2: second | {"0/0": 11}, 3: second | {"2/2": 4}}) == [3]
    # A rank that creates no group, for which all wait.
    assert ranks_behind({0: {"groups": 2, "0/0": 3}, 1: {"groups": 1, "0/0": 3}}) == [1]


def test_every_group_waits_as_long_as_the_watchdog_lets_it(tmp_path):
    """Also those that DeepSpeed creates for experts."""
    code = """
import torch.distributed as dist
from torch import device
from torch.distributed import distributed_c10d
from train.runtime.distributed import start_distributed
from train.model.text_model import create_expert_group
start_distributed(timeout=60)
create_expert_group(1)
for group in distributed_c10d._world.pg_map:
    print("limit", group._get_backend(device("cpu")).options._timeout)
"""
    done = run("-c", code, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    limits = [line for line in done.stdout.splitlines() if line.startswith("limit")]
    assert len(limits) > 1 and set(limits) == {"limit 7 days, 0:00:00"}, done.stderr
