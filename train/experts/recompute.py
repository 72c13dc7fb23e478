"""Gradient checkpointing that routes the recomputed forward exactly as the first one.

A router that flips an expert on recomputation (GPU kernels need not be deterministic) would change the sizes of what
the ranks exchange. So the indices of every `topk` inside a checkpointed layer are kept from the first forward, and the
recomputation gathers its values at those indices: right gradients, fixed routing.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)
_depth = 0


def recomputing() -> bool:
    """True inside the second forward of a checkpointed layer: counters must not count twice."""
    return _depth > 0


class _Record(TorchFunctionMode):
    def __init__(self, tape: list[Tensor]):
        self.tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _TOPK:
            self.tape.append(out.indices)
        return out


class _Replay(TorchFunctionMode):
    def __init__(self, tape: list[Tensor]):
        self.tape = tape

    def __enter__(self):
        global _depth
        _depth += 1
        self.position = 0
        return super().__enter__()

    def __exit__(self, *exception):
        global _depth
        _depth -= 1
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        values, dim = args[0], kwargs.get("dim", args[2] if len(args) > 2 else -1)
        indices = self.tape[self.position]
        self.position += 1
        return torch.return_types.topk((values.gather(dim, indices), indices))


def same_routing() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """`context_fn` for torch.utils.checkpoint: the contexts of the forward and of its recomputation."""
    tape: list[Tensor] = []
    return _Record(tape), _Replay(tape)
