"""Serves a base model and the adapters of several runs from one server, vLLM or SGLang:

    python -m launch.serve --model DIR --adapters runs/a/adapter runs/b/adapter --output served [-- FLAG…]

Checks ranks, names and memory before the server starts, and writes each adapter in the server's form (train/export.py)
into a directory of --output. The base is named `base`, and an adapter has the name of its run. Flags after -- go to the
server. --dry-run only prints the command. The server has its own Python environment; --python is its interpreter.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.server_node import on_nodes
from train.checkpoints.present import BASE_NAME, SERVE, adapter_files, adapter_name, is_adapter, read_config
from train.comparison.variants import runs_of
from train.config.command_line import Parser, check_ranges, given, setting
from train.runtime.command import command
from train.runtime.errors import UserError
from train.runtime.interruption import unblock
from train.runtime.outputs import check_directory
from train.runtime.outside import read_json
from train.runtime.shown import size_shown

ENVIRONMENT = Path(".venv-vllm/bin/python")  # as `make vllm` makes it
USABLE = 0.9  # share of a GPU's memory that servers take by default


@dataclass(kw_only=True)
class ServeOptions:
    """The options of a server."""

    model: str = setting("", "DIR: the base model")
    adapters: list[str] = setting((), "DIR…: adapters of runs, or runs, of which the adapter is served", many=True)  # noqa: RUF009
    output: str = setting("", "DIR for the adapters in the server's form")
    to: str = setting("vllm", "the server", choices=("vllm", "sglang"))
    python: str = setting("", f"interpreter of the server's environment; default: {ENVIRONMENT}, else python")
    port: int = setting(8000, "port on which the server listens", between=(1, 65535))
    slots: int = setting(
        0, "adapters in GPU memory at once, the others are swapped in when they are asked; 0: all", between=(0, 10**4)
    )
    tensor_parallel: int = setting(0, "GPUs that share each matrix; 0: all of this node", between=(0, 10**4))
    nodes: int = setting(1, "nodes of this Slurm job that the layers are divided over (vLLM)", between=(1, 10**4))
    expert_parallel: bool = setting(False, "divide the experts over these GPUs instead of each expert's matrices")
    fully_sharded: bool = setting(False, "divide all LoRA weights over these GPUs (vLLM)")
    drop: list[str] = setting((), "NAME…: modules whose LoRA weights may be left out", many=True)  # noqa: RUF009
    dtype: str = setting("bfloat16", "of the adapters' weights", choices=("bfloat16", "float32"))
    other_base: bool = setting(False, "serve adapters on a --model of the same shapes that they were not trained on")
    dry_run: bool = setting(False, "check, and print the command")


@dataclass
class Serving:
    """A server that is ready to start. names: adapter directory by its name on the server. command: starts it."""

    options: ServeOptions
    names: dict[str, Path] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The base URL of the server."""
        return f"http://127.0.0.1:{self.options.port}/v1"


