"""Checks that a PEFT adapter is a plain update, W + scale B A, of the base model as stored on disk.

Any option that is not known to keep it a plain update is rejected by name. Otherwise the adapter would load without an
error and give different logits.
"""

import re
from pathlib import Path
from typing import Any

from train.runtime.errors import UserError

# Keys of peft's LoraConfig (0.21) that do not affect the forward pass of a trained adapter or are read elsewhere: where
# it comes from, which layers have LoRA weights (the tensor names also give that), how they were initialized, dropout.
INERT = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "lora_dropout", "target_modules", "target_parameters",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "eva_config", "loftq_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
UNSET: tuple[Any, ...] = (None, False, "none", {}, [])
# Initializations that leave the base unchanged. pissa, olora, corda, loftq and lora_ga change it.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
WHY = {
    "alora_invocation_tokens": "its LoRA weights act only after these tokens, so no merged weights are equivalent",
    "modules_to_save": "it holds full weights besides its LoRA weights",
    "trainable_token_indices": "it holds rows of the embedding besides its LoRA weights",
    "layer_replication": "it is for a model with repeated layers",
}
OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a LoRA weight that belongs to one expert, as trainers that keep experts as modules write it."""


def check_plain(config: dict[str, Any], path: Path) -> None:
    """Raises UserError, with key and value, unless an adapter_config.json is known to describe a plain update.

    path: the file that `config` was read from, for the message.
    """
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}, not LORA. {_fix('adapter weights of another kind')}")
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights is {init!r}, for which the LoRA weights may not be an update of the "
            "base itself: pissa, olora, corda, loftq and lora_ga change the base before they train. Save a plain "
            "adapter by peft, save_pretrained(DIR, path_initial_model_for_weight_conversion=…), or merge it by peft "
            "into the base that it was trained on (merge_and_unload) and give the result as --model."
        )
    for key in config.keys() - INERT:
        if config[key] not in UNSET:
            why = WHY.get(key, "that is not known to leave it a plain update of the base")
            raise UserError(f"{path}: {key} is {config[key]!r}: {why}. {_fix(key)}")


def _fix(key: str) -> str:
    merging = "" if key == "alora_invocation_tokens" else " (merge_and_unload gives weights to be a --model)"
    return f"Use it by peft itself{merging}, or give an adapter without {key}."
