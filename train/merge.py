"""Merges an adapter's LoRA weights into its base model, or converts a quantized checkpoint to BF16:

    python train/merge.py --model DIR --adapter DIR --output DIR [--to same]

Works shard by shard in little memory, in one process, without a GPU. If it is started again with the same --output, it
continues after the complete shards; config.json is written last. Tensors without LoRA weights, tokenizer and
configuration are copied unchanged. FP8 and INT4 checkpoints become BF16 by default; with --to same, their matrices are
encoded in their own format again. merge_report.json gives for each tensor how much of the update survived rounding.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted: complete shards are kept; run the same command again to continue")

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoints.present import MARKER, REPORT, adapter_files, read_config
from train.config.command_line import Parser
from train.runtime.command import command
from train.runtime.errors import UserError, writing
from train.runtime.locks import lock, opened_to_lock
from train.runtime.outputs import check_directory, write_whole
from train.runtime.outside import checked, read_json
from train.runtime.terminal import NobodyReads
from train.runtime.text_formats import Unreadable, parse_json

if TYPE_CHECKING:  # torch and what needs it are imported after the first checks
    from train.checkpoints.reader import Checkpoint

MOST_OF_A_MARKER = 2**20  # characters
LITTLE = 0.5  # share of an update that survives; if it is less, there is a warning


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can fix."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a run's adapter/; without, only the format changes"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the merged model goes")
    parser.add_argument(
        "--to", choices=("bf16", "same"), default="bf16", help="quantized matrices become (default: bf16)"
    )
    parser.add_argument(
        "--other-base", action="store_true", help="merge into a --model of the same shapes that it was not trained on"
    )
    args = parser.parse_args(arguments)
    if args.other_base and args.adapter is None:
        raise UserError("--other-base: has no effect without --adapter; give both or neither.")
    read_config(args.model)
    if args.adapter:
        adapter_files(args.adapter)
    check_target(args.output, args.model)
    with writing(args.output):
        run(args.model, args.adapter, args.output, args.to == "bf16", args.other_base)
    return 0


def check_target(output: Path, source: Path) -> None:
    """Raises UserError if the directory for the merged model is the model itself (`source`) or holds something other
    than a merge, or cannot be a directory."""
    if os.path.exists(output) and output.resolve() == source.resolve():
        raise UserError(
            f"--output {output}: is --model itself, whose files would be overwritten. Give another directory."
        )
    check_directory("--output", output)
    if output.exists() and not (output / MARKER).exists() and any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty and holds no merge. Give another directory.")


def run(source: Path, adapter: Path | None, output: Path, bf16: bool, other_base: bool) -> None:
    """Merges a model and an adapter, verifies what was written, and prints what survived rounding.

    source: the base model. adapter: None to change only the format. bf16: quantized matrices become BF16, else they
    keep their format. other_base: whether the adapter may be of another base. Raises UserError if model and adapter are
    damaged or do not fit together, if there is nothing to do, or if `output` is in use or holds another merge.
    """
    from train.checkpoints.adapter_files import adapter_settings, check_adapter, check_finite
    from train.checkpoints.layout import plan_load
    from train.checkpoints.merging import Merger, merge
    from train.checkpoints.reader import Checkpoint
    from train.experts.dispatch import ExpertGroup
    from train.formats import quantized_format
    from train.model.text_model import architecture, skeleton, text_config

    checkpoint = Checkpoint(source)
    quantized = quantized_format(checkpoint.config, f"--model {source}").kind != "plain"
    if adapter is None and not (quantized and bf16):
        raise UserError("--adapter: missing, and --model needs no conversion: the output would be a copy. Give one.")
    model = skeleton(text_config(checkpoint), ExpertGroup())
    plan = plan_load(model, checkpoint)
    lora = adapter_settings(adapter) if adapter else None
    if adapter and lora:
        check_adapter(adapter, model, lora, architecture(checkpoint), checkpoint, other_base)
        check_finite(adapter)

    merger = Merger(checkpoint, model, plan, adapter, lora, architecture(checkpoint), quantized and bf16)
    with claimed(output, _identity(checkpoint, adapter, bf16)):
        report = read_report(output)

        def keep() -> None:  # called before a shard gets its final name: a complete shard is always in the report
            report.update(merger.survived())
            write_whole(output / REPORT, json.dumps(report, indent=1, sort_keys=True) + "\n")

        merge(merger, output, keep)

        written = Checkpoint(output)
        plan_load(skeleton(text_config(written), ExpertGroup()), written)  # index, names, shapes, dtypes and sizes
    with suppress(NobodyReads):  # the merge is done
        print(f"{output}: {len(written.tensors)} tensors, checked against index and config.json")
        if report:
            show(report)


def show(report: dict[str, dict[str, float]]) -> None:
    """Prints the tensors of which least survived. report: tensor -> survived, a share of 1, and update_norm."""
    worst = sorted(report.items(), key=lambda item: item[1]["survived"])
    little = sum(values["survived"] < LITTLE for values in report.values())
    middle = worst[len(worst) // 2][1]["survived"]
    print(f"Share of the update that survived rounding: median {middle:.3f} over {len(report)} tensors; least:")
    for name, values in worst[:5]:
        print(f"  {values['survived']:.3f}  {name} (update norm {values['update_norm']:.3g})")
    if little:
        print(
            f"WARNING: of {little} tensors less than {LITTLE:.0%} of the update survived: the merged model is not what "
            "was trained. Merge to BF16 (--to bf16), or serve the adapter beside the base model."
        )


def _identity(checkpoint: "Checkpoint", adapter: Path | None, bf16: bool) -> dict[str, str]:
    """Returns what identifies a merge: the paths of its inputs, and SHA-256 hashes of their contents."""
    identity = {"model": str(checkpoint.directory.resolve()), "to": "bf16" if bf16 else "same"}
    identity["weights of the model"] = checkpoint.fingerprint()
    if adapter:
        identity["adapter"] = str(adapter.resolve())
        for path in adapter_files(adapter):
            with path.open("rb") as file:
                identity[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return identity


def read_report(output: Path) -> dict[str, dict[str, float]]:
    """Returns tensor -> what survived rounding, as an interrupted merge has left it; {} if there is none. Raises
    UserError if the file is damaged."""
    path = output / REPORT
    if not os.path.lexists(path):
        return {}
    report = read_json(path, fix="give another --output directory")
    for name, values in report.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {name} is not an object; give another --output directory.")
        checked(values, {"survived": float, "update_norm": float}, f"{path}: {name}", "give another --output directory")
    return report


@contextmanager
def claimed(output: Path, identity: dict[str, str]) -> Iterator[None]:
    """Inside the context, holds a lock on the directory, if its file system can, and marks it as this merge's. Raises
    UserError if it holds another merge or other files, if its marker is damaged, or if another process is merging into
    it."""
    marker = output / MARKER
    output.mkdir(parents=True, exist_ok=True)
    with opened_to_lock(marker) as file:
        if unlocked := lock(file, f"--output {output}: another process is merging into it. Wait for it, or stop it."):
            print(f"note: {output} cannot be locked ({unlocked}): keep other merges out of it", file=sys.stderr)
        try:
            held = parse_json(file.read(MOST_OF_A_MARKER), strictly=True)
            if not isinstance(held, dict):
                raise Unreadable("no object")
        except Unreadable:  # the marker is new, or a kill or a full disk truncated it before anything else was written
            if any(path != marker for path in output.iterdir()):
                raise UserError(
                    f"{marker}: is damaged, so it is unknown which merge the other files belong to. Give another "
                    "--output directory."
                ) from None
            file.seek(0)
            file.truncate(0)
            file.write(json.dumps(identity, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
            held = identity
        if held != identity:
            differing = [name for name in identity.keys() | held.keys() if identity.get(name) != held.get(name)]
            raise UserError(
                f"--output {output}: holds another merge, which differs in {', '.join(sorted(differing))}. Give "
                "another directory."
            )
        yield


if __name__ == "__main__":
    sys.exit(main())
