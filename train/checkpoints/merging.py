"""Merges an adapter's LoRA weights into a checkpoint, W + scale B A rounded once, and writes it shard by shard.

Tensors without LoRA weights are copied byte for byte. A quantized matrix becomes BF16, or is encoded in its own format
again, with its original scales wherever the new values fit. Only some rows of a matrix are in memory at a time, so that
memory does not grow with the size of the model.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train.checkpoints.adapter import Place, places
from train.checkpoints.adapter_files import AdapterFile
from train.checkpoints.layout import LoadPlan, head_name
from train.checkpoints.reader import Checkpoint, TensorFile
from train.checkpoints.whole import (
    by_shard,
    changed_config,
    config_text,
    copy_other_files,
    copy_tensor,
    says_tied,
    untied,
)
from train.checkpoints.writer import Layout, SafetensorsWriter
from train.formats import PLAIN, Format, quantized_format
from train.layers.lora import LoRASettings
from train.runtime.errors import UserError
from train.runtime.outputs import write_whole

ROWS_OF = 2**20  # elements of a matrix that are in memory at a time, roughly: in fp32 they fit in a CPU's cache
INDEX = "model.safetensors.index.json"


@dataclass
class Matrix:
    """A weight of the checkpoint as a stack of `count` matrices [out, in]. `count` is 1 except for fused experts.

    name, source: the tensor names to write to and read from, without the suffixes of the format. They differ if a tied
    lm_head becomes a separate tensor. place: the LoRA weights, if any. experts: the expert index of each matrix.
    rows: the rows of lora_B that belong to this weight.
    """

    name: str
    source: str
    format: Format
    count: int
    shape: tuple[int, int]
    place: Place | None = None
    experts: tuple[int, ...] = (0,)
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def suffixes(self) -> list[str]:
        """The suffixes of the weight's tensors; the first is that of the values."""
        return list(self.format.tensors(*self.shape))

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Yields (index in the stack, rows) chunk by chunk. A chunk consists of complete rows of blocks."""
        step = max(1, ROWS_OF // self.shape[1] // self.format.block[0]) * self.format.block[0]
        for index in range(self.count):
            for start in range(0, self.shape[0], step):
                yield index, slice(start, min(start + step, self.shape[0]))


class Merger:
    """Decides for each tensor of a checkpoint whether it is copied, changed, replaced or added, and computes it.

    bf16: convert quantized matrices to BF16. untied: config.json ties lm_head to the embedding, but lm_head has LoRA
    weights and therefore becomes a separate tensor. Raises UserError if the adapter has LoRA weights for a weight that
    the checkpoint has no tensor for.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, plan: LoadPlan, adapter: Path | None, lora: LoRASettings | None,
        architecture: str, bf16: bool,
    ):  # fmt: skip
        self.checkpoint, self.lora, self.architecture, self.bf16 = checkpoint, lora, architecture, bf16
        self.untied = bool(lora and lora.lm_head) and says_tied(checkpoint.config)
        self.factors = AdapterFile(adapter, architecture, lora) if adapter and lora else None
        self.made: dict[str, tuple[Matrix, str]] = {}  # computed tensor -> its matrix and suffix
        self.gone: set[str] = set()  # tensors that are replaced by others
        self.beside: dict[str, list[str]] = {}  # tensor of the checkpoint -> new tensors in its shard
        self.report: dict[str, dict[str, float]] = {}
        self._remembered: dict[str, Tensor] = {}
        found = {(id(place.module), place.weight): place for place in places(model, lora)} if lora else {}
        self._add_dense(plan, found)
        self._add_experts(plan, found)
        if bf16:
            self._add_left_out()
        merged = {id(matrix.place) for matrix, _ in self.made.values()}
        if lost := [place.name for place in found.values() if id(place) not in merged]:
            raise UserError(
                f"--adapter: has LoRA weights for {lost[0]}, but --model has no such tensor. "
                "Use the adapter's own base model."
            )

    # Deciding what happens to each tensor

    def _add(self, matrix: Matrix) -> None:
        """Records which tensors of a matrix are computed, replaced or added, if any."""
        first, *_ = matrix.suffixes
        if self._becomes_bf16(matrix):
            self.gone |= {matrix.name + suffix for suffix in (*matrix.suffixes, "_shape")}
            self.made[matrix.name] = matrix, ""
            self.beside.setdefault(matrix.source + first, []).append(matrix.name)
        elif matrix.place:
            for suffix in matrix.suffixes:
                self.made[matrix.name + suffix] = matrix, suffix
                if matrix.name + suffix not in self.checkpoint.tensors:
                    self.beside.setdefault(matrix.source + suffix, []).append(matrix.name + suffix)

    def _becomes_bf16(self, matrix: Matrix) -> bool:
        return self.bf16 and matrix.format.kind != "plain"

    def _add_dense(self, plan: LoadPlan, found: dict[tuple[int, str | None], Place]) -> None:
        for piece in plan.dense:
            for module, target in [(piece.module, piece.target), *piece.tied]:
                place = found.get((id(module), None))
                if place is None or target != "weight":
                    continue
                name = piece.source
                if module is not piece.module:  # lm_head is tied: the embedding is not changed
                    name, self.untied = head_name(piece.source), True  # whatever config.json says
                self._add(Matrix(name, piece.source, piece.format, 1, place.sizes[1:], place))

    def _add_experts(self, plan: LoadPlan, found: dict[tuple[int, str | None], Place]) -> None:
        for layer in plan.experts:
            place, every = found.get((id(layer.module), layer.target)), tuple(range(layer.module.experts))
            out_features = layer.matrix_shape[0]
            if layer.fused:
                self._add(Matrix(layer.fused, layer.fused, PLAIN, len(every), layer.matrix_shape, place, every))
                continue
            for expert, (index, matrix) in itertools.product(every, enumerate(layer.matrices)):
                name = f"{layer.prefix}{expert}.{matrix}.weight"
                rows = slice(index * out_features, (index + 1) * out_features)
                self._add(Matrix(name, name, layer.format, 1, layer.matrix_shape, place, (expert,), rows))

    def _add_left_out(self) -> None:
        """Adds quantized matrices that have no LoRA weights or are not in the text model (multi-token prediction)."""
        format = quantized_format(self.checkpoint.config, "--model")
        suffix = {"fp8": "", "int4": "_packed", "plain": None}[format.kind]
        for name, info in self.checkpoint.tensors.items():
            if suffix is None or not name.endswith(suffix) or len(info.shape) != 2:
                continue
            base = name.removesuffix(suffix)
            if base not in self.made and (suffix or info.dtype == torch.float8_e4m3fn):
                columns = info.shape[1] * (8 if suffix else 1)
                self._add(Matrix(base, base, format, 1, (info.shape[0], columns)))

    def outputs(self, layout: Layout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of the tensors that a shard will have after the merge."""
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, kept in layout.items():
            if name not in self.gone:
                out[name] = kept
            for new in self.beside.get(name, ()):
                matrix, _ = self.made[new]
                out[new] = (torch.bfloat16, matrix.shape) if self._becomes_bf16(matrix) else kept
        return out

    # Reading and changing

    def _raw(self, matrix: Matrix, index: int, rows: slice) -> dict[str, Tensor]:
        """Returns rows of a matrix as stored on disk, by suffix."""
        out = {}
        for suffix, (_, (height, width)) in matrix.format.tensors(*matrix.shape).items():
            block = matrix.format.block[0] if suffix else 1
            first, last = rows.start // block, -(-rows.stop // block)
            name = matrix.source + suffix
            part = torch.empty(last - first, width, dtype=self.checkpoint.tensors[name].dtype)
            self.checkpoint.read(name, (index * height + first) * width, part)
            out[suffix] = part
        return out

    def _factor(self, place: Place, factor: str) -> Tensor:
        """Returns lora_A or lora_B in fp32, in the shapes of `AdapterFile.read`. The last four are cached."""
        key = place.parameter(factor)
        if key not in self._remembered:
            assert self.factors is not None
            while len(self._remembered) >= 4:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[key] = self.factors.read(place, factor).float()
        return self._remembered[key]

    def _update(self, matrix: Matrix, index: int, rows: slice) -> Tensor:
        """Returns scale B A [rows, in] in fp32 for rows of a matrix."""
        place, expert = matrix.place, matrix.experts[index]
        assert place is not None and self.lora is not None
        A, B = (self._factor(place, f) for f in "AB")
        if place.weight is None:
            return (self.lora.scale * B[matrix.rows][rows]) @ A
        return (self.lora.expert_scale * B[expert][matrix.rows][rows]) @ A[expert]

    def changed(self, matrix: Matrix, index: int, rows: slice, measure: bool) -> dict[str, Tensor]:
        """Returns the new rows [R, in] of a matrix in its format, by suffix; only suffix "" if it becomes BF16.

        measure: also record how much of the update is left after rounding. Raises UserError if that finds values that
        are not finite.
        """
        raw = self._raw(matrix, index, rows)
        old = matrix.format.decode(raw)
        if matrix.place is None:
            return {"": old}
        old, update = old.float(), self._update(matrix, index, rows)
        new = old + update
        format = PLAIN if self._becomes_bf16(matrix) else matrix.format
        parts = {"": new.bfloat16()} if self._becomes_bf16(matrix) else format.encode(new, raw)
        if measure:
            self._measure(matrix.name, torch.sub(format.decode(parts).float(), old, out=old), update)
        return parts

    def _measure(self, name: str, applied: Tensor, update: Tensor) -> None:
        a, u = applied.flatten(), update.flatten()
        pairs = {"applied": (a, a), "update": (u, u), "both": (a, u)}
        found = {key: torch.vdot(*pair).item() for key, pair in pairs.items()}
        if not all(math.isfinite(value) for value in found.values()):
            raise UserError(f"tensor {name}: base or LoRA weights have values that are not finite. Get them again.")
        sums = self.report.setdefault(name, dict.fromkeys(found, 0.0))
        for key, value in found.items():
            sums[key] += value

    # Writing

    def together(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Yields the tensor names of a shard in groups, one group per matrix or copied tensor."""

        def matrix(name: str) -> str:
            return self.made[name][0].name if name in self.made else name

        for _, group in itertools.groupby(sorted(names, key=lambda name: (matrix(name), name)), matrix):
            yield list(group)

    def write(self, names: list[str], writer: SafetensorsWriter) -> None:
        """Writes one group of `together`: a shard's tensors of one matrix, or one tensor that is copied unchanged.

        The tensors of a matrix may be spread over two shards. The update is measured only once, with the shard that has
        the values. Raises UserError if the base or the LoRA weights have values that are not finite.
        """
        if names[0] not in self.made:
            copy_tensor(self.checkpoint, names[0], writer)
            return
        matrix, _ = self.made[names[0]]
        suffixes = {name: self.made[name][1] for name in names}
        measure = self._becomes_bf16(matrix) or matrix.suffixes[0] in suffixes.values()
        done = dict.fromkeys(names, 0)
        for index, rows in matrix.chunks():
            parts = self.changed(matrix, index, rows, measure)
            for name, suffix in suffixes.items():
                writer.write(name, parts[suffix], done[name])
                done[name] += parts[suffix].numel()

    def survived(self) -> dict[str, dict[str, float]]:
        """Returns, by tensor, the Frobenius norm of the update and the share of it that survived rounding.

        The share is <applied, update> / max(|applied|^2, |update|^2): 1 if all of the update survived, 0 if none did or
        if the change is only rounding error.
        """
        out = {}
        for name, sums in self.report.items():
            largest = max(sums["applied"], sums["update"])
            share = sums["both"] / largest if largest else 1.0
            out[name] = {"update_norm": math.sqrt(sums["update"]), "survived": share}
        return out


def merge(merger: Merger, output: Path, shard_done: Callable[[], None]) -> None:
    """Writes the shards that do not exist yet, then the tokenizer, the index and finally config.json.

    config.json comes last because a directory without it is not taken for a model. `shard_done` is called before each
    shard is renamed to its final name. Raises UserError if the disk has too little space, if `output` has shards with
    other tensors, or if the base or the LoRA weights have values that are not finite.
    """
    checkpoint, shards = merger.checkpoint, by_shard(merger.checkpoint)
    outputs = {shard: merger.outputs(layout) for shard, layout in shards.items()}
    size = {shard: _bytes(layout) for shard, layout in outputs.items()}
    todo = [shard for shard in shards if not _complete(output / shard.name, outputs[shard])]
    for abandoned in output.glob("*.partial"):
        abandoned.unlink()
    free, needed = shutil.disk_usage(output).free, sum(size[shard] for shard in todo)
    if needed > free:
        raise UserError(
            f"--output {output}: {tqdm.format_sizeof(needed, 'B')} are still to be written, "
            f"{tqdm.format_sizeof(free, 'B')} are free. Give a directory with more space; the existing files "
            "are kept."
        )
    (output / "config.json").unlink(missing_ok=True)
    with tqdm(total=sum(size.values()), initial=sum(size.values()) - needed, unit="B", unit_scale=True) as bar:
        for shard in todo:
            bar.set_description(shard.name)
            writer = SafetensorsWriter(output / shard.name, outputs[shard])
            for names in merger.together(outputs[shard]):
                merger.write(names, writer)
                bar.update(_bytes({name: outputs[shard][name] for name in names}))
            writer.check_whole()
            writer.close()
            shard_done()
            writer.publish()
    copy_other_files(checkpoint.directory, output, but={INDEX, "config.json"})
    weight_map = {name: shard.name for shard, layout in outputs.items() for name in layout}
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": dict(sorted(weight_map.items()))}
    write_whole(output / INDEX, json.dumps(index, indent=2) + "\n")
    write_whole(output / "config.json", _config(merger))


def _bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def _complete(path: Path, layout: Layout) -> bool:
    """Whether an earlier attempt wrote this shard. A shard has its final name only once it is complete.

    Raises UserError if it holds other tensors than `layout`.
    """
    if not path.is_file():
        return False
    found = {name: (info.dtype, info.shape) for name, info in TensorFile(path).tensors.items()}
    if found != dict(layout):
        raise UserError(f"{path}: holds other tensors than this merge writes. Give an empty --output directory.")
    return True


def _config(merger: Merger) -> str:
    """Returns the text of config.json: that of the base, except for quantization and tied weights if these change."""
    config = merger.checkpoint.config
    if merger.bf16:
        config = changed_config(config, lambda part: {k: v for k, v in part.items() if k != "quantization_config"})
    return config_text(merger.checkpoint, untied(config) if merger.untied else config)
