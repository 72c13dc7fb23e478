"""The watchdog on real ranks, of which one hangs, is stopped, or never starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import free_port

WORKER = Path(__file__).with_name("hanging_worker.py")


def ranks(directory: Path, *arguments: str) -> list[subprocess.Popen]:
    """The two ranks of the worker, started."""
    directory.mkdir()
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory), *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_hangs_or_is_stopped_end_and_name_it_but_not_for_one_that_is_slow(tmp_path):
    cases = [("1", "hangs"), ("1", "is stopped"), ("0", "is stopped"), ("1", "comes"), ("1", "gets on")]
    jobs = {case: ranks(tmp_path / " ".join(case), "5", *case) for case in cases}
    try:
        said = {}
        for (hanging, how), job in jobs.items():
            waiting = job[1 - int(hanging)]
            said[hanging, how] = waiting.communicate(timeout=120)[1]
            assert waiting.returncode == (0 if how == "gets on" else 1), said[hanging, how]
    finally:
        for job in jobs.values():
            for process in job:
                process.kill()

    hangs = said["1", "hangs"]
    assert "no rank has got on for 5 s (--timeout): rank 1 kept the others waiting." in hangs
    assert "rank 1: step 2, in tests/launch/hanging_worker.py:" in hangs
    assert "in all_reduce" in hangs  # its own stack
    assert "rank 1 gave no sign of life" in said["1", "is stopped"]
    assert "rank 1: step 2, in tests" in said["1", "is stopped"]
    assert "rank 0, which keeps what ranks tell each other, does not answer" in said["0", "is stopped"]
    assert "rank 1 gave no sign of life" in said["1", "comes"] and "rank 1: never heard of" in said["1", "comes"]
    assert "no rank has got on" not in said["1", "gets on"]