@command
def main(argv: list[str]) -> None:
    """Prepares the adapters and replaces this process by the server. Raises UserError if a model would not be served as
    trained."""
    own, more = split(argv)
    parser = Parser(__doc__ or "")
    parser.add_settings(ServeOptions)
    options = ServeOptions(**given(parser.parse_args(own), ServeOptions))
    check_ranges(options)
    check_early(options)
    serving = prepare(options, more)
    print(shlex.join(serving.command), flush=True)
    if not options.dry_run:
        unblock()
        os.execvp(serving.command[0], serving.command)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments before and after the first --."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def check_early(options: ServeOptions) -> None:
    """Raises UserError for missing settings and for paths that do not exist. Needs no torch."""
    for name in ("model", "adapters", "output"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing; give it.")
    held = int(os.environ.get("SLURM_JOB_NUM_NODES") or 0)
    if options.nodes > 1 and options.to != "vllm":
        raise UserError(f"--nodes {options.nodes}: goes with --to vllm alone; give one node, or serve by vLLM.")
    if options.nodes > max(1, held) and not options.dry_run:
        here = f"this Slurm job has {held}" if held else "this is no Slurm job"
        raise UserError(f"--nodes {options.nodes}: {here}; submit one of as many (sbatch --nodes), or give fewer.")
    read_config(Path(options.model))
    check_directory("--output", options.output)
    for adapter in options.adapters:
        if not is_adapter(adapter_of(Path(adapter))):
            runs = [run for run in runs_of(Path(adapter)) if run != Path(adapter)]
            fix = f"it is a comparison; give its runs: {' '.join(map(str, runs))}" if runs else "give finished runs"
            raise UserError(f"--adapters {adapter}: holds no adapter; {fix}, or directories of adapters.")
        adapter_files(adapter_of(Path(adapter)))
        adapter_name(adapter_of(Path(adapter)), options.to)
    if not options.dry_run:
        check_installed(interpreter(options.python), options.to)


def adapter_of(path: Path) -> Path:
    """Returns the adapter of a run's directory; an adapter's own directory as it is."""
    return path / "adapter" if (path / "settings.yaml").is_file() else path


def prepare(options: ServeOptions, more: list[str]) -> Serving:
    """Writes the adapters in the server's form, unless they exist already, and returns the server's command.

    more: further flags of the server. With --dry-run nothing is written. Raises UserError if an adapter does not fit
    the model, if the server would not apply all of it, if two adapters have one name, or if memory does not suffice.
    """
    import torch

    from train.checkpoints.adapter_files import adapter_settings, check_adapter, is_of
    from train.checkpoints.reader import Checkpoint
    from train.checkpoints.served import command as server_command
    from train.checkpoints.served import largest_rank, served
    from train.experts.dispatch import ExpertGroup
    from train.model.text_model import architecture, skeleton, text_config

    base, serving = Checkpoint(options.model), Serving(options)
    model, of, dtype = skeleton(text_config(base), ExpertGroup()), architecture(base), getattr(torch, options.dtype)
    forms, written, adapters = [], {}, [adapter_of(Path(each)) for each in options.adapters]
    if options.other_base and all(is_of(adapter, base) for adapter in adapters):
        raise UserError(f"--other-base: --model {base.directory} is what all --adapters were trained on; leave it out.")
    for adapter in adapters:
        name, lora = adapter_name(adapter, options.to), adapter_settings(adapter)
        if name in {*serving.names, BASE_NAME}:
            raise UserError(f"--adapters {adapter}: the server has another {name}; rename the run's directory.")
        form = served(options.to, model, lora, of, base, options.drop)
        moved = options.other_base and not is_of(adapter, base)
        check_adapter(adapter, model, lora, of, base, moved)
        serving.names[name], target = adapter, Path(options.output) / name
        written[name] = str(target.resolve())
        forms.append(form)
        if not options.dry_run:
            _write(form, adapter, target, lora, of, base, options, moved)
    rank, gpus = max(map(largest_rank, forms)), options.tensor_parallel or max(1, torch.cuda.device_count())
    slots = min(options.slots or len(forms), len(forms))
    check_memory(options, forms, slots, rank, gpus, base, dtype)
    own = server_command(options.to, options.model, written, rank, forms[0].family, slots)
    parallel = {"vllm": "--tensor-parallel-size", "sglang": "--tp-size"}[options.to]
    own += ["--host", "127.0.0.1", "--port", str(options.port), *([parallel, str(gpus)] if gpus > 1 else [])]
    own += ["--pipeline-parallel-size", str(options.nodes)] if options.nodes > 1 else []
    if options.expert_parallel:
        own += ["--enable-expert-parallel"] if options.to == "vllm" else ["--ep-size", str(gpus)]
    own += ["--fully-sharded-loras"] if options.fully_sharded else []
    serving.command = [interpreter(options.python), *own[1:], *more]
    if options.nodes > 1:
        serving.command = on_nodes(serving.command, options.nodes)
    return serving


def _write(
    form: Any, adapter: Path, target: Path, lora: Any, of: str, base: Any, options: ServeOptions, moved: bool
) -> None:
    """Writes an adapter in the server's form, unless it is there already. moved: whether it is put on another base.
    Raises UserError if the directory holds something else, or weights are not finite."""
    import torch

    from train.checkpoints.adapter_files import check_finite, weights_hash
    from train.checkpoints.served import SERVERS, write_served

    held = read_json(target / SERVE) if (target / SERVE).is_file() else {}
    wanted = {
        "server": options.to, "version": SERVERS[options.to], "dtype": options.dtype,
        "not_served": sorted(options.drop), "other_base": moved,
    }  # fmt: skip
    same = (held.get("adapter") or {}).get("sha256") == weights_hash(adapter)
    same &= (held.get("base") or {}).get("fingerprint") == base.fingerprint()
    if not (same and is_adapter(target) and all(held.get(key) == value for key, value in wanted.items())):
        if target.exists() and not (target / SERVE).is_file():
            raise UserError(
                f"--output {options.output}: holds {target.name}, which is not an adapter written for a server and "
                "would be lost; give another directory."
            )
        check_finite(adapter)
        write_served(form, adapter, lora, of, base, target, getattr(torch, options.dtype), moved)


def interpreter(given: str) -> str:
    """Returns the interpreter that runs the server. Raises UserError if there is no such file."""
    if given and not os.access(given, os.X_OK):
        raise UserError(f"--python {given}: is not an executable; give the interpreter of the server's environment.")
    return given or (str(ENVIRONMENT.absolute()) if ENVIRONMENT.exists() else "python")


def check_installed(python: str, server: str) -> None:
    """Raises UserError if the interpreter has no such server."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({server!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0
    except OSError:
        found = False
    if not found:
        raise UserError(
            f"--python {python}: has no {server}; give the interpreter of the server's environment, or make one at "
            f"{ENVIRONMENT} (make vllm: the CPU build of vLLM)."
        )


def check_memory(
    options: ServeOptions, forms: list[Any], slots: int, rank: int, gpus: int, base: Any, dtype: Any
) -> None:
    """Prints how much memory weights and adapters take on each GPU; every slot has room for the largest adapter. Raises
    UserError if it does not fit, or if the ranks are not divisible as --fully-sharded requires. Without a GPU, it only
    prints."""
    from launch.cluster import gpu_memory
    from train.checkpoints.served import slot_bytes

    ranks = {rank for form in forms for rank in form.ranks}
    if options.fully_sharded and any(each % gpus for each in ranks):
        raise UserError(
            f"--fully-sharded: the ranks must be multiples of {gpus}, the number of GPUs, and are "
            f"{', '.join(map(str, sorted(ranks)))}; leave it out."
        )
    weights = sum(info.dtype.itemsize * math.prod(info.shape) for info in base.tensors.values())
    weights /= gpus * options.nodes
    sharding = options.expert_parallel, options.fully_sharded
    adapters = slots * max(slot_bytes(form, rank, gpus, *sharding, dtype) for form in forms) / options.nodes
    memory, wanted = gpu_memory(), (weights + adapters) / 1e9
    print(
        f"on each of {gpus * options.nodes} {'GPUs' if memory else 'processes'}: {size_shown(weights)} of weights, "
        f"{size_shown(adapters)} for {slots} of {len(forms)} adapters at once, of rank up to {rank}"
    )
    if memory and wanted > USABLE * memory:
        raise UserError(
            f"--adapters: {wanted:.1f} GB are needed on each GPU before any cache, and servers use {USABLE:.0%} of "
            f"{memory:.0f} GB. Give --expert-parallel or --fully-sharded, {'fewer --slots, ' if slots > 1 else ''}or "
            "more GPUs."
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
