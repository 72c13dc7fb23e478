"""Checks a job's nodes before a weight is read: every check a line, all that is wrong at once.

    srun --ntasks-per-node=1 python -m launch.preflight [--time-limit S] [settings of train/sft.py]

One process a node: which one it is comes from SLURM_PROCID and SLURM_NTASKS, or from RANK and WORLD_SIZE; the first
node's address from MASTER_ADDR and MASTER_PORT, or else from Slurm; how many ranks a node will have from LOCAL_SIZE, or
else it is one a GPU, or one without GPUs. The time limit comes from --time-limit or, for instance where a job script
starts this, from PREFLIGHT_TIME_LIMIT. Exit code, the same on all nodes: 0, go on; 2, something will not pass by
itself, such as a shard that is missing; 1, something may, such as a busy GPU or a node that does not answer.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launch.computing import computed, of_model
from launch.network import try_ranks
from launch.node import (
    MAY_PASS,
    PASSED,
    WILL_NOT_PASS,
    Finding,
    Share,
    checked_settings,
    disk_space,
    disk_speed,
    documents,
    gpu_memory,
    gpus,
    host_memory,
    kernels,
    model,
    plan,
    versions,
    wandb_mode,
    within,
)
from train.config.command_line import MOST, Parser, setting
from train.config.settings import Recipe, Settings, parse
from train.runtime.distributed import leave
from train.runtime.errors import UserError
from train.runtime.terminal import NobodyReads, command

MOST_SKEW = 5.0  # seconds: beyond it, the logs of two nodes cannot be put in order


@dataclass(kw_only=True)
class PreflightOptions:
    """The options of preflight, in addition to the settings of train/sft.py."""

    time_limit: int = setting(
        0,
        "seconds for the checks of a node, and again for the network; 0: PREFLIGHT_TIME_LIMIT, or 120",
        between=(0, MOST),
    )


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
        number = _whole("RANK", "SLURM_PROCID", default=0)
        nodes = _whole("WORLD_SIZE", "SLURM_NTASKS", default=1)
        if not 0 <= number < nodes:
            raise UserError(f"RANK or SLURM_PROCID is {number}, of {nodes} nodes: must be from 0 to {nodes - 1}.")
        by_slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST"} <= os.environ.keys()
        if nodes > 1 and not by_slurm and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(
                f"MASTER_ADDR, MASTER_PORT: must be set where there are {nodes} nodes: the first node's name, and a "
                "port that is free there."
            )
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _whole("MASTER_PORT", default=0)
        if nodes > 1 and "MASTER_ADDR" not in os.environ:
            address = (slurm_nodes() or [address])[0]
        local = _whole("LOCAL_SIZE", default=0) or torch.cuda.device_count() or 1
        return cls(number, nodes, name, local, address, port or _whole("SLURM_JOB_ID", default=0) % 10_000 + 20_000)

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


def _whole(*variables: str, default: int) -> int:
    for variable in variables:
        if text := os.environ.get(variable):
            if not text.isdecimal():
                raise UserError(f"{variable}={text}: must be a whole number.")
            return int(text)
    return default


@command
def main(argv: list[str]) -> int:
    """Returns the exit code, as the module's docstring defines it."""
    try:
        place = NodePlace.from_environment()
        options, settings = parse_options(argv)
    except UserError as error:
        print(f"error: {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}: {error}", file=sys.stderr)
        return WILL_NOT_PASS
    started = time.monotonic()
    findings = own_findings(place, options, settings)
    try:
        meeting = Meeting(place, started + 2 * options.time_limit)
    except (dist.DistError, RuntimeError, OSError) as error:
        where = f"{place.address}:{place.port}"
        text = f"the nodes cannot meet at {where}, by MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0]})"
        findings.append(Finding("meeting", MAY_PASS, text))
        print_report({place.name: findings})
        return worst(findings)
    return meeting.lead(findings, options) if place.number == 0 else meeting.follow(findings, options)


def parse_options(argv: list[str]) -> tuple[PreflightOptions, Settings]:
    """Parses the command line. Raises UserError, which names the setting, its value, the rule and the fix."""
    parser = Parser(__doc__ or "", beside=(Settings, Recipe))
    parser.add_settings(PreflightOptions)
    values, rest = parser.parse_known_args(argv)
    limit = values.time_limit or _whole("PREFLIGHT_TIME_LIMIT", default=120)
    if limit < 1:
        raise UserError(f"--time-limit or PREFLIGHT_TIME_LIMIT {limit}: must be ≥ 1 second.")
    return PreflightOptions(time_limit=limit), parse(rest, "")


