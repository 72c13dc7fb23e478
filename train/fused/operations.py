"""The kernels as custom torch operations. Each is one launch whose output shapes are known without a GPU, so that
launch/trace.py can plan and count a training step. The kernels themselves say what they compute.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def _kernels(name: str) -> Any:
    """Imports a module of this package. It needs Triton, which may be missing on a machine without a GPU."""
    return import_module(f"train.fused.{name}")


def _operation(function: Callable[..., Any], sizes: Callable[..., Any], changes: tuple[str, ...] = ()) -> Any:
    """Registers a function as a custom operation. sizes: returns results of the same shapes and dtypes, without their
    values. changes: names of the arguments that are modified in place."""
    operation = torch.library.custom_op(f"spanwise::{function.__name__.strip('_')}", function, mutates_args=changes)
    operation.register_fake(sizes)
    return operation


def _int4_decode(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    return _kernels("decoding").int4_decode(packed, scale, group)


def _fp8_decode(weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return _kernels("decoding").fp8_decode(weight, scale, (block_rows, block_columns))


def _gated(gate_up: Tensor, weight: Tensor) -> Tensor:
    return _kernels("experts").gated(gate_up, weight)


def _gated_backward(grad: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels("experts").gated_backward(grad, gate_up, weight)


def _add_grouped(y: Tensor, h: Tensor, right: Tensor, ends: Tensor, scale: float) -> None:
    _kernels("experts").add_grouped_(y, h, right, ends, scale)


def _summed(x: Tensor, place: Tensor) -> Tensor:
    return _kernels("experts").summed(x, place)


def _rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, one_more: bool) -> tuple[Tensor, Tensor]:
    return _kernels("norms").rms_norm(x, weight, gate, eps, one_more)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, rstd: Tensor, one_more: bool
) -> tuple[Tensor, Tensor]:
    return _kernels("norms").rms_norm_backward(grad, x, weight, gate, rstd, one_more)


def _loss_terms(
    logits: Tensor, target: Tensor, coefficient: Tensor, unlikely: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    return _kernels("loss").terms_(logits, target, coefficient, unlikely, gradient)


def _held_terms(
    logits: Tensor, base: Tensor, target: Tensor, coefficient: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    return _kernels("loss").held_terms_(logits, base, target, coefficient, gradient)


int4_decode = _operation(
    _int4_decode,
    lambda packed, scale, group: packed.new_empty(
        *packed.shape[:-1], packed.shape[-1] * 8, dtype=torch.bfloat16
    ),
)  # fmt: skip
fp8_decode = _operation(
    _fp8_decode, lambda weight, scale, rows, columns: weight.new_empty(weight.shape, dtype=torch.bfloat16)
)
gated = _operation(_gated, lambda gate_up, weight: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))
gated_backward = _operation(
    _gated_backward, lambda grad, gate_up, weight: (torch.empty_like(gate_up), torch.empty_like(weight))
)
add_grouped_ = _operation(_add_grouped, lambda y, h, right, ends, scale: None, changes=("y",))
summed = _operation(_summed, lambda x, place: x.new_empty(len(place), x.shape[1]))
rms_norm = _operation(
    _rms_norm,
    lambda x, weight, gate, eps, one_more: (x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)),
)
rms_norm_backward = _operation(
    _rms_norm_backward,
    lambda grad, x, weight, gate, rstd, one_more: (
        torch.empty_like(grad), grad.new_empty(0) if gate is None else torch.empty_like(gate)
    ),
)  # fmt: skip
loss_terms_ = _operation(
    _loss_terms,
    lambda logits, *_: tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2)),
    changes=("logits",),
)
held_terms_ = _operation(
    _held_terms,
    lambda logits, *_: tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2)),
    changes=("logits",),
)
