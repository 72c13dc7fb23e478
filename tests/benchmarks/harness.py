"""What the benchmarks share: a child process for memory, the machine's name, the JSON file."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `tests` is no installed package


def alone(what: str, script: str) -> int:
    """What `script --alone WHAT` prints last, a number, from a process of its own."""
    done = subprocess.run([sys.executable, script, "--alone", what], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} --alone {what} failed:\n{done.stderr[-3000:]}")
    return int(done.stdout.split()[-1])


def machine() -> dict[str, str]:
    """Processor, cores, memory and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    return {
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB",
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
    }


def header() -> None:
    print("\n".join(machine().values()), flush=True)


def finish(rows: list[dict[str, Any]], path: str | None) -> None:
    """Writes {"rows": [...]} with what they were measured on."""
    if path:
        Path(path).write_text(json.dumps({"rows": rows, **machine()}, indent=1) + "\n")
