"""Sends each token to the ranks that hold its experts, and adds up what comes back.

Shapes: T tokens of this rank, S rows sent, R rows received, H hidden size, k experts per token, D ranks of the group, P
(token, expert) pairs of this rank's experts.

A token's hidden state crosses the wire at most once per destination rank, however many of its experts live there, and
each destination returns one partial sum per token, already weighted.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class ExpertGroup:
    """The ranks that divide a layer's experts among them. Rank `rank` of the group holds experts
    [rank * E/size, (rank + 1) * E/size)."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None  # None: the experts are not divided
    replicas: dist.ProcessGroup | None = None  # the ranks, this one among them, that hold the same experts
    wire_bytes: int = 0  # sent by this rank to others of the group, in forward, backward and recomputation

    def owned(self, experts: int) -> range:
        """The experts of this rank, of `experts` in all."""
        local = experts // self.size
        return range(self.rank * local, (self.rank + 1) * local)

    def exchange(self, rows: Tensor, received_D: list[int], sent_D: list[int]) -> Tensor:
        """Rows [S, ...] in destination order -> rows [R, ...] in source order. No gradient."""
        received = rows.new_empty(sum(received_D), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), received_D, sent_D, group=self.group)
        self.wire_bytes += (sum(sent_D) - sent_D[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size()
        return received

    def zero3_tags(self) -> dict[str, Any]:
        """Attributes of an expert parameter by which ZeRO-3 partitions and reduces it over `replicas` (DeepSpeed's
        AutoEP placement, which has no public name yet). Needed before the parameter is partitioned."""
        name = f"ep_size_{self.size}"
        return {
            "allreduce": False,
            "group_name": name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": name,
            # Without this, ZeRO-3 broadcasts rank 0's expert parameters over every rank's: no error, wrong experts.
            "ds_zero_partition_process_group": self.replicas,
        }


class Ends(NamedTuple):
    """Where the pairs of each expert of this rank end: on the device, int32, and on the host."""

    device: Tensor
    host: list[int]


class _Exchange(torch.autograd.Function):
    """Rows [S, ...] in destination order -> rows [R, ...] in source order; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, rows, sent_D, received_D, ep):
        ctx.sizes = sent_D, received_D, ep
        return ep.exchange(rows, received_D, sent_D)

    @staticmethod
    def backward(ctx, grad):
        sent_D, received_D, ep = ctx.sizes
        return _Exchange.apply(grad, received_D, sent_D, ep), None, None, None


class Dispatch:
    """One layer's exchange of one batch: who sends which token where, worked out from the routing alone. The host waits
    for the device once, for how much is sent and received; all else stays there.

    index_Tk: the experts of each token, of E in all. keep_T: False for what is sent nowhere.
    """

    def __init__(self, index_Tk: Tensor, experts: int, ep: ExpertGroup, keep_T: Tensor | None = None):
        self.ep, (self.tokens, k) = ep, index_Tk.shape
        local = experts // ep.size
        owner_Tk, kept_Tk = index_Tk // local, torch.ones_like(index_Tk)
        hit_TD = torch.zeros(self.tokens, ep.size, dtype=torch.bool, device=index_Tk.device).scatter_(1, owner_Tk, True)
        if keep_T is not None:
            hit_TD &= keep_T[:, None]
            kept_Tk *= keep_T[:, None]
        zero_E = torch.zeros(experts, dtype=torch.int64, device=index_Tk.device)
        self.load_E = zero_E.scatter_add_(0, index_Tk.flatten(), kept_Tk.flatten())  # of all experts, by this rank
        # To each rank: how many tokens come, and how often each of its experts is wanted.
        told_DC = torch.cat([hit_TD.sum(0)[:, None], self.load_E.view(ep.size, local)], 1)
        heard_DC = told_DC if ep.size == 1 else ep.exchange(told_DC, [1] * ep.size, [1] * ep.size)
        count_E = heard_DC[:, 1:].sum(0)
        counts = torch.cat([told_DC[:, 0], heard_DC[:, 0], count_E]).tolist()
        self.sent_D, self.received_D = counts[: ep.size], counts[ep.size : 2 * ep.size]
        self.ends = Ends(count_E.cumsum(0).to(torch.int32), list(itertools.accumulate(counts[2 * ep.size :])))

        destination_S, self.token_S = torch.nonzero_static(hit_TD.t(), size=sum(self.sent_D)).unbind(1)
        self.here_Sk = owner_Tk.index_select(0, self.token_S) == destination_S[:, None]
        local_Sk = index_Tk.index_select(0, self.token_S) - destination_S[:, None] * local
        slot_Sk = torch.where(self.here_Sk, local_Sk, local).to(torch.int32)  # `local`: of another rank
        slot_Rk = slot_Sk if ep.size == 1 else _Exchange.apply(slot_Sk, self.sent_D, self.received_D, ep)
        # (token, expert) pairs, sorted by expert: their places in [R, k], and of those the row.
        self.pair_P = slot_Rk.flatten().argsort(stable=True)[: self.ends.host[-1]]
        self.row_P = self.pair_P // k

    def send(self, hidden_TH: Tensor, weight_Tk: Tensor) -> tuple[Tensor, Tensor]:
        """-> hidden_RH, weight_Rk of the tokens that use experts of this rank (weight 0 for experts elsewhere)."""
        hidden_SH = hidden_TH.index_select(0, self.token_S)
        weight_Sk = weight_Tk.index_select(0, self.token_S) * self.here_Sk
        if self.ep.size == 1:
            return hidden_SH, weight_Sk
        return (
            _Exchange.apply(hidden_SH, self.sent_D, self.received_D, self.ep),
            _Exchange.apply(weight_Sk, self.sent_D, self.received_D, self.ep),
        )

    def combine(self, partial_RH: Tensor) -> Tensor:
        """Partial sums of the received tokens -> out_TH, the sum over the ranks for each token of this rank."""
        if self.ep.size > 1:
            partial_RH = _Exchange.apply(partial_RH, self.received_D, self.sent_D, self.ep)
        out_TH = partial_RH.new_zeros(self.tokens, partial_RH.shape[1])
        return out_TH.index_add_(0, self.token_S, partial_RH)
