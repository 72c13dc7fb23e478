"""Becomes what one node of a Slurm step runs of a vLLM server that is divided over several nodes:

    srun --nodes=2 --ntasks-per-node=1 … python -m launch.server_node COMMAND…

launch.serve --nodes writes this. COMMAND is that of a server on one node. The first node answers, and the others only
compute. They find each other at the address of the node that srun was called on, which must be the first one.
"""

import os
import sys
from collections.abc import Mapping

from train.runtime.errors import UserError

NEEDED = ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_LAUNCH_NODE_IPADDR")


def on_nodes(command: list[str], nodes: int) -> list[str]:
    """Returns the command that starts a server on the first `nodes` nodes of the job, within a step of it or without.
    Where one of them ends, all do."""
    return [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1",
        "--cpu-bind=none", "--gpu-bind=none", sys.executable, "-m", "launch.server_node", *command,
    ]  # fmt: skip


def of_this_node(command: list[str], environment: Mapping[str, str]) -> list[str]:
    """Returns the command of this node. Raises UserError outside a step of Slurm.

    vLLM takes --headless by its command line alone, and not by the module that starts it on one node.
    """
    if lacking := [name for name in NEEDED if not environment.get(name)]:
        raise UserError(
            f"launch.server_node: {lacking[0]} is not set; it is started by srun, as launch.serve --nodes does."
        )
    rank, nodes, head = (environment[name] for name in NEEDED)
    interpreter, flags = command[0], command[3:]  # without -m MODULE
    return [
        interpreter, "-m", "vllm.entrypoints.cli.main", "serve", *flags, "--nnodes", nodes, "--node-rank", rank,
        "--master-addr", head, *(["--headless"] if int(rank) else []),
    ]  # fmt: skip


if __name__ == "__main__":
    own = of_this_node(sys.argv[1:], os.environ)
    os.execvp(own[0], own)
