"""What a GPU does in one launch (launch/launches.py), at sizes that the caller gives: its error, and how fast it is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.launches import Case
from tests.gpu.parts import Figures, both_ways, milliseconds


class Called(TorchDispatchMode):
    """The kernels that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "spanwise":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def figures(device: torch.device, case: Case, kernels: Sequence[str], moved: int = 0) -> Figures:
    """kernels: those that must have been called on a GPU. moved: bytes that must be read and written, both ways."""
    given = [*case.given.values()]
    with Called() as called:
        both_ways(case.ours, given, case.out)()
    assert called.names == (set(kernels) if device.type == "cuda" else set())
    error, ms = case.error(), milliseconds(device, both_ways(case.ours, given, case.out))
    return {"error": error, "forward_backward_ms": ms, "gigabytes_per_second": moved / ms / 1e6}
