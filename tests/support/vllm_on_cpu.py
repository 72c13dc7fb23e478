"""What vLLM's CPU build (0.32.0) lacks to serve adapters of mixture-of-experts models, and of layers that are divided
over several processes. A plugin of vLLM's, which it calls in each of its processes; all the rest is vLLM's own: what
reads an adapter, gives its tensors to the layers, keeps them in slots, and answers.

- Experts with LoRA are Triton kernels there, and weights in FP8 and INT4 want a CPU with AMX; here they are torch, from
  the same slots and weights.
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
    _linear_layers_in_fp8()


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


class TorchExperts:
    """Slots as for the Triton kernels: of each slot A [experts, r, in] and B [experts, out, r], for gate and up in
    two tensors or in one. The weights are w13 [experts, 2 I, H] and w2 [experts, H, I]."""

    _supports_current_device = staticmethod(lambda: True)
    _supports_routing_method = staticmethod(lambda *_: True)
    _supports_quant_scheme = staticmethod(lambda *_: True)

    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def moe_problem_size(self, a1: Any, w1: Any, w2: Any, topk_ids: Any) -> tuple[int, int, int, int, int]:
        sizes = self.moe_config
        return len(w1), len(a1), 2 * sizes.intermediate_size_per_partition, a1.shape[1], topk_ids.shape[1]

    def dense(self, weight: Any, scale: Any, dtype: Any) -> Any:
        """One expert's matrix."""
        return weight

    def apply(
        self, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
        global_num_experts: int, expert_map: Any, *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        context, dtype = self._lora_context, hidden_states.dtype
        slots = context.punica_wrapper.token_lora_indices[: len(hidden_states)]
        s1, s2 = self.w1_scale, self.w2_scale
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
            w13 = self.dense(w1[local], None if s1 is None else s1[local], dtype)
            gate, up = (x @ w13.T + added).chunk(2, 1)
            x = F.silu(gate) * up
            y = x @ self.dense(w2[local], None if s2 is None else s2[local], dtype).T
            y = y + _update(x, slot, context.w2_lora_a_stacked[0][:, local], context.w2_lora_b_stacked[0][:, local])
            output.index_add_(0, rows, (y * topk_weights[rows, places, None]).to(output.dtype))


def _experts_with_lora() -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class Unquantized(TorchExperts, LoRAExpertsMixin, cpu_moe.CPUUnquantizedExperts):
        pass

    class FP8(TorchExperts, LoRAExpertsMixin, cpu_moe.CPUExpertsFp8):
        def dense(self, weight: Any, scale: Any, dtype: Any) -> Any:
            return _in_bf16(_from_blocks(weight, scale), dtype)

    class INT4(TorchExperts, LoRAExpertsMixin, cpu_moe.CPUExpertsInt4):
        def dense(self, weight: Any, scale: Any, dtype: Any) -> Any:
            values = (weight[..., None] >> (4 * torch.arange(8, dtype=torch.int32)) & 15).flatten(-2).float() - 8
            grouped = values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None].float()
            return _in_bf16(grouped.flatten(-2), dtype)

    own = unquantized.backend_to_kernel_cls

    def with_torch(backend: Any) -> Any:
        return [Unquantized] if backend == unquantized.UnquantizedMoeBackend.TRITON else own(backend)

    unquantized.backend_to_kernel_cls = with_torch
    cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsInt4 = FP8, INT4
    cpu_moe.prepare_fp8_moe_layer_for_cpu = lambda w13, w2: (w13, w2)
    cpu_moe.prepare_int4_moe_layer_for_cpu = lambda *transposed, **_: (
        *(each.mT for each in transposed), *[torch.zeros(1, dtype=torch.int32)] * 2
    )  # fmt: skip


def _from_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [O, I] in FP8, scale [O / 128, I / 128], rounded up, -> [O, I] in fp32"""
    rows, columns = weight.shape
    return weight.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns].float()


def _in_bf16(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded as transformers does where it makes quantized weights dense."""
    return weight.to(torch.bfloat16).to(dtype)


def _linear_layers_in_fp8() -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel as Kernel

    def apply_weights(kernel: Any, layer: Any, x: torch.Tensor, bias: Any = None, **_: Any) -> torch.Tensor:
        held = kernel._get_layer_params(layer)
        scale = held.weight_scale_inv if held.weight_scale_inv is not None else held.weight_scale
        return F.linear(x, _in_bf16(_from_blocks(held.weight, scale), x.dtype), bias)

    Kernel.is_supported = classmethod(lambda *_: (True, None))
    Kernel.process_weights_after_loading = lambda *_: None
    Kernel.apply_weights = apply_weights


def _update(x: torch.Tensor, slot: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """x [T, in], slot [T], -1 for none, A [slots, r, in] and B [slots, out, r], scaled, -> [T, out]"""
    added = torch.zeros(len(x), B.shape[1], dtype=x.dtype)
    for one in slot.unique().tolist():
        if one >= 0:
            added[slot == one] = x[slot == one] @ A[one].T @ B[one].T
    return added
