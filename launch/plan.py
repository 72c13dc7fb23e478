"""Predicts before a job is queued whether it fits, how long it loads and what a step costs.

    python -m launch.plan --model DIR --nodes 1 --gpus 8 --gpu-memory 80 --method qlora --gradient-checkpointing
    python -m launch.plan --model config.json --nodes 2 --gpus 8 --gpu-memory 141 --search

Needs no weights and no GPU: --model is a directory, or its config.json alone. Accepts the settings of train/sft.py,
also from --recipe. Assumes that every document has --max-tokens tokens, all in the loss. Exits with 1 if the job does
not fit.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import GPUS, Cluster
from train.checkpoints.present import read_config
from train.config.command_line import MOST, Parser, check_ranges, given, setting
from train.config.phases import parse_phases
from train.config.settings import Recipe, Settings, read_ds_config
from train.masking.grammar import parse_mask
from train.runtime.command import command
from train.runtime.errors import UserError
from train.runtime.outputs import check_apart, model_files, write
from train.runtime.terminal import NobodyReads


@dataclass(kw_only=True)
class PlanOptions:
    """The options of the plan, in addition to the settings of train/sft.py."""

    nodes: int = setting(1, "number of nodes", between=(1, MOST))
    gpus: int = setting(8, "GPUs per node", between=(1, MOST))
    gpu_memory: str = setting("80", "memory of each GPU in GB, or its name: A100, H100, H200, B200")
    search: bool = setting(False, "propose settings that fit, the fastest first")
    traffic: bool = setting(False, "show what a step reads and writes of the GPU's memory, by part of the model")
    json: str = setting("", "FILE that the plan is written to")


def of_each_gpu(text: str) -> tuple[float, str]:
    """Parses --gpu-memory. Returns GB and the GPU's name, "" if none is given; for a GPU that comes in two sizes, the
    larger one. Raises UserError for an unknown name, or a size that is not positive or too large."""
    if sizes := [gpu.memory for gpu in GPUS if gpu.name == text.upper()]:
        return max(sizes), text.upper()
    try:
        memory = float(text)
    except ValueError:
        memory = math.nan
    if not 0 < memory <= MOST:
        names = ", ".join(dict.fromkeys(gpu.name for gpu in GPUS))
        raise UserError(f"--gpu-memory {text}: must be GB, more than 0 and at most {MOST}, or one of {names}.")
    return memory, ""


def check_model(model: str) -> None:
    """Raises UserError if --model is neither a directory with a config.json nor such a file, or that is invalid."""
    path = Path(model)
    if os.path.isfile(path) and path.name != "config.json":
        raise UserError(f"--model {path}: give a model's directory or its config.json.")
    read_config(path.parent if os.path.isfile(path) else path)


def read_by(settings: Settings, argv: list[str]) -> dict[str, list[Any]]:
    """Returns the files that the plan reads, by flag, so that --json replaces none of them."""
    parser = Parser("", add_help=False)
    parser.add_settings(Recipe)
    recipes = given(parser.parse_known_args(argv)[0], Recipe).get("recipe", [])
    data = [source.path for source in settings.sources()]
    return {
        "--model": model_files(settings.model), "--data": data, "--recipe": recipes,
        "--ds-config": [settings.ds_config],
    }  # fmt: skip


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the job fits, 1 if it does not, 2 for an error that the user can fix."""
    parser = Parser(__doc__ or "", beside=(Settings, Recipe))
    parser.add_settings(PlanOptions)
    values, rest = parser.parse_known_args(arguments)
    options, phases = PlanOptions(**given(values, PlanOptions)), parse_phases(rest, "")[1]
    # The phase that takes most: one that holds tokens has a pass of the base more.
    name, settings = max(phases.items(), key=lambda phase: parse_mask(phase[1].mask).holds)
    if len(phases) > 1:
        print(f"note: of the variant's {len(phases)} phases, {name!r} is planned, which takes most")
    check_ranges(options)
    memory, kind = of_each_gpu(options.gpu_memory)
    check_apart({"--json": options.json}, read_by(settings, rest))
    check_model(settings.model)
    read_ds_config(settings)
    return plan(options, settings, Cluster(nodes=options.nodes, gpus=options.gpus, memory=memory, kind=kind))


def plan(options: PlanOptions, settings: Settings, cluster: Cluster) -> int:
    """Makes the plan, prints it and writes it to --json. Returns the exit code: 0 if the job fits, 1 if it does not."""
    from launch.planning import Plan  # these imports take seconds: after the checks that do not need them
    from launch.proposal import advise, opened, search, searched, show, show_traffic

    checkpoint = opened(settings.model)
    found = search(settings, checkpoint, cluster) if options.search else []
    made = found[0] if found else Plan(settings, checkpoint, cluster, settings.max_tokens)
    with suppress(NobodyReads):
        for other in found[:5]:
            print(
                f"{other.gpu_bytes['total'] / 1e9:6.1f} GB, {other.tokens_per_second:9,.0f} tokens/s at most: "
                f"{searched(other.settings)}"
            )
        if options.search and not found:
            print("no setting of method, micro-batch, checkpointing and expert parallelism fits")
        show(made)
        if options.traffic:
            show_traffic(made)
        if not made.fits:
            advise(made)
    if options.json:
        write("--json", Path(options.json), [json.dumps(made.as_json(), indent=1)])
    return 0 if made.fits else 1


if __name__ == "__main__":
    sys.exit(main())
