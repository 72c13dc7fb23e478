"""The trained factors in PEFT's own layout, so that stock peft puts them on the stock transformers model.

Experts are `target_parameters`: for a weight [E, out, in], PEFT keeps lora_A as [E*r, in] (expert-major) and lora_B as
[out, r*E] (rank-major), and nests its wrappers: gate_up_proj, the inner one, has `.base_layer` in its key.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.checkpoints.plain import check_form, check_plain
from train.checkpoints.reader import Checkpoint, TensorFile
from train.checkpoints.writer import SafetensorsWriter, publish_directory, write_whole
from train.errors import UserError
from train.experts.module import ExpertParallelExperts
from train.lora import LoRALinear, LoRASettings, lora_linears
from train.outside import checked, read_json

if TYPE_CHECKING:
    from peft import LoraConfig

# In MoE families, peft takes gate/up/down_proj in target_modules for the experts' and drops the factors of dense and
# shared MLPs without a word; as target_parameters it loads them.
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The place of an expert weight's factors among PEFT's nested wrappers: the first of target_parameters is the inner one.
INNER = {"gate_up_proj": "base_layer.", "down_proj": ""}


@dataclass(frozen=True)
class Place:
    """A weight that has factors. name: of the module in the text model; weight: of an expert weight, else None;
    sizes: experts (1 for a linear layer), out, in."""

    name: str
    module: nn.Module
    weight: str | None
    sizes: tuple[int, int, int]

    def parameter(self, factor: str) -> str:
        """The name of lora_A or lora_B in the model that is trained."""
        return f"{self.name}.{self.weight}_lora_{factor}" if self.weight else f"{self.name}.lora_{factor}"

    def key(self, architecture: str, factor: str) -> str:
        """PEFT's name of lora_A or lora_B."""
        inner = INNER[self.weight] if self.weight else ""
        return f"base_model.model.{stock_name(self.name, architecture)}.{inner}lora_{factor}.weight"

    def shape(self, lora: LoRASettings, factor: str) -> tuple[int, int]:
        """PEFT's shape of lora_A or lora_B."""
        experts, out_features, in_features = self.sizes
        rank = experts * (lora.expert_rank if self.weight else lora.rank)
        return (rank, in_features) if factor == "A" else (out_features, rank)


def stock_name(name: str, architecture: str) -> str:
    """A module's name in transformers' model of the checkpoint's own architecture: the text model of a multimodal one
    lies deeper."""
    if architecture.endswith("ForConditionalGeneration") and name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def places(model: nn.Module, lora: LoRASettings) -> Iterator[Place]:
    """Every weight of transformers' text model that has factors: of a skeleton, or of a model that holds them."""
    linears = {**lora_linears(model), **{n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}}
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallelExperts):
            for weight, sizes in module.shapes().items():
                yield Place(name, module, weight, sizes)
        elif name in linears or (name == "lm_head" and lora.lm_head):
            linear: Any = module
            yield Place(name, module, None, (1, linear.out_features, linear.in_features))


def as_peft(place: Place, factor: str, value: Tensor, lora: LoRASettings) -> Tensor:
    """A whole factor, experts of all ranks on dim 0, in PEFT's shape. The padding of expert ranks is cut off."""
    if place.weight and factor == "A":
        value = value[:, : lora.expert_rank].flatten(0, 1)
    elif place.weight:
        value = value[:, :, : lora.expert_rank].permute(1, 2, 0).flatten(1)
    return value.contiguous()


def peft_config(model: nn.Module, lora: LoRASettings, architecture: str, base: str) -> "LoraConfig":
    """The configuration under which stock peft loads every factor of the model."""
    from peft import LoraConfig  # here: the import takes seconds, and one rank needs it, at the end

    modules, parameters = [], []
    found = list(places(model, lora))
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
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is as good
        use_rslora=lora.rslora,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        # PEFT warns that this matched no module and was ignored; it does match the parameters, and is not.
        rank_pattern={RANK_PATTERN: lora.expert_rank} if experts and lora.expert_rank != lora.rank else {},
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


BASE_MODEL = "base_model.json"
"""Beside the factors: of which weights they are, as shapes do not tell two models of one architecture apart."""
RANK_PATTERN = r"experts\.(gate_up_proj|down_proj)"


