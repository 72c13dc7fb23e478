"""Describes the GPU of this process, and checks the installed packages for the kernels that a model needs: they must
exist, be fast and be correct."""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from train.runtime.errors import UserError

KERNELS = ("triton", "flash-linear-attention", "fla-core", "flash-attn")
"""Packages that only a GPU needs."""
EXTRA = "pip install --constraint constraints.txt --editable '.[gpu]'"


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the version of each of the packages that is installed, by package name."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cuda() -> Any:
    """Returns torch.cuda; None on a CPU."""
    import torch  # these imports take seconds, which commands spend after their first checks
    from deepspeed.accelerator import get_accelerator

    return torch.cuda if get_accelerator().device_name() == "cuda" else None


def _own() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def capability() -> tuple[int, int] | None:
    """Returns the compute capability of this rank's GPU, such as (9, 0) for an H100; None on a CPU."""
    return cuda.get_device_capability(_own()) if (cuda := _cuda()) else None


def name() -> str | None:
    """Returns the name of this rank's GPU, such as NVIDIA H100 80GB HBM3; None on a CPU."""
    return cuda.get_device_name(_own()) if (cuda := _cuda()) else None


def memory() -> float:
    """Returns the total memory of this rank's GPU in GB (1e9 bytes); 0 on a CPU."""
    return cuda.get_device_properties(_own()).total_memory / 1e9 if (cuda := _cuda()) else 0.0


def grouped_products(capability: tuple[int, int]) -> bool:
    """Returns whether torch has a grouped GEMM in BF16 for a GPU of this capability: it multiplies all rows by the
    weights of their experts in one kernel launch. This holds on Hopper and on data-center Blackwell. Elsewhere torch
    loops over the experts on the host."""
    return capability[0] in (9, 10)


def needs_delta_rule(text: Any) -> bool:
    """Returns whether a text model has layers of the gated delta rule. text: its transformers configuration."""
    return "linear_attention" in (getattr(text, "layer_types", None) or ())


def _release(text: str) -> tuple[int, ...]:
    """Returns the release of a version. That of 2.11.0a0+git, as NVIDIA's images have it, is (2, 11, 0) too."""
    return Version(text).release


def unmet(delta_rule: bool, capability: tuple[int, int] | None, versions: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with the installed packages, one message with its fix each. Nothing is wrong on a CPU.
    delta_rule: whether the model has layers of the gated delta rule. capability: of the GPU; None on a CPU. versions:
    of the installed packages by name, with torch among them."""
    if capability is None:
        return []
    wrong = []
    if _release(versions["torch"]) < (2, 11) and "flash-attn" not in versions:
        wrong.append(
            f"torch {versions['torch']}: attention needs torch ≥ 2.11, or flash-attn, to separate the documents of a "
            "row in one launch: pip install --constraint constraints.txt torch"
        )
    fla, triton = versions.get("fla-core"), versions.get("triton")
    if delta_rule and (fla is None or _release(fla) < (0, 6)):
        wrong.append(
            f"flash-linear-attention {fla or 'is not installed'}: the model's gated delta rule needs ≥ 0.6, or a step "
            f"takes several times as long: {EXTRA}"
        )
    if triton is None:
        wrong.append("triton is not installed: a step on a GPU runs Triton kernels: pip install 'triton>=3.7.1'")
    if triton and delta_rule and capability[0] == 9 and (3, 4) <= _release(triton) < (3, 7, 1):
        wrong.append(
            f"triton {triton}: versions from 3.4.0 to below 3.7.1 give wrong gradients of the gated delta rule on "
            "Hopper GPUs (H100, H200): pip install 'triton>=3.7.1'"
        )
    return wrong


def check_kernels(text: Any) -> None:
    """Raises UserError if the installed packages lack a kernel that a model of this text configuration needs on this
    rank's GPU."""
    if wrong := unmet(needs_delta_rule(text), capability(), installed(("torch", *KERNELS))):
        raise UserError("; ".join(wrong))
