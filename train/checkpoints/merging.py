"""A checkpoint with an adapter's factors added to its weights, written shard by shard: W + scale B A, rounded once.

Whatever has no factors is carried over byte for byte. A quantized matrix becomes BF16, or goes back to its own format
with the scales that it had. Of a matrix some rows are held at a time, so that memory does not grow with the model.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train.checkpoints.adapter import Place, places
from train.checkpoints.formats import PLAIN, Format, quantized_format
from train.checkpoints.layout import LoadPlan
from train.checkpoints.reader import Checkpoint, TensorFile
from train.checkpoints.whole import by_shard, copy_other_files, copy_tensor
from train.checkpoints.writer import Layout, SafetensorsWriter
from train.errors import UserError
from train.lora import LoRASettings

ROWS_OF = 2**24  # elements of a matrix that are held at a time, about


@dataclass
class Matrix:
    """A weight of the checkpoint as a stack of `count` matrices [out, in] (fused experts; else 1). place: its factors,
    if any; experts: which expert each matrix is; rows: those of the factor B that belong to it."""

    name: str
    format: Format
    count: int
    shape: tuple[int, int]
    place: Place | None = None
    experts: tuple[int, ...] = ()
    rows: slice = field(default_factory=lambda: slice(None))

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """(which of the stack, rows) in whole rows of blocks."""
        step = max(1, ROWS_OF // self.shape[1] // self.format.block[0]) * self.format.block[0]
        for index in range(self.count):
            for start in range(0, self.shape[0], step):
                yield index, slice(start, min(start + step, self.shape[0]))


class Merger:
    """What becomes of each tensor. bf16: quantized matrices become BF16."""

    def __init__(
        self, checkpoint: Checkpoint, model: Any, plan: LoadPlan, adapter: Path | None, lora: LoRASettings | None,
        architecture: str, bf16: bool,
    ):  # fmt: skip
        self.checkpoint, self.lora, self.architecture, self.bf16 = checkpoint, lora, architecture, bf16
        self.factors = TensorFile(adapter / "adapter_model.safetensors") if adapter else None
        self.matrices: dict[str, Matrix] = {}
        self.report: dict[str, dict[str, float]] = {}
        self._cached: dict[Any, Any] = {}
        by_module: dict[tuple[int, str | None], Place] = {}
        for place in places(model, lora) if lora else ():
            by_module[id(place.module), place.weight] = place
        for piece in plan.dense:
            linear = by_module.get((id(piece.module), None))
            if linear and piece.target == "weight":
                self.matrices[piece.source] = Matrix(piece.source, piece.format, 1, linear.sizes[1:], linear, (0,))
        for layer in plan.experts:
            expert_place = by_module.get((id(layer.module), layer.target))
            if layer.fused:
                if expert_place:
                    every = tuple(range(layer.module.experts))
                    self.matrices[layer.fused] = Matrix(
                        layer.fused, PLAIN, len(every), layer.matrix_shape, expert_place, every
                    )
                continue
            out_features = layer.matrix_shape[0]
            for expert in range(layer.module.experts):
                for index, matrix in enumerate(layer.matrices):
                    name = f"{layer.prefix}{expert}.{matrix}.weight"
                    rows = slice(index * out_features, (index + 1) * out_features)
                    self.matrices[name] = Matrix(
                        name, layer.format, 1, layer.matrix_shape, expert_place, (expert,), rows
                    )
        self._add_quantized()

    def _add_quantized(self) -> None:
        """Quantized matrices that the text model has no place for (multi-token prediction)."""
        format = quantized_format(self.checkpoint.config, "--model")
        main = {"fp8": "", "int4": "_packed", "plain": None}[format.kind]
        for name, info in self.checkpoint.tensors.items():
            if main is None or not name.endswith(main) or len(info.shape) != 2:
                continue
            base = name.removesuffix(main) if main else name
            if base in self.matrices or (not main and info.dtype != torch.float8_e4m3fn):
                continue
            columns = info.shape[1] * (8 if main else 1)
            self.matrices[base] = Matrix(base, format, 1, (info.shape[0], columns))

    # Reading and changing

    def _raw(self, matrix: Matrix, index: int, rows: slice) -> dict[str, Tensor]:
        """suffix -> rows of a matrix as they lie on disk."""
        out = {}
        for suffix, (_, (height, width)) in matrix.format.tensors(*matrix.shape).items():
            block = matrix.format.block[0] if suffix else 1
            first, last = rows.start // block, -(-rows.stop // block)
            name = matrix.name + suffix
            part = torch.empty(last - first, width, dtype=self.checkpoint.tensors[name].dtype)
            self.checkpoint.read(name, (index * height + first) * width, part)
            out[suffix] = part
        return out

    def _factor(self, place: Place, factor: str) -> Tensor:
        """A factor in fp32, as PEFT keeps it; the last few are remembered."""
        key = place.key(self.architecture, factor)
        if key not in self._cached:
            assert self.factors is not None
            while len(self._cached) >= 4:
                self._cached.pop(next(iter(self._cached)))
            info = self.factors.tensors[key]
            whole = torch.empty(info.shape, dtype=info.dtype)
            self.factors.read(key, 0, whole)
            self._cached[key] = whole.float()
        return self._cached[key]

    def _update(self, matrix: Matrix, index: int, rows: slice) -> Tensor:
        """scale B A for rows of a matrix, fp32."""
        place, expert = matrix.place, matrix.experts[index]
        assert place is not None and self.lora is not None
        A, B = (self._factor(place, f) for f in "AB")
        B = B[matrix.rows][rows]
        if place.weight is None:
            return self.lora.scale * (B @ A)
        experts, rank = place.sizes[0], self.lora.expert_rank
        # peft_tensors: A is expert-major [E*r, in], B rank-major [out, r*E]
        A_e, B_e = A[expert * rank : (expert + 1) * rank], B.unflatten(1, (rank, experts))[..., expert]
        return self.lora.expert_scale * (B_e @ A_e)

    def changed(self, matrix: Matrix, index: int, rows: slice) -> dict[str, Tensor]:
        """suffix -> the new rows; of a matrix that becomes BF16, "" alone. Measures what rounding leaves of the
        update."""
        raw = self._raw(matrix, index, rows)
        old = matrix.format.decode(raw).float()
        update = self._update(matrix, index, rows) if matrix.place else None
        new = old if update is None else old + update
        if self.bf16 and matrix.format.kind != "plain":
            parts = {"": new.bfloat16()}
            kept = parts[""].float()
        else:
            parts = raw if update is None else matrix.format.encode(new, raw)
            kept = matrix.format.decode(parts).float()
        if update is not None:
            self._measure(matrix.name, kept - old, update)
        return parts

    def _measure(self, name: str, applied: Tensor, update: Tensor) -> None:
        sums = self.report.setdefault(name, {"applied": 0.0, "update": 0.0, "both": 0.0})
        sums["applied"] += applied.square().sum().item()
        sums["update"] += update.square().sum().item()
        sums["both"] += (applied * update).sum().item()

    # Writing

    def outputs(self, layout: Layout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A shard's tensors as they will be: those of a matrix that becomes BF16 give way to one."""
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, kept in layout.items():
            matrix, suffix = self._owner(name)
            if matrix is None or not self.bf16 or matrix.format.kind == "plain":
                out[name] = kept
            elif suffix == next(iter(matrix.format.tensors(*matrix.shape))):
                out[matrix.name] = torch.bfloat16, matrix.shape
        return out

    def _owner(self, name: str) -> tuple[Matrix | None, str]:
        """The matrix that a tensor is part of, and its suffix."""
        if name in self.matrices:
            return self.matrices[name], ""
        for suffix in ("_scale_inv", "_packed", "_scale", "_shape"):
            base = name.removesuffix(suffix)
            if base != name and base in self.matrices:
                return self.matrices[base], suffix
        return None, ""

    def order(self, name: str) -> tuple[str, str]:
        """Tensors of one matrix together."""
        matrix, _ = self._owner(name)
        return matrix.name if matrix else name, name

    def write(self, name: str, writer: SafetensorsWriter) -> None:
        """One tensor of the new shard."""
        matrix, suffix = self._owner(name)
        becomes_bf16 = matrix is not None and self.bf16 and matrix.format.kind != "plain"
        if matrix is None or suffix == "_shape" or not (matrix.place or becomes_bf16):
            copy_tensor(self.checkpoint, name, writer)
            return
        position = 0
        for index, rows in matrix.chunks():
            key = (matrix.name, index, rows.start)
            if self._cached.get("chunk", (None,))[0] != key:  # the scales of the values just written are at hand
                self._cached["chunk"] = key, self.changed(matrix, index, rows)
            part = self._cached["chunk"][1][suffix]
            writer.write(name, part, position)
            position += part.numel()

    def survived(self) -> dict[str, dict[str, float]]:
        """tensor -> size of the update (Frobenius norm), and how much of it is left after rounding: <applied, update> /
        max(|applied|^2, |update|^2): 1 all of it, 0 nothing or nothing but rounding."""
        out = {}
        for name, sums in self.report.items():
            largest = max(sums["applied"], sums["update"])
            share = sums["both"] / largest if largest else 1.0
            out[name] = {"update_norm": math.sqrt(sums["update"]), "survived": share}
        return out