def own_findings(place: NodePlace, options: PreflightOptions, settings: Settings) -> list[Finding]:
    """Runs the checks that this node can do without the others."""
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
        finding, tokens = documents(settings)
        return finding

    def read_headers() -> Finding:
        finding, share = model(settings, ranks, place.nodes * place.local, tokens)
        shares.append(share)
        return finding

    check("versions", versions)
    check("GPUs", gpus)
    check("settings", lambda: checked_settings(settings))
    check("documents", read_documents)
    if check("model", read_headers):
        (share,) = shares
        check("kernels", lambda: kernels(share))
        check("disk speed", lambda: disk_speed(share))
        check("disk space", lambda: disk_space(share))
        check("plan", lambda: plan(share))
        if share.host_bytes:
            check("host memory", lambda: host_memory(share))
        if share.gpu_bytes and share.plan.cluster.memory:
            check("GPU memory", lambda: gpu_memory(share))
    if devices := [torch.device("cuda", index) for index in range(torch.cuda.device_count())]:
        names = of_model(shares[0].plan.model.causal if shares else None)
        check("computing", lambda: computed(names, devices))
    if place.number == 0:  # rank 0, which logs to W&B, is there
        check("W&B", lambda: wandb_mode(settings.wandb))
    return findings


class Meeting:
    """All nodes connected to one TCPStore of torch.distributed. The first node leads, the others follow. until: a time
    of time.monotonic(), in seconds, until which the first node waits for the findings of the others."""

    def __init__(self, place: NodePlace, until: float):
        self.place, self.until = place, until
        self.store = dist.TCPStore(
            place.address, place.port, is_master=place.number == 0, wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, until - time.monotonic())),
        )  # fmt: skip

    def tell(self, key: str, value: Any) -> None:
        """Publishes a value, which JSON can represent, to the other nodes."""
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, until: float) -> Any:
        """Returns what another node publishes under this key; None if it does not do so in time."""
        try:
            self.store.wait([key], timedelta(seconds=max(0.01, until - time.monotonic())))
            return json.loads(self.store.get(key))
        except (dist.DistError, RuntimeError):  # timed out, or the first node is gone
            return None

    def lead(self, findings: list[Finding], options: PreflightOptions) -> int:
        """Collects the findings of all nodes, tests the network and prints the report. Returns the exit code, which the
        other nodes receive too."""
        names, others = self.place.names() | {0: self.place.name}, range(1, self.place.nodes)
        by_node, locals = {0: findings}, {0: self.place.local}
        for number in others:
            if told := self.hear(f"findings/{number}", self.until):
                names[number], locals[number] = told["name"], told["local"]
                by_node[number] = [Finding(**finding) for finding in told["findings"]]
        absent = [names[number] for number in others if number not in by_node]
        extra = [
            Finding("nodes", MAY_PASS, f"{name} did not report in time: is it down, or does it hang?")
            for name in absent
        ]
        extra += [Finding("clock", *self.skew(names, [number for number in others if number in by_node]))]
        go = not absent and len(set(locals.values())) == 1
        self.tell("go", go)
        if go:
            extra.append(self.network(names, options))
        else:
            why = f"{', '.join(absent)} did not report" if absent else "nodes have different numbers of ranks"
            extra.append(Finding("network", MAY_PASS, f"not tried: {why}"))
        by_name = {names[number]: found for number, found in by_node.items()}
        extra += differing(by_name)
        print_report(by_name, extra)
        code = worst([*extra, *(finding for found in by_node.values() for finding in found)])
        self.tell("code", code)
        for number in by_node.keys() - {0}:  # wait, as the store ends with this process
            self.hear(f"left/{number}", time.monotonic() + 10)
        return code

    def follow(self, findings: list[Finding], options: PreflightOptions) -> int:
        """Sends this node's findings to the first node, and takes part in the other checks. Returns the exit code."""
        number = self.place.number
        own = {
            "name": self.place.name,
            "local": self.place.local,
            "findings": [asdict(finding) for finding in findings],
        }
        self.tell(f"findings/{number}", own)
        # The first node waits for all until `until`, and then tests the network.
        last = self.until + options.time_limit + 60
        if self.hear(f"time?/{number}", last) is not None:
            self.tell(f"time/{number}", time.time())
        if self.hear("go", last):
            self.tell(f"network/{number}", self.try_own_ranks(options))
        code = self.hear("code", last)
        if code is None:
            findings.append(Finding("meeting", MAY_PASS, f"the first node ({self.place.address}) does not answer"))
            print_report({self.place.name: findings})
            return worst(findings)
        self.tell(f"left/{number}", True)
        return int(code)

    def try_own_ranks(self, options: PreflightOptions) -> list[dict[str, Any]]:
        """Tests the network with this node's ranks. Returns the results of `try_ranks`."""
        until = time.monotonic() + options.time_limit
        where = self.place.address, self.store.port
        place = self.place
        return try_ranks(place.number * place.local, place.local, place.nodes * place.local, where, until)

    def network(self, names: dict[int, str], options: PreflightOptions) -> Finding:
        """Tests all-reduce and all-to-all between all ranks of all nodes, and returns the finding."""
        told = {0: self.try_own_ranks(options)}
        silent = []
        for number in range(1, self.place.nodes):
            answer = self.hear(f"network/{number}", time.monotonic() + 20)  # it had as much time as this node
            if answer is None:
                silent.append(names[number])
            else:
                told[number] = answer
        if silent:
            return Finding("network", MAY_PASS, f"{', '.join(silent)} did not answer while the network was tried")
        ranks = [{**rank, "node": names[number]} for number, found in told.items() for rank in found]
        return judge_network(ranks, "NCCL" if torch.cuda.is_available() else "gloo", options.time_limit)

    def skew(self, names: dict[int, str], present: list[int]) -> tuple[int, str]:
        """Returns (code, text) on how far the nodes' clocks are from the first node's. Half of the round-trip time is
        the error of the measurement, and is left out."""
        most, off = 0.0, []
        for number in present:
            asked = time.time()
            self.tell(f"time?/{number}", True)
            told = self.hear(f"time/{number}", time.monotonic() + 20)
            answered = time.time()
            if told is None:
                off.append(f"{names[number]} did not tell its time")
                continue
            apart = max(0.0, abs(told - (asked + answered) / 2) - (answered - asked) / 2)
            most = max(most, apart)
            if apart > MOST_SKEW:
                off.append(f"{names[number]} is {apart:.0f} s off: set its clock (NTP)")
        if off:
            return MAY_PASS, "; ".join(off)
        return PASSED, f"within {max(most, 0.1):.1f} s of {names[0]}'s" if present else "one node"


