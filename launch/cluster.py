"""What a planned job runs on: GPUs by their data sheets, network and disk, and what is assumed of them."""

import os
from dataclasses import dataclass

from train.gpu import memory as gpu_memory
from train.gpu import name as gpu_name


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, by its memory in GB. Per second, by its maker's data sheet: dense BF16 operations, bytes of its
    memory, bytes of NVLink one way. grouped: whether torch multiplies many experts in one launch there."""

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
NETWORK = 50e9  # bytes a second and GPU: 400 Gb/s InfiniBand
DISK = 2e9  # bytes a second and node
# Two allowances, not measured. On a GPU: what nvidia-smi shows of a rank beyond torch.cuda.max_memory_reserved(), and
# torch.cuda.max_memory_allocated() / max_memory_reserved().
RUNTIME = 2_000_000_000  # CUDA context, NCCL's and cuBLAS's buffers
USABLE = 0.95  # of a GPU's memory: the rest is lost between blocks of torch's allocator
# On a CPU, a process's objects of Python's and its heap: about the middle of what tests/benchmarks/plan.py finds.
PROCESS = 20_000_000

ASSUMED = f"""\
assumed: {RUNTIME / 1e9:.0f} GB for CUDA, NCCL and cuBLAS, and {1 - USABLE:.0%} of the memory lost between blocks of
torch's allocator; routing uniformly at random; all documents of --max-tokens tokens. Time is a
roofline: for each micro-batch the longer of matrix products at the GPU's dense BF16 peak and of all
operands through its memory, once each; then, not overlapped, NVLink and a network of {NETWORK * 8 / 1e9:.0f} Gb/s
a GPU; load from a disk of {DISK / 1e9:.0f} GB/s a node. Real steps are slower.
"""


@dataclass(kw_only=True)
class Cluster:
    """What the job is to run on."""

    nodes: int
    gpus: int  # of a node
    memory: float  # GB of a GPU; 0: on CPUs
    kind: str = ""  # has the GPU's name in it, where that is known

    @classmethod
    def here(cls, ranks: int) -> "Cluster":
        """What a job of so many ranks runs on, as its launcher tells: as many ranks on each node as on this one. Where
        it does not tell, one node."""
        local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or ranks)
        local = ranks if ranks % local else local
        return cls(nodes=ranks // local, gpus=local, memory=gpu_memory(), kind=gpu_name() or "")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def gpu(self) -> GPU:
        """The kind of GPU whose memory is nearest, of those of its name; of two the newer one."""
        named = [gpu for gpu in GPUS if gpu.name in self.kind]
        return min(named or GPUS, key=lambda gpu: abs(gpu.memory - self.memory))