def merge(merger: Merger, output: Path, shard_done: Callable[[], None]) -> None:
    """Writes the shards that are not there yet, calling `shard_done` before each gets its name, and then index,
    configuration and tokenizer."""
    checkpoint, shards = merger.checkpoint, by_shard(merger.checkpoint)
    outputs = {shard: merger.outputs(layout) for shard, layout in shards.items()}
    size = {
        shard: sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        for shard, layout in outputs.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    todo = [shard for shard in shards if not _complete(output / shard.name, outputs[shard])]
    free, needed = shutil.disk_usage(output).free, sum(size[shard] for shard in todo)
    if needed > free:
        raise UserError(
            f"--output {output}: {needed / 1e9:.1f} GB are still to be written, {free / 1e9:.1f} GB are free there. "
            "Give a directory with more room; what is there already is kept."
        )
    with tqdm(total=sum(size.values()), initial=sum(size.values()) - needed, unit="B", unit_scale=True) as bar:
        for shard in todo:
            bar.set_description(shard.name)
            writer = SafetensorsWriter(output / shard.name, outputs[shard])
            for name in sorted(outputs[shard], key=merger.order):
                merger.write(name, writer)
                dtype, shape = outputs[shard][name]
                bar.update(dtype.itemsize * math.prod(shape))
            writer.close()
            shard_done()
            writer.publish()
    copy_other_files(checkpoint.directory, output)
    weight_map = {name: shard.name for shard, layout in outputs.items() for name in layout}
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if merger.bf16:
        (output / "config.json").write_text(json.dumps(_without_quantization(checkpoint.config), indent=2) + "\n")


def _complete(path: Path, layout: Layout) -> bool:
    """Whether a shard of an earlier attempt is there: it has its name only when it is whole."""
    if not path.is_file():
        return False
    found = {name: (info.dtype, info.shape) for name, info in TensorFile(path).tensors.items()}
    if found != dict(layout):
        raise UserError(f"{path}: holds other tensors than this merge writes. Give an empty --output directory.")
    return True


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = _without_quantization(plain["text_config"])
    return plain