def judge_network(ranks: list[dict[str, Any]], backend: str, limit: int) -> Finding:
    """Returns the finding on the network. ranks: the result of `try_ranks` for each, with its node. limit: in seconds.
    Only the ranks at the earliest stage are named, since they hold up the others."""
    standing = [rank for rank in ranks if rank["standing"]]
    if not standing:
        if len(ranks) == 1:
            return Finding("network", PASSED, "one rank: nothing to connect")
        speed = {kind: min(rank["left"][kind] for rank in ranks) for kind in ("all-reduce", "all-to-all")}
        told = ", ".join(f"{kind} {value:.2f} GB/s" for kind, value in speed.items())
        return Finding("network", PASSED, f"{backend}, {len(ranks)} ranks: {told} (bus bandwidth of the slowest rank)")
    fewest = min(len(rank["left"]) for rank in standing)
    first = [rank for rank in standing if len(rank["left"]) == fewest]
    stage = first[0]["standing"]
    if len(first) == len(ranks) > 1 and not any(rank["error"] for rank in first):
        return Finding(
            "network", MAY_PASS, f"{backend}: no rank got through {stage} in {limit} s: do the nodes reach each other?"
        )
    who = "; ".join(
        f"{rank['node']}, rank {rank['rank']}{': ' + rank['error'] if rank['error'] else ''}" for rank in first[:8]
    )
    return Finding("network", MAY_PASS, f"{backend}: did not get through {stage} in {limit} s: {who}")


def differing(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """Returns a finding for each value that must be the same on all nodes and differs from that of the first node."""
    (first, *names), out = by_node, []
    reference = {finding.check: finding.same for finding in by_node[first] if finding.same is not None}
    for name in names:
        for finding in by_node[name]:
            ours, theirs = reference.get(finding.check), finding.same
            if ours is None or theirs is None:
                continue
            for what in sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
                text = f"{name} has {what} {theirs.get(what)}, {first} has {ours.get(what)}: must be the same"
                out.append(Finding(finding.check, WILL_NOT_PASS, text))
    return out


def worst(findings: list[Finding]) -> int:
    """Returns the exit code of all findings together: their highest code."""
    return max((finding.code for finding in findings), default=PASSED)


def print_report(by_node: dict[str, list[Finding]], extra: list[Finding] | None = None) -> None:
    """Prints a line per check with what the nodes found. Nodes that found the same share a text. Each problem has a
    line of its own with its node. extra: findings about several nodes."""
    checks = dict.fromkeys(finding.check for found in by_node.values() for finding in found)
    for check in checks:
        passed: dict[str, list[str]] = {}
        for node, found in by_node.items():
            for finding in found:
                if finding.check == check and finding.code == PASSED:
                    passed.setdefault(finding.text, []).append(node)
                elif finding.check == check:
                    _print_line(check, finding.code, f"{node}: {finding.text}")
        if passed:
            _print_line(check, PASSED, "; ".join(f"{', '.join(nodes)}: {text}" for text, nodes in passed.items()))
    for finding in extra or []:
        _print_line(finding.check, finding.code, finding.text)


def _print_line(check: str, code: int, text: str) -> None:
    verdict = {PASSED: "ok", MAY_PASS: "FAILED, may pass", WILL_NOT_PASS: "FAILED"}[code]
    with suppress(NobodyReads):  # the exit code says what to do
        print(f"preflight: {check}: {verdict}: {' '.join(text.split())}", flush=True)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
