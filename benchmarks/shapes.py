"""Configs of the models that the benchmarks build, as published checkpoints spell them."""

from __future__ import annotations

from typing import Any


def _gemma4(*, layers: int, period: int, shared: int, **changes: Any) -> dict[str, Any]:
    """A Gemma 4 config whose every `period`-th layer is a full one."""
    text = {
        "model_type": "gemma4_text",
        "num_hidden_layers": layers,
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
        "num_kv_shared_layers": shared,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
        "use_double_wide_mlp": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
            },
        },
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 131_072,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    } | changes
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "text_config": text,
    }


def _mobile(config: dict[str, Any], rules: dict[str, int]) -> dict[str, Any]:
    """A config whose text model holds codes: embeddings, head and matrices, by these rules.

    Source: the published `-qat-mobile-transformers` checkpoints.
    """
    quantization = {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {pattern: {"num_bits": bits} for pattern, bits in rules.items()},
        "modules_to_not_convert": ["per_layer_model_projection"],
    }
    text = config["text_config"] | {"tie_word_embeddings": False}
    return config | {
        "tie_word_embeddings": False,
        "text_config": text,
        "quantization_config": quantization,
    }


_MOBILE_RULES = {
    r"^lm_head$": 2,
    r"language_model\.embed_tokens$": 2,
    r"per_layer_input_gate$": 8,
    r"per_layer_projection$": 8,
    r"self_attn\.": 4,
}
_E2B_RULES = _MOBILE_RULES | {
    r"language_model\.embed_tokens_per_layer$": 4,
    r"language_model\.layers\.(\d|1[0-4])\.mlp\.": 4,
    r"language_model\.layers\.\d+\.mlp\.": 2,
}
_E4B_RULES = _MOBILE_RULES | {
    r"language_model\.embed_tokens_per_layer$": 2,
    r"language_model\.layers\.\d+\.mlp\.": 4,
}

SHAPES: dict[str, dict[str, Any]] = {
    # The published text models.
    "gemma4-e2b": _gemma4(layers=35, period=5, shared=20, hidden_size=1536, intermediate_size=6144),
    "gemma4-e4b": _gemma4(
        layers=42,
        period=6,
        shared=18,
        hidden_size=2560,
        intermediate_size=10_240,
        num_key_value_heads=2,
        use_double_wide_mlp=False,
    ),
    # E2B's structure at a ninth of its size: every mechanism, in a minute.
    "gemma4-small": _gemma4(
        layers=20,
        period=5,
        shared=10,
        hidden_size=768,
        intermediate_size=2304,
        num_attention_heads=4,
        vocab_size=65_536,
        vocab_size_per_layer_input=65_536,
    ),
    # E2B's layers, narrow: caches of E2B's pattern, next to nothing else.
    "gemma4-narrow": _gemma4(
        layers=35,
        period=5,
        shared=20,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        head_dim=64,
        global_head_dim=128,
        hidden_size_per_layer_input=16,
        vocab_size=2048,
        vocab_size_per_layer_input=2048,
    ),
    # The released model's sizes, with the two key heads that its name suggests.
    "embformer": {
        "architectures": ["EmbformerForCausalLM"],
        "model_type": "embformer",
        "dtype": "bfloat16",
        "vocab_size": 6400,
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 96,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
}
SHAPES["gemma4-e2b-mobile"] = _mobile(SHAPES["gemma4-e2b"], _E2B_RULES)
SHAPES["gemma4-e4b-mobile"] = _mobile(SHAPES["gemma4-e4b"], _E4B_RULES)


def _rwkv7a(*, vocab: int, width: int, layers: int, head_size: int) -> dict[str, tuple[int, ...]]:
    """Tensors of RWKV-7a by name, with the ranks of the published model."""
    vector, feed_forward = (1, 1, width), 4 * width
    tensors: dict[str, tuple[int, ...]] = {"emb.weight": (vocab, width)}
    for part in ("weight", "bias"):
        tensors |= {f"{norm}.{part}": (width,) for norm in ("blocks.0.ln0", "ln_out")}
    for i in range(layers):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        for norm in (f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"{att}.ln_x"):
            tensors |= {f"{norm}.{part}": (width,) for part in ("weight", "bias")}
        tensors |= {f"{att}.x_{name}": vector for name in "rwkvag"}
        tensors |= {f"{att}.{name}": vector for name in ("w0", "a0", "v0", "k_k", "k_a")}
        for name, rank in (("w", 64), ("a", 64), ("v", 32), ("g", 128)):
            tensors |= {f"{att}.{name}1": (width, rank), f"{att}.{name}2": (rank, width)}
        tensors[f"{att}.r_k"] = (width // head_size, head_size)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{name}.weight"] = (width, width)
        tensors |= {
            f"{ffn}.x_k": vector,
            f"{ffn}.key.weight": (feed_forward, width),
            f"{ffn}.value.weight": (width, feed_forward),
            f"{ffn}.s_emb.weight": (vocab, 1024),
            f"{ffn}.s_emb_x.weight": (1024, width),
            f"{ffn}.s0": (1, 1, feed_forward),
            f"{ffn}.s1": (width, 32),
            f"{ffn}.s2": (32, feed_forward),
        }
    return tensors | {"head.weight": (vocab, width)}


# Shapes of tensors, of models that have no config.
TENSORS = {"rwkv7a-0.1b": _rwkv7a(vocab=65_536, width=768, layers=12, head_size=64)}
