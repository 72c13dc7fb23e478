"""What vLLM's CPU build (0.32.0) lacks to serve adapters of mixture-of-experts models, and of layers that are divided
over several processes. A plugin of vLLM's, which it calls in each of its processes; all the rest is vLLM's own: what
reads an adapter, gives its tensors to the layers, keeps them in slots, and answers.

- Experts with LoRA are Triton kernels there; here they are torch, from the same slots.
- With LoRA, the buffers that a process receives hidden states in are never made (only the warm-up makes them).
- Its command line does not find its version, as its distribution has another name.
"""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n",
    "entry_points.txt": f"[vllm.general_plugins]\nspanwise_tests = {__name__}:register\n",
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
    _without_torchvision()
    _receive_hidden_states()
    _experts_with_lora()


def _without_torchvision() -> None:
    """Qwen3.5's module imports the processing of images, of which text needs nothing."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        module = sys.modules[name] = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    sys.modules["torchvision.transforms.v2"].functional = ModuleType("functional")  # type: ignore[attr-defined]


def _receive_hidden_states() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    own = GPUModelRunner.sync_and_gather_intermediate_tensors

    def with_buffers(runner: Any, *arguments: Any, **more: Any) -> Any:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return own(runner, *arguments, **more)

    GPUModelRunner.sync_and_gather_intermediate_tensors = with_buffers


def _experts_with_lora() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class TorchExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
        """Weights and slots as for the Triton kernels: w13 [experts, 2 I, H], w2 [experts, H, I]; of each slot A
        [experts, r, in] and B [experts, out, r], for gate and up in two tensors or in one."""

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply(
            self, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
            global_num_experts: int, expert_map: Any, *_: Any, **__: Any,
        ) -> None:  # fmt: skip
            context = self._lora_context
            slots = context.punica_wrapper.token_lora_indices[: len(hidden_states)]
            output.zero_()
            for expert in topk_ids.unique().tolist():
                local = expert if expert_map is None else int(expert_map[expert])
                if local < 0:  # another process has it
                    continue
                rows, places = (topk_ids == expert).nonzero(as_tuple=True)
                x, slot = hidden_states[rows], slots[rows]
                added = torch.cat([
                    _update(x, slot, A[:, local], B[:, local])
                    for A, B in zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                ], 1)  # fmt: skip
                gate, up = (x @ w1[local].T + added).chunk(2, 1)
                x = F.silu(gate) * up
                y = x @ w2[local].T
                y = y + _update(x, slot, context.w2_lora_a_stacked[0][:, local], context.w2_lora_b_stacked[0][:, local])
                output.index_add_(0, rows, (y * topk_weights[rows, places, None]).to(output.dtype))

    own = unquantized.backend_to_kernel_cls

    def with_torch(backend: Any) -> Any:
        return [TorchExperts] if backend == unquantized.UnquantizedMoeBackend.TRITON else own(backend)

    unquantized.backend_to_kernel_cls = with_torch


def _update(x: torch.Tensor, slot: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """x [T, in], slot [T], -1 for none, A [slots, r, in] and B [slots, out, r], scaled, -> [T, out]"""
    added = torch.zeros(len(x), B.shape[1], dtype=x.dtype)
    for one in slot.unique().tolist():
        if one >= 0:
            added[slot == one] = x[slot == one] @ A[one].T @ B[one].T
    return added
