"""Lets vLLM's CPU build answer with layers that are divided over several processes: `make vllm` installs it under another
name, by which its command line does not find its version, and with LoRA it does not create the buffers that a later
process receives hidden states in (0.32.0: only its warm-up does, which LoRA turns off)."""

from pathlib import Path
from typing import Any

METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n",
    "entry_points.txt": f"[vllm.general_plugins]\nstages = {__name__}:register\n",
}


def write_plugin(directory: Path) -> Path:
    """Writes what a directory of PYTHONPATH must have for vLLM to call `register`. -> the directory"""
    metadata = directory / "vllm-0.32.0.dist-info"
    metadata.mkdir(parents=True)
    for name, text in METADATA.items():
        (metadata / name).write_text(text)
    return directory


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    own = GPUModelRunner.sync_and_gather_intermediate_tensors

    def with_buffers(runner: Any, *arguments: Any, **more: Any) -> Any:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return own(runner, *arguments, **more)

    GPUModelRunner.sync_and_gather_intermediate_tensors = with_buffers
