"""A checkpoint of which only the config.json is there, to plan a job without the weights."""

import os
from pathlib import Path

import torch

from train.checkpoints.layout import F32_TOO, MATRICES
from train.checkpoints.reader import Checkpoint, TensorInfo
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.formats import quantized_format
from train.model.text_model import skeleton, text_config
from train.runtime.errors import UserError


class BareCheckpoint(Checkpoint):
    """The tensors that a checkpoint with this config.json would have, without their data.

    They are those of the text model, in the dtype that config.json names. The experts have the format of its
    quantization_config, and if that is FP8, so do the matrices of the layers. config: the file or its directory. Raises
    UserError if config.json is missing or invalid, if its dtype is neither bfloat16 nor float32, or if its architecture
    or quantization is not supported.
    """

    tensors: dict[str, TensorInfo]

    def __init__(self, config: Path):
        super().__init__(config.parent if os.path.isfile(config) else config)
        self.tensors = {}  # text_config looks for lm_head here; without weights, config.json alone decides
        where, text = f"--model {self.directory}", self.config.get("text_config") or self.config
        name = str(text.get("dtype") or text.get("torch_dtype") or self.config.get("dtype") or "bfloat16")
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(name)
        if dtype is None:
            raise UserError(f"{where}: config.json says dtype {name}; bfloat16 and float32 are trained.")
        format = quantized_format(self.config, where)
        kept = (self.config.get("quantization_config") or {}).get("modules_to_not_convert") or []
        model = skeleton(text_config(self), ExpertGroup())

        def add(name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
            self.tensors[name] = TensorInfo(self.directory / "config.json", dtypes[0], shape, 0)

        for prefix, module in model.named_modules():
            if isinstance(module, ExpertParallelExperts):
                for target, (experts, out_features, in_features) in module.shapes().items():
                    if format.kind == "plain":
                        add(f"{prefix}.{target}", (dtype,), (experts, out_features, in_features))
                        continue
                    for expert in range(experts):
                        for matrix in MATRICES[target]:
                            rows = out_features // len(MATRICES[target])
                            for suffix, (dtypes, shape) in format.tensors(rows, in_features).items():
                                add(f"{prefix}.{expert}.{matrix}.weight{suffix}", dtypes, shape)
                            if format.kind == "int4":
                                add(f"{prefix}.{expert}.{matrix}.weight_shape", (torch.int32,), (2,))
        for name, parameter in model.named_parameters():
            linear = parameter.dim() == 2 and ".layers." in name and not name.endswith((".gate.weight", "_gate.weight"))
            if format.kind == "fp8" and linear and not any(name.startswith(f"{module}.") for module in kept):
                for suffix, (dtypes, shape) in format.tensors(*parameter.shape).items():
                    add(name + suffix, dtypes, shape)
            else:
                add(name, (dtype,), tuple(parameter.shape))
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                add(name, (torch.float32 if F32_TOO.search(name) else dtype,), tuple(buffer.shape))

    def fingerprint(self) -> str:
        """Raises AssertionError: there are no weights to hash."""
        raise AssertionError("has no weights")
