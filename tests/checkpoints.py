"""Random checkpoints as `transformers` saves them, small enough to build in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)

SLIDING, FULL = "sliding_attention", "full_attention"
PATTERN = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]

GEMMA4: dict[str, Any] = {
    "vocab_size": 120,
    "vocab_size_per_layer_input": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 3,
    "sliding_window": 8,
    "layer_types": PATTERN,
    "final_logit_softcapping": 30.0,
    "use_double_wide_mlp": True,
    "max_position_embeddings": 2048,
}
GEMMA3N: dict[str, Any] = {
    "vocab_size": 124,
    "vocab_size_per_layer_input": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 3,
    "sliding_window": 8,
    "layer_types": PATTERN,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.5, 0.0],
    "max_position_embeddings": 2048,
}


def gemma4(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a random Gemma 4 checkpoint with `GEMMA4` changed by `changes`."""
    config = Gemma4TextConfig(**(GEMMA4 | changes))
    return save(Gemma4ForCausalLM(config), folder, dtype)


def gemma3n(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a random Gemma 3n checkpoint with `GEMMA3N` changed by `changes`."""
    config = Gemma3nTextConfig(**(GEMMA3N | changes))
    return save(Gemma3nForCausalLM(config), folder, dtype)


def gemma4_multimodal(folder: Path, **changes: Any) -> Path:
    """Save a random multimodal Gemma 4 checkpoint with small towers."""
    config = Gemma4Config(
        text_config=GEMMA4 | changes,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
        image_token_id=100,
        video_token_id=101,
        audio_token_id=102,
        boi_token_id=103,
        eoi_token_id=104,
    )
    return save(Gemma4ForConditionalGeneration(config), folder, torch.bfloat16)


def save(model: nn.Module, folder: Path, dtype: torch.dtype, *, seed: int = 0) -> Path:
    """Give every tensor random values, also those that are born as ones or zeros, and save."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        tensors |= {n: b for n, b in model.named_buffers() if n.endswith("layer_scalar")}
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            # Wilder values make attention so sharp that float32 noise itself exceeds 1e-4.
            centre, spread = (1.0, 0.2) if tensor.ndim == 1 else (0.0, 0.1)
            if name.endswith("bias"):
                centre, spread = 0.0, 0.1
            tensor.copy_(centre + spread * noise)
    model.to(dtype).save_pretrained(folder)
    return folder
