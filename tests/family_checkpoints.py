"""Random checkpoints of families that transformers lacks, with the configs their authors save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

EMBFORMER: dict[str, Any] = {
    "architectures": ["EmbformerForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "max_window_layers": 28,
    "model_type": "embformer",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_channel_shift": True,
    "use_sliding_window": False,
    "vocab_size": 100,
}
LCKV: dict[str, Any] = {
    "architectures": ["LCKVLlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "backward_passes": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "force_nodiag": False,
    "forward_passes": 7,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_types": "0_3_3_3_4",
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "lckv-llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sequential": False,
    "vocab_size": 100,
}
LLAMA_VALUE_EMBEDDINGS: dict[str, Any] = {
    "architectures": ["LlamaValueEmbeddingsForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama_value_embeddings",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "value_embedding_layers": [0, 3],
    "vocab_size": 100,
}


def embformer(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Save a random Embformer checkpoint with `EMBFORMER` changed by `changes`."""
    config = EMBFORMER | changes
    layers, vocab = range(config["num_hidden_layers"]), config["vocab_size"]
    full = config["max_window_layers"] if config["use_sliding_window"] else len(layers)
    config.setdefault(
        "layer_types", ["full_attention" if i < full else "sliding_attention" for i in layers]
    )
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in layers:
        shapes[f"model.layers.{i}.self_attn.k_embed.weight"] = (vocab, kv_width)
        shapes[f"model.layers.{i}.self_attn.v_embed.weight"] = (vocab, kv_width)
        shapes[f"model.layers.{i}.ffn.gate_embed.weight"] = (vocab, config["hidden_size"])
    return save(folder, config, shapes | embedding_and_head(config), dtype, seed)


def lckv(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a random LCKV checkpoint with `LCKV` changed by `changes`."""
    config = LCKV | changes
    layers = range(config["num_hidden_layers"])
    layer_types = config["layer_types"] or "_".join(map(str, layers))
    makes_keys = {int(part.removesuffix("s")) for part in layer_types.split("_")}
    shapes = llama_shapes(config, makes_keys)
    return save(folder, config, shapes, dtype, seed)


def llama_value_embeddings(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Save a random checkpoint with `LLAMA_VALUE_EMBEDDINGS` changed by `changes`."""
    config = LLAMA_VALUE_EMBEDDINGS | changes
    shapes = llama_shapes(config, set(range(config["num_hidden_layers"])))
    for i in config["value_embedding_layers"]:
        kv_width = shapes[f"model.layers.{i}.self_attn.v_proj.weight"][0]
        shapes[f"model.layers.{i}.self_attn.value_embeds.weight"] = config["vocab_size"], kv_width
    return save(folder, config, shapes, dtype, seed)


def llama_shapes(config: dict[str, Any], makes_keys: set[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama's tensors by key; only layers of `makes_keys` have `k_proj`, `v_proj`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] or hidden // heads
    q, kv = heads * head_dim, (config["num_key_value_heads"] or heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        attention = {"q_proj": (q, hidden), "o_proj": (hidden, q)}
        if i in makes_keys:
            attention |= {"k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        mlp = {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        for part, linears, bias in (
            ("self_attn", attention, config["attention_bias"]),
            ("mlp", mlp, config["mlp_bias"]),
        ):
            for name, shape in linears.items():
                shapes[f"model.layers.{i}.{part}.{name}.weight"] = shape
                if bias:
                    shapes[f"model.layers.{i}.{part}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (hidden,)
    return shapes | embedding_and_head(config)


def embedding_and_head(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the input embedding and, unless they are one, the head."""
    shape = config["vocab_size"], config["hidden_size"]
    shapes = {"model.embed_tokens.weight": shape}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": shape}


def save(
    folder: Path,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    seed: int,
) -> Path:
    """Give every tensor random values and write `config.json` and `model.safetensors`.

    Linear layers keep the size of what they are given, so that attention is not sharp: sharp
    attention blows float32 noise up until checks are about nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "embed" in name:
            tensors[name] = 0.5 * noise
        elif name.endswith("bias"):
            tensors[name] = 0.1 * noise
        elif len(shape) == 1:
            tensors[name] = 1 + 0.2 * noise
        else:
            tensors[name] = shape[1] ** -0.5 * noise
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
