"""train/sft.py or train/evaluate.py with trouble on rank 1.

deepspeed troubled_worker.py sft|evaluate WHAT [flags]

WHAT: told to end by SIGUSR1 "in N", the second micro-batch of step N (1, 2, …), "after N", or while claims are measured
after step N, "measuring N"; or "hangs" where claims are measured. A save without --save-every is always due.
"""

if __name__ == "__main__":
    from train.runtime.interruption import interruption

    interruption.listen()

import os
import signal
import sys
import time
from typing import Any

from train import evaluate, sft
from train.evaluation import in_engine
from train.runtime.command import leave
from train.runtime.interruption import interruption
from train.training import trainer
from train.training.run import Run
from train.training.trainer import Trainer

plain_check, plain_log, plain_evaluate = Trainer._check, Run.log, Trainer.evaluate
checked: list[int] = []


def be_told() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    while not interruption.told:
        time.sleep(0.01)


def check(self: Trainer, loss: Any, step: int, batch: Any) -> None:
    checked.append(step + 1)
    if what == f"in {step + 1}" and checked.count(step + 1) == 2:
        be_told()
    plain_check(self, loss, step, batch)


def log(self: Run, values: dict[str, Any]) -> None:
    plain_log(self, values)
    if what == f"after {values['step']}":
        be_told()


def evaluate_claims(self: Trainer, run: Run, step: int, known: Any = None) -> None:
    if what == f"measuring {step}":
        be_told()
    plain_evaluate(self, run, step, known)


def hang(*given: Any) -> Any:
    time.sleep(600)


if __name__ == "__main__":
    script, what, *flags = [flag for flag in sys.argv[1:] if not flag.startswith("--local_rank")]
    trainer.SAVE_SECONDS = 0
    if os.environ["RANK"] == "1":
        if what == "hangs":
            in_engine.measure = hang
        Trainer._check, Run.log, Trainer.evaluate = check, log, evaluate_claims  # type: ignore[method-assign]
    leave({"sft": sft, "evaluate": evaluate}[script].main(flags))
