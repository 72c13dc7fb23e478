"""What the benchmarks share: starts of processes, contenders that take turns, the machine's name, the JSON file.

A benchmark that is itself a fork of tests/support/ranks.py, as in tests/test_benchmarks.py, starts others by it too.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `tests` is no installed package

from tests.support import ranks as forks
from train.runtime import local

FORKED = forks.SERVER in os.environ


def run(*words: str, ranks: int = 0, env: dict[str, str] | None = None) -> str:
    """What a script with these arguments prints, alone or by the launcher. Raises RuntimeError if it fails."""
    options: dict[str, Any] = {"capture_output": True, "text": True}
    if FORKED:
        done = forks.run(*words, ranks=ranks, env=env, **options)
    elif ranks:
        done = local.run(*words, ranks=ranks, env=env or {}, **options)
    else:
        done = subprocess.run([sys.executable, *words], env=os.environ | (env or {}), **options)
    if done.returncode:
        raise RuntimeError(f"{words} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


class Turns:
    """A worker's side of the taking of turns: a line comes in for a step, and a line of JSON goes out after it."""

    def say(self, **values: Any) -> None:
        print(f"\n{json.dumps(values)}", flush=True)

    def begin(self) -> bool:
        """Waits for the turn; False where there is none any more."""
        asked = bool(sys.stdin.readline())
        self.faults, self.started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        return asked

    def end(self, **values: Any) -> None:
        seconds = time.perf_counter() - self.started
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self.faults
        from train.runtime.distributed import peak_host_bytes

        self.say(seconds=seconds, faults=faults, peak=peak_host_bytes(), **values)


class Worker:
    """A contender's process: `script --worker ARGUMENTS`, which says that it is ready and then takes turns. spin:
    whether OpenMP's idle threads do, for some milliseconds, as is its default, or sleep at once."""

    def __init__(self, script: str, arguments: list[str], log: Path, spin: bool = False):
        self.log = log
        words, pipe = [script, "--worker", *arguments], subprocess.PIPE
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {} if spin else {"OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("w") as errors:
            self.process: Any = (
                forks.Forked(*words, stdin=pipe, stdout=pipe, stderr=errors)
                if FORKED
                else subprocess.Popen(
                    [sys.executable, *words], stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
                )
            )
        self.hear()

    def hear(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):  # else a library's
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} failed:\n{self.log.read_text()[-3000:]}")

    def step(self) -> dict[str, Any]:
        print(file=self.process.stdin, flush=True)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


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
    """Writes {"rows": [...]} with the command, the date and what they were measured on."""
    if path:
        given = [argument for argument in sys.argv[1:] if argument not in ("--json", path)]
        command = " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *given])
        measured = {"command": command, "date": f"{date.today()}", **machine(), "rows": rows}
        Path(path).write_text(json.dumps(measured, indent=1) + "\n")
