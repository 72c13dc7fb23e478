"""Whether a device computes a function as torch's own operations do in fp32."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Wrong(ArithmeticError):
    """This device computes something else than it should."""


def most(dtype: torch.dtype) -> float:
    """The relative error, by norms, that rounding alone explains."""
    return 2e-5 if dtype == torch.float32 else 3e-2


def drawn_values(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal values."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def compared(
    what: str, names: Sequence[str], function: Callable[..., Tensor], plain: Callable[..., Tensor],
    given: Sequence[Tensor], out: Tensor,
) -> float:  # fmt: skip
    """`function` of tensors against `plain` of the same in fp32: value, and gradients by `out`."""
    ours = [x.detach().requires_grad_() for x in given]
    theirs = [x.detach().float().requires_grad_() for x in given]
    found, wanted = function(*ours), plain(*theirs)
    worst = near(what, found, wanted, most(out.dtype))
    gradients = torch.autograd.grad(found, ours, out), torch.autograd.grad(wanted, theirs, out.float())
    for name, one, other in zip(names, *gradients, strict=True):
        worst = max(worst, near(f"{what}, gradient of {name},", one, other, most(out.dtype)))
    return worst


def near(what: str, found: Tensor, wanted: Tensor, bound: float) -> float:
    if found.shape != wanted.shape:
        raise Wrong(f"{what} has shape {tuple(found.shape)} in the place of {tuple(wanted.shape)}")
    apart, size = (found.float() - wanted.float()).norm().item(), wanted.float().norm().item()
    error = apart / size if size else apart
    if not error <= bound:  # nor NaN
        raise Wrong(f"{what} is off by {error:.1e} (at most {bound:.0e})")
    return error
