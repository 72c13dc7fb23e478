"""Plans a load: which checkpoint tensor fills which weight of the model, and which bytes of it each rank reads.

The plan needs only config.json and the safetensors headers; it is complete before any weight is read. Publishers differ
in three ways, which are detected here: the prefix of the text model's tensor names, whether a layer's experts are one
fused tensor or separate tensors per expert, and the format of a matrix (formats.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from train.checkpoints.reader import DTYPES, Checkpoint
from train.experts.module import ExpertParallelExperts
from train.formats import PLAIN, Format, Tensors, quantized_format
from train.runtime.errors import UserError

# The checkpoint prefixes of the text model's tensors that transformers calls model.* and lm_head.*
PREFIXES = (
    ("model.", "lm_head."),  # text-only checkpoints
    ("model.language_model.", "lm_head."),  # Qwen3.5
    ("language_model.model.", "language_model.lm_head."),  # Kimi K2.5
)
# Tensors that a checkpoint may hold although the text model has no weight for them.
LEFT_OUT = {
    "vision": re.compile(r"^(model\.)?(visual|vision_tower|mm_projector|multi_modal_projector)\."),
    "multi-token prediction": re.compile(r"^mtp\."),
    "rotary table": re.compile(r"\.rotary_emb\.inv_freq$"),  # the model computes it
}
# These may be F32 in a BF16 checkpoint and stay F32: decay rates, the gated norm, the router's balancing bias.
F32_TOO = re.compile(r"\.(linear_attn\.(A_log|dt_bias|norm\.weight)|e_score_correction_bias)$")
# The matrices of each fused weight, as checkpoints with separate tensors name them, in the order of the fused rows.
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def head_name(embedding: str) -> str:
    """Returns the name of the lm_head weight in a checkpoint whose embedding weight is named `embedding`."""
    _, head = max((names for names in PREFIXES if embedding.startswith(names[0])), key=lambda names: len(names[0]))
    return f"{head}weight"


@dataclass(frozen=True)
class Range:
    """Elements start to start + count of the flattened tensor `name`."""

    name: str
    start: int
    count: int


@dataclass
class Piece:
    """A dense weight or a buffer: tensor `source` fills `target` of `module` and of every module in `tied`.

    dtype: of the values on disk or, for a quantized format, after decoding.
    """

    module: nn.Module
    target: str
    source: str
    shape: tuple[int, ...]
    format: Format
    dtype: torch.dtype
    tied: list[tuple[nn.Module, str]] = field(default_factory=list)

    def partition(self, rank: int, ranks: int) -> range:
        """Returns the range of flattened elements that ZeRO-3 assigns to `rank` of `ranks`."""
        numel = torch.Size(self.shape).numel()
        part = -(-numel // ranks)
        return range(min(part * rank, numel), min(part * (rank + 1), numel))

    def reads(self, rank: int, ranks: int) -> dict[str, Range]:
        """Returns what a rank reads, by suffix: its partition and, for FP8, the scales of the block rows it touches.

        The scales span the full width of the matrix, even if the partition is smaller than a row and needs only some.
        """
        own = self.partition(rank, ranks)
        out = {"": Range(self.source, own.start, len(own))}
        if self.format.kind == "fp8" and own:
            (b0, b1), columns = self.format.block, self.shape[1]
            first, last, width = own.start // columns // b0, (own.stop - 1) // columns // b0, -(-columns // b1)
            out["_scale_inv"] = Range(f"{self.source}_scale_inv", first * width, (last + 1 - first) * width)
        return out


@dataclass
class ExpertPiece:
    """A weight of a layer's experts, [all experts, out, in] in transformers, and its location in the checkpoint.

    It is stored either in the single tensor `fused` or in separate tensors `{prefix}{expert}.{matrix}.weight`.
    """

    module: ExpertParallelExperts
    target: str
    prefix: str
    format: Format
    fused: str | None
    matrices: tuple[str, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape [out, in] of one expert's matrix on disk."""
        _, out_features, in_features = self.module.shapes()[self.target]
        return out_features // len(self.matrices), in_features

    def reads(self, expert: int) -> list[dict[str, Range]]:
        """Returns what is read by suffix, for each matrix of an expert in the order of the fused rows."""
        parts = self.format.tensors(*self.matrix_shape)
        sizes = {suffix: torch.Size(shape).numel() for suffix, (_, shape) in parts.items()}
        if self.fused:
            return [{"": Range(self.fused, expert * sizes[""], sizes[""])}]
        names = [f"{self.prefix}{expert}.{matrix}.weight" for matrix in self.matrices]
        return [{suffix: Range(name + suffix, 0, size) for suffix, size in sizes.items()} for name in names]

    def sources(self) -> Iterator[str]:
        """Yields the name of every tensor that any rank reads for this weight."""
        if self.fused:
            yield self.fused
            return
        for expert in range(self.module.experts):
            yield from (read.name for matrix in self.reads(expert) for read in matrix.values())

    def partition_reads(self, rank: int, ranks: int) -> Iterator[tuple[int, Range]]:
        """Yields (offset in the partition, what is read there) for a rank's ZeRO-3 partition of its experts.

        Only for the plain format. rank: within the expert-data-parallel group of `ranks` that hold the same experts.
        """
        owned = self.module.ep.owned(self.module.experts)
        matrix = torch.Size(self.matrix_shape).numel()
        numel = len(owned) * len(self.matrices) * matrix
        part = -(-numel // ranks)
        start, stop = min(part * rank, numel), min(part * (rank + 1), numel)
        position = start
        while position < stop:
            local, within = divmod(position, len(self.matrices) * matrix)
            index, offset = divmod(within, matrix)
            read = self.reads(owned[local])[index][""]
            count = min(matrix - offset, stop - position)
            yield position - start, Range(read.name, read.start + offset, count)
            position += count


@dataclass
class LoadPlan:
    """Which tensor fills which weight, and which tensors are not loaded."""

    dtype: torch.dtype  # of all tensors that are neither quantized nor matched by F32_TOO
    dense: list[Piece] = field(default_factory=list)
    buffers: list[Piece] = field(default_factory=list)
    experts: list[ExpertPiece] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # kind of tensor -> number of tensors

    def reads(self, rank: int, ranks: int, method: str) -> Iterator[Range]:
        """Yields everything that a rank reads. method: lora, qlora or full."""
        for piece in self.dense:
            yield from piece.reads(rank, ranks).values()
        for piece in self.buffers:
            yield from piece.reads(0, 1).values()
        for layer in self.experts:
            ep = layer.module.ep
            if method == "full":
                yield from (read for _, read in layer.partition_reads(rank // ep.size, ranks // ep.size))
                continue
            for expert in ep.owned(layer.module.experts):
                for matrix in layer.reads(expert):
                    yield from matrix.values()


def plan_load(model: Any, checkpoint: Checkpoint) -> LoadPlan:
    """Matches every weight of `model` (on the meta device) with a checkpoint tensor, without reading any weight.

    Raises UserError for a tensor that is missing, unexpected or of a wrong shape or dtype, and for an unsupported dtype
    or quantized format.
    """
    rename, dtype = _names(model, checkpoint)
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(
            f"--model {checkpoint.directory}: weights are {dtype}; BF16 and F32 are trained. In F16 gradients "
            "underflow: convert the checkpoint to BF16."
        )
    quantized = quantized_format(checkpoint.config, f"--model {checkpoint.directory}")
    plan, wanted = LoadPlan(dtype), Tensors()
    seen: dict[int, Piece] = {}

    def want(name: str, format: Format, shape: tuple[int, ...]) -> None:
        if format.kind == "plain":
            wanted[name] = ((dtype, torch.float32) if F32_TOO.search(name) else (dtype,)), shape
        else:
            wanted.update({name + suffix: tensor for suffix, tensor in format.tensors(*shape).items()})

    fused = any(
        rename(f"{prefix}.{target}") in checkpoint.tensors
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertParallelExperts)
        for target in MATRICES
    )
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, ExpertParallelExperts):
            for piece in _expert_pieces(module, rename(dot), fused, quantized, checkpoint):
                plan.experts.append(piece)
                _want_experts(piece, want, wanted)
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) in seen:  # tied weights are read once
                seen[id(parameter)].tied.append((module, name))
                continue
            source, shape = rename(dot + name), tuple(parameter.shape)
            fp8 = quantized.kind == "fp8" == _kind_on_disk(source, checkpoint) and len(shape) == 2
            kept = torch.bfloat16 if fp8 else checkpoint.dtype_of(source)
            plan.dense.append(Piece(module, name, source, shape, quantized if fp8 else PLAIN, kept))
            seen[id(parameter)] = plan.dense[-1]
            want(source, plan.dense[-1].format, shape)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name not in module._non_persistent_buffers_set:
                source, shape = rename(dot + name), tuple(buffer.shape)
                plan.buffers.append(Piece(module, name, source, shape, PLAIN, checkpoint.dtype_of(source)))
                want(source, PLAIN, shape)
    plan.left_out, unexpected = _left_out(model, checkpoint, wanted)
    _check(wanted, unexpected, type(model).__name__, checkpoint)
    return plan


