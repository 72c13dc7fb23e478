"""Writes full checkpoints shard by shard in the layout of the source checkpoint.

Whatever is not changed is copied byte for byte: vision, multi-token prediction, tokenizer, configuration.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param

from train.checkpoints.layout import LoadPlan, has_own_head
from train.checkpoints.present import MARKER, REPORT
from train.checkpoints.reader import Checkpoint
from train.checkpoints.writer import SafetensorsWriter, publish_directory
from train.runtime.outputs import flush, write_whole
from train.runtime.watchdog import progress

CHUNK = 2**26  # bytes copied at a time
WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data",
    ".partial",
}  # fmt: skip


def copy_tensor(checkpoint: Checkpoint, name: str, writer: SafetensorsWriter) -> None:
    """Copies a tensor unchanged, in chunks. Raises UserError if its file cannot be read."""
    info = checkpoint.tensors[name]
    count, step = torch.Size(info.shape).numel(), CHUNK // info.dtype.itemsize
    for start in range(0, count, step):
        progress("copying the checkpoint")
        part = torch.empty(min(step, count - start), dtype=info.dtype)
        checkpoint.read(name, start, part)
        writer.write(name, part, start)


def copy_other_files(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copies everything but the weights: tokenizer, configuration, other files and directories.

    Weight files, files of merge.py and those named in `but` are left out. Prints a note with the reason for anything
    else that is not copied. For example, weights in a subdirectory would still be those of the base.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if why := _left_behind(path, source, target):
                print(f"note: {path}: is not copied: {why}")
            else:
                _copy_directory(path, target)
        elif path.suffix.lower() in WEIGHTS or path.name in {MARKER, REPORT, *but}:
            continue
        elif not path.is_file():
            print(f"note: {path}: is not copied: it is not a regular file")
        elif not any(path.resolve().is_relative_to(own) for own in _places_of(source)):
            print(f"note: {path}: is not copied: it links to a file outside the checkpoint")
        else:
            flush(Path(shutil.copyfile(path, target / path.name)))


def _copy_directory(source: Path, into: Path) -> None:
    for each in [source, *_inside(source)]:
        copy = into / each.relative_to(source.parent)
        if each.is_dir():
            copy.mkdir(exist_ok=True)
        else:
            flush(Path(shutil.copyfile(each, copy)))


def _inside(directory: Path) -> Iterator[Path]:
    """Yields everything in a directory, at any depth, parents before their contents. Links are not followed."""
    for place, directories, files in os.walk(directory):
        yield from (Path(place, name) for name in sorted([*directories, *files]))


def _places_of(source: Path) -> list[Path]:
    """Returns where the files of a checkpoint may be: in its directory or, in a hub cache, in the cache's blobs."""
    root = source.resolve()
    return [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]


def _left_behind(directory: Path, source: Path, target: Path) -> str:
    """Returns why a directory of a checkpoint is not copied, or "". In a hub cache, files are links to its blobs."""
    ours = _places_of(source)
    if target.resolve().is_relative_to(directory.resolve()):
        return "it contains this output"
    if directory.name.startswith("."):
        return "it is hidden"
    for each in [directory, *_inside(directory)]:
        if each.suffix.lower() in WEIGHTS and not each.is_dir():
            return f"{each.relative_to(source)} belongs to the original weights"
        if not (each.is_file() or (each.is_dir() and not each.is_symlink())):
            return f"{each.relative_to(source)} is a link or not a regular file"
        if not any(each.resolve().is_relative_to(own) for own in ours):
            return f"{each.relative_to(source)} links to a file outside the checkpoint"
    return ""


def by_shard(checkpoint: Checkpoint) -> dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Returns, by shard, the dtype and shape of each tensor by name, in the order of the file."""
    shards: dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        shards.setdefault(info.file, {})[name] = info.dtype, info.shape
    return shards


def config_text(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    """Returns `config` as the text of config.json: the checkpoint's own text, byte for byte, if nothing changed."""
    if config == checkpoint.config:
        return (checkpoint.directory / "config.json").read_text(encoding="utf-8")
    return json.dumps(config, indent=2) + "\n"


def says_tied(config: dict[str, Any]) -> bool:
    """Whether config.json ties lm_head to the embedding."""
    return any(part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {}))


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json for a checkpoint with a separate lm_head weight."""
    return changed_config(config, lambda part: part | {"tie_word_embeddings": False})


def changed_config(config: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Returns a configuration with `change` applied to its top level and to its text_config, if any."""
    config = change(config)
    return config | {"text_config": change(config["text_config"])} if config.get("text_config") else config


def save_model(directory: Path, plan: LoadPlan, checkpoint: Checkpoint) -> None:
    """Writes a model whose weights were trained, in the layout of `checkpoint`.

    Each rank writes its partitions to the same locations that it read them from. All ranks must call this and share the
    file system.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    partial, shards = directory.with_name(directory.name + ".partial"), by_shard(checkpoint)
    trained = {piece.source for piece in plan.dense}
    trained |= {name for piece in plan.experts for name in piece.sources()}
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_other_files(checkpoint.directory, partial)
        if has_own_head(checkpoint) and says_tied(checkpoint.config):  # the separate lm_head was trained
            write_whole(partial / "config.json", config_text(checkpoint, untied(checkpoint.config)))
        for shard, layout in shards.items():
            writer = SafetensorsWriter(partial / shard.name, layout)
            for name in layout.keys() - trained:
                copy_tensor(checkpoint, name, writer)
            writer.close()
    dist.barrier()
    writers = {shard: SafetensorsWriter(partial / shard.name, layout, create=False) for shard, layout in shards.items()}
    for dense in plan.dense:
        progress("saving the model")
        read = dense.reads(rank, ranks)[""]
        values = safe_get_local_fp32_param(getattr(dense.module, dense.target))
        writers[checkpoint.tensors[read.name].file].write(read.name, values[: read.count], read.start)
    for experts in plan.experts:
        progress("saving the model")
        ep = experts.module.ep
        values = safe_get_local_fp32_param(getattr(experts.module, experts.target))
        for place, read in experts.partition_reads(rank // ep.size, ranks // ep.size):
            part = values[place : place + read.count]
            writers[checkpoint.tensors[read.name].file].write(read.name, part, read.start)
    for writer in writers.values():
        writer.close()
    dist.barrier()
    if rank == 0:
        for writer in writers.values():
            writer.publish()
        publish_directory(partial, directory)
    checkpoint.close()
