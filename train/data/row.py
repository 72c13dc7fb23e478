"""Document boundaries of a packed row, and causal functions applied within each of its documents.

Shapes: T tokens of the row, D documents of a group, L tokens of the longest document of the group, S tokens of the
padded group that are not padding.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

A_CALL = 128
"""Number of padding tokens that cost about as much as the calls for one more group."""


@dataclass(frozen=True)
class _Group:
    """Adjacent documents of the row, tokens [start, stop), padded to the length of the longest.

    at_DL: position in the row of each token of the padded group; padding repeats the document's last token. inside_S:
    positions in the flattened padded group that are not padding. Both are None if all documents have the same length,
    because nothing is padded then.
    """

    start: int
    stop: int
    documents: int
    longest: int
    at_DL: Tensor | None
    inside_S: Tensor | None


class Row:
    """The documents of a packed row. lengths: tokens of each document, in order.

    Adjacent documents of similar length are computed with the least padding.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self.ends = [0, *itertools.accumulate(self.lengths)]
        self.mixed = 0  # how often attention or the delta rule ran on this row
        self._made: dict[Any, Any] = {}

    def position_T(self) -> Tensor:
        """Returns [T] int64: the position of each token in its document."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def ends_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns [documents + 1]: 0 and the end of each document in the row, as kernels take it (cu_seqlens)."""
        return self._once(
            ("ends", device, dtype), lambda: torch.tensor(self.ends, dtype=dtype).to(device, non_blocking=True)
        )

    def ends_for_fla(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the ends [documents + 1] as arguments of flash-linear-attention, on the device and on the CPU.

        Without the CPU tensor, flash-linear-attention would synchronize to read the GPU's.
        """
        both = {"cu_seqlens": device, "cu_seqlens_cpu": torch.device("cpu")}
        return {name: self.ends_on(where, torch.int64) for name, where in both.items()}

    def groups(self, device: torch.device) -> list[_Group]:
        """Returns the row's documents as groups of adjacent documents, with index tensors on `device`.

        A document joins the group before it if its padding costs less than separate calls.
        """
        device = torch.device("cpu") if device.type == "meta" else device
        return self._once(("groups", device), lambda: [self._group(*part, device) for part in self._parts()])

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _parts(self) -> list[tuple[int, int]]:
        """Returns the document numbers [first, last) of each group."""
        parts = [0]
        longest = self.lengths[0]
        for number, length in enumerate(self.lengths):
            if abs(longest - length) > A_CALL:
                parts.append(number)
                longest = length
        return list(itertools.pairwise([*parts, len(self.lengths)]))

    def _group(self, first: int, last: int, device: torch.device) -> _Group:
        lengths, longest = self.lengths[first:last], max(self.lengths[first:last])
        place = self.ends[first], self.ends[last], len(lengths), longest
        if min(lengths) == longest:
            return _Group(*place, None, None)
        length_D1 = torch.tensor(lengths)[:, None]
        token_L = torch.arange(longest)
        at_DL = torch.tensor(self.ends[first:last])[:, None] + torch.minimum(token_L, length_D1 - 1)
        (inside_S,) = (token_L < length_D1).flatten().nonzero(as_tuple=True)
        return _Group(*place, at_DL.to(device), inside_S.to(device))

    def within(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Applies a causal function of padded documents [D, L, …] to packed rows [T, …]; returns [T, …].

        Padding follows the tokens of its document, so a causal function does not see it.
        """
        done = []
        for group in self.groups(rows[0].device):
            shape = group.documents, group.longest
            if group.at_DL is None or group.inside_S is None:
                out = function(*(row[group.start : group.stop].unflatten(0, shape) for row in rows))
                done.append(out.flatten(0, 1))
            else:
                at = group.at_DL.flatten()
                out = function(*(row.index_select(0, at).unflatten(0, shape) for row in rows))
                done.append(out.flatten(0, 1).index_select(0, group.inside_S))
        return done[0] if len(done) == 1 else torch.cat(done)
