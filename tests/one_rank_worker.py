"""train/sft.py on ranks that each have a copy of the files, in RANK/; on rank 1 reading them goes wrong.

    deepspeed --num_gpus 2 tests/one_rank_worker.py cut|unreadable|broken [flags of train/sft.py]

cut: the first file that is read is cut before. unreadable: a directory takes its place, of which a read is an error.
broken: an exception that nobody foresaw.
"""

import os
import runpy
import sys
from typing import Any

from train import sft
from train.checkpoints.reader import Checkpoint


def spoil(kind: str) -> None:
    plain_read = Checkpoint.read

    def read(self: Checkpoint, name: str, start: int, out: Any) -> None:
        file = self.tensors[name].file
        if kind == "broken":
            raise ZeroDivisionError(name)
        if kind == "cut":
            os.truncate(file, 9)
        elif file.is_file():
            file.rename(file.with_suffix(".bad"))
            file.mkdir()
        plain_read(self, name, start, out)

    Checkpoint.read = read  # type: ignore[method-assign]


if __name__ == "__main__":
    rank = os.environ["RANK"]
    kind, *flags = [flag for flag in sys.argv[1:] if not flag.startswith("--local_rank")]
    os.chdir(rank)
    if rank == "1":
        spoil(kind)
    sys.argv[1:] = flags
    runpy.run_path(sft.__file__, run_name="__main__")
