"""Reads adapters: checks that one fits the model, and returns its LoRA weights by their place in the model.

Three forms are read. In PEFT's own form for transformers 5 (adapter.py), the experts of a layer are one parameter. In
the per-expert form, as Tinker, ms-swift and older versions of PEFT write it, each expert's gate_proj, up_proj and
down_proj has an A and a B of its own: `….experts.3.gate_proj.lora_A.weight` [r, I].

Two updates s B_g A_g of the gate and s B_u A_u of the up projection are one update of the fused weight, of rank 2r:
A = [A_g; A_u], and B has B_g and B_u on its diagonal. So an adapter of the per-expert form has expert rank 2r here.
down_proj is padded to that rank with zeros, which change nothing.

The third form is a training checkpoint, RUN/saves/step-N (resume.py): the run's settings.yaml has its ranks and scale.

Shapes: E experts, r LoRA rank, I and O input and output features, n experts of one rank.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.checkpoints.adapter import RANK_PATTERN, Place, places, stock_name
from train.checkpoints.layout import MATRICES
from train.checkpoints.plain import OF_ONE_EXPERT, check_plain
from train.checkpoints.present import BASE_MODEL, SAVED, STATE, adapter_files
from train.checkpoints.reader import Checkpoint, TensorFile
from train.config.provenance import held_settings
from train.config.settings import Settings
from train.layers.lora import LoRASettings
from train.runtime.errors import UserError
from train.runtime.outside import checked, opened, read_json

LARGEST_RANK = 2**20
MOMENTS = ("exp_avg", "exp_avg_sq")  # ends of the names of what a training checkpoint holds beside the weights
ADAPTER_KINDS = {"r": int, "lora_alpha": float, "use_rslora": bool, "rank_pattern": dict, "alpha_pattern": dict}


def weights_hash(directory: Path) -> str:
    """Returns the SHA-256 of an adapter's weight file. Raises UserError if it cannot be read."""
    with opened(adapter_files(directory)[1]) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AdapterFile:
    """The tensors of an adapter's directory, in any form, read by place.

    architecture: the class that the base's config.json names, which decides how modules are named. lora: the settings
    that `adapter_settings` returned for the directory. Raises UserError if the file cannot be read.
    """

    def __init__(self, directory: Path, architecture: str, lora: LoRASettings):
        self.file, self.architecture, self.lora = TensorFile(adapter_files(directory)[1]), architecture, lora
        self.saved = os.path.isfile(directory / SAVED)
        self.per_expert = any(OF_ONE_EXPERT.search(name) for name in self.file.tensors)

    def tensors(self, place: Place) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of every tensor that the form has for a place."""
        if self.saved:
            return {self._name(place, f): self._saved_shape(place, f) for f in "AB"}
        if not (self.per_expert and place.weight):
            return {place.key(self.architecture, f): place.shape(self.lora, f) for f in "AB"}
        experts, out_features, in_features = place.sizes
        matrices = MATRICES[place.weight]
        rank, out_features = self.lora.rank, out_features // len(matrices)
        return {
            self._key(place, expert, matrix, f): (rank, in_features) if f == "A" else (out_features, rank)
            for expert in range(experts)
            for matrix in matrices
            for f in "AB"
        }

    def _name(self, place: Place, factor: str) -> str:
        """Returns the name of the tensor of all experts, or of the linear layer."""
        return f"causal.{place.parameter(factor)}" if self.saved else place.key(self.architecture, factor)

    def _saved_shape(self, place: Place, factor: str) -> tuple[int, ...]:
        experts, out_features, in_features = place.sizes
        rank = self.lora.expert_rank if place.weight else self.lora.rank
        shape = (rank, in_features) if factor == "A" else (out_features, rank)
        return (experts, *shape) if place.weight else shape

    def _key(self, place: Place, expert: int, matrix: str, factor: str) -> str:
        module = stock_name(place.name, self.architecture)
        return f"base_model.model.{module}.{expert}.{matrix}.lora_{factor}.weight"

    def read(self, place: Place, factor: str, experts: range | None = None) -> Tensor:
        """Returns lora_A or lora_B of a place in its stored dtype. factor: "A" or "B".

        For a linear layer A [r, I] or B [O, r], for an expert weight A [n, r, I] or B [n, O, r] of `experts` (None: all
        of them), where r is the expert LoRA rank. In PEFT's form, A of some experts is one range of the file, and only
        that is read; B is read completely. In a training checkpoint both are.
        """
        if place.weight is None:
            return self._whole(self._name(place, factor))
        count, out_features, in_features = place.sizes
        experts = range(count) if experts is None else experts
        if self.per_expert:
            return torch.stack([self._fused(place, expert, factor) for expert in experts])
        key, rank = self._name(place, factor), self.lora.expert_rank
        if factor == "A" or self.saved:
            shape = (rank, in_features) if factor == "A" else (out_features, rank)
            out = torch.empty(len(experts), *shape, dtype=self.file.tensors[key].dtype)
            self.file.read(key, experts.start * math.prod(shape), out)
            return out
        B_OrE = self._whole(key).view(out_features, rank, count)
        return B_OrE[..., experts.start : experts.stop].permute(2, 0, 1)

    def _whole(self, key: str) -> Tensor:
        info = self.file.tensors[key]
        out = torch.empty(info.shape, dtype=info.dtype)
        self.file.read(key, 0, out)
        return out

    def _fused(self, place: Place, expert: int, factor: str) -> Tensor:
        """Returns one expert's A [2r, I] or B [O, 2r] of a fused weight, from the tensors of its projections."""
        assert place.weight
        parts = [self._whole(self._key(place, expert, matrix, factor)) for matrix in MATRICES[place.weight]]
        whole = torch.block_diag(*parts) if factor == "B" else torch.cat(parts)
        padding = self.lora.expert_rank - whole.shape[0 if factor == "A" else 1]
        whole = nn.functional.pad(whole, (0, 0, 0, padding) if factor == "A" else (0, padding))
        # The scale of rank r in the file is the scale of rank 2r here, so B makes up for the difference
        return whole if factor == "A" else whole * (self.lora.scale / self.lora.expert_scale)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def adapter_settings(directory: Path) -> LoRASettings:
    """Returns the ranks and scales of the adapter in `directory`. In the per-expert form the expert rank is twice r.

    Raises UserError if a file is missing or invalid, or if the adapter is something other than a plain update, has a
    dtype other than floats of at least 16 bits, or a rank or alpha out of range.
    """
    if os.path.isfile(directory / SAVED):
        return _saved_settings(directory)
    config_path, weights = adapter_files(directory)
    config, tensors = read_json(config_path), TensorFile(weights).tensors
    checked(config, ADAPTER_KINDS, config_path)
    check_plain(config, config_path)
    if wrong := [name for name, info in tensors.items() if not info.dtype.is_floating_point or info.dtype.itemsize < 2]:
        raise UserError(
            f"{weights}: tensor {wrong[0]} is {tensors[wrong[0]].dtype}, but LoRA weights must be floats of 16 bits "
            "or more; save the adapter again in one of these."
        )
    per_expert = any(OF_ONE_EXPERT.search(name) for name in tensors)
    patterns, rank, alpha = dict(config.get("rank_pattern") or {}), config.get("r", 0), config.get("lora_alpha", 0)
    expert_rank = rank if per_expert else patterns.pop(RANK_PATTERN, rank)
    numbers = (rank, expert_rank, alpha)
    if patterns or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 < n <= LARGEST_RANK for n in numbers
    ):
        raise UserError(
            f"{config_path}: r, lora_alpha or rank_pattern are not supported: there must be one rank for all "
            "linear layers, and one for all experts. Give another adapter."
        )
    lm_head = any(".lm_head." in name for name in tensors)
    expert_rank = int(expert_rank) * (2 if per_expert else 1)
    return LoRASettings(int(rank), float(alpha), expert_rank, 0, lm_head, bool(config.get("use_rslora")))


