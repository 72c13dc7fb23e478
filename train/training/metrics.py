"""What a step measures: the loss by role, the load of experts, memory."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.data.batches import Batch
from train.data.kinds import TermKind
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.masking.loss import Terms
from train.runtime.distributed import allocated_since_start, peak_host_bytes, reset_peak_host_bytes


class Meter:
    """Sums the loss, its parts and the NLL of every role over a step's micro-batches and, at the end, over all ranks.
    The NLL of a role is over all of its targets, including masked ones; its divergence from the base is over the
    targets where it is known."""

    def __init__(self, roles: list[str], device: torch.device):
        self.roles = ["all", "unspanned", *roles]
        self.parts = torch.zeros(len(TermKind) + 1, dtype=torch.float64, device=device)  # by kind; tokens
        self.nll = torch.zeros(len(self.roles), 4, dtype=torch.float64, device=device)  # sum, count; of kl too

    def add(self, batch: Batch, terms: Terms, measured: bool) -> None:
        """Adds a micro-batch and its loss terms [N]. If measured, adds the NLL of every role, for which all targets
        must be in the batch."""
        share_N = (batch.coefficient_N * terms.term_N).double()
        shares = [(share_N * (batch.kind_N == kind)).sum() for kind in TermKind]
        self.parts += torch.stack([*shares, share_N.new_tensor(batch.tokens)])
        known_N = batch.base.known_N if batch.base else torch.zeros_like(batch.roles_N, dtype=torch.bool)
        for i in range(len(self.roles)) if measured else ():
            member_N = self._members(batch.roles_N, i)
            values = [terms.nll_N.double()[member_N].sum(), member_N.sum()]
            based_N = member_N & known_N
            self.nll[i] += torch.stack([*values, terms.kl_N.double()[based_N].sum(), based_N.sum()])

    @staticmethod
    def _members(roles_N: Tensor, i: int) -> Tensor:
        if i == 0:
            return torch.ones_like(roles_N, dtype=torch.bool)
        return roles_N == 0 if i == 1 else (roles_N >> (i - 2)) & 1 == 1

    def result(self, measured: bool) -> dict[str, Any]:
        """Returns loss, cross_entropy, unlikelihood, held, tokens and, if measured, nll and targets per role, and kl
        per role where what the base predicts is known, over all ranks. NLL and KL are in nats per target. All ranks
        must call it."""
        dist.all_reduce(self.parts)
        *shares, tokens = self.parts.tolist()
        values: dict[str, Any] = {"loss": sum(shares)}
        values |= {kind.name.lower(): share for kind, share in zip(TermKind, shares, strict=True)}
        values["tokens"] = int(tokens)
        if measured:
            dist.all_reduce(self.nll)
            sums = {role: row for role, row in zip(self.roles, self.nll.tolist(), strict=True) if row[1]}
            values["nll"] = {role: total / count for role, (total, count, *_) in sums.items()}
            values["targets"] = {role: int(count) for role, (_, count, *_) in sums.items()}
            kl = {role: total / count for role, (*_, total, count) in sums.items() if count}
            values |= {"kl": kl} if kl else {}
        return values


def expert_metrics(layers: list[ExpertParallelExperts], device: torch.device) -> dict[str, Any]:
    """Returns the load since the last call, over all ranks, and resets it. {} for a dense model.

    The load is the number of tokens of each expert by layer and of each rank of an expert-parallel group; the tokens of
    the busiest expert over the mean, in the layer where this ratio is largest, and the same for ranks; and the bytes
    sent between ranks by expert parallelism. All ranks must call it.
    """
    if not layers:
        return {}
    ep: ExpertGroup = layers[0].ep
    load_LE = torch.stack([
        torch.zeros(layer.experts, dtype=torch.int64, device=device) if layer.load_E is None else layer.load_E
        for layer in layers
    ])  # fmt: skip
    wire = torch.tensor(ep.wire_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(load_LE)
    dist.all_reduce(wire)
    for layer in layers:
        layer.load_E = None
    ep.wire_bytes = 0
    loads = {layer.name: load_E for layer, load_E in zip(layers, load_LE.tolist(), strict=True)}
    rank_load = load_LE.view(len(layers), ep.size, -1).sum((0, 2)).tolist()
    load_LE = load_LE.double().clamp(min=1e-9)
    load_LD = load_LE.view(len(layers), ep.size, -1).sum(-1)
    return {
        "expert_load_max_over_mean": (load_LE.amax(1) / load_LE.mean(1)).max().item(),
        "rank_load_max_over_mean": (load_LD.amax(1) / load_LD.mean(1)).max().item(),
        "experts_without_tokens": int((load_LE < 1).sum().item()),
        "wire_bytes": int(wire.item()),
        "rank_load": {str(rank): load for rank, load in enumerate(rank_load)},
        "expert_load": loads,
    }


def peak_memory(device: torch.device) -> int:
    """Returns the highest peak of any rank so far, in bytes: allocated on the GPU, or resident on a CPU."""
    return _most(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes(), device)


def measured_memory(device: torch.device) -> int:
    """Returns the memory that launch.plan predicts, in bytes, measured on the rank that took most: allocated on the GPU
    or, on a CPU, since the start."""
    return _most(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else allocated_since_start(), device)


def _most(own: int, device: torch.device) -> int:
    value = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def reset_peak_memory(device: torch.device) -> bool:
    """Resets the peak that peak_memory returns. Returns False if the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return reset_peak_host_bytes()
