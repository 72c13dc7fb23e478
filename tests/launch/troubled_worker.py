"""train/sft.py or train/evaluate.py with trouble on rank 1.

deepspeed troubled_worker.py sft|evaluate STEP|hangs [flags]

STEP: told to end by SIGUSR1 after it has trained step STEP (1, 2, …). hangs: where claims are measured.
"""

if __name__ == "__main__":
    from launch.interruption import interruption

    interruption.listen()

import os
import signal
import sys
import time
from typing import Any

from launch.distributed import leave
from launch.interruption import interruption
from train import evaluate, sft
from train.belief import in_engine
from train.trainer import Trainer

plain_step = Trainer.step


def step_and_be_told(self: Trainer, step: int, measure: bool) -> dict[str, Any]:
    values = plain_step(self, step, measure)
    if step + 1 == int(trouble):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not interruption.told:
            time.sleep(0.01)
    return values


def hang(*given: Any) -> Any:
    time.sleep(600)


if __name__ == "__main__":
    script, trouble, *flags = [flag for flag in sys.argv[1:] if not flag.startswith("--local_rank")]
    if os.environ["RANK"] == "1":
        if trouble == "hangs":
            in_engine.measure = hang
        else:
            Trainer.step = step_and_be_told  # type: ignore[method-assign]
    leave({"sft": sft, "evaluate": evaluate}[script].main(flags))