def _run_of(saved: Path) -> dict[str, Any]:
    """Returns the content of the settings.yaml of the run whose training checkpoint `saved` is.

    Raises UserError if there is none, or if the run trained all weights.
    """
    path = Path(os.path.abspath(saved)).parents[1] / "settings.yaml"
    if not os.path.isfile(path):
        raise UserError(
            f"--adapter {saved}: is a training checkpoint, but the settings of its run are missing ({path})."
        )
    held = held_settings(path)
    if held["settings"].get("method") == "full":
        raise UserError(f"--adapter {saved}: its run trained all weights (--method full): it has no LoRA weights.")
    return held


def _saved_settings(directory: Path) -> LoRASettings:
    held = _run_of(directory)
    own = dataclasses.asdict(Settings()) | held["settings"]
    expert_rank = (held.get("resolved") or {}).get("expert_lora_rank") or own["lora_rank"]
    return LoRASettings(own["lora_rank"], own["lora_alpha"], int(expert_rank), 0, own["lora_lm_head"], own["rslora"])


def training_of(directory: Path) -> dict[str, Any] | None:
    """Returns what an adapter records about its training: `directory` and `fingerprint` of its base, and `step`, if
    known.

    None if it records nothing, as adapters of other trainers do. Raises UserError if the file is damaged.
    """
    if os.path.isfile(directory / SAVED):
        held, state = _run_of(directory), read_json(directory / STATE)
        checked(state, {"step": int}, directory / STATE)
        hashes = (held.get("resolved") or {}).get("hashes") or {}
        base = {"directory": held["settings"].get("model"), "fingerprint": hashes.get("base_model")}
        return base | {"step": state["step"]} if "step" in state else base
    path = directory / BASE_MODEL
    if not os.path.lexists(path):
        return None
    trained = read_json(path)
    checked(trained, {"step": int}, path)
    return trained


