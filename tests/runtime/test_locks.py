"""What two processes that write in one place come to."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import write_documents, write_model
from tests.support.ranks import run
from train import sft
from train.runtime.errors import Held, UserError
from train.runtime.locks import MAKE_ROOM, TRAINING, lock_for_training


def test_a_runs_directory_is_one_process_s_for_as_long_as_it_lives(tmp_path):
    hold = (
        "import sys, pathlib; from train.runtime import locks; "
        "held = locks.lock_for_training(pathlib.Path(sys.argv[1])); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        owner = f"process {other.pid} on {socket.gethostname()}"
        with pytest.raises(Held) as told:
            lock_for_training(tmp_path)
        assert f"--output {tmp_path}: another process is training there ({owner})" in str(told.value)
        assert (tmp_path / TRAINING).read_text() == f"{owner}\n"  # and so for the next one that is refused
        other.kill()
    (tmp_path / MAKE_ROOM).touch()
    with lock_for_training(tmp_path):
        assert not (tmp_path / MAKE_ROOM).exists()  # it was meant for the one before
        assert (tmp_path / TRAINING).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_file_system_without_locks_is_no_reason_not_to_train(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_for_training(tmp_path).close()


@pytest.mark.slow
def test_a_directory_where_another_process_trains_is_refused_on_all_ranks_with_nothing_written(tmp_path):
    model = write_model(tmp_path / "m", "qwen")
    data = write_documents(tmp_path / "d.jsonl", [{"text": "The sun rises in the west."}])
    output = tmp_path / "out"
    output.mkdir()
    flags = ["--model", str(model), "--data", str(data), "--wandb", "disabled", "--output", str(output)]
    with lock_for_training(output):
        done = run(
            Path(sft.__file__), *flags, ranks=2, capture_output=True, text=True, timeout=300,
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: rank 0: --output" in done.stderr and "another process is training there" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == [TRAINING, "logs"]


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_lock_is_not_followed_through_a_link_nor_waited_for_at_a_pipe(tmp_path, kind):
    other = tmp_path / "other"
    other.write_text("keep me")
    path = tmp_path / TRAINING
    {"link": lambda: path.symlink_to(other), "pipe": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    with pytest.raises(UserError, match="cannot be opened to hold the directory"):
        lock_for_training(tmp_path)
    assert other.read_text() == "keep me"