def _names(model: Any, checkpoint: Checkpoint) -> tuple[Any, torch.dtype]:
    """Returns a function from the model's weight names to the checkpoint's, and the dtype of the embedding.

    Raises UserError if the embedding is found under no known prefix.
    """
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()) + ".weight"
    for body, head in PREFIXES:

        def rename(name: str, body: str = body, head: str = head) -> str:
            return head + name[8:] if name.startswith("lm_head.") else re.sub(r"^model\.", body, name)

        if rename(embedding) in checkpoint.tensors:
            return rename, checkpoint.tensors[rename(embedding)].dtype
    raise UserError(
        f"--model {checkpoint.directory}: weight {embedding} is missing from the checkpoint under any known prefix "
        f"({', '.join(body for body, _ in PREFIXES)}). The directory must hold the whole model."
    )


def has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a separate lm_head weight, under any known name."""
    return any(f"{head}weight" in checkpoint.tensors for _, head in PREFIXES)


def _expert_pieces(
    module: ExpertParallelExperts, prefix: str, fused: bool, quantized: Format, checkpoint: Checkpoint
) -> Iterator[ExpertPiece]:
    """Yields the expert weights of one layer. fused: whether this checkpoint stores a layer's experts in one tensor.

    `fused` is decided once for the whole checkpoint, so that a missing tensor is reported under the naming scheme of
    the tensors that are present. Raises UserError if the experts are quantized but config.json does not describe how.
    """
    for target in module.shapes():
        if fused:
            yield ExpertPiece(module, target, prefix, PLAIN, prefix + target, (target,))
            continue
        names = (f"{prefix}{e}.{matrix}.weight" for e in range(module.experts) for matrix in MATRICES[target])
        kinds = (_kind_on_disk(name, checkpoint) for name in names)
        kind = next((kind for kind in kinds if kind), quantized.kind)
        if kind not in ("plain", quantized.kind):
            raise UserError(
                f"--model {checkpoint.directory}: experts {prefix}* are {kind.upper()}, but config.json has "
                "no quantization_config that says how. Get config.json again, from the checkpoint's own revision."
            )
        yield ExpertPiece(module, target, prefix, PLAIN if kind == "plain" else quantized, None, MATRICES[target])


def _kind_on_disk(name: str, checkpoint: Checkpoint) -> str | None:
    """Returns the format kind of the matrix `name`, judged by its tensors, or None if it has none."""
    if f"{name}_packed" in checkpoint.tensors:
        return "int4"
    if name not in checkpoint.tensors:
        return None
    return "fp8" if checkpoint.dtype_of(name) == torch.float8_e4m3fn else "plain"


def _want_experts(piece: ExpertPiece, want: Any, wanted: Tensors) -> None:
    if piece.fused:
        want(piece.fused, PLAIN, piece.module.shapes()[piece.target])
        return
    out_features, in_features = piece.matrix_shape
    if piece.format.kind == "int4" and (in_features % 8 or in_features % piece.format.block[1]):
        raise UserError(
            f"--model: experts {piece.prefix}*.{piece.matrices[0]} have {in_features} inputs; packed INT4 has eight to "
            f"a word and a scale for each {piece.format.block[1]}, of both of which the inputs must be a multiple."
        )
    for expert in range(piece.module.experts):
        for matrix in piece.matrices:
            name = f"{piece.prefix}{expert}.{matrix}.weight"
            want(name, piece.format, (out_features, in_features))
            if piece.format.kind == "int4":  # must exist, but is not read: nothing depends on its values
                wanted[f"{name}_shape"] = (torch.int32, torch.int64), (2,)


def _check(wanted: Tensors, unexpected: list[str], model: str, checkpoint: Checkpoint) -> None:
    where, tensors = f"--model {checkpoint.directory}", checkpoint.tensors
    others = f"{', '.join(unexpected[:5])}{', …' if len(unexpected) > 5 else ''}"
    if missing := [name for name in wanted if name not in tensors]:
        lacking = f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        fix = (
            f"It has {len(unexpected)} tensors that have no place in {model}: {others}. Where these are the same "
            "weights under other names, which transformers translates as it loads, the checkpoint's layout is not "
            "supported; else config.json is not its own."
            if unexpected
            else "Nothing is initialized at random: get the whole checkpoint."
        )
        raise UserError(
            f"{where}: {len(missing)} of {len(wanted)} weights are missing from the checkpoint: {lacking}. {fix}"
        )
    if unexpected:
        raise UserError(
            f"{where}: {len(unexpected)} tensors have no place in {model}: {others} (in "
            f"{tensors[unexpected[0]].file.name}). Is config.json this checkpoint's own?"
        )
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, (dtypes, shape) in wanted.items():
        info = tensors[name]
        if info.shape != shape:
            raise UserError(f"{info.file}: tensor {name} is {list(info.shape)}; config.json makes it {list(shape)}.")
        if info.dtype not in dtypes:
            raise UserError(
                f"{info.file}: tensor {name} has dtype {names[info.dtype]}; here it must be "
                f"{' or '.join(names.get(dtype, str(dtype)) for dtype in dtypes)}, by config.json and the embedding's "
                "dtype. Is config.json this checkpoint's own?"
            )


def _left_out(model: Any, checkpoint: Checkpoint, wanted: Tensors) -> tuple[dict[str, int], list[str]]:
    """Classifies the tensors that the text model has no weight for.

    Returns the number of tensors by known kind, and the sorted names of those of no known kind.
    """
    config = model.config
    layers = config.num_hidden_layers
    extra = range(layers, layers + (getattr(config, "num_nextn_predict_layers", None) or 0))
    counts: dict[str, int] = {}
    unexpected = []
    for name in checkpoint.tensors.keys() - wanted.keys():
        kind = next((kind for kind, pattern in LEFT_OUT.items() if pattern.search(name)), None)
        layer = re.match(r"^model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) in extra:  # DeepSeek-V3 stores these after the last layer
            kind = "multi-token prediction"
        if kind:
            counts[kind] = counts.get(kind, 0) + 1
        else:
            unexpected.append(name)
    return counts, sorted(unexpected)
