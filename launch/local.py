"""Starts a script on this machine's ranks by DeepSpeed's own launcher."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def deepspeed_command(script: str | Path, *flags: str, ranks: int) -> list[str]:
    """The launcher's command line, on a port of its own so that two jobs on one machine do not meet."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]  # its script lies elsewhere where pip had a --target
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), str(script), *flags]


def free_port() -> int:
    """A port that nobody listens on, from below those that systems give to outgoing connections: until the launcher
    listens there itself, one of them could take it."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise OSError("no free port found between 20000 and 32000")


def run(script: str | Path, *flags: str, ranks: int, **options: Any) -> subprocess.CompletedProcess:
    """Runs the script and waits. `options` go to subprocess.run."""
    environment = os.environ | options.pop("env", {})
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # ninja, for DeepSpeed
    )
    return subprocess.run(deepspeed_command(script, *flags, ranks=ranks), env=environment, **options)
