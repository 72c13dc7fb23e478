"""Starts a script on ranks as DeepSpeed's launcher does, by forks of one process that has imported what takes long.

A start by the launcher takes 18 s of processor time before the first step, almost all of it imports. A fork has them
done: the rank runs the script's own file, as the launcher's child would, with the same arguments and environment. What
is about the launcher itself is tested with the launcher itself (`train.runtime.local.run`).
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from train.runtime.local import free_port

REPOSITORY = Path(__file__).parents[2]
IMPORTED = ("peft", "train.compare", "train.evaluate", "train.sft", "tests.support.models", "tests.support.layouts")
ON_CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # a process that has looked for GPUs must not fork
_started: list[tuple[subprocess.Popen, socket.socket]] = []  # the process of this one that forks


def run(
    script: str | Path, *flags: str, ranks: int, env: dict[str, str] | None = None, cwd: str | Path | None = None,
    timeout: float | None = None, **options: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """As `train.runtime.local.run` with capture_output and text."""
    assert options == {"capture_output": True, "text": True}, options
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | ON_CPUS
    environment |= env or {}
    request = {"script": str(script), "flags": flags, "ranks": ranks, "env": environment, "cwd": str(cwd or Path.cwd())}
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("request", "out", "err")]
        paths[0].write_text(json.dumps(request))
        with paths[1].open("w") as out, paths[2].open("w") as err:
            channel = _channel()
            socket.send_fds(channel, [str(paths[0]).encode()], [out.fileno(), err.fileno()])
        launcher = int(channel.recv(100))
        channel.settimeout(timeout)
        try:
            code = int(channel.recv(100))
        except TimeoutError:
            os.killpg(launcher, signal.SIGKILL)
            channel.settimeout(None)
            channel.recv(100)
            raise
        done = subprocess.CompletedProcess([str(script), *flags], code, *(path.read_text() for path in paths[1:]))
    return done


def _channel() -> socket.socket:
    if not _started or _started[-1][0].poll() is not None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread, as tests with several ranks on few cores have it; and none besides when it forks.
        environment = os.environ | ON_CPUS | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.ranks", str(theirs.fileno())], cwd=REPOSITORY, env=environment,
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        _started.append((process, ours))
    return _started[-1][1]


def _serve(channel: socket.socket) -> None:
    """Forks a launcher for each request, until nobody is there to ask."""
    for name in IMPORTED:
        __import__(name)
    while True:
        path, streams, *_ = socket.recv_fds(channel, 4096, 2)
        if not path:
            return
        request = json.loads(Path(path.decode()).read_text())
        launcher = os.fork()
        if not launcher:
            channel.close()
            for number, stream in enumerate(streams, 1):
                os.dup2(stream, number)
            _launch(request)
        for stream in streams:
            os.close(stream)
        channel.send(str(launcher).encode())
        channel.send(str(os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])).encode())


def _launch(request: dict[str, Any]) -> None:
    """In the place of deepspeed/launcher/launch.py: returns in the ranks alone, whose parent ends as soon as they have,
    or as one of them has failed and the others are ended."""
    os.setsid()
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(request["ranks"]),
        "LOCAL_SIZE": str(request["ranks"]), "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    ranks = []
    for rank in range(request["ranks"]):
        process = os.fork()
        if not process:
            _become(request, rank, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
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


def _become(request: dict[str, Any], rank: int, own: dict[str, str]) -> NoReturn:
    """The rank itself, to the end of its interpreter."""
    import torch

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"] | own)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.argv = [request["script"], f"--local_rank={rank}", *request["flags"]]
    sys.path[0] = str(Path(request["script"]).parent)
    runpy.run_path(request["script"], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
