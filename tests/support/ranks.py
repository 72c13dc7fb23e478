"""Starts scripts by forks of one process that has imported what takes long: on ranks, as DeepSpeed's launcher does, or
alone, as `python` does.

A start by the launcher takes 18 s of processor time before the first step, and one by `python` 4 to 8, almost all of it
imports. A fork has them done: it runs the script's own file, as the launcher's child would, with the same arguments and
environment. What is about the launcher itself is tested with the launcher itself (`train.runtime.local.run`), and what
is about the imports with a fresh interpreter.
"""

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, TextIO

from train.runtime.local import free_port

REPOSITORY = Path(__file__).parents[2]
IMPORTED = (
    *("peft", "deepspeed", "wandb", "wandb.sdk.launch.inputs.internal", "pandas"),
    *("launch.planning", "launch.preflight"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("deepseek_v3", "qwen3_5_moe")),
    *("train.compare", "train.evaluate", "train.sft", "train.training.trainer", "train.training.finishing"),
    *("tests.support.models", "tests.support.layouts"),
)
ON_CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # a process that has looked for GPUs must not fork
SERVER = "SPANWISE_TESTS_FORKS"  # in the environment of a fork: where it asks for others
_started: list[tuple[subprocess.Popen, socket.socket, str]] = []  # the process that forks, its life line, its address
_raised: list[BaseException] = []  # by what a fork ends


class Forked:
    """A process that runs `words`, which are what would follow `python`: a script, `-m` and a module, or `-c` and a
    text, with arguments. ranks: on so many, with a launcher as its process. It leads a session of its own. Has what
    `subprocess.Popen` has with text=True; stdout and stderr are this process's own unless given."""

    def __init__(
        self, *words: str | Path, ranks: int = 0, env: dict[str, str] | None = None, cwd: str | Path | None = None,
        stdin: int | None = None, stdout: int | TextIO | None = None, stderr: int | TextIO | None = None,
    ):  # fmt: skip
        self.args, self.returncode = [str(word) for word in words], None
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | ON_CPUS
        request = {
            "words": self.args, "ranks": ranks, "env": os.environ | own | (env or {}), "cwd": str(cwd or Path.cwd()),
        }  # fmt: skip
        opened: list[int] = []
        self.stdin: Any = _pipe(opened, "w") if stdin == subprocess.PIPE else None
        if stdin is None:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        self.stdout, self.stderr = (
            _pipe(opened, "r") if given == subprocess.PIPE else _given(opened, given, number)
            for number, given in ((1, stdout), (2, stderr))
        )
        self.waiting, self.channel = threading.Lock(), _connection()
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(json.dumps(request))
            file.flush()
            socket.send_fds(self.channel, [file.name.encode()], opened)
            self.pid = int(self.channel.recv(100))
        for stream in opened:
            os.close(stream)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self.waiting:
            return self._wait(timeout)

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self.channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self.channel.recv(100))
            self.channel.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        deadline = None if timeout is None else time.monotonic() + timeout
        found = ["", ""]

        def read(number: int, stream: TextIO) -> None:
            found[number] = stream.read()

        readers = [
            threading.Thread(target=read, args=(number, stream), daemon=True)
            for number, stream in enumerate((self.stdout, self.stderr))
            if stream
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *words: str | Path, ranks: int = 0, env: dict[str, str] | None = None, cwd: str | Path | None = None,
    timeout: float | None = None, **options: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """As `train.runtime.local.run` with capture_output and text; without ranks as `subprocess.run` with these."""
    assert options == {"capture_output": True, "text": True}, options
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("out", "err")]
        with paths[0].open("w") as out, paths[1].open("w") as err:
            process = Forked(*words, ranks=ranks, env=env, cwd=cwd, stdout=out, stderr=err)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(process.args, process.wait(), *(path.read_text() for path in paths))


def _pipe(opened: list[int], own: str) -> TextIO:
    """Our end of a pipe, which is for "w" or for "r"; the other one is added to `opened`."""
    ends = os.pipe()
    opened.append(ends[own == "r"])
    return os.fdopen(ends[own == "w"], own)


def _given(opened: list[int], given: int | TextIO | None, number: int) -> None:
    if given == subprocess.STDOUT:
        opened.append(os.dup(opened[1]))
    elif given == subprocess.DEVNULL:
        opened.append(os.open(os.devnull, os.O_WRONLY))
    else:
        opened.append(os.dup(number if given is None else given if isinstance(given, int) else given.fileno()))


def _connection() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{os.environ.get(SERVER) or address()}")
    return connection


