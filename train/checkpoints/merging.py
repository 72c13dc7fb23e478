"""A checkpoint with an adapter's factors added to its weights, written shard by shard: W + scale B A, rounded once.

Whatever has no factors is carried over byte for byte. A quantized matrix becomes BF16, or goes back to its own format
with the scales that it had. Of a matrix some rows are held at a time, so that memory does not grow with the model.
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
from train.checkpoints.formats import PLAIN, Format, quantized_format
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
from train.checkpoints.writer import Layout, SafetensorsWriter, write_whole
from train.errors import UserError
from train.lora import LoRASettings

ROWS_OF = 2**20  # elements of a matrix that are held at a time, about: in fp32 they fit a processor's cache
INDEX = "model.safetensors.index.json"


@dataclass
class Matrix:
    """A weight of the checkpoint as a stack of `count` matrices [out, in] (fused experts; else 1). name, source: where
    it is written and read, without the suffixes of its format; they differ where a tied head becomes a tensor of its
    own. place: its factors, if any; experts: which expert each matrix is; rows: those of factor B that belong to it."""

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
        """Of its tensors; the first is that of the values."""
        return list(self.format.tensors(*self.shape))

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """(which of the stack, rows) in whole rows of blocks."""
        step = max(1, ROWS_OF // self.shape[1] // self.format.block[0]) * self.format.block[0]
        for index in range(self.count):
            for start in range(0, self.shape[0], step):
                yield index, slice(start, min(start + step, self.shape[0]))


class Merger:
    """What becomes of each tensor. bf16: quantized matrices become BF16. untied: config.json ties the head to the
    embedding, but the head has factors, and becomes a tensor of its own."""

    def __init__(
        self, checkpoint: Checkpoint, model: Any, plan: LoadPlan, adapter: Path | None, lora: LoRASettings | None,
        architecture: str, bf16: bool,
    ):  # fmt: skip
        self.checkpoint, self.lora, self.architecture, self.bf16 = checkpoint, lora, architecture, bf16
        self.untied = bool(lora and lora.lm_head) and says_tied(checkpoint.config)
        self.factors = TensorFile(adapter / "adapter_model.safetensors") if adapter else None
        self.made: dict[str, tuple[Matrix, str]] = {}  # tensor that is computed -> its matrix, and which part of it
        self.gone: set[str] = set()  # tensors that give way to others
        self.beside: dict[str, list[str]] = {}  # tensor of the checkpoint -> new ones that go into its shard
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
                f"--adapter: has factors for {lost[0]}, and no tensor of --model is for them. "
                "Use the adapter's own base model."
            )

    # What becomes of the tensors

    def _add(self, matrix: Matrix) -> None:
        """Notes what becomes of a matrix's tensors, if anything does."""
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
                if module is not piece.module:  # the embedding stays as it is
                    name, self.untied = head_name(piece.source), True  # whatever config.json says of it
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
        """Quantized matrices that the text model has no place for (multi-token prediction), or no factors."""
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
        """A shard's tensors as they will be."""
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
        """suffix -> rows of a matrix as they lie on disk."""
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
        """A factor in fp32, as PEFT keeps it; the last few are remembered."""
        key = place.key(self.architecture, factor)
        if key not in self._remembered:
            assert self.factors is not None
            while len(self._remembered) >= 4:
                self._remembered.pop(next(iter(self._remembered)))
            info = self.factors.tensors[key]
            whole = torch.empty(info.shape, dtype=info.dtype)
            self.factors.read(key, 0, whole)
            self._remembered[key] = whole.float()
        return self._remembered[key]

    def _update(self, matrix: Matrix, index: int, rows: slice) -> Tensor:
        """scale B A for rows of a matrix, fp32."""
        place, expert = matrix.place, matrix.experts[index]
        assert place is not None and self.lora is not None
        A, B = (self._factor(place, f) for f in "AB")
        B = B[matrix.rows][rows]
        if place.weight is None:
            return (self.lora.scale * B) @ A
        experts, rank = place.sizes[0], self.lora.expert_rank
        # as_peft: A is expert-major [E*r, in], B rank-major [out, r*E]
        A_e, B_e = A[expert * rank : (expert + 1) * rank], B.unflatten(1, (rank, experts))[..., expert]
        return (self.lora.expert_scale * B_e) @ A_e

    def changed(self, matrix: Matrix, index: int, rows: slice, measure: bool) -> dict[str, Tensor]:
        """suffix -> the new rows; of a matrix that becomes BF16, "" alone. measure: what rounding leaves of the
        update."""
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
            raise UserError(f"tensor {name}: base or factors have values that are not finite there. Get them again.")
        sums = self.report.setdefault(name, dict.fromkeys(found, 0.0))
        for key, value in found.items():
            sums[key] += value

    # Writing

    def together(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Tensors of a shard, those of one matrix together."""

        def matrix(name: str) -> str:
            return self.made[name][0].name if name in self.made else name

        for _, group in itertools.groupby(sorted(names, key=lambda name: (matrix(name), name)), matrix):
            yield list(group)

    def write(self, names: list[str], writer: SafetensorsWriter) -> None:
        """What a shard has of one matrix, or one tensor that is carried over. A matrix may lie in two shards: it is
        measured with its values, once."""
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
        """tensor -> size of the update (Frobenius norm), and how much of it is left after rounding: <applied, update> /
        max(|applied|^2, |update|^2): 1 all of it, 0 nothing or nothing but rounding."""
        out = {}
        for name, sums in self.report.items():
            largest = max(sums["applied"], sums["update"])
            share = sums["both"] / largest if largest else 1.0
            out[name] = {"update_norm": math.sqrt(sums["update"]), "survived": share}
        return out


def merge(merger: Merger, output: Path, shard_done: Callable[[], None]) -> None:
    """Writes the shards that are not there yet, calling `shard_done` before each gets its name, then tokenizer, index,
    and config.json last of all: without it, no directory is taken for a model."""
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
            f"{tqdm.format_sizeof(free, 'B')} are free there. Give a directory with more room; what is there already "
            "is kept."
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
    """Whether a shard of an earlier attempt is there: it has its name only when it is whole."""
    if not path.is_file():
        return False
    found = {name: (info.dtype, info.shape) for name, info in TensorFile(path).tensors.items()}
    if found != dict(layout):
        raise UserError(f"{path}: holds other tensors than this merge writes. Give an empty --output directory.")
    return True


def _config(merger: Merger) -> str:
    """The text of config.json: the base's own, but for what it says about formats and tied weights."""
    config = merger.checkpoint.config
    if merger.bf16:
        config = changed_config(config, lambda part: {k: v for k, v in part.items() if k != "quantization_config"})
    return config_text(merger.checkpoint, untied(config) if merger.untied else config)
