"""Gradient checkpointing that routes the recomputed forward exactly as the first one.

A router that flips an expert on recomputation (GPU kernels need not be deterministic) would change the sizes of what
the ranks exchange. So the indices of every `topk` inside a checkpointed layer are kept from the first forward, and the
recomputation gathers its values at those indices: right gradients, fixed routing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)
_depth = 0


def recomputing() -> bool:
    """True inside the second forward of a checkpointed layer: counters must not count twice."""
    return _depth > 0


class _TopkAt(TorchFunctionMode):
    """Every topk inside takes its values by `gather`, at indices that `indices_of(its arguments)` gives: both forwards
    must build the same graph, or torch refuses the recomputation."""

    def __init__(self, tape: list[Tensor]):
        self.tape = tape

    def indices_of(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        indices = self.indices_of(*args, **kwargs)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((args[0].gather(dim, indices), indices))


class _Record(_TopkAt):
    def indices_of(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            self.tape.append(torch.topk(*args, **kwargs).indices)
        return self.tape[-1]


class _Replay(_TopkAt):
    def __enter__(self):
        global _depth
        _depth += 1
        self.position = 0
        return super().__enter__()

    def __exit__(self, *exception):
        global _depth
        _depth -= 1
        return super().__exit__(*exception)

    def indices_of(self, *args: Any, **kwargs: Any) -> Tensor:
        self.position += 1
        return self.tape[self.position - 1]


def same_routing() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """`context_fn` for torch.utils.checkpoint: the contexts of the forward and of its recomputation."""
    tape: list[Tensor] = []
    return _Record(tape), _Replay(tape)
