"""Starts a script on several ranks of this machine with DeepSpeed's own launcher."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def deepspeed_command(script: str | Path, *flags: str, ranks: int) -> list[str]:
    """Returns the launcher's command line. It uses a free port, so that two jobs on one machine do not collide. Raises
    OSError if no port is free."""
    # Not the launcher's script, which pip installs elsewhere if it was given a --target.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), str(script), *flags]


def free_port() -> int:
    """Returns a port on which nobody listens. It is below the range that systems use for outgoing connections: one of
    those could take the port before the launcher listens on it. Raises OSError if none of 100 tries is free."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise OSError("no free port found between 20000 and 32000")


def run(script: str | Path, *flags: str, ranks: int, **options: Any) -> subprocess.CompletedProcess:
    """Runs the script on this many ranks, waits for its end and returns the completed process. `options` go to
    subprocess.run; its `env` adds to the environment instead of replacing it."""
    environment = os.environ | options.pop("env", {})
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # where DeepSpeed finds ninja
    )
    return subprocess.run(deepspeed_command(script, *flags, ranks=ranks), env=environment, **options)
