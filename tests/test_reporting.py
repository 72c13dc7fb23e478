"""What a run measures of itself."""

import torch

from launch.distributed import peak_host_bytes
from train.reporting import reset_peak_memory


def test_the_peak_of_memory_of_one_run_is_not_that_of_the_run_before():
    assert reset_peak_memory(torch.device("cpu"))  # of the tests before this one
    large = torch.ones(50_000_000)
    before = peak_host_bytes()
    del large
    assert reset_peak_memory(torch.device("cpu"))
    assert peak_host_bytes() < before - 150_000_000
    again = torch.ones(50_000_000)
    assert peak_host_bytes() > before - 50_000_000 and again.sum() == 50_000_000
