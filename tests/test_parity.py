"""Bundles against transformers' own models, on random checkpoints of every variation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FULL, PATTERN, SLIDING, gemma3n, gemma4, gemma4_multimodal
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import pleexport

TOLERANCE = 1e-4  # of the range of the logits
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


def logits_of(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def relative_error(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return float(np.abs(expected - got).max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_agree_with_transformers(name: str, tmp_path: Path) -> None:
    make, changes = VARIATIONS[name]
    folder = make(tmp_path / "checkpoint", **changes)
    bundle = pleexport.build(
        folder,
        tmp_path / "bundle",
        target="laptop",
        table_dtype="source",
        weight_dtype="fp32",
        verify=False,
    )
    runner = pleexport.Runner(bundle)
    ids = np.random.default_rng(1).integers(0, runner.blob.num_rows, 300).tolist()
    expected = logits_of(reference(folder), ids)

    assert relative_error(expected, runner.logits(ids)) < TOLERANCE  # chunks of 256 and 44
    runner.reset()
    steps = np.stack([runner.feed([i])[0].copy() for i in ids])
    assert relative_error(expected, steps) < TOLERANCE
    runner.reset()
    cuts = [0, 1, 8, 9, 40, 41, 150, 300]
    pieces = [runner.feed(ids[a:b], keep=0) for a, b in itertools.pairwise(cuts)]
    assert relative_error(expected, np.concatenate(pieces)) < TOLERANCE
    runner.reset()
    runner.feed(ids[:100], keep=1)
    assert relative_error(expected[100:140], runner.feed(ids[100:140], keep=0)) < TOLERANCE
    # The control: rows of the neighbouring token must not pass.
    shifted = [(i + 1) % runner.blob.num_rows for i in ids]
    assert relative_error(expected, runner.logits(shifted)) > 100 * TOLERANCE
