"""One rank of parity runs, started by the real launcher: each trains as sft.py does and records what a test compares.

    deepspeed --num_gpus N tests/parity_worker.py RECORD.safetensors [flags of train/sft.py] [--then RECORD ...]

--flip-router: the routers' inputs change their sign when gradient checkpointing recomputes.
B, which starts at zero, gets random values by name, so that every LoRA weight has a gradient from the first step on.
"""

import gc
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from train.checkpoints import resume
from train.checkpoints.adapter import as_peft, places, save_adapter
from train.config.settings import parse
from train.experts.module import ExpertParallelExperts
from train.experts.recompute import recomputing
from train.model.engine import make_engine
from train.model.text_model import LanguageModel, build
from train.runtime.command import leave
from train.runtime.distributed import start_distributed
from train.training.job import Job, prepare
from train.training.trainer import Trainer


def fill_B(model: LanguageModel) -> None:
    """B uniform in ±0.3, from the name of the layer and the number of the expert alone."""

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.6 - 0.3

    for name, parameter in model.named_parameters():
        if not name.endswith("lora_B"):
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, ExpertParallelExperts):
            for i, expert in enumerate(layer.ep.owned(layer.experts)):
                factor = values(f"{name}.{expert}", torch.Size([parameter.shape[1], layer.rank]))
                parameter.data[i, :, : layer.rank] = factor
        else:
            parameter.data.copy_(values(name, parameter.shape))


def as_stock(model: LanguageModel, job: Job, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of PEFT, or where the weights themselves are trained of transformers."""
    inside = {name.removeprefix("causal."): value for name, value in values.items()}
    if not job.lora:
        return inside
    return {
        place.key(model.architecture, f): as_peft(place, f, inside[place.parameter(f)], job.lora)
        for place in places(model.causal, job.lora)
        for f in "AB"
    }


def record_gradients(engine: Any, model: LanguageModel, job: Job, recorded: dict[str, torch.Tensor]) -> None:
    """Has every step add the gradients that it is taken with."""
    step_engine = engine.step

    def recording_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            step = sum(name.startswith("loss.") for name in recorded)
            gradients = {
                name: resume.gather_experts(safe_get_full_grad(p), resume.expert_group(model, name))
                for name, p in resume.trainable(model).items()
            }
            if dist.get_rank():
                return step_engine()
            for name, layer in model.named_modules():  # the padding of expert ranks has no gradient at all
                if isinstance(layer, ExpertParallelExperts) and layer.rank:
                    for weight in layer.shapes():
                        assert not gradients[f"{name}.{weight}_lora_A"][:, layer.rank :].any()
                        assert not gradients[f"{name}.{weight}_lora_B"][:, :, layer.rank :].any()
            recorded.update({f"grad.{step}.{k}": v.clone() for k, v in as_stock(model, job, gradients).items()})
        step_engine()

    engine.step = recording_step


def main(record: Path, flags: list[str]) -> None:
    flip = "--flip-router" in flags
    settings = parse([flag for flag in flags if flag != "--flip-router"], "")
    job = prepare(settings, dist.get_world_size(), show=False)
    model, _ = build(
        job.checkpoint, settings.method, job.lora, settings.adapter, job.expert_parallel, job.ds_config,
        torch.device("cpu"),
    )  # fmt: skip
    if not settings.adapter:
        fill_B(model)
    model.train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    calls = [0]
    for layer in model.expert_layers:
        layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    engine = make_engine(model, settings, job.ds_config)
    if job.lora:
        save_adapter(record.with_suffix(".start"), model, resume.full_factors(model), job.lora, job.checkpoint, 7)
    recorded: dict[str, torch.Tensor] = {}

    record_gradients(engine, model, job, recorded)
    if flip:
        for module in model.modules():
            if type(module).__name__.endswith(("TopKRouter", "TopkRouter")):
                module.register_forward_pre_hook(lambda _, given: tuple(-x if recomputing() else x for x in given))
    trainer = Trainer(job, engine)
    for step in range(job.steps):
        values = trainer.step(step, measure=True)
        recorded[f"loss.{step}"] = torch.tensor(values["loss"], dtype=torch.float64)
        recorded[f"norm.{step}"] = torch.tensor(values["grad_norm"], dtype=torch.float64)
        recorded[f"load.{step}"] = torch.tensor(sum(values.get("rank_load", {}).values()))
        recorded[f"idle.{step}"] = torch.tensor(values.get("experts_without_tokens", 0))
        for part in ("cross_entropy", "unlikelihood", "held"):
            recorded[f"{part}.{step}"] = torch.tensor(values[part], dtype=torch.float64)
        for measure in ("nll", "kl"):
            for role, value in values.get(measure, {}).items():
                recorded[f"{measure}.{step}.{role}"] = torch.tensor(value, dtype=torch.float64)
    end = dict(resume.full_factors(model))
    if dist.get_rank() == 0:
        recorded |= {"calls": torch.tensor(calls[0])} | {f"end.{k}": v for k, v in as_stock(model, job, end).items()}
        save_file(recorded, record)


if __name__ == "__main__":
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--local_rank")]
    gc.freeze()  # for each engine DeepSpeed collects all that there is, which is mostly what was imported
    start_distributed()
    while given:
        end = given.index("--then") if "--then" in given else len(given)
        main(Path(given[0]), given[1:end])
        given = given[end + 1 :]
    leave(0)