def trained_steps(directory: Path) -> int | None:
    """Returns for how many optimizer steps an adapter was trained; None if it does not record that. Raises UserError if
    the file is damaged."""
    step = (training_of(directory) or {}).get("step")
    return None if step is None else int(step)


def is_of(directory: Path, base: Checkpoint) -> bool:
    """Whether an adapter is known to be trained on the base's weights."""
    held = training_of(directory)
    return held is not None and held.get("fingerprint") == base.fingerprint()


def check_base(directory: Path, base: Checkpoint, other_base: bool = False) -> None:
    """Raises UserError if the adapter was trained on weights other than the base's, unless `other_base` allows it.

    Adapters of other trainers do not record their base weights. They are accepted, and rank 0 prints a note, as it does
    for another base on purpose.
    """
    held, first = training_of(directory), os.environ.get("RANK", "0") == "0"
    if held is None:
        if first:
            print(f"note: --adapter {directory}: does not record its base model's weights ({BASE_MODEL} is missing)")
        return
    if held.get("fingerprint") == base.fingerprint():
        if other_base:
            raise UserError(f"--other-base: --model {base.directory} is what {directory} was trained on; leave it out.")
        return
    if other_base:
        if first:
            print(f"note: --other-base: {directory} was trained on {held.get('directory')}, not on {base.directory}")
        return
    raise UserError(
        f"--adapter {directory}: was trained on another base model than --model {base.directory}: on "
        f"{held.get('directory')}, whose weights had the fingerprint {str(held.get('fingerprint'))[:12]}, not "
        f"{base.fingerprint()[:12]}. Give that model. To put the adapter on these weights on purpose (a chat model of "
        "the same base, say), give --other-base."
    )


def check_adapter(
    directory: Path, skeleton: nn.Module, lora: LoRASettings, architecture: str, base: Checkpoint,
    other_base: bool = False,
) -> None:  # fmt: skip
    """Checks that an adapter fits the model and the settings.

    Raises UserError unless it was trained on this base (or `other_base` allows another), has exactly the LoRA weights
    that `lora` gives the model, and uses the same ranks and scale.
    """
    where, theirs = f"--adapter {directory}", adapter_settings(directory)
    check_base(directory, base, other_base)
    flags = {"rank": "--lora-rank", "alpha": "--lora-alpha", "rslora": "--rslora", "expert_rank": "--expert-lora-rank"}
    experts = any(place.weight for place in places(skeleton, lora))
    for field, flag in flags.items():
        here, there = getattr(lora, field), getattr(theirs, field)
        if here != there and (experts or field != "expert_rank"):
            fix = f"give {flag} {there}" if field != "rslora" else f"{'give' if there else 'leave out'} {flag}"
            raise UserError(f"{where}: was trained with {flag} {there}, not {here}; {fix}.")
    with closing(AdapterFile(directory, architecture, lora)) as file:
        wanted = {key: shape for place in places(skeleton, lora) for key, shape in file.tensors(place).items()}
        found = {name: info.shape for name, info in file.file.tensors.items() if not name.endswith(MOMENTS)}
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = differing[0]
        raise UserError(
            f"{where}: {len(differing)} tensors differ from the LoRA weights that this model takes, among them {name}: "
            f"{found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here. Use the adapter's own base model, "
            "and, in train/sft.py, --lora-lm-head if it has LoRA weights there."
        )


def check_finite(directory: Path) -> None:
    """Raises UserError if an adapter tensor has NaN or infinite values. Reads all tensors, one at a time."""
    with closing(TensorFile(adapter_files(directory)[1])) as file:
        for name, info in file.tensors.items():
            values = torch.empty(info.shape, dtype=info.dtype)
            file.read(name, 0, values)
            if not values.isfinite().all():
                raise UserError(
                    f"--adapter {directory}: tensor {name} has values that are not finite; the training that made it "
                    "went wrong. Give another adapter."
                )


def load_adapter(directory: Path, model: Any, lora: LoRASettings) -> None:
    """Copies a checked adapter's LoRA weights into the model, which must not be partitioned by ZeRO-3 yet."""
    with torch.no_grad():
        for name, value in adapter_values(directory, model, lora):
            model.causal.get_parameter(name).copy_(value)


def adapter_values(directory: Path, model: Any, lora: LoRASettings) -> Iterator[tuple[str, Tensor]]:
    """Yields name in `model.causal` and unpartitioned value of every LoRA parameter of a LanguageModel, as a checked
    adapter has it. The values of experts are those of this rank's experts, with the padding of their rank."""
    with closing(AdapterFile(directory, model.architecture, lora)) as file:
        for place in places(model.causal, lora):
            module = cast(Any, place.module)
            for factor in "AB":
                owned = module.ep.owned(place.sizes[0]) if place.weight else None
                value = file.read(place, factor, owned)
                if place.weight:
                    padding = module.padded_rank - lora.expert_rank
                    value = F.pad(value, (0, 0, 0, padding) if factor == "A" else (0, padding))
                yield place.parameter(factor), value
