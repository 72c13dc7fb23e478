"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, all of this user's own, in one directory."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ELSEWHERE = "/usr/sbin:/sbin"  # not in every user's PATH

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdSpoolDir={directory}/spool-%n
SlurmdTimeout=10
SlurmdParameters=config_overrides
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00
"""


def missing() -> list[str]:
    """The programs of Slurm that this machine lacks."""
    path = f"{os.environ['PATH']}:{ELSEWHERE}"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


class Cluster:
    """Started in a directory; `stop` ends its daemons."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.hastened: set[str] = set()
        self.environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{ELSEWHERE}",
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PREFLIGHT_TIME_LIMIT": "60",
        }  # fmt: skip
        text = CONFIGURATION.format(host=socket.gethostname(), user=getpass.getuser(), directory=directory)
        (directory / "slurm.conf").write_text(text)
        for name in ("state", "spool-n1", "spool-n2"):
            (directory / name).mkdir()
        key = directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.call("munged", "--force", *(f"--{flag}={directory}/munge.{name}" for flag, name in files.items()))
        self.call("slurmctld")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.until(lambda: self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == ["n1", "n2"])

    def call(self, *command: str) -> str:
        """A command's output."""
        done = subprocess.run(command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self.call("slurmd", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """Ends a node's slurmd alone."""
        psutil.Process(int((self.directory / f"slurmd-{node}.pid").read_text())).kill()

    def kill_node(self, node: str) -> None:
        """Ends a node's slurmd and all that its jobs have started there, as a crash of the node would."""
        slurmd = psutil.Process(int((self.directory / f"slurmd-{node}.pid").read_text()))
        tasks = [process for process in psutil.process_iter() if self._runs_on(process, node)]
        stepds = [parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")]
        for process in dict.fromkeys([slurmd, *stepds, *tasks]):  # slurmstepd first: it would report its tasks' end
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _runs_on(self, process: psutil.Process, node: str) -> bool:
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        configuration = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return configuration and environment.get("SLURMD_NODENAME") == node

    def sbatch(self, *words: str) -> str:
        """Submits, as users do, a script of slurm/ with options before and flags after it. -> the job's number.
        Added are only options for nodes without GPUs."""
        output = f"--output={self.directory}/slurm-%j.out"
        cpu = ("--gpus-per-node=0", "--ntasks-per-node=1", "--time=15", "--signal=USR1@60")
        return self.call("sbatch", "--parsable", output, *cpu, *words).strip()

    def said(self, job: str) -> str:
        """What a job's script has printed, in all attempts."""
        return (self.directory / f"slurm-{job}.out").read_text()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Waits until a job is done with all of its attempts. -> what Slurm knows of it."""
        self.until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
        return self.show(job)

    def state(self, job: str) -> str:
        """A job's state; one that was requeued need not wait two minutes, but not so little that nodes refuse it."""
        known = self.show(job)
        if known["JobState"] == "PENDING" and known["Reason"] == "BeginTime":
            attempt = f"{job}.{known['Restarts']}"
            if attempt not in self.hastened:
                self.hastened.add(attempt)
                self.call("scontrol", "update", f"jobid={job}", "starttime=now+3")
        return known["JobState"]

    def until(self, true: Callable[[], Any], seconds: float = 300) -> None:
        """Waits until something is so, at most five minutes."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, (self.directory / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        subprocess.run(["scancel", "--state=RUNNING"], env=self.environment, check=False)
        subprocess.run(["scancel", "--state=PENDING"], env=self.environment, check=False)
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and self.call("squeue", "-h").strip():
            time.sleep(0.2)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            with contextlib.suppress(OSError):  # a node that a test has killed
                os.kill(int((self.directory / f"{name}.pid").read_text()), signal.SIGTERM)
