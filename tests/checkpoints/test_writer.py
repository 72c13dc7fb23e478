"""What a kill leaves: files and directories that are whole, or not there."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.checkpoints.resume import saves
from train.checkpoints.writer import SafetensorsWriter, remove
from train.runtime.outputs import write_whole


def killed(work: Callable[[], object], moment: Callable[[], bool]) -> None:
    """Does the work in a process of its own, and kills it at the first moment at which it is found so."""
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not moment() and time.monotonic() < deadline:
        pass
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])  # at work until then


def test_a_small_file_is_the_earlier_or_the_later_one_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    texts = [f"{letter}\n" * 2**20 for letter in "ab"]
    path.write_text(texts[0])

    def rewriting() -> None:
        while True:
            for text in texts:
                write_whole(path, text)

    for wait in (0.01, 0.02, 0.03, 0.05, 0.08):
        started = time.monotonic()
        killed(rewriting, lambda until=started + wait: time.monotonic() > until)
        assert path.read_text() in texts


def test_a_save_whose_removal_is_killed_is_no_save(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        for number in range(3000):
            (tmp_path / f"step-{step}" / str(number)).touch()
    killed(
        lambda: remove(tmp_path / "step-1"),
        lambda: sum(len(os.listdir(entry)) for entry in os.scandir(tmp_path)) < 6000,
    )
    left = [path.name for path in tmp_path.iterdir()]
    assert saves(tmp_path) == [tmp_path / "step-2"] and len(left) == 2  # and half of one that nobody counts


def test_a_file_is_not_taken_for_whole_when_elements_were_not_written(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors", {"x": (torch.float32, (2, 3)), "y": (torch.int8, ())})
    writer.write("x", torch.ones(4), 2)
    with pytest.raises(AssertionError, match=r"\{'x': 4, 'y': 0\}"):
        writer.check_whole()
    writer.write("x", torch.ones(2))
    writer.write("y", torch.tensor(7))
    writer.check_whole()
    writer.close()
    assert not Path(writer.path).exists()
    writer.publish()
    assert Path(writer.path).exists()
