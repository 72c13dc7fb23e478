"""Sends each token's hidden state to the ranks that hold its experts and sums the results that they return.

Shapes: T tokens of this rank, S rows sent, R rows received, H hidden size, k experts per token, D ranks of the group, P
(token, expert) pairs of this rank's experts, N rows that are summed, G sums of at most n rows each.

A token's hidden state is sent at most once to each destination rank, however many of its experts are there. Each
destination returns one partial sum per token, to which the routing weights have already been applied.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.fused import IN_ONE_LAUNCH
from train.fused.operations import summed


@dataclass
class ExpertGroup:
    """An expert-parallel group: the ranks that divide a layer's E experts among them. Rank `rank` of the group holds
    experts [rank * E/size, (rank + 1) * E/size)."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None  # None: the experts are not divided among ranks
    replicas: dist.ProcessGroup | None = None  # the ranks, including this one, that hold the same experts
    wire_bytes: int = 0  # bytes sent by this rank to others of the group, in forward, backward and recomputation

    def owned(self, experts: int) -> range:
        """Returns the indices of this rank's experts. `experts`: number of experts of the layer on all ranks."""
        local = experts // self.size
        return range(self.rank * local, (self.rank + 1) * local)

    def exchange(self, rows: Tensor, received_D: list[int], sent_D: list[int]) -> Tensor:
        """Sends rows [S, ...], in order of their destination ranks, and returns the received rows [R, ...], in order of
        their source ranks. Adds the bytes sent to `wire_bytes`. Not differentiable."""
        received = rows.new_empty(sum(received_D), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), received_D, sent_D, group=self.group)
        self.wire_bytes += (sum(sent_D) - sent_D[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size()
        return received

    def zero3_tags(self) -> dict[str, Any]:
        """Returns the attributes that make ZeRO-3 partition and reduce an expert parameter over `replicas`.

        This is DeepSpeed's AutoEP placement, which has no public name yet. The attributes must be set before the
        parameter is partitioned.
        """
        name = f"ep_size_{self.size}"
        return {
            "allreduce": False,
            "group_name": name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": name,
            # Without this, ZeRO-3 silently overwrites every rank's expert parameters with those of rank 0.
            "ds_zero_partition_process_group": self.replicas,
        }


class Ends(NamedTuple):
    """The end of each local expert's rows among the pairs sorted by expert: [E] int32 on the device, and a list on the
    host."""

    device: Tensor
    host: list[int]


class _Exchange(torch.autograd.Function):
    """Differentiable ExpertGroup.exchange: rows [S, ...] in destination order -> rows [R, ...] in source order."""

    @staticmethod
    def forward(ctx, rows, sent_D, received_D, ep):
        ctx.sizes = sent_D, received_D, ep
        return ep.exchange(rows, received_D, sent_D)

    @staticmethod
    def backward(ctx, grad):
        sent_D, received_D, ep = ctx.sizes
        return _Exchange.apply(grad, received_D, sent_D, ep), None, None, None


class Places:
    """Gathers N rows from G rows by index, and does the reverse: sums the N rows by index into G rows."""

    def __init__(self, from_N: Tensor, count: int):
        self.from_N, self.count = from_N, count
        self.place_Gn: Tensor | None = None  # indices of the rows of each sum, padded with -1

    def invert(self, slot_N: Tensor, most: int) -> None:
        """Stores which rows belong to each sum, as the kernel `summed` needs it. slot_N: each row's place in the
        flattened [G, n]; most: n."""
        place = torch.full((self.count * most,), -1, dtype=torch.int32, device=slot_N.device)
        numbers = torch.arange(len(slot_N), dtype=torch.int32, device=slot_N.device)
        self.place_Gn = place.scatter_(0, slot_N, numbers).view(self.count, most)

    def gather(self, x_GH: Tensor) -> Tensor:
        """Returns the row of x [G, H] for each index, [N, H]."""
        return x_GH.index_select(0, self.from_N)

    def sum(self, x_NH: Tensor) -> Tensor:
        """Returns the sum of the rows of x [N, H] with the same index, [G, H]."""
        if self.place_Gn is not None:
            return summed(x_NH.contiguous(), self.place_Gn)
        return x_NH.new_zeros(self.count, x_NH.shape[1]).index_add_(0, self.from_N, x_NH)


class Dispatch:
    """The exchange of one batch for one layer: which rank sends which token to which rank, computed from the routing
    alone. Synchronizes with the device once, to learn how many rows are sent and received.

    index_Tk: expert indices of each token. experts: number of experts of the layer on all ranks. keep_T: False for
    tokens that are sent to no expert. device: device of the hidden states.
    """

    def __init__(
        self, index_Tk: Tensor, experts: int, ep: ExpertGroup, device: torch.device, keep_T: Tensor | None = None
    ):
        self.ep, (tokens, k) = ep, index_Tk.shape
        local = experts // ep.size
        owner_Tk, kept_Tk = index_Tk // local, torch.ones_like(index_Tk)
        hit_TD = torch.zeros(tokens, ep.size, dtype=torch.bool, device=index_Tk.device).scatter_(1, owner_Tk, True)
        if keep_T is not None:
            hit_TD &= keep_T[:, None]
            kept_Tk *= keep_T[:, None]
        zero_E = torch.zeros(experts, dtype=torch.int64, device=index_Tk.device)
        self.load_E = zero_E.scatter_add_(0, index_Tk.flatten(), kept_Tk.flatten())  # this rank's tokens per expert
        # For each destination rank: the number of tokens sent to it, and the number of pairs for each of its experts.
        told_DC = torch.cat([hit_TD.sum(0)[:, None], self.load_E.view(ep.size, local)], 1)
        heard_DC = told_DC if ep.size == 1 else ep.exchange(told_DC, [1] * ep.size, [1] * ep.size)
        count_E = heard_DC[:, 1:].sum(0)
        counts = torch.cat([told_DC[:, 0], heard_DC[:, 0], count_E]).tolist()
        self.sent_D, self.received_D = counts[: ep.size], counts[ep.size : 2 * ep.size]
        self.ends = Ends(count_E.cumsum(0).to(torch.int32), list(itertools.accumulate(counts[2 * ep.size :])))

        destination_S, token_S = torch.nonzero_static(hit_TD.t(), size=sum(self.sent_D)).unbind(1)
        self.here_Sk = owner_Tk.index_select(0, token_S) == destination_S[:, None]
        local_Sk = index_Tk.index_select(0, token_S) - destination_S[:, None] * local
        slot_Sk = torch.where(self.here_Sk, local_Sk, local).to(torch.int32)  # `local` marks an expert of another rank
        slot_Rk = slot_Sk if ep.size == 1 else _Exchange.apply(slot_Sk, self.sent_D, self.received_D, ep)
        # The places of the (token, expert) pairs in the flattened [R, k], sorted by expert. place // k is the row.
        self.pair_P = slot_Rk.flatten().argsort(stable=True)[: self.ends.host[-1]]
        self.rows = Places(self.pair_P // k, sum(self.received_D))
        self.tokens = Places(token_S, tokens)
        if device.type in IN_ONE_LAUNCH:
            self.rows.invert(self.pair_P, k)
            self.tokens.invert(token_S * ep.size + destination_S, ep.size)

    def _across(self, rows: Tensor, back: bool = False) -> Tensor:
        """Sends rows to their destination ranks, or back from there. Not differentiable."""
        if self.ep.size == 1:
            return rows
        sizes = (self.sent_D, self.received_D) if back else (self.received_D, self.sent_D)
        return self.ep.exchange(rows, *sizes)

    def spread(self, x_TH: Tensor) -> Tensor:
        """Sends the hidden states x [T, H] to the experts' ranks. Returns [P, H], a row for each pair of this rank's
        experts."""
        return _Spread.apply(x_TH, self)

    def weights(self, weight_Tk: Tensor) -> Tensor:
        """Sends the routing weights [T, k]. Returns [P], the weight of each pair of this rank's experts."""
        weight_Sk = weight_Tk.index_select(0, self.tokens.from_N) * self.here_Sk  # 0 for experts of other ranks
        if self.ep.size > 1:
            weight_Sk = _Exchange.apply(weight_Sk, self.sent_D, self.received_D, self.ep)
        return weight_Sk.flatten().index_select(0, self.pair_P)

    def combine(self, out_PH: Tensor, needed: bool = True) -> Tensor:
        """Sends the experts' outputs [P, H] back to the tokens' ranks. Returns [T, H], the sum over each token's
        experts.

        needed: if False, sends nothing and returns NaN, which still has the right gradient.
        """
        return _Combine.apply(out_PH, self, needed)

    def spread_now(self, x_TH: Tensor) -> Tensor:
        """Does what `spread` does, x [T, H] -> [P, H], but is not tracked by autograd."""
        return self.rows.gather(self._across(self.tokens.gather(x_TH)))

    def combine_now(self, out_PH: Tensor) -> Tensor:
        """Does what `combine` does, [P, H] -> [T, H], but is not tracked by autograd."""
        return self.tokens.sum(self._across(self.rows.sum(out_PH), back=True))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, dispatch):
        ctx.dispatch = dispatch
        return dispatch.spread_now(x_TH)

    @staticmethod
    def backward(ctx, grad_PH):
        return ctx.dispatch.combine_now(grad_PH), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_PH, dispatch, needed):
        ctx.dispatch = dispatch
        if not needed:
            nan = torch.full((1, 1), math.nan, dtype=out_PH.dtype, device=out_PH.device)
            return nan.expand(dispatch.tokens.count, out_PH.shape[1])
        return dispatch.combine_now(out_PH)

    @staticmethod
    def backward(ctx, grad_TH):
        return ctx.dispatch.spread_now(grad_TH.contiguous()), None, None
