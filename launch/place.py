"""Determines which node of a job this process is, from the environment of the launcher or of Slurm."""

import os
import socket
import subprocess
from dataclasses import dataclass

from train.runtime.errors import UserError

NUMBER_OF_NODES = ("WORLD_SIZE", "SLURM_NTASKS")
"""Variables of the environment, the first of which that is set gives the number of nodes; one node without them."""


@dataclass(frozen=True)
class NodePlace:
    """Which of how many nodes this is, its name, how many ranks it will have (`local`), and where the first node
    listens."""

    number: int
    nodes: int
    name: str
    local: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> "NodePlace":
        """Reads the environment of the launcher or of Slurm, as the module's docstring says. Raises UserError if a
        variable is missing or wrong."""
        number = whole_number("RANK", "SLURM_PROCID", default=0)
        nodes = whole_number(*NUMBER_OF_NODES, default=1)
        if not 0 <= number < nodes:
            raise UserError(f"RANK or SLURM_PROCID is {number}, of {nodes} nodes: must be from 0 to {nodes - 1}.")
        by_slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST"} <= os.environ.keys()
        if nodes > 1 and not by_slurm and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(
                f"MASTER_ADDR, MASTER_PORT: must be set for {nodes} nodes: the first node's name, and a "
                "port that is free there."
            )
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), whole_number("MASTER_PORT", default=0)
        if nodes > 1 and "MASTER_ADDR" not in os.environ:
            address = (slurm_nodes() or [address])[0]
        if not (local := whole_number("LOCAL_SIZE", default=0)):
            import torch  # takes seconds, which commands spend after their first checks

            local = torch.cuda.device_count() or 1
        return cls(
            number, nodes, name, local, address, port or whole_number("SLURM_JOB_ID", default=0) % 10_000 + 20_000
        )

    def names(self) -> dict[int, str]:
        """Returns number -> name of all nodes by Slurm, for those that never report their own name."""
        names = slurm_nodes()
        return {number: names[number] if number < len(names) else f"node {number}" for number in range(self.nodes)}


def slurm_nodes() -> list[str]:
    """Returns the names of the job step's nodes; [] if Slurm does not report them."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if not nodes:
        return []
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def whole_number(*variables: str, default: int) -> int:
    """Returns the number in the first of these environment variables that is set. Raises UserError if it is none."""
    for variable in variables:
        if text := os.environ.get(variable):
            if not text.isdecimal():
                raise UserError(f"{variable}={text}: must be a whole number.")
            return int(text)
    return default
