"""Bundles against transformers' own models, on random checkpoints of every variation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FULL, PATTERN, SLIDING, gemma3n, gemma4, gemma4_multimodal
from conftest import check_every_way_to_feed, exact_bundle
from transformers import AutoModelForCausalLM

VARIATIONS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "gemma4": (gemma4, {}),
    "gemma4 in float32": (gemma4, {"dtype": torch.float32}),
    "gemma4 in float16": (gemma4, {"dtype": torch.float16}),
    "gemma4 without sharing, softcap or tie": (
        gemma4,
        {
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "num_key_value_heads": 4,
            "sliding_window": 1,
        },
    ),
    "gemma4 with keys as values": (
        gemma4,
        {
            "attention_k_eq_v": True,
            "num_key_value_heads": 3,
            "num_global_key_value_heads": 2,
            "num_attention_heads": 6,
            "head_dim": 6,
            "global_head_dim": 10,
            "sliding_window": 5000,
            "hidden_activation": "silu",
        },
    ),
    "gemma4 full layers first, one own layer of each type": (
        gemma4,
        {
            "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL],
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 12,
            "hidden_size": 20,
            "intermediate_size": 33,
            "num_attention_heads": 5,
            "rope_parameters": {
                SLIDING: {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 5000.0,
                    "partial_rotary_factor": 0.5,
                },
            },
        },
    ),
    "gemma4 one head size, all layers full": (
        gemma4,
        {"layer_types": [FULL] * 4, "num_hidden_layers": 4, "global_head_dim": 8},
    ),
    "gemma4 fewer per-layer rows": (gemma4, {"vocab_size_per_layer_input": 90}),
    "gemma4 multimodal": (gemma4_multimodal, {}),
    "gemma3n": (gemma3n, {}),
    "gemma3n in float32": (gemma3n, {"dtype": torch.float32}),
    "gemma3n two streams, no sharing": (
        gemma3n,
        {
            "altup_num_inputs": 2,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "num_kv_shared_layers": 0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3n uneven widths": (
        gemma3n,
        {
            "intermediate_size": [16, 24, 40, 48, 64, 7],
            "num_kv_shared_layers": 2,
            "layer_types": [*PATTERN[:3], FULL, SLIDING, SLIDING],
            "sliding_window": 3,
            "hidden_size_per_layer_input": 5,
            "head_dim": 12,
            "num_key_value_heads": 1,
            "laurel_rank": 1,
        },
    ),
}


def reference(folder: Path) -> Any:
    """The original, as users load it: constants rounded to the checkpoint's dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()


def logits_of(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


# It takes long, and a dtype changes the same few nodes in every model.
SLOW = ("gemma3n in float32",)


@pytest.mark.parametrize(
    "name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in VARIATIONS]
)
def test_logits_agree_with_transformers(name: str, tmp_path: Path) -> None:
    make, changes = VARIATIONS[name]
    folder = make(tmp_path / "checkpoint", **changes)
    original = reference(folder)
    check_every_way_to_feed(
        exact_bundle(folder, tmp_path / "bundle"), lambda ids: logits_of(original, ids)
    )
