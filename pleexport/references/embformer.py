"""Embformer, one token at a time: keys, values and gates are looked up, nothing is projected.

Shape suffixes: H hidden = N * D, L layers, N heads, K key heads, D head size, W = K * D,
V vocabulary.

Source: HighCWu/embformer, `theory/note.md` and the equations of `modeling_embformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pleexport.errors import CheckpointError
from pleexport.references.llama_value_embeddings import (
    ACTIVATIONS,
    TextState,
    attend,
    inverse_frequencies,
    rms_norm,
    rotate,
)


def shift_channels(x_H: Tensor, *, heads: int) -> Tensor:
    """A permutation: channel j of head i comes from head i + j, counted around the heads."""
    x_ND = x_H.reshape(heads, -1)
    channels = torch.arange(x_ND.shape[1])
    source_heads = (torch.arange(heads)[:, None] + channels) % heads
    return x_ND[source_heads, channels].flatten()


def read_windows(config: Mapping[str, Any]) -> list[int | None]:
    """For each layer, how many positions a token sees, its own included; None for all.

    Raises:
        CheckpointError: a layer slides, but `use_sliding_window` is off.
    """
    layers: int = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first_sliding = layers if window is None else config.get("max_window_layers", 28)
    layer_types = config.get("layer_types") or [
        "full_attention" if i < first_sliding else "sliding_attention" for i in range(layers)
    ]
    if window is None and "sliding_attention" in layer_types:
        raise CheckpointError(
            "config.json: `layer_types` has sliding layers, but `use_sliding_window` and "
            "`sliding_window` set no window",
            hint="set `use_sliding_window` to true, or drop `layer_types`",
        )
    return [window if kind == "sliding_attention" else None for kind in layer_types]


class EmbformerReference:
    """Embformer; all norms have the weight 1, which no checkpoint holds."""

    name = "step-by-step Embformer"

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
        self._tensors = tensors
        self._heads: int = config["num_attention_heads"]
        self._head_dim: int = config.get("head_dim", 128)
        self._eps: float = config.get("rms_norm_eps", 1e-6)
        self._activation = ACTIVATIONS[config.get("hidden_act", "silu")]
        self._shifts: bool = config.get("use_channel_shift", True)
        self._windows = read_windows(config)
        self._inv_freq = inverse_frequencies(config, head_dim=self._head_dim)
        tied = config.get("tie_word_embeddings", False)
        self._head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def start(self) -> TextState:
        """An empty text."""
        return TextState()

    def vectors(self, token_id: int) -> dict[str, Tensor]:
        """What a token looks up, by graph input: `[H]`, and for each layer `[W]`, `[W]`, `[H]`."""
        return {
            "inputs_embeds": self._tensors["model.embed_tokens.weight"][token_id].float(),
            "key_embeds": self._rows("self_attn.k_embed", token_id),
            "value_embeds": self._rows("self_attn.v_embed", token_id),
            "gate_embeds": self._rows("ffn.gate_embed", token_id),
        }

    def step(self, vectors: Mapping[str, Tensor], state: TextState) -> tuple[Tensor, list[Tensor]]:
        """Logits `[V]` after one more token, and what each layer hands on, `[H]`."""
        x = vectors["inputs_embeds"]
        handed_on = []
        for i, window in enumerate(self._windows):
            state.keys[i].append(self._rotated(vectors["key_embeds"][i], state.position))
            state.values[i].append(vectors["value_embeds"][i].reshape(-1, self._head_dim))
            query = self._rotated(rms_norm(x, self._eps), state.position)
            seen = slice(0 if window is None else -window, None)
            x = x + attend(query, state.keys[i][seen], state.values[i][seen])
            gated = self._activation(rms_norm(x, self._eps)) * vectors["gate_embeds"][i]
            x = x + (shift_channels(gated, heads=self._heads) if self._shifts else gated)
            handed_on.append(x)
        state.position += 1
        return self._head.float() @ rms_norm(x, self._eps), handed_on

    def _rows(self, table: str, token_id: int) -> Tensor:
        keys = [f"model.layers.{i}.{table}.weight" for i in range(len(self._windows))]
        return torch.stack([self._tensors[key][token_id].float() for key in keys])

    def _rotated(self, x: Tensor, position: int) -> Tensor:
        x_ND = rms_norm(x.reshape(-1, self._head_dim), self._eps)
        return rotate(x_ND, position, self._inv_freq)
