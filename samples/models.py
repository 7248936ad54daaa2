"""The two model shapes: every mechanism of the real families, at toy size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

_LAYER_TYPES = [*["sliding_attention"] * 3, "full_attention"] * 2
_SHARED = {
    "num_hidden_layers": len(_LAYER_TYPES),
    "layer_types": _LAYER_TYPES,
    "num_kv_shared_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 64,
    "max_position_embeddings": 1024,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "final_logit_softcapping": 30.0,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "bos_token_id": BOS_ID,
}


def build_gemma4() -> Gemma4ForCausalLM:
    """Return a randomly initialised toy Gemma 4: eight layers, the last four share K and V."""
    config = Gemma4TextConfig(
        **_SHARED,
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=256,
        use_double_wide_mlp=True,
        global_head_dim=64,
    )
    return Gemma4ForCausalLM(config)


def build_gemma3n() -> Gemma3nForCausalLM:
    """Return a randomly initialised toy Gemma 3n.

    As in the real one, `vocab_size` is larger than `vocab_size_per_layer_input`: the 64 ids
    above the tokenizer's have an input embedding but no row in the per-layer table.
    """
    config = Gemma3nTextConfig(
        **_SHARED,
        vocab_size=VOCAB_SIZE + 64,
        hidden_size=128,
        intermediate_size=256,
        laurel_rank=16,
        altup_num_inputs=4,
        activation_sparsity_pattern=[0.95] * 3 + [0.0] * 5,
    )
    return Gemma3nForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma4": build_gemma4,
    "gemma3n": build_gemma3n,
}


def prepare_for_training(model: PreTrainedModel) -> None:
    """Choose first weights that train well, and make Gemma 4's `layer_scalar` trainable.

    Attention scores are not divided by sqrt(head_dim) in these families, so the norms of the
    queries and keys start at head_dim ** -0.25 each. Gemma 3n's AltUp scale starts at zero in
    `transformers`, which keeps the per-layer rows out; here it starts at one. `layer_scalar` is
    a buffer in `transformers`; as a parameter of the same name it is saved under the same key.
    """
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name, None)
            if norm is not None:
                nn.init.constant_(norm.weight, norm.weight.numel() ** -0.25)
        if hasattr(layer, "altup"):
            nn.init.ones_(layer.altup.correct_output_scale)
        if hasattr(layer, "layer_scalar"):
            del layer.layer_scalar
            layer.layer_scalar = nn.Parameter(torch.ones(1))


def trained_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a copy of the trained tensors; a tied tensor occurs once."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters()}


def load_trained_state(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Copy tensors of `trained_state` into a model.

    Raises:
        ValueError: a trained tensor has no place in the model, or the reverse.
    """
    result = model.load_state_dict(state, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    missing = parameters.intersection(result.missing_keys)
    if result.unexpected_keys or missing:
        raise ValueError(f"state does not fit: {result.unexpected_keys} {sorted(missing)}")
