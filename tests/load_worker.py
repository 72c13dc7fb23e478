"""One rank of a load, started by the real launcher: reads checkpoints and records what a test compares.

    deepspeed --num_gpus N tests/load_worker.py RECORD EXPERT_PARALLEL METHOD DIR [DIR ...]

For each DIR, RECORD/NAME-N-EP.safetensors gets the log-probabilities of the whole vocabulary at every position of
tests.load_worker.IDS, without LoRA weights and with random ones, which RECORD/NAME-N-EP.adapter gets, and of each rank
the elements that it read, by tensor.
"""

import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.parity_worker import fill_B
from train.checkpoints.adapter import save_adapter
from train.checkpoints.reader import Checkpoint
from train.checkpoints.resume import full_factors
from train.config.settings import ds_config, parse
from train.data.batches import Batch
from train.data.row import Row
from train.experts.module import ExpertParallelExperts
from train.experts.storage import FrozenExperts
from train.layers.lora import LoRALinear, LoRASettings
from train.model.text_model import build
from train.runtime.command import leave
from train.runtime.distributed import start_distributed

IDS = [5, 240, 17, 99, 3, 3, 141, 60, 201, 8, 77, 34, 128, 90, 41, 12]


def every_log_probability(model: torch.nn.Module, vocabulary: int) -> torch.Tensor:
    """[positions, vocabulary], by asking for the NLL of every token at every position."""
    rows = torch.arange(len(IDS)).repeat_interleave(vocabulary)
    everything = Batch(
        ids_T=torch.tensor(IDS), position_T=torch.arange(len(IDS)), position_N=rows,
        target_N=torch.arange(vocabulary).repeat(len(IDS)),
        coefficient_N=torch.zeros(len(rows)), kind_N=torch.zeros(len(rows), dtype=torch.int8),
        roles_N=torch.zeros_like(rows),
        row=Row([len(IDS)]), names=["all"],
    )  # fmt: skip
    with torch.no_grad():
        return -model(everything).nll_N.view(len(IDS), vocabulary)


def in_fp32(model: torch.nn.Module) -> None:
    """The same values computed with in fp32, so that logits differ by no more than rounding of fp32."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.dtype != torch.float32:
            parameter.ds_tensor.data = parameter.ds_tensor.data.float()
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, FrozenExperts) and module.format.kind == "plain":
            module.data = module.data.float()


def main(record: Path, expert_parallel: int, method: str, directories: list[str]) -> None:
    device = start_distributed()
    ranks = dist.get_world_size()
    config = ds_config(parse([], ""), ranks)
    for directory in directories:
        checkpoint = Checkpoint(directory)
        read: Counter[str] = Counter()
        plain_read = checkpoint.read

        def counting(name, start, out, read=read, plain_read=plain_read):
            read[name] += out.numel()
            plain_read(name, start, out)

        checkpoint.read = counting  # type: ignore[method-assign]
        lora = LoRASettings(rank=4, alpha=8.0, expert_rank=2, seed=0)
        model, _ = build(checkpoint, method, lora, "", expert_parallel, config, device)
        in_fp32(model)
        fill_B(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=config)
        engine.eval()
        size = model.causal.config.vocab_size
        values = {"adapted": every_log_probability(engine, size).contiguous()}
        name = f"{Path(directory).name}-{ranks}-{expert_parallel}"
        save_adapter(record / f"{name}.adapter", model, full_factors(model), lora, checkpoint, 7)
        for module in model.modules():
            if isinstance(module, LoRALinear | ExpertParallelExperts):
                module.scale = 0.0
        values["log_p"] = every_log_probability(engine, size).contiguous()
        seen: list[Counter[str]] = [Counter()] * ranks
        dist.all_gather_object(seen, read)
        values |= {f"read.{rank}.{name}": torch.tensor(n) for rank, c in enumerate(seen) for name, n in c.items()}
        if dist.get_rank() == 0:
            save_file(values, record / f"{name}.safetensors")


if __name__ == "__main__":
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--local_rank")]
    main(Path(given[0]), int(given[1]), given[2], given[3:])
    dist.barrier()
    leave(0)
