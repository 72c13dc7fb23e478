"""Defines where a model has LoRA weights, and saves them in PEFT's own layout, so that stock peft can apply them to the
stock transformers model. (adapter_files.py reads adapters.)

Expert weights are PEFT `target_parameters`. For a weight [E, out, in], PEFT stores lora_A as [E*r, in] (expert-major)
and lora_B as [out, r*E] (rank-major). It nests one wrapper per weight; gate_up_proj is the inner one and has
`.base_layer` in its key.

Shapes: E experts, r LoRA rank, I and O input and output features.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.checkpoints.present import BASE_MODEL
from train.checkpoints.reader import Checkpoint
from train.checkpoints.writer import SafetensorsWriter, publish_directory
from train.experts.module import ExpertParallelExperts
from train.layers.lora import LoRALinear, LoRASettings, lora_linears
from train.runtime.outputs import write_whole

if TYPE_CHECKING:
    from peft import LoraConfig

# In MoE families, peft takes gate/up/down_proj in target_modules to mean the experts' matrices and silently drops the
# LoRA weights of dense and shared MLPs. It does load them if they are listed as target_parameters.
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What PEFT's nested wrappers add to the keys of an expert weight's lora_A and lora_B. PEFT wraps the target parameters
# of a module in the order in which the module holds them, so the first one has the inner wrapper.
INNER = {"gate_up_proj": "base_layer.", "down_proj": ""}


@dataclass(frozen=True)
class Place:
    """A weight of the model that has LoRA weights (A and B).

    name: the module's name in the text model. weight: gate_up_proj or down_proj for an expert weight, None for a
    linear layer. sizes: number of experts (1 for a linear layer), out, in.
    """

    name: str
    module: nn.Module
    weight: str | None
    sizes: tuple[int, int, int]

    def parameter(self, factor: str) -> str:
        """Returns the parameter name of lora_A or lora_B in the model being trained. factor: "A" or "B"."""
        return f"{self.name}.{self.weight}_lora_{factor}" if self.weight else f"{self.name}.lora_{factor}"

    def key(self, architecture: str, factor: str) -> str:
        """Returns PEFT's tensor name of lora_A or lora_B. factor: "A" or "B"."""
        inner = INNER[self.weight] if self.weight else ""
        return f"base_model.model.{stock_name(self.name, architecture)}.{inner}lora_{factor}.weight"

    def shape(self, lora: LoRASettings, factor: str) -> tuple[int, int]:
        """Returns the shape of lora_A or lora_B in PEFT's layout. factor: "A" or "B"."""
        experts, out_features, in_features = self.sizes
        rank = experts * (lora.expert_rank if self.weight else lora.rank)
        return (rank, in_features) if factor == "A" else (out_features, rank)


def stock_name(name: str, architecture: str) -> str:
    """Returns a module's name in transformers' model of the checkpoint's own architecture.

    In a multimodal architecture the text model is nested one level deeper.
    """
    if architecture.endswith("ForConditionalGeneration") and name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def places(model: nn.Module, lora: LoRASettings) -> Iterator[Place]:
    """Yields every weight of transformers' text model that has LoRA weights.

    `model` is either a skeleton without LoRA layers or a model that already has them.
    """
    linears = {**lora_linears(model), **{n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}}
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallelExperts):
            for weight, sizes in module.shapes().items():
                yield Place(name, module, weight, sizes)
        elif name in linears or (name == "lm_head" and lora.lm_head):
            linear: Any = module
            yield Place(name, module, None, (1, linear.out_features, linear.in_features))


def as_peft(place: Place, factor: str, value: Tensor, lora: LoRASettings) -> Tensor:
    """Returns a full lora_A or lora_B in PEFT's layout.

    A linear layer's A [r, I] and B [O, r] keep their shape. An expert weight's A [E, r, I] becomes [E*r, I], and its B
    [E, O, r] becomes [O, r*E]. E counts the experts of all ranks. The padding of the expert LoRA rank is cut off.
    """
    if place.weight and factor == "A":
        value = value[:, : lora.expert_rank].flatten(0, 1)
    elif place.weight:
        value = value[:, :, : lora.expert_rank].permute(1, 2, 0).flatten(1)
    return value.contiguous()


def peft_config(found: Collection[Place], lora: LoRASettings, architecture: str, base: str) -> "LoraConfig":
    """Returns the configuration with which stock peft loads the LoRA weights of these places. base: the base model."""
    from peft import LoraConfig  # here: the import takes seconds, and only rank 0 needs it, at the end

    modules, parameters = [], []
    experts = any(place.weight for place in found)
    for place in found:
        name = stock_name(place.name, architecture)
        if place.weight:
            parameters.append(f"{name}.{place.weight}")
        elif experts and name.rpartition(".")[2] in MLP_PROJECTIONS:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it, so a float works too
        use_rslora=lora.rslora,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        # PEFT warns that this pattern matched no module and was ignored. It does match the parameters and is applied.
        rank_pattern={RANK_PATTERN: lora.expert_rank} if experts and lora.expert_rank != lora.rank else {},
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


RANK_PATTERN = r"experts\.(gate_up_proj|down_proj)"


def save_adapter(
    directory: Path, model: Any, factors: Iterable[tuple[str, Tensor | None]], lora: LoRASettings, base: Checkpoint,
    step: int,
) -> None:  # fmt: skip
    """Writes adapter_model.safetensors (fp32), adapter_config.json and base_model.json into `directory`.

    The directory has a temporary name until all files are complete. factors: (parameter name, full tensor), one at a
    time, as from `resume.full_factors`: A [r, I] or [E, r, I], B [O, r] or [E, O, r]. All ranks must call this; only
    rank 0 writes, and only it needs the tensors. step: optimizer steps that the weights were trained for.
    """
    if dist.get_rank():
        for _ in factors:
            pass
        return
    partial, found = directory.with_name(directory.name + ".partial"), list(places(model.causal, lora))
    partial.mkdir(parents=True, exist_ok=True)
    layout = {p.key(model.architecture, f): (torch.float32, p.shape(lora, f)) for p in found for f in "AB"}
    by_parameter = {f"causal.{place.parameter(f)}": (place, f) for place in found for f in "AB"}
    writer = SafetensorsWriter(partial / "adapter_model.safetensors", layout)
    for name, value in factors:
        place, f = by_parameter[name]
        assert value is not None
        writer.write(place.key(model.architecture, f), as_peft(place, f, value, lora))
    writer.check_whole()
    writer.close()
    writer.publish()
    config = plain_values(peft_config(found, lora, model.architecture, str(base.directory)).to_dict())
    write_whole(partial / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    trained_on = {"directory": str(base.directory), "fingerprint": base.fingerprint(), "step": step}
    write_whole(partial / BASE_MODEL, json.dumps(trained_on, indent=2) + "\n")
    publish_directory(partial, directory)


def plain_values(value: Any) -> Any:
    """Converts PEFT's sets and enums to JSON types."""
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    if isinstance(value, set | list | tuple):
        return [plain_values(v) for v in (sorted(value) if isinstance(value, set) else value)]
    return value.value if hasattr(value, "value") else value
