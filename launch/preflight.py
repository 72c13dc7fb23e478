"""Checks a job's nodes before any weight is read. Prints one line per check, and reports all problems at once.

    srun --ntasks-per-node=1 python -m launch.preflight [--time-limit S] [settings of train/sft.py]

Runs as one process per node. The number of this node comes from SLURM_PROCID and SLURM_NTASKS, or from RANK and
WORLD_SIZE. The first node's address comes from MASTER_ADDR and MASTER_PORT, or else from Slurm. The number of ranks per
node comes from LOCAL_SIZE; the default is one rank per GPU, or one rank without GPUs. The time limit comes from
--time-limit, or from PREFLIGHT_TIME_LIMIT, for example in a job script. The exit code is the same on all nodes: 0,
start the job; 1, a problem may be temporary, such as a busy GPU or a node that does not answer; 2, a problem needs a
fix, such as a missing shard. A single node reports a wrong path by itself, before the other checks.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.place import NUMBER_OF_NODES, NodePlace, whole_number
from train.config.command_line import MOST, Parser, given, setting
from train.config.phases import parse_phases, runs_in_order
from train.config.settings import Recipe, Settings
from train.runtime.command import command, leave
from train.runtime.errors import UserError
from train.runtime.terminal import complain
from train.training.early import check_early, continued

if TYPE_CHECKING:  # torch and what needs it are imported once the command line is checked
    from launch.check_results import Finding


@dataclass(kw_only=True)
class PreflightOptions:
    """The options of preflight, in addition to the settings of train/sft.py."""

    time_limit: int = setting(
        0,
        "seconds for the checks of a node, and again for the network; 0: PREFLIGHT_TIME_LIMIT, or 120",
        between=(0, MOST),
    )


@command
def main(argv: list[str]) -> int:
    """Returns the exit code, as the module's docstring defines it."""
    try:
        options, settings = parse_options(argv)
        if whole_number(*NUMBER_OF_NODES, default=1) == 1:  # one of several tells the others, which wait for it
            check_early(settings)
        place = NodePlace.from_environment()
    except UserError as error:
        # Not reported by `command`: a node is not a rank, and every node gives its name.
        complain(f"error: {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}: {error}")
        return error.code
    return check(place, options, settings)


def check(place: NodePlace, options: PreflightOptions, settings: Settings) -> int:
    """Runs all checks, of this node and of all together. Returns the exit code."""
    import torch.distributed as dist  # these imports take seconds: after the command line is checked

    from launch.check_results import MAY_PASS, Finding
    from launch.meeting import Meeting, print_report, worst

    started = time.monotonic()
    findings = own_findings(place, options, settings)
    try:
        meeting = Meeting(place, started + 2 * options.time_limit)
    except (dist.DistError, RuntimeError, OSError) as error:
        where = f"{place.address}:{place.port}"
        text = f"the nodes cannot connect to {where}, from MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0]})"
        findings.append(Finding("meeting", MAY_PASS, text))
        print_report({place.name: findings})
        return worst(findings)
    return (
        meeting.lead(findings, options.time_limit)
        if place.number == 0
        else meeting.follow(findings, options.time_limit)
    )


def parse_options(argv: list[str]) -> tuple[PreflightOptions, Settings]:
    """Parses the command line; of a variant with phases, for the phase that is next. Raises UserError, which names the
    setting, its value, the rule and the fix."""
    parser = Parser(__doc__ or "", beside=(Settings, Recipe))
    parser.add_settings(PreflightOptions)
    values, rest = parser.parse_known_args(argv)
    limit = PreflightOptions(**given(values, PreflightOptions)).time_limit or whole_number(
        "PREFLIGHT_TIME_LIMIT", default=120
    )
    if limit < 1:
        raise UserError(f"--time-limit or PREFLIGHT_TIME_LIMIT {limit}: must be ≥ 1 second.")
    runs = runs_in_order(parse_phases(rest, "")[1])
    # Of a variant with phases, the first one that is not finished: what this attempt of the job begins with.
    settings = next((each for each in runs if not (Path(each.output) / "summary.json").exists()), runs[-1])
    return PreflightOptions(time_limit=limit), continued(settings)


def own_findings(place: NodePlace, options: PreflightOptions, settings: Settings) -> "list[Finding]":
    """Runs the checks that this node can do without the others."""
    import torch

    from launch import node
    from launch.check_results import PASSED, Finding, within
    from launch.computing import computed, of_model
    from launch.node import Share
    from launch.wandb_access import wandb_mode

    until = time.monotonic() + options.time_limit
    ranks = range(place.number * place.local, (place.number + 1) * place.local)
    findings: list[Finding] = []
    shares: list[Share] = []
    tokens = settings.max_tokens

    def check(name: str, work: Callable[[], Finding]) -> bool:
        findings.append(within(until - time.monotonic(), name, work))
        return findings[-1].code == PASSED

    def read_documents() -> Finding:
        nonlocal tokens
        finding, tokens = node.documents(settings)
        return finding

    def read_headers() -> Finding:
        finding, share = node.model(settings, ranks, place.nodes * place.local, tokens)
        shares.append(share)
        return finding

    check("versions", node.versions)
    check("GPUs", node.gpus)
    check("settings", lambda: node.checked_settings(settings))
    check("documents", read_documents)
    if check("model", read_headers):
        (share,) = shares
        check("kernels", lambda: node.kernels(share))
        check("disk speed", lambda: node.disk_speed(share))
        check("disk space", lambda: node.disk_space(share))
        check("plan", lambda: node.plan(share))
        if share.host_bytes:
            check("host memory", lambda: node.host_memory(share))
        if share.gpu_bytes and share.plan.cluster.memory:
            check("GPU memory", lambda: node.gpu_memory(share))
    if devices := [torch.device("cuda", index) for index in range(torch.cuda.device_count())]:
        names = of_model(shares[0].plan.model.causal if shares else None)
        check("computing", lambda: computed(names, devices))
    if place.number == 0:  # rank 0, which logs to W&B, is there
        check("W&B", lambda: wandb_mode(settings.wandb))
    return findings


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
