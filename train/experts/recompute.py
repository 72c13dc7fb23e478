"""Gradient checkpointing in which the recomputed forward routes tokens exactly as the first forward did.

GPU kernels need not be deterministic. A router that chose another expert on recomputation would change the sizes of
what the ranks exchange. So the indices of every `topk` between the start of a block with experts and its experts are
kept from the first forward. The recomputation gathers its values at those indices, so that the gradients are right and
the routing is fixed. What follows from the routing alone, such as which rank sends what where, is kept too instead of
being computed and sent again.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)
T = TypeVar("T")


class _Tape:
    """What the first forward of a checkpointed layer chose and computed, in order."""

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


_running: list[_Tape] = []  # tapes of the checkpointed layers that are running now, the innermost one last


def recomputing() -> bool:
    """Returns True inside the recomputation of a checkpointed layer, where counters must not count a second time."""
    return any(tape.replays for tape in _running)


def first_time(work_out: Callable[[], T]) -> T:
    """Returns the result of `work_out`. When a checkpointed layer is recomputed, returns that of the first forward."""
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
    """Returns the contexts of a forward and of its recomputation, as `context_fn` of torch.utils.checkpoint."""
    tape = _Tape()
    return _Forward(tape, replays=False), _Forward(tape, replays=True)


class _FixedTopk(TorchFunctionMode):
    """Makes every topk inside gather its values at the kept indices. Both forwards do so, since torch refuses a
    recomputation that builds another graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        with torch.no_grad():
            indices = first_time(lambda: torch.topk(*args, **kwargs).indices)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((args[0].gather(dim, indices), indices))


def fix_choices(block: nn.Module, experts: nn.Module) -> None:
    """Makes a block keep its choice of experts for recomputation. The block chooses them between its start and its call
    of `experts`. Only this part is intercepted, since a mode costs microseconds for every torch call inside."""
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
