"""Tiny models of two families trained in bf16 on the GPU, 20 steps with a training checkpoint and a resume, against
fp32 on a CPU."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.gpu.training import FAMILIES, METHODS, check, compare

STEPS = 20
CASES = [(family, method) for family in FAMILIES for method in METHODS]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, gpu: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """The runs of the cases that are asked for, which all begin at once: most of such a run is its start."""
    asked = [item.callspec.params for item in request.session.items if item.module is request.module]  # type: ignore
    cases = [(each["family"], each["method"]) for each in asked]
    with ThreadPoolExecutor(len(cases)) as pool:
        started: dict[tuple[str, str], Future] = {}
        for case in cases:
            started[case] = pool.submit(compare, tmp_path_factory.mktemp("-".join(case)), *case, STEPS)
        yield lambda family, method: started[family, method].result()


@pytest.mark.parametrize(("family", "method"), CASES)
def test_bf16_on_the_gpu_has_the_losses_of_fp32_on_a_cpu_and_goes_on_from_a_save(runs, figures, family, method):
    found = runs(family, method)
    figures[f"training of a tiny {family}, {method}"] = found
    found["off"] = check(found)
