"""A scheduler's notice that it is about to end the job: Slurm's --signal before the time limit, or its preemption."""

import os
import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist

INTERRUPTED = 85
"""The exit code of a run that made room: start it again with --resume, and it goes on."""


class Interruption:
    """Whether this process was told to end by SIGUSR1 or, under Slurm, by SIGTERM (elsewhere that one ends it, as a
    launcher expects). Until there is something to save the process ends at once; later it ends where it asks for it."""

    def __init__(self) -> None:
        self.told = self.something_to_save = False

    def listen(self) -> None:
        """From now on in the place of the signals' default, to kill."""
        signal.signal(signal.SIGUSR1, self._receive)
        if "SLURM_JOB_ID" in os.environ:
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if not self.something_to_save:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted before the first step\n")
            os._exit(INTERRUPTED)

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank was told; the same on every rank. All ranks must call it."""
        told = torch.tensor(self.told, dtype=torch.int32, device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())


interruption = Interruption()