def save_adapter(
    directory: Path, model: Any, factors: Iterable[tuple[str, Tensor | None]], lora: LoRASettings, base: Checkpoint
) -> None:
    """Writes adapter_model.safetensors (fp32), adapter_config.json and base_model.json, under another name until they
    are whole. factors: resume.full_factors, one at a time; all ranks must call it, and rank 0 writes."""
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
    config = _plain(peft_config(model.causal, lora, model.architecture, str(base.directory)).to_dict())
    write_whole(partial / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    trained_on = {"directory": str(base.directory), "fingerprint": base.fingerprint()}
    write_whole(partial / BASE_MODEL, json.dumps(trained_on, indent=2) + "\n")
    publish_directory(partial, directory)


def _plain(value: Any) -> Any:
    """JSON's types: PEFT keeps sets and enums."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | list | tuple):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    return value.value if hasattr(value, "value") else value


LARGEST_RANK = 2**20
ADAPTER_KINDS = {"r": int, "lora_alpha": float, "use_rslora": bool, "rank_pattern": dict, "alpha_pattern": dict}


def adapter_settings(directory: Path) -> LoRASettings:
    """Ranks and scales of an adapter directory. UserError if it is none, or one that this trainer does not make."""
    where = f"--adapter {directory}"
    config_path, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for path in (config_path, weights):
        if not os.path.isfile(path):
            fix = f"--adapter {directory / 'adapter'}" if os.path.isfile(directory / "adapter" / path.name) else ""
            raise UserError(
                f"{where}: no {path.name} there; give {fix or 'the directory of a PEFT adapter in safetensors'}."
            )
    config, factors = read_json(config_path), TensorFile(weights).tensors
    checked(config, ADAPTER_KINDS, config_path)
    check_plain(config, config_path)
    check_form(factors, where)
    if wrong := [name for name, info in factors.items() if not info.dtype.is_floating_point or info.dtype.itemsize < 2]:
        raise UserError(
            f"{weights}: tensor {wrong[0]} is {factors[wrong[0]].dtype}, but factors must be floats of 16 bits "
            "or more; save the adapter again in one of these."
        )
    patterns = dict(config.get("rank_pattern") or {})
    expert_rank = patterns.pop(RANK_PATTERN, config.get("r"))
    rank, alpha = config.get("r", 0), config.get("lora_alpha", 0)
    numbers = (rank, expert_rank, alpha)
    if patterns or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 < n <= LARGEST_RANK for n in numbers
    ):
        raise UserError(f"{config_path}: r, lora_alpha or rank_pattern are not those of an adapter of train/sft.py.")
    lm_head = any(".lm_head." in name for name in factors)
    return LoRASettings(int(rank), float(alpha), int(expert_rank), 0, lm_head, bool(config.get("use_rslora")))


def check_base(directory: Path, base: Checkpoint) -> None:
    """UserError where the adapter was trained on other weights than the base's. One that does not say on which, as
    other trainers leave it, is taken with a note."""
    path = directory / BASE_MODEL
    if not os.path.lexists(path):
        if os.environ.get("RANK", "0") == "0":
            print(f"note: --adapter {directory}: does not say which weights it was trained on ({BASE_MODEL} is absent)")
        return
    trained_on = read_json(path)
    if trained_on.get("fingerprint") != base.fingerprint():
        raise UserError(
            f"--adapter {directory}: was trained on another base model than --model {base.directory}: on "
            f"{trained_on.get('directory')}, whose weights had the fingerprint "
            f"{str(trained_on.get('fingerprint'))[:12]}, not {base.fingerprint()[:12]}. Give that model (where these "
            f"are the same weights in other files, remove {path})."
        )


def check_adapter(
    directory: Path, skeleton: nn.Module, lora: LoRASettings, architecture: str, base: Checkpoint
) -> None:
    """UserError unless the adapter was trained on this base, and has exactly the factors that `lora` gives the model,
    under the same scale."""
    where, theirs = f"--adapter {directory}", adapter_settings(directory)
    check_base(directory, base)
    flags = {"rank": "--lora-rank", "alpha": "--lora-alpha", "rslora": "--rslora", "expert_rank": "--expert-lora-rank"}
    experts = any(place.weight for place in places(skeleton, lora))
    for field, flag in flags.items():
        here, there = getattr(lora, field), getattr(theirs, field)
        if here != there and (experts or field != "expert_rank"):
            fix = f"give {flag} {there}" if field != "rslora" else f"{'give' if there else 'leave out'} {flag}"
            raise UserError(f"{where}: was trained with {flag} {there}, not {here}; {fix}.")
    wanted = {p.key(architecture, f): p.shape(lora, f) for p in places(skeleton, lora) for f in "AB"}
    found = {name: info.shape for name, info in TensorFile(directory / "adapter_model.safetensors").tensors.items()}
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = differing[0]
        raise UserError(
            f"{where}: {len(differing)} tensors differ from the factors that this model takes, among them {name}: "
            f"{found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here. Use the adapter's own base model, "
            "and, in train/sft.py, --lora-lm-head if it has factors there."
        )


def check_finite(directory: Path) -> None:
    """UserError if a factor has values that are NaN or infinite. Reads all of them, one at a time."""
    file = TensorFile(directory / "adapter_model.safetensors")
    for name, info in file.tensors.items():
        values = torch.empty(info.shape, dtype=info.dtype)
        file.read(name, 0, values)
        if not values.isfinite().all():
            raise UserError(
                f"--adapter {directory}: tensor {name} has values that are not finite; the training that made it went "
                "wrong. Give another adapter."
            )
    file.close()


def load_adapter(directory: Path, model: Any, lora: LoRASettings) -> None:
    """Puts a checked adapter's factors into a model whose factors are whole on each rank (before ZeRO-3 divides them):
    each rank its own experts'. Of lora_A these lie together; lora_B, where they do not, is read one layer at a time."""
    file = TensorFile(directory / "adapter_model.safetensors")

    def read(key: str, start: int, *shape: int) -> Tensor:
        out = torch.empty(shape, dtype=file.tensors[key].dtype)
        file.read(key, start, out)
        return out

    for place in places(model.causal, lora):
        (experts, out_features, in_features), module = place.sizes, cast(Any, place.module)
        key_A, key_B = (place.key(model.architecture, f) for f in "AB")
        with torch.no_grad():
            if place.weight is None:
                module.lora_A.copy_(read(key_A, 0, lora.rank, in_features))
                module.lora_B.copy_(read(key_B, 0, out_features, lora.rank))
                continue
            rank, owned = lora.expert_rank, module.ep.owned(experts)
            A_ErI = read(key_A, owned.start * rank * in_features, len(owned), rank, in_features)
            getattr(module, f"{place.weight}_lora_A")[:, :rank] = A_ErI
            B_OrE = read(key_B, 0, out_features, rank, experts)[..., owned.start : owned.stop]
            getattr(module, f"{place.weight}_lora_B")[:, :, :rank] = B_OrE.permute(2, 0, 1)
    file.close()
