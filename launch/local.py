"""Starts a script on this machine's ranks by DeepSpeed's own launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def deepspeed_command(script: str | Path, *flags: str, ranks: int) -> list[str]:
    """The launcher's command line, on a port of its own so that two jobs on one machine do not meet."""
    launcher = Path(sys.executable).with_name("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, str(launcher), "--num_gpus", str(ranks), "--master_port", str(port), str(script), *flags]


def run(script: str | Path, *flags: str, ranks: int, **options: Any) -> subprocess.CompletedProcess:
    """Runs the script and waits. `options` go to subprocess.run."""
    environment = os.environ | options.pop("env", {})
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # ninja, for DeepSpeed
    )
    return subprocess.run(deepspeed_command(script, *flags, ranks=ranks), env=environment, **options)
