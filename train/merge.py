"""Adds an adapter's factors to the weights of its base model, or turns a quantized checkpoint into BF16:

    python train/merge.py --model DIR --adapter DIR --output DIR [--to same]

Works shard by shard in little memory, on one process, without a GPU. Started again with the same --output, it goes on
after the shards that are complete. Tensors without factors, tokenizer and configuration are carried over as they are.
FP8 and INT4 checkpoints become BF16 by default; with --to same, their matrices go back to their own format.
merge_report.json says for each tensor how much of the update survived rounding.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from train.checkpoints.adapter import adapter_settings, check_adapter
from train.checkpoints.formats import quantized_format
from train.checkpoints.layout import plan_load
from train.checkpoints.merging import Merger, merge
from train.checkpoints.reader import Checkpoint
from train.errors import UserError
from train.experts.dispatch import ExpertGroup
from train.model import architecture, skeleton, text_config

LITTLE = 0.5  # of an update that survives: below, a warning


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="the base model")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a run's adapter/; without, only the format changes"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the merged model goes")
    parser.add_argument("--to", choices=("bf16", "same"), default="bf16", help="format of quantized matrices")
    args = parser.parse_args(arguments)
    try:
        run(args.model, args.adapter, args.output, args.to == "bf16")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(source: Path, adapter: Path | None, output: Path, bf16: bool) -> None:
    """Checks, merges, verifies what was written, and says what survived rounding."""
    checkpoint = Checkpoint(source)
    quantized = quantized_format(checkpoint.config, f"--model {source}").kind != "plain"
    if output.exists() and output.resolve() == source.resolve():
        raise UserError(
            f"--output {output}: is --model itself, whose files would be overwritten. Give another directory."
        )
    if adapter is None and not (quantized and bf16):
        raise UserError("--adapter: none given, and nothing is to be converted: the output would be a copy of --model.")
    model = skeleton(text_config(checkpoint), ExpertGroup())
    plan = plan_load(model, checkpoint)
    lora = adapter_settings(adapter) if adapter else None
    if adapter and lora:
        check_adapter(adapter, model, lora, architecture(checkpoint))

    merger = Merger(checkpoint, model, plan, adapter, lora, architecture(checkpoint), quantized and bf16)
    report = _earlier_report(output, {"model": str(source), "adapter": str(adapter), "to": "bf16" if bf16 else "same"})

    def keep() -> None:  # before a shard gets its name: what it lost is known, or it is written again
        report.update(merger.survived())
        _save_report(output, report)

    merge(merger, output, keep)

    written = Checkpoint(output)
    plan_load(skeleton(text_config(written), ExpertGroup()), written)  # index, names, shapes, dtypes and sizes
    print(f"{output}: {len(written.tensors)} tensors, checked against index and config.json")
    if report:
        show(report)


def show(report: dict[str, dict[str, float]]) -> None:
    """The tensors of which least survived."""
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


def _report_path(output: Path) -> Path:
    return output / "merge_report.json"


def _earlier_report(output: Path, settings: dict[str, str]) -> dict[str, dict[str, float]]:
    """Marks the directory as this merge's. -> what an earlier attempt at it measured."""
    marker = output / "merge.json"
    if marker.exists() and json.loads(marker.read_text()) != settings:
        raise UserError(
            f"--output {output}: holds another merge ({marker.read_text().strip()}). Give another directory."
        )
    if not marker.exists() and output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty and holds no merge. Give another directory.")
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings) + "\n")
    path = _report_path(output)
    return json.loads(path.read_text()) if path.exists() else {}


def _save_report(output: Path, report: dict[str, dict[str, float]]) -> None:
    partial = _report_path(output).with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, _report_path(output))


if __name__ == "__main__":
    sys.exit(main())
