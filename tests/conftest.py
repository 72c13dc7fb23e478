"""Fixtures of several test modules: directories with real vocabularies, written once a run, and real documents.

And what ends a test that would not end by itself, or would take all memory."""

import contextlib
import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if not Path("/proc/driver/nvidia").exists():  # for tests/fused: decided when it is first imported, which torch does too
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton.experimental.gluon.language  # noqa: F401
    del os.environ["TRITON_INTERPRET"]

import psutil
import pytest
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from tests.support.real_model import SHARED
from tests.support.vocabularies import write_kimi_tokenizer, write_qwen_tokenizer
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.layers.mixing import bind

pytest_plugins = ["tests.support.processor_time"]
MOST_MEMORY, MOST_SECONDS = 8e9, 1200  # of the process that runs the tests; of a test with its fixtures


class TakesTooMuch(BaseException):
    """No Exception, which code under test may catch."""


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGXCPU, _too_much)
    if SHARED not in os.environ:  # as it is in those that another process has run the tests
        os.environ[SHARED] = tempfile.mkdtemp(prefix="spanwise-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED)))


def _too_much(*_: object) -> None:
    used = psutil.Process().memory_info().rss
    raise TakesTooMuch(f"takes more than {MOST_MEMORY / 1e9:.0f} GB ({used / 1e9:.1f}) or {MOST_SECONDS} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Interrupts the test itself, so that its report shows where it was."""
    done, main = threading.Event(), threading.main_thread().ident or 0

    def watch() -> None:
        process, deadline = psutil.Process(), time.monotonic() + MOST_SECONDS
        while not done.wait(0.5):
            if process.memory_info().rss > MOST_MEMORY or time.monotonic() > deadline:
                signal.pthread_kill(main, signal.SIGXCPU)
                done.wait(30)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return (yield)
    finally:
        done.set()
        watcher.join()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that files run side by side end together: those of tests/slurm, which mostly wait,
    and then by how many of their tests are slow."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "slurm", -slow[item.path]))


def pytest_collection_finish() -> None:
    """What is imported stays: collections need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _stock_models_run_on_cpus() -> None:
    """transformers' own Qwen3.5, too, where a GPU's kernels are installed."""
    bind(modeling_qwen3_5_moe)


@pytest.fixture(scope="session")
def qwen_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen")
    write_qwen_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def kimi_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kimi")
    write_kimi_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def qwen(qwen_directory: Path) -> Tokenizer:
    return load_tokenizer(qwen_directory)


@pytest.fixture(scope="session")
def kimi(kimi_directory: Path) -> Tokenizer:
    return load_tokenizer(kimi_directory)


@pytest.fixture(scope="session", params=["qwen", "kimi"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A fast tokenizer with offsets that normalizes (Qwen), then one without offsets (Kimi)."""
    return request.getfixturevalue(request.param)


def shared(*parts: str) -> Path:
    """A directory that stands beside the project, and is no part of it."""
    directory = Path(__file__).parents[2].joinpath("shared", *parts)
    if not directory.is_dir():
        pytest.skip(f"../shared/{parts[0]} is absent")
    return directory


@pytest.fixture(scope="session")
def shared_documents() -> Path:
    """The paper's own documents."""
    return shared("data", "negation_neglect", "documents")


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """Small inputs from real use."""
    return shared("cases")


@pytest.fixture(scope="session")
def shared_checkpoints() -> Path:
    """The configurations of the real checkpoints."""
    return shared("checkpoints")
