"""Compares what a device computes with a plain reference: the same function by torch's own operations in fp32."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Wrong(ArithmeticError):
    """The device's result differs from the reference by more than rounding. The message says which value is off."""


def most(dtype: torch.dtype) -> float:
    """Returns the largest relative error, by L2 norms, that rounding alone explains: smaller for fp32 than for any
    other dtype."""
    return 2e-5 if dtype == torch.float32 else 3e-2


def drawn_values(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Returns a tensor of each shape with standard normal values, the same in every call (seed 0)."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def compared(
    what: str, names: Sequence[str], function: Callable[..., Tensor], plain: Callable[..., Tensor],
    given: Sequence[Tensor], out: Tensor,
) -> float:  # fmt: skip
    """Compares `function` of the tensors `given`, of any shape, with `plain` of them in fp32, in value and gradients.

    what, names: of the function and of the tensors, for messages. out: the gradient of the function's value, in the
    dtype that decides how exact the results must be. Returns the largest relative error. Raises Wrong if an error is
    more than rounding (`most`).
    """
    ours = [x.detach().requires_grad_() for x in given]
    theirs = [x.detach().float().requires_grad_() for x in given]
    found, wanted = function(*ours), plain(*theirs)
    worst = near(what, found, wanted, most(out.dtype))
    gradients = torch.autograd.grad(found, ours, out), torch.autograd.grad(wanted, theirs, out.float())
    for name, one, other in zip(names, *gradients, strict=True):
        worst = max(worst, near(f"{what}, gradient of {name},", one, other, most(out.dtype)))
    return worst


def near(what: str, found: Tensor, wanted: Tensor, bound: float) -> float:
    """Returns the relative error of `found`, of any shape, by L2 norms; the absolute error if `wanted` is zero. Raises
    Wrong if the shapes differ, or if the error is NaN or larger than `bound`."""
    if found.shape != wanted.shape:
        raise Wrong(f"{what} has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
    apart, size = (found.float() - wanted.float()).norm().item(), wanted.float().norm().item()
    error = apart / size if size else apart
    if not error <= bound:  # so written, NaN fails too
        raise Wrong(f"{what} is off by {error:.1e} (at most {bound:.0e})")
    return error