def address() -> str:
    """Where the process that forks is asked to, which is started if there is none."""
    if not _started or _started[-1][0].poll() is not None:
        own = f"spanwise-tests-{os.getpid()}-{len(_started)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0{own}")  # no file: in the abstract namespace (unix(7))
        listener.listen(100)
        ours, theirs = socket.socketpair()
        # One thread, as tests with several ranks on few cores have it; and none besides when it forks.
        environment = os.environ | ON_CPUS | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        numbers = [theirs.fileno(), listener.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.ranks", own, *map(str, numbers)], cwd=REPOSITORY,
            env=environment, pass_fds=numbers, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        listener.close()
        _started.append((process, ours, own))
    return _started[-1][2]


def _serve(address: str, life: socket.socket, listener: socket.socket) -> None:
    """Forks for each request, and tells of each end, until nobody is there to ask."""
    atexit.register(_leave)  # the first one, which is the last to be called
    gc.disable()
    for name in IMPORTED:
        __import__(name)
    torch = sys.modules["torch"]
    torch.set_printoptions(threshold=0, edgeitems=0)  # DeepSpeed writes out every parameter, and shows none of it
    gc.freeze()  # else each collection of a fork, as DeepSpeed makes for each engine, goes through and copies all of it
    gc.enable()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[int, socket.socket] = {}
    while True:
        ready = select.select([life, woken, listener], [], [])[0]
        if life in ready:
            return
        if woken in ready:
            os.read(woken, 1000)
            _tell_ends(clients)
        if listener not in ready:
            continue
        client = listener.accept()[0]
        path, streams, *_ = socket.recv_fds(client, 4096, 3)
        request = json.loads(Path(path.decode()).read_text())
        process = os.fork()
        if not process:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for opened in (*streams, woken, wake):
                os.close(opened)
            for connection in (life, listener, client, *clients.values()):
                connection.close()
            request["env"][SERVER] = address
            _begin(request)
        for stream in streams:
            os.close(stream)
        clients[process] = client
        client.send(str(process).encode())


def _tell_ends(clients: dict[int, socket.socket]) -> None:
    while clients:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            return
        with clients.pop(process) as client, contextlib.suppress(BrokenPipeError):
            client.send(str(os.waitstatus_to_exitcode(status)).encode())


def _begin(request: dict[str, Any]) -> None:
    """Without ranks, becomes the process itself. Else in the place of deepspeed/launcher/launch.py: returns in the
    ranks alone, whose parent ends as soon as they have, or as one of them has failed and the others are ended."""
    os.setsid()
    if not request["ranks"]:
        _become(request, [], {})
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(request["ranks"]),
        "LOCAL_SIZE": str(request["ranks"]), "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    ranks = []
    for rank in range(request["ranks"]):
        process = os.fork()
        if not process:
            _become(request, [f"--local_rank={rank}"], common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        ranks.append(process)
    code = 0
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            _end(ranks)
    os._exit(code if code >= 0 else 128 - code)


def _end(ranks: list[int]) -> None:
    """Tells the ranks that are left to end, and ends those that have not after half a minute."""
    for process in ranks:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(Path(f"/proc/{p}/stat").read_text().split()[2] != "Z" for p in ranks):
        time.sleep(0.1)
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _become(request: dict[str, Any], flags: list[str], own: dict[str, str]) -> NoReturn:
    """The process itself, to the end of its interpreter."""
    import torch

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"] | own)
    time.tzset()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        # New ones: what this process was forked from has had files that could be rewound, and these may be pipes
        file = io.FileIO(number, mode, closefd=False)
        buffered: Any = io.BufferedReader(file) if mode == "r" else io.BufferedWriter(file)
        setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8", write_through=number == 2))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if media := sys.modules.get("wandb.sdk.data_types._private"):  # each process removes its directory at its end
        media.MEDIA_TMP.name = tempfile.mkdtemp("wandb-media")
    first, *others = request["words"]
    by_path = first not in ("-m", "-c")
    sys.path[0] = str(Path(first).parent) if by_path else request["cwd"]
    sys.path[1:1] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.argv = [first, *flags, *(others if by_path else others[1:])]
    try:
        if by_path:
            runpy.run_path(first, run_name="__main__")
        elif first == "-m":
            sys.modules.pop(others[0], None)
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
                script.write(others[0])
                script.flush()
                runpy.run_path(script.name, run_name="__main__")
        sys.exit()
    except BaseException as error:
        _raised.append(error)
        raise


def _leave() -> None:
    """Ends this process after all that is done at exit, but does not take apart what was imported, which takes long."""
    code, error = 1, _raised[-1] if _raised else SystemExit()  # without one, it is the process that forks
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else error.code is not None
    elif isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120  # as Python's own
    os._exit(code & 255)


if __name__ == "__main__":
    _serve(sys.argv[1], *(socket.socket(fileno=int(number)) for number in sys.argv[2:]))
