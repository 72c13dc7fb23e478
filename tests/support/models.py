"""Tiny random models in transformers' layout, with a byte-level tokenizer: one token a byte, ids = byte order."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 260

QWEN: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
    n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, routed_scaling_factor=2.5, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
DENSE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
QWEN3: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True,
    max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen": (Qwen3_5MoeTextConfig, QWEN),
    "qwen3": (Qwen3MoeConfig, QWEN3),
    "deepseek": (DeepseekV3Config, DEEPSEEK),
    "dense": (LlamaConfig, DENSE),
}


def write_model(directory: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A random model of FAMILIES with its tokenizer; weights larger than usual, so that routing is decided clearly.
    DeepSeek's expert 3 never gets a token; with `router_bias` [experts] the choice is the caller's."""
    router_bias = sizes.pop("router_bias", [0.05, 0.0, 0.02, -10.0, -0.03, 0.0, 0.01, 0.04])
    config_class, defaults = FAMILIES[family]
    config = config_class(**(defaults | sizes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.tensor(router_bias))
            elif tensor.dim() >= 2 and "conv1d" not in name:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory


def write_byte_tokenizer(directory: Path) -> None:
    """256 byte tokens, <bos> 256, <eos> 257, <pad> 258, <end> 259, and a chat template that ends turns with <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=["<end>"],
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}<end>\n{% endfor %}"
    fast.save_pretrained(directory)


def write_documents(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    return path
