"""The hardware of a planned job: GPUs by their data sheets, network and disk, and the plan's assumptions about them."""

import os
from dataclasses import dataclass

from train.runtime.gpu import memory as gpu_memory
from train.runtime.gpu import name as gpu_name


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, with the peak rates of its maker's data sheet.

    memory: in GB. flops: dense BF16 operations per second. bandwidth: of its memory, bytes per second. nvlink: in one
    direction, bytes per second. grouped: whether torch computes the products of many experts in one launch there.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    grouped: bool = True


GPUS = (
    GPU("H100", 80, 989e12, 3.35e12, 450e9),
    GPU("H200", 141, 989e12, 4.8e12, 450e9),
    GPU("B200", 192, 2250e12, 8e12, 900e9),
    GPU("A100", 40, 312e12, 1.555e12, 300e9, grouped=False),
    GPU("A100", 80, 312e12, 2.039e12, 300e9, grouped=False),
)
NETWORK = 50e9  # bytes per second and GPU: 400 Gb/s InfiniBand
DISK = 2e9  # bytes per second and node
# Two allowances, not measured. They can be measured on a GPU: RUNTIME is the memory that nvidia-smi shows for a rank
# beyond torch.cuda.max_memory_reserved(), USABLE is torch.cuda.max_memory_allocated() / max_memory_reserved().
RUNTIME = 2_000_000_000  # bytes of the CUDA context and of the buffers of NCCL and cuBLAS
USABLE = 0.95  # share of a GPU's memory; the rest is lost to fragmentation of torch's allocator
# On a CPU, bytes of a process's Python objects and heap: about the middle of what tests/benchmarks/plan.py measures.
PROCESS = 20_000_000

ASSUMED = f"""\
assumed: {RUNTIME / 1e9:.0f} GB for CUDA, NCCL and cuBLAS; {1 - USABLE:.0%} of the memory lost to fragmentation in
torch's allocator; uniformly random routing; --max-tokens tokens in every document. Time is a
roofline: for each micro-batch the longer of matrix products at the GPU's dense BF16 peak and of all
operands through its memory, once each; then, not overlapped, NVLink and a network of {NETWORK * 8 / 1e9:.0f} Gb/s
per GPU; load from a disk of {DISK / 1e9:.0f} GB/s per node. Real steps are slower.
"""


@dataclass(kw_only=True)
class Cluster:
    """The cluster that a job is to run on."""

    nodes: int
    gpus: int  # per node; on CPUs, ranks per node
    memory: float  # GB per GPU; 0: the job runs on CPUs
    kind: str = ""  # contains the GPU's name, if that is known

    @classmethod
    def here(cls, ranks: int) -> "Cluster":
        """Returns the cluster that a job of so many ranks runs on, with the GPU of this rank.

        Every node is assumed to have as many ranks as the launcher reports for this one (LOCAL_SIZE or
        LOCAL_WORLD_SIZE). The cluster is one node if the launcher reports no number, or one that does not divide the
        ranks.
        """
        local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or ranks)
        local = ranks if ranks % local else local
        return cls(nodes=ranks // local, gpus=local, memory=gpu_memory(), kind=gpu_name() or "")

    @property
    def ranks(self) -> int:
        """The number of ranks: one rank per GPU."""
        return self.nodes * self.gpus

    @property
    def gpu(self) -> GPU:
        """The data sheet with the nearest memory size, among those whose name is in `kind`, or else among all; the
        newer GPU of two that are equally near."""
        named = [gpu for gpu in GPUS if gpu.name in self.kind]
        return min(named or GPUS, key=lambda gpu: abs(gpu.memory - self.memory))
