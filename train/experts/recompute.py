"""Gradient checkpointing that routes the recomputed forward exactly as the first one.

A router that flips an expert on recomputation (GPU kernels need not be deterministic) would change the sizes of what
the ranks exchange. So the indices of every `topk` between the beginning of a block with experts and its experts are
kept from the first forward, and the recomputation gathers its values at those indices: right gradients, fixed routing.
What follows from the routing alone, who sends what where, is kept too, and not worked out and sent once more.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)
T = TypeVar("T")


class _Tape:
    """What the first forward of a checkpointed layer has chosen and worked out, in order."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.position = 0
        self.replays = False

    def once(self, work_out: Callable[[], T]) -> T:
        if not self.replays:
            self.kept.append(work_out())
            return self.kept[-1]
        self.position += 1
        return self.kept[self.position - 1]


_running: list[_Tape] = []  # of the checkpointed layers that are being run, one inside the other


def recomputing() -> bool:
    """True inside the second forward of a checkpointed layer: counters must not count twice."""
    return any(tape.replays for tape in _running)


def first_time(work_out: Callable[[], T]) -> T:
    """What `work_out` gives; where a checkpointed layer is recomputed, what it gave in the first forward."""
    return _running[-1].once(work_out) if _running else work_out()


class _Forward:
    """The context of a checkpointed layer's first forward, or of its recomputation."""

    def __init__(self, tape: _Tape, replays: bool):
        self.tape, self.replays = tape, replays

    def __enter__(self) -> None:
        self.tape.replays, self.tape.position = self.replays, 0
        _running.append(self.tape)

    def __exit__(self, *exception: Any) -> None:
        _running.pop()


def same_routing() -> tuple[_Forward, _Forward]:
    """`context_fn` for torch.utils.checkpoint: the contexts of the forward and of its recomputation."""
    tape = _Tape()
    return _Forward(tape, replays=False), _Forward(tape, replays=True)


class _FixedTopk(TorchFunctionMode):
    """Every topk inside takes its values by `gather`, in both forwards: they must build the same graph, or torch
    refuses the recomputation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        with torch.no_grad():
            indices = first_time(lambda: torch.topk(*args, **kwargs).indices)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((args[0].gather(dim, indices), indices))


def fix_choices(block: nn.Module, experts: nn.Module) -> None:
    """Has a block's choice of experts kept, which is made between its beginning and its call of `experts`. Not in all
    of it: a mode costs microseconds for every call of torch inside."""
    modes: list[_FixedTopk] = []

    def begin(*_: Any) -> None:
        if _running:
            modes.append(_FixedTopk())
            modes[-1].__enter__()

    def end(*_: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(begin)
    experts.register_forward_pre_hook(end)
