"""Finds out to which part of the model an operation belongs, in forward, recomputation and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from train.experts.recompute import recomputing

PARTS = {
    "ExpertParallelExperts": "experts", "LossHead": "loss", "Embedding": "embedding", "RMSNorm": "norms",
    "GatedDeltaNet": "delta rule layers", "Attention": "attention layers", "Router": "router", "MLP": "dense MLPs",
}  # fmt: skip
"""Substring of the name of a module's class -> the part. The first one that matches counts."""
REST = "the rest"


class Parts:
    """Keeps track of the part of the model that is running: one of the values of PARTS, or REST.

    In forward and recomputation it is the part of the innermost module whose forward is running. In backward it is the
    part of the innermost module whose forward created the running node of the autograd graph.
    """

    def __init__(self) -> None:
        self._running = [REST]

    def now(self) -> str:
        """Returns the part that is running."""
        node: Any = torch._C._current_autograd_node()
        if node is not None and not recomputing():
            return node.metadata.get("part", REST)
        return self._running[-1]

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Inside the context, keeps track of the modules of this model."""
        hooks: list[Any] = []
        for module in model.modules():
            part = next((part for name, part in PARTS.items() if name in type(module).__name__), None)
            if part:
                hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._running.append(part)))
                hooks.append(module.register_forward_hook(self._end, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _end(self, module: nn.Module, given: Any, named: Any, out: Any) -> None:
        part, seen = self._running.pop(), {_node(leaf) for leaf in tree_leaves((given, named))}
        nodes = [_node(leaf) for leaf in tree_leaves(out)]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            node.metadata.setdefault("part", part)  # an inner module has already marked its own nodes
            nodes += [each for each, _ in node.next_functions]


def _node(leaf: Any) -> Any:
    return leaf.grad_fn if isinstance(leaf, Tensor) else None
