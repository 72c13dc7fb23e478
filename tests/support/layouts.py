"""Tiny checkpoints written byte by byte in the layouts of the real ones: names, dtypes and shards as their makers
publish them, values drawn as bits. Nothing here uses the code under test, nor transformers' save_pretrained.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.models import VOCABULARY, write_byte_tokenizer

QWEN = dict(
    vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=32, linear_value_head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=128,
    shared_expert_intermediate_size=128, max_position_embeddings=512, tie_word_embeddings=False, rms_norm_eps=1e-6,
    hidden_act="silu", model_type="qwen3_5_moe_text", dtype="bfloat16", partial_rotary_factor=0.25,
)  # fmt: skip
DEEPSEEK = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3,
    n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=32, qk_rope_head_dim=32,
    qk_nope_head_dim=32, v_head_dim=32, routed_scaling_factor=2.5, norm_topk_prob=True, scoring_func="sigmoid",
    topk_method="noaux_tc", max_position_embeddings=512, tie_word_embeddings=False, hidden_act="silu",
    num_nextn_predict_layers=0, rms_norm_eps=1e-6, dtype="bfloat16", moe_layer_freq=1,
)  # fmt: skip
QWEN3 = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=3,
    norm_topk_prob=True, max_position_embeddings=512, tie_word_embeddings=False, hidden_act="silu", mlp_only_layers=[],
    decoder_sparse_step=1, model_type="qwen3_moe", dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
)  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": None,
    "quantization_status": "compressed", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                                                    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None,
                                  "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                                              "group_size": 32, "dynamic": False, "actorder": None}}},
}  # fmt: skip

Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data


class Bits:
    """Draws tensors as bytes."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def f32(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = (self.rng.standard_normal(shape) * scale + shift).astype("<f4")
        return name, "F32", shape, values.tobytes()

    def bf16(self, name: str, *shape: int, scale: float | None = None, shift: float = 0.0) -> Tensor:
        """The upper half of a float32's bits."""
        scale = shape[-1] ** -0.5 if scale is None else scale
        values = (self.rng.standard_normal(shape) * scale + shift).astype("<f4")
        return name, "BF16", shape, (values.view("<u4") >> 16).astype("<u2").tobytes()

    def fp8(self, name: str, out: int, inside: int, scale_dtype: str) -> Iterator[Tensor]:
        """Codes of up to 16 in size (exponent bits below 11), and a scale for each block of 128 x 128."""
        codes = self.rng.integers(0, 0x58, size=(out, inside)) | (self.rng.integers(0, 2, size=(out, inside)) << 7)
        yield name, "F8_E4M3", (out, inside), codes.astype(np.uint8).tobytes()
        shape = -(-out // 128), -(-inside // 128)
        make = self.bf16 if scale_dtype == "BF16" else self.f32
        size = inside**-0.5 / 5
        yield make(f"{name}_scale_inv", *shape, scale=0.1 * size, shift=size)

    def int4(self, name: str, out: int, inside: int) -> Iterator[Tensor]:
        """name: without .weight. Any word is eight values."""
        words = self.rng.integers(-(2**31), 2**31, size=(out, inside // 8)).astype("<i4")
        yield f"{name}.weight_packed", "I32", (out, inside // 8), words.tobytes()
        size = inside**-0.5 / 5
        yield self.bf16(f"{name}.weight_scale", out, inside // 32, scale=0.2 * size, shift=size)
        yield f"{name}.weight_shape", "I32", (2,), np.array([out, inside], "<i4").tobytes()


def write_shards(directory: Path, shards: list[list[Tensor]], pattern: str) -> None:
    """The safetensors files and their index."""
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, start=1):
        file = pattern.format(number, len(shards))
        header, position = {}, 0
        for name, dtype, shape, data in tensors:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
            position += len(data)
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (directory / file).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[3] for t in tensors))
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def matrix(bits: Bits, name: str, out: int, inside: int, fp8: str | None) -> Iterator[Tensor]:
    """A weight in BF16, or in FP8 with scales of dtype `fp8`."""
    if fp8:
        yield from bits.fp8(name, out, inside, fp8)
    else:
        yield bits.bf16(name, out, inside)


def qwen35_layer(
    bits: Bits, prefix: str, c: dict[str, Any], full: bool, fused: bool, fp8: str | None
) -> Iterator[Tensor]:
    """A decoder layer as the table of shared/checkpoints/README.md has it."""
    H, E, W, S = c["hidden_size"], c["num_experts"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    yield bits.bf16(f"{prefix}.input_layernorm.weight", H, scale=0.1)
    yield bits.bf16(f"{prefix}.post_attention_layernorm.weight", H, scale=0.1)
    yield bits.bf16(f"{prefix}.mlp.gate.weight", E, H)
    if fused:
        yield bits.bf16(f"{prefix}.mlp.experts.gate_up_proj", E, 2 * W, H)
        yield bits.bf16(f"{prefix}.mlp.experts.down_proj", E, H, W)
    else:
        for e in range(E):
            for name, out, inside in (("gate", W, H), ("up", W, H), ("down", H, W)):
                yield from matrix(bits, f"{prefix}.mlp.experts.{e}.{name}_proj.weight", out, inside, fp8)
    for name, out, inside in (("gate", S, H), ("up", S, H), ("down", H, S)):
        yield from matrix(bits, f"{prefix}.mlp.shared_expert.{name}_proj.weight", out, inside, fp8)
    yield bits.bf16(f"{prefix}.mlp.shared_expert_gate.weight", 1, H)
    if full:
        heads, kv, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        for name, out, inside in (("q", 2 * heads * d, H), ("k", kv * d, H), ("v", kv * d, H), ("o", H, heads * d)):
            yield from matrix(bits, f"{prefix}.self_attn.{name}_proj.weight", out, inside, fp8)
        yield bits.bf16(f"{prefix}.self_attn.q_norm.weight", d, scale=0.1)
        yield bits.bf16(f"{prefix}.self_attn.k_norm.weight", d, scale=0.1)
        return
    key = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads, value = c["linear_num_value_heads"], c["linear_num_value_heads"] * c["linear_value_head_dim"]
    yield from matrix(bits, f"{prefix}.linear_attn.in_proj_qkv.weight", 2 * key + value, H, fp8)
    yield from matrix(bits, f"{prefix}.linear_attn.in_proj_z.weight", value, H, fp8)
    yield from matrix(bits, f"{prefix}.linear_attn.out_proj.weight", H, value, fp8)
    yield bits.bf16(f"{prefix}.linear_attn.in_proj_a.weight", heads, H)
    yield bits.bf16(f"{prefix}.linear_attn.in_proj_b.weight", heads, H)
    yield bits.bf16(f"{prefix}.linear_attn.conv1d.weight", 2 * key + value, 1, 4, scale=0.3)
    yield bits.f32(f"{prefix}.linear_attn.A_log", heads, scale=0.3)
    yield bits.bf16(f"{prefix}.linear_attn.dt_bias", heads, scale=0.3)
    yield bits.f32(f"{prefix}.linear_attn.norm.weight", c["linear_value_head_dim"], scale=0.1, shift=1.0)


def write_qwen35(directory: Path, fp8: bool, seed: int = 0, **sizes: Any) -> Path:
    """Qwen3.5-397B-A17B, BF16 with fused experts or FP8 with one tensor an expert's matrix and BF16 scales; with a
    vision tower and a layer of multi-token prediction, in six shards."""
    directory.mkdir(parents=True, exist_ok=True)
    c, bits, scale = QWEN | sizes, Bits(seed), "BF16" if fp8 else None
    H, V = c["hidden_size"], c["vocab_size"]
    tensors = [bits.bf16("lm_head.weight", V, H), bits.bf16("model.language_model.embed_tokens.weight", V, H, scale=1)]
    for i, kind in enumerate(c["layer_types"]):
        prefix = f"model.language_model.layers.{i}"
        tensors += qwen35_layer(bits, prefix, c, kind == "full_attention", not fp8, scale)
    tensors.append(bits.bf16("model.language_model.norm.weight", H, scale=0.1))
    tensors += qwen35_layer(bits, "mtp.layers.0", c, True, False, scale)
    tensors += [bits.bf16("mtp.fc.weight", H, 2 * H), bits.bf16("mtp.norm.weight", H)]
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=48, num_heads=2, in_channels=3, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=H, num_position_embeddings=16, model_type="qwen3_5_moe",
    )  # fmt: skip
    tensors += qwen35_vision(bits, vision)
    by_number = [tensors[i::6] for i in range(6)]  # a layer's tensors lie in several shards
    write_shards(directory, by_number, "model.safetensors-{:05d}-of-{:05d}.safetensors")
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": c,
        "vision_config": vision, "tie_word_embeddings": False, "dtype": "bfloat16", "image_token_id": 250,
        "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
    }  # fmt: skip
    if fp8:
        skipped = ["lm_head", "model.visual", "mtp.fc", "model.language_model.embed_tokens"]
        for i in range(len(c["layer_types"])):
            layer = f"model.language_model.layers.{i}"
            skipped += [
                f"{layer}.linear_attn.in_proj_a",
                f"{layer}.linear_attn.in_proj_b",
                f"{layer}.linear_attn.conv1d",
            ]
            skipped += [f"{layer}.mlp.gate", f"{layer}.mlp.shared_expert_gate"]
        config["quantization_config"] = FP8 | {"modules_to_not_convert": skipped}
    (directory / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(directory)
    return directory


def qwen35_vision(bits: Bits, v: dict[str, Any]) -> Iterator[Tensor]:
    D, F, M, p = v["hidden_size"], v["intermediate_size"], v["spatial_merge_size"] ** 2, "model.visual"
    yield bits.bf16(f"{p}.patch_embed.proj.weight", D, 3, v["temporal_patch_size"], v["patch_size"], v["patch_size"])
    yield bits.bf16(f"{p}.patch_embed.proj.bias", D)
    yield bits.bf16(f"{p}.pos_embed.weight", v["num_position_embeddings"], D)
    for name, *shape in (
        ("norm1.weight", D), ("norm1.bias", D), ("norm2.weight", D), ("norm2.bias", D), ("attn.qkv.weight", 3 * D, D),
        ("attn.qkv.bias", 3 * D), ("attn.proj.weight", D, D), ("attn.proj.bias", D), ("mlp.linear_fc1.weight", F, D),
        ("mlp.linear_fc1.bias", F), ("mlp.linear_fc2.weight", D, F), ("mlp.linear_fc2.bias", D),
    ):  # fmt: skip
        yield bits.bf16(f"{p}.blocks.0.{name}", *shape)
    for name, *shape in (
        ("norm.weight", D), ("norm.bias", D), ("linear_fc1.weight", M * D, M * D), ("linear_fc1.bias", M * D),
        ("linear_fc2.weight", v["out_hidden_size"], M * D), ("linear_fc2.bias", v["out_hidden_size"]),
    ):  # fmt: skip
        yield bits.bf16(f"{p}.merger.{name}", *shape)


def deepseek_layer(
    bits: Bits, prefix: str, c: dict[str, Any], dense: bool, fp8: str | None, int4: bool
) -> Iterator[Tensor]:
    """A decoder layer of DeepSeek-V3, Kimi K2 and K2.5."""
    H, E, W, heads = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"], c["num_attention_heads"]
    q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
    yield bits.bf16(f"{prefix}.input_layernorm.weight", H, scale=0.1, shift=1)
    yield bits.bf16(f"{prefix}.post_attention_layernorm.weight", H, scale=0.1, shift=1)
    yield bits.bf16(f"{prefix}.self_attn.q_a_layernorm.weight", q_rank, scale=0.1, shift=1)
    yield bits.bf16(f"{prefix}.self_attn.kv_a_layernorm.weight", kv_rank, scale=0.1, shift=1)
    for name, out, inside in (
        ("q_a_proj", q_rank, H), ("q_b_proj", heads * (nope + rope), q_rank), ("kv_a_proj_with_mqa", kv_rank + rope, H),
        ("kv_b_proj", heads * (nope + value), kv_rank), ("o_proj", H, heads * value),
    ):  # fmt: skip
        yield from matrix(bits, f"{prefix}.self_attn.{name}.weight", out, inside, fp8)
    if dense:
        D = c["intermediate_size"]
        for name, out, inside in (("gate", D, H), ("up", D, H), ("down", H, D)):
            yield from matrix(bits, f"{prefix}.mlp.{name}_proj.weight", out, inside, fp8)
        return
    yield bits.bf16(f"{prefix}.mlp.gate.weight", E, H)
    yield bits.f32(f"{prefix}.mlp.gate.e_score_correction_bias", E, scale=0.1)
    for name, out, inside in (("gate", W, H), ("up", W, H), ("down", H, W)):
        yield from matrix(bits, f"{prefix}.mlp.shared_experts.{name}_proj.weight", out, inside, fp8)
        for e in range(E):
            if int4:
                yield from bits.int4(f"{prefix}.mlp.experts.{e}.{name}_proj", out, inside)
            else:
                yield from matrix(bits, f"{prefix}.mlp.experts.{e}.{name}_proj.weight", out, inside, fp8)


def write_kimi(directory: Path, kind: str, seed: int = 0, **sizes: Any) -> Path:
    """kind: "k2.5" and "k2-thinking" (INT4 experts), "k2-instruct" and "deepseek-v3" (FP8 with F32 scales). Shards as
    theirs: a layer each, then the rest."""
    directory.mkdir(parents=True, exist_ok=True)
    c, bits = DEEPSEEK | sizes, Bits(seed)
    int4, fp8 = kind in ("k2.5", "k2-thinking"), "F32" if kind in ("k2-instruct", "deepseek-v3") else None
    body, head = ("language_model.model", "language_model.lm_head") if kind == "k2.5" else ("model", "lm_head")
    H, V, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    shards = []
    for i in range(layers):
        shards.append(list(deepseek_layer(bits, f"{body}.layers.{i}", c, i < c["first_k_dense_replace"], fp8, int4)))
        if kind == "k2-instruct":
            shards[-1].append(bits.bf16(f"{body}.layers.{i}.self_attn.rotary_emb.inv_freq", c["qk_rope_head_dim"] // 2))
    shards.append([
        bits.bf16(f"{body}.embed_tokens.weight", V, H, scale=1),
        bits.bf16(f"{body}.norm.weight", H, scale=0.1, shift=1), bits.bf16(f"{head}.weight", V, H),
    ])  # fmt: skip
    config: dict[str, Any] = dict(c)
    if kind == "deepseek-v3":
        extra = list(deepseek_layer(bits, f"{body}.layers.{layers}", c, False, fp8, False))
        extra += [bits.bf16(f"{body}.layers.{layers}.{name}.weight", H) for name in ("enorm", "hnorm")]
        shards.append([*extra, bits.bf16(f"{body}.layers.{layers}.eh_proj.weight", H, 2 * H)])
        config |= {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_nextn_predict_layers": 1,
        }
    elif kind != "k2.5":
        config |= {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
        config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config["quantization_config"] = INT4 if int4 else FP8
    if kind == "k2.5":
        vision = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48, patch_size=4,
                      pos_emb_height=4, pos_emb_width=4, pos_emb_time=2)  # fmt: skip
        shards += [kimi_projector(bits, H), list(kimi_vision(bits, vision))]
        config = {
            "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": "bfloat16",
            "text_config": config | {"model_type": "kimi_k2"}, "vision_config": vision, "tie_word_embeddings": False,
            "image_token_id": 250, "video_token_id": 251,
            "projection_hidden_size": 32,
        }  # fmt: skip
    write_shards(directory, shards, "model-{:05d}-of-{:06d}.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(directory)
    return directory


def kimi_projector(bits: Bits, hidden: int) -> list[Tensor]:
    wide = 4 * 32
    return [
        bits.bf16("mm_projector.pre_norm.weight", 32), bits.bf16("mm_projector.pre_norm.bias", 32),
        bits.bf16("mm_projector.proj.0.weight", wide, wide), bits.bf16("mm_projector.proj.0.bias", wide),
        bits.bf16("mm_projector.proj.2.weight", hidden, wide), bits.bf16("mm_projector.proj.2.bias", hidden),
    ]  # fmt: skip


def kimi_vision(bits: Bits, v: dict[str, Any]) -> Iterator[Tensor]:
    D, F, p = v["hidden_size"], v["intermediate_size"], "vision_tower"
    yield bits.bf16(f"{p}.patch_embed.proj.weight", D, 3, v["patch_size"], v["patch_size"])
    yield bits.bf16(f"{p}.patch_embed.proj.bias", D)
    yield bits.bf16(f"{p}.patch_embed.pos_emb.weight", v["pos_emb_height"], v["pos_emb_width"], D)
    for name, *shape in (
        ("norm0.weight", D), ("norm0.bias", D), ("norm1.weight", D), ("norm1.bias", D), ("wqkv.weight", 3 * D, D),
        ("wqkv.bias", 3 * D), ("wo.weight", D, D), ("wo.bias", D), ("mlp.fc0.weight", F, D), ("mlp.fc0.bias", F),
        ("mlp.fc1.weight", D, F), ("mlp.fc1.bias", D),
    ):  # fmt: skip
        yield bits.bf16(f"{p}.encoder.blocks.0.{name}", *shape)
    yield bits.bf16(f"{p}.encoder.final_layernorm.weight", D)
    yield bits.bf16(f"{p}.encoder.final_layernorm.bias", D)


def write_qwen3(directory: Path, seed: int = 0, **sizes: Any) -> Path:
    """Qwen3-MoE: BF16, one tensor an expert's matrix."""
    directory.mkdir(parents=True, exist_ok=True)
    c, bits = QWEN3 | sizes, Bits(seed)
    H, V, E, W, d = (c[k] for k in ("hidden_size", "vocab_size", "num_experts", "moe_intermediate_size", "head_dim"))
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    tensors = [bits.bf16("model.embed_tokens.weight", V, H, scale=1)]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        for name, out, inside in (("q", heads * d, H), ("k", kv * d, H), ("v", kv * d, H), ("o", H, heads * d)):
            tensors.append(bits.bf16(f"{p}.self_attn.{name}_proj.weight", out, inside))
        for name, size in (("self_attn.q_norm", d), ("self_attn.k_norm", d), ("input_layernorm", H),
                           ("post_attention_layernorm", H)):  # fmt: skip
            tensors.append(bits.bf16(f"{p}.{name}.weight", size, scale=0.1, shift=1))
        tensors.append(bits.bf16(f"{p}.mlp.gate.weight", E, H))
        for e in range(E):
            for name, out, inside in (("gate", W, H), ("up", W, H), ("down", H, W)):
                tensors.append(bits.bf16(f"{p}.mlp.experts.{e}.{name}_proj.weight", out, inside))
    tensors += [bits.bf16("model.norm.weight", H, scale=0.1, shift=1), bits.bf16("lm_head.weight", V, H)]
    half = len(tensors) // 2
    write_shards(directory, [tensors[:half], tensors[half:]], "model-{:05d}-of-{:05d}.safetensors")
    (directory / "config.json").write_text(json.dumps(c))
    write_byte_tokenizer(directory)
    return directory


LAYOUTS = {
    "qwen3.5-bf16": lambda directory, **sizes: write_qwen35(directory, fp8=False, **sizes),
    "qwen3.5-fp8": lambda directory, **sizes: write_qwen35(directory, fp8=True, **sizes),
    "kimi-k2.5": lambda directory, **sizes: write_kimi(directory, "k2.5", **sizes),
    "kimi-k2-thinking": lambda directory, **sizes: write_kimi(directory, "k2-thinking", **sizes),
    "kimi-k2-instruct": lambda directory, **sizes: write_kimi(directory, "k2-instruct", **sizes),
    "deepseek-v3": lambda directory, **sizes: write_kimi(directory, "deepseek-v3", **sizes),
    "qwen3-moe": write_qwen3,
}
