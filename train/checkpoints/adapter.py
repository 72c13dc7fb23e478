"""The trained factors in PEFT's own layout, so that stock peft puts them on the stock transformers model.

Experts are `target_parameters`: for a weight [E, out, in], PEFT keeps lora_A as [E*r, in] (expert-major) and lora_B as
[out, r*E] (rank-major), and nests its wrappers: gate_up_proj, the inner one, has `.base_layer` in its key.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from train.experts.module import ExpertParallelExperts
from train.lora import LoRALinear, LoRASettings
from train.masking.loss import LossHead
from train.model import LanguageModel

# In these families, peft takes gate/up/down_proj in target_modules for the experts' and drops the factors of dense and
# shared MLPs without a word; as target_parameters it loads them.
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def peft_tensors(model: LanguageModel, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's keys and shapes for `factors`: parameter name -> whole tensor, experts of all ranks on dim 0. The padding
    of expert ranks is cut off."""
    tensors = {}
    for name, module in model.causal.named_modules():
        prefix = f"base_model.model.{name}"
        if isinstance(module, ExpertParallelExperts) and module.rank:
            for weight, inner in (("gate_up_proj", "base_layer."), ("down_proj", "")):
                A, B = (factors[f"causal.{name}.{weight}_lora_{f}"] for f in "AB")
                A, B = A[:, : module.rank], B[:, :, : module.rank]
                tensors[f"{prefix}.{inner}lora_A.weight"] = A.reshape(-1, A.shape[2]).contiguous()
                tensors[f"{prefix}.{inner}lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
        elif _has_factors(module):
            for f in "AB":
                tensors[f"{prefix}.lora_{f}.weight"] = factors[f"causal.{name}.lora_{f}"].contiguous()
    return tensors


def _has_factors(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear) or (isinstance(module, LossHead) and module.lora_A is not None)


def peft_config(model: LanguageModel, lora: LoRASettings, base: str) -> LoraConfig:
    """The configuration under which stock peft loads every one of `peft_tensors`."""
    modules, parameters = [], []
    for name, module in model.causal.named_modules():
        if isinstance(module, ExpertParallelExperts) and module.rank:
            parameters += [f"{name}.{weight}" for weight in module.shapes()]
        elif _has_factors(module):
            if model.expert_layers and name.rpartition(".")[2] in MLP_PROJECTIONS:
                parameters.append(f"{name}.weight")
            else:
                modules.append(name)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is as good
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        # PEFT warns that this matched no module and was ignored; it does match the parameters, and is not.
        rank_pattern={r"experts\.(gate_up_proj|down_proj)": lora.expert_rank} if lora.expert_rank != lora.rank else {},
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def save_adapter(
    directory: Path, model: LanguageModel, factors: dict[str, Tensor], lora: LoRASettings, base: str
) -> None:
    """Writes adapter_model.safetensors (fp32) and adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.float32) for name, tensor in peft_tensors(model, factors).items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = _plain(peft_config(model, lora, base).to_dict())
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _plain(value: Any) -> Any:
    """JSON's types: PEFT keeps sets and enums."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | list | tuple):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    return value.value if hasattr(value, "value") else value
