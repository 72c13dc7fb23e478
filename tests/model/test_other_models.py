"""Dense models of other families: those that are built as Llama is give the logits of stock transformers, others are
refused for what they are."""

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.load_worker import IDS, every_log_probability
from tests.support.models import write_documents, write_model
from train import sft
from train.checkpoints.layout import plan_load
from train.checkpoints.reader import Checkpoint
from train.experts.dispatch import ExpertGroup
from train.layers.lora import LoRASettings
from train.model.text_model import LanguageModel, skeleton, text_config

SMALL: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=260
)
GROUPED: dict[str, Any] = SMALL | dict(num_key_value_heads=2)
GPT: dict[str, Any] = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=260)
BLIND = "is not given the document boundaries"
IN_TRANSFORMER = "its layers are in 'transformer', not in 'model'"
UNLIKE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "GPTNeoX": (SMALL, ["GPTNeoXForCausalLM is not supported: its layers are in 'gpt_neox', not in 'model'."]),
    "GPT2": (GPT, [IN_TRANSFORMER, "its own are Conv1D, not torch's Linear"]),
    "GPTNeo": (
        dict(hidden_size=32, num_layers=1, num_heads=2, vocab_size=260, attention_types=[[["global"], 1]]),
        [f"{IN_TRANSFORMER}; transformer.h.0.attn.attention has values that no checkpoint contains (bias)."],
    ),
    "GPTJ": (GPT | dict(rotary_dim=8), [IN_TRANSFORMER, "lm_head has a bias", "contains (embed_positions)"]),
    "Falcon": (SMALL, [IN_TRANSFORMER, "its own are FalconLinear, not torch's Linear"]),
    "Bloom": (GPT, [f"{IN_TRANSFORMER}."]),
    "Mpt": (dict(d_model=32, n_layers=1, n_heads=2, vocab_size=260), [f"{IN_TRANSFORMER}."]),
    "Mamba": (dict(hidden_size=32, num_hidden_layers=1, vocab_size=260), ["its layers are in 'backbone', not in"]),
    "Phi": (SMALL, ["PhiForCausalLM is not supported: lm_head has a bias."]),
    "Gemma": (GROUPED | dict(head_dim=16), ["embed_tokens has values that no checkpoint contains (embed_scale)."]),
    "Gemma2": (GROUPED | dict(head_dim=16), ["final_logit_softcapping 30.0 in config.json changes logits"]),
    "StableLm": (GROUPED, [BLIND]),
    "Nemotron": (GROUPED, [BLIND]),
    "OPT": (dict(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=260,
                 word_embed_proj_dim=32, max_position_embeddings=64), [BLIND]),
    "Cohere": (GROUPED, ["logit_scale 0.0625 in config.json changes logits after lm_head"]),
    "Granite": (GROUPED | dict(logits_scaling=8.0), ["logits_scaling 8.0 in config.json changes logits"]),
    "Mixtral": (
        GROUPED | dict(num_local_experts=4),
        ["weights are missing from the checkpoint: model.layers.0.mlp.gate.weight, ", "layers.0.block_sparse_moe.",
         "Where these are the same weights under other names, which transformers translates"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", UNLIKE)
def test_a_model_of_another_build_is_refused_with_what_it_is_that_is_not_supported(tmp_path, family, capsys):
    """Before its dtype: who turns F16 into BF16 as told finds a model that trains."""
    sizes, parts = UNLIKE[family]
    data = str(write_documents(tmp_path / "d.jsonl", [{"text": "The sun rises."}]))
    directory = write_model(tmp_path / "model", "dense")
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    dtype = torch.bfloat16 if family == "Mixtral" else torch.float16  # which alone is known by its tensors
    model.to(dtype).save_pretrained(directory)
    assert sft.main(["--model", str(directory), "--data", data, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    for part in [*parts, "not supported"]:
        assert part in told, told


LIKE: dict[str, dict[str, Any]] = {
    "Mistral": GROUPED, "Qwen2": GROUPED, "Olmo2": GROUPED, "Starcoder2": GROUPED,
    "Phi3": GROUPED | dict(pad_token_id=0),
}  # fmt: skip


@pytest.mark.parametrize("family", LIKE)
def test_a_model_that_is_built_as_llama_gives_the_logits_of_stock_transformers(tmp_path, family):
    """With LoRA weights B that are zero, as before the first step."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**LIKE[family])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    bare = skeleton(text_config(checkpoint), ExpertGroup())
    model = LanguageModel(bare, "", LoRASettings(4, 8.0, 2, 0), torch.device("cpu"), torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    for piece in plan_load(bare, checkpoint).dense:
        weight = nn.Parameter(weights[piece.source])
        for module, target in [(piece.module, piece.target), *piece.tied]:
            setattr(module, target, weight)
    with torch.no_grad():
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([IDS])).logits[0]
    ours = every_log_probability(model.eval(), config.vocab_size)
    torch.testing.assert_close(ours, stock.log_softmax(-1), rtol=0, atol=1e-5)
