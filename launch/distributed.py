"""The process group of a training job."""

import os
import resource
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator


def peak_host_bytes() -> int:
    """The peak resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage has the peak of the process that started this one in it
        high_water = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high_water.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_distributed() -> torch.device:
    """Joins all ranks in one process group, over gloo where there is no GPU; a script started without the launcher is a
    group of one. Ranks on one CPU divide its cores among them. -> this rank's device."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":  # or every rank would use the first GPU
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if accelerator.device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
    # An all-reduce for inference on CPUs, which training never calls. DeepSpeed would compile it first, for a minute,
    # and its link command does not hold where the path to .venv has a space.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    return torch.device(accelerator.current_device_name())
