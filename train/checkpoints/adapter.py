"""Saves and loads the trained LoRA weights in PEFT's own layout, so that stock peft can apply them to the stock
transformers model.

Expert weights are PEFT `target_parameters`. For a weight [E, out, in], PEFT stores lora_A as [E*r, in] (expert-major)
and lora_B as [out, r*E] (rank-major). It nests one wrapper per weight; gate_up_proj is the inner one and has
`.base_layer` in its key.

Shapes: E experts, r LoRA rank, I and O input and output features.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.checkpoints.plain import check_form, check_plain
from train.checkpoints.present import adapter_files
from train.checkpoints.reader import Checkpoint, TensorFile
from train.checkpoints.writer import SafetensorsWriter, publish_directory
from train.experts.module import ExpertParallelExperts
from train.layers.lora import LoRALinear, LoRASettings, lora_linears
from train.runtime.errors import UserError
from train.runtime.outputs import write_whole
from train.runtime.outside import checked, read_json

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


def peft_config(model: nn.Module, lora: LoRASettings, architecture: str, base: str) -> "LoraConfig":
    """Returns the configuration with which stock peft loads all LoRA weights of the model. base: the base model."""
    from peft import LoraConfig  # here: the import takes seconds, and only rank 0 needs it, at the end

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


BASE_MODEL = "base_model.json"
"""File beside the LoRA weights that identifies the base model's weights. Shapes alone cannot distinguish two models of
the same architecture."""
RANK_PATTERN = r"experts\.(gate_up_proj|down_proj)"


def save_adapter(
    directory: Path, model: Any, factors: Iterable[tuple[str, Tensor | None]], lora: LoRASettings, base: Checkpoint
) -> None:
    """Writes adapter_model.safetensors (fp32), adapter_config.json and base_model.json into `directory`.

    The directory has a temporary name until all files are complete. factors: (parameter name, full tensor), one at a
    time, as from `resume.full_factors`: A [r, I] or [E, r, I], B [O, r] or [E, O, r]. All ranks must call this; only
    rank 0 writes, and only it needs the tensors.
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
    config = _plain(peft_config(model.causal, lora, model.architecture, str(base.directory)).to_dict())
    write_whole(partial / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    trained_on = {"directory": str(base.directory), "fingerprint": base.fingerprint()}
    write_whole(partial / BASE_MODEL, json.dumps(trained_on, indent=2) + "\n")
    publish_directory(partial, directory)


def _plain(value: Any) -> Any:
    """Converts PEFT's sets and enums to JSON types."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | list | tuple):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    return value.value if hasattr(value, "value") else value


LARGEST_RANK = 2**20
ADAPTER_KINDS = {"r": int, "lora_alpha": float, "use_rslora": bool, "rank_pattern": dict, "alpha_pattern": dict}


def adapter_settings(directory: Path) -> LoRASettings:
    """Returns the ranks and scales of the adapter in `directory`.

    Raises UserError if a file is missing or invalid, or if the adapter is not of a kind that this trainer writes:
    something other than a plain update, LoRA weights named per expert, a dtype other than floats of at least 16 bits,
    or a rank or alpha out of range.
    """
    where = f"--adapter {directory}"
    config_path, weights = adapter_files(directory)
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
    """Raises UserError if the adapter was trained on weights other than the base's.

    Adapters of other trainers do not record their base weights. They are accepted, and rank 0 prints a note.
    """
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
    """Checks that an adapter fits the model and the settings.

    Raises UserError unless it was trained on this base, has exactly the LoRA weights that `lora` gives the model, and
    uses the same ranks and scale.
    """
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
    """Raises UserError if an adapter tensor has NaN or infinite values. Reads all tensors, one at a time."""
    with closing(TensorFile(directory / "adapter_model.safetensors")) as file:
        for name, info in file.tensors.items():
            values = torch.empty(info.shape, dtype=info.dtype)
            file.read(name, 0, values)
            if not values.isfinite().all():
                raise UserError(
                    f"--adapter {directory}: tensor {name} has values that are not finite; the training that made it "
                    "went wrong. Give another adapter."
                )


def load_adapter(directory: Path, model: Any, lora: LoRASettings) -> None:
    """Copies a checked adapter's LoRA weights into the model, which must not be partitioned by ZeRO-3 yet.

    For experts, each rank copies only those of its own. In lora_A they are contiguous, so only they are read. In lora_B
    they are not, so each layer's lora_B is read completely, one layer at a time.
    """
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
