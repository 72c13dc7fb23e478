"""Connects the nodes of a job: the first node collects the findings of all nodes, tests the network and reports."""

import json
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launch.check_results import MAY_PASS, PASSED, WILL_NOT_PASS, Finding
from launch.network import try_ranks
from launch.place import NodePlace
from train.runtime.terminal import NobodyReads

MOST_SKEW = 5.0  # seconds: beyond it, the logs of two nodes cannot be put in order


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

    def lead(self, findings: list[Finding], limit: int) -> int:
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
            extra.append(self.network(names, limit))
        else:
            why = f"{', '.join(absent)} did not report" if absent else "nodes have different numbers of ranks"
            extra.append(Finding("network", MAY_PASS, f"not tested: {why}"))
        by_name = {names[number]: found for number, found in by_node.items()}
        extra += differing(by_name)
        print_report(by_name, extra)
        code = worst([*extra, *(finding for found in by_node.values() for finding in found)])
        self.tell("code", code)
        for number in by_node.keys() - {0}:  # wait, as the store ends with this process
            self.hear(f"left/{number}", time.monotonic() + 10)
        return code

    def follow(self, findings: list[Finding], limit: int) -> int:
        """Sends this node's findings to the first node, and takes part in the other checks. Returns the exit code."""
        number = self.place.number
        own = {
            "name": self.place.name,
            "local": self.place.local,
            "findings": [asdict(finding) for finding in findings],
        }
        self.tell(f"findings/{number}", own)
        # The first node waits for all until `until`, and then tests the network.
        last = self.until + limit + 60
        if self.hear(f"time?/{number}", last) is not None:
            self.tell(f"time/{number}", time.time())
        if self.hear("go", last):
            self.tell(f"network/{number}", self.try_own_ranks(limit))
        code = self.hear("code", last)
        if code is None:
            findings.append(Finding("meeting", MAY_PASS, f"the first node ({self.place.address}) does not answer"))
            print_report({self.place.name: findings})
            return worst(findings)
        self.tell(f"left/{number}", True)
        return int(code)

    def try_own_ranks(self, limit: int) -> list[dict[str, Any]]:
        """Tests the network with this node's ranks. Returns the results of `try_ranks`."""
        until = time.monotonic() + limit
        where = self.place.address, self.store.port
        place = self.place
        return try_ranks(place.number * place.local, place.local, place.nodes * place.local, where, until)

    def network(self, names: dict[int, str], limit: int) -> Finding:
        """Tests all-reduce and all-to-all between all ranks of all nodes, and returns the finding."""
        told = {0: self.try_own_ranks(limit)}
        silent = []
        for number in range(1, self.place.nodes):
            answer = self.hear(f"network/{number}", time.monotonic() + 20)  # it had as much time as this node
            if answer is None:
                silent.append(names[number])
            else:
                told[number] = answer
        if silent:
            return Finding("network", MAY_PASS, f"{', '.join(silent)} did not answer during the network test")
        ranks = [{**rank, "node": names[number]} for number, found in told.items() for rank in found]
        return judge_network(ranks, "NCCL" if torch.cuda.is_available() else "gloo", limit)

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
                off.append(f"{names[number]} did not report its time")
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
            "network",
            MAY_PASS,
            f"{backend}: no rank completed {stage} within {limit} s: can the nodes reach each other?",
        )
    who = "; ".join(
        f"{rank['node']}, rank {rank['rank']}{': ' + rank['error'] if rank['error'] else ''}" for rank in first[:8]
    )
    return Finding("network", MAY_PASS, f"{backend}: did not complete {stage} within {limit} s: {who}")


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
    """Prints a line per check with what the nodes found. Nodes that found the same share a text. Each problem has its
    own line with its node. extra: findings about several nodes."""
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
    verdict = {PASSED: "ok", MAY_PASS: "FAILED, may be temporary", WILL_NOT_PASS: "FAILED"}[code]
    with suppress(NobodyReads):  # the exit code says what to do
        print(f"preflight: {check}: {verdict}: {' '.join(text.split())}", flush=True)
