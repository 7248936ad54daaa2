"""Embformer for training: whole windows at once, parameters named as in its checkpoints.

Everything that is trained is a table: the head is the embedding, and norms have no weights.

Shape suffixes: B windows, T tokens, H hidden, N heads of size D, K key heads, L layers.

Source: HighCWu/embformer, `theory/note.md` and the equations of `modeling_embformer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotate(x_BNTD: Tensor, *, theta: float) -> Tensor:
    """Rotary embedding: element i of a head turns with element i + D / 2."""
    length, size = x_BNTD.shape[-2:]
    inv_freq = 1.0 / theta ** (torch.arange(0, size, 2, device=x_BNTD.device) / size)
    angles = torch.arange(length, device=x_BNTD.device)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    a, b = x_BNTD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LookedUpAttention(nn.Module):
    """The tables of a layer's attention."""

    def __init__(self, vocab: int, width: int, std: float) -> None:
        super().__init__()
        self.k_embed, self.v_embed = nn.Embedding(vocab, width), nn.Embedding(vocab, width)
        nn.init.normal_(self.k_embed.weight, std=std)
        nn.init.normal_(self.v_embed.weight, std=std)


class LookedUpGate(nn.Module):
    """The table of a layer's feed-forward."""

    def __init__(self, vocab: int, width: int, std: float) -> None:
        super().__init__()
        self.gate_embed = nn.Embedding(vocab, width)
        nn.init.normal_(self.gate_embed.weight, std=std)


class Layer(nn.Module):
    """One layer: tables alone."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vocab, std = config["vocab_size"], config["initializer_range"]
        kv_width = config["num_key_value_heads"] * config["head_dim"]
        self.self_attn = LookedUpAttention(vocab, kv_width, std)
        self.ffn = LookedUpGate(vocab, config["hidden_size"], std)


class Decoder(nn.Module):
    """The embedding and the layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=config["initializer_range"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))


class Embformer(nn.Module):
    """Embformer with a tied head, full attention in all layers and the channel shift.

    Args:
        config: what config.json holds.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        heads, size = config["num_attention_heads"], config["head_dim"]
        source = [(i + j) % heads * size + j for i in range(heads) for j in range(size)]
        self.register_buffer("source_channels", torch.tensor(source), persistent=False)

    def look_up(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What tokens look up: `inputs_embeds` `[B, T, H]`, the others `[B, T, L, width]`."""
        layers = self.model.layers
        return {
            "inputs_embeds": self.model.embed_tokens(ids_BT),
            "key_embeds": torch.stack([y.self_attn.k_embed(ids_BT) for y in layers], 2),
            "value_embeds": torch.stack([y.self_attn.v_embed(ids_BT) for y in layers], 2),
            "gate_embeds": torch.stack([y.ffn.gate_embed(ids_BT) for y in layers], 2),
        }

    def forward(
        self, inputs_embeds: Tensor, key_embeds: Tensor, value_embeds: Tensor, gate_embeds: Tensor
    ) -> Tensor:
        """Logits `[B, T, V]`."""
        x_BTH = inputs_embeds
        rows = (key_embeds.unbind(2), value_embeds.unbind(2), gate_embeds.unbind(2))
        for key, value, gate in zip(*rows, strict=True):
            attended = functional.scaled_dot_product_attention(
                self.rotated_heads(self.normalize(x_BTH)),
                self.rotated_heads(key),
                self.split_heads(value),
                is_causal=True,
                enable_gqa=True,
            )
            x_BTH = x_BTH + attended.transpose(1, 2).flatten(2)
            gated = functional.silu(self.normalize(x_BTH)) * gate
            x_BTH = x_BTH + gated.index_select(2, self.source_channels)
        return functional.linear(self.normalize(x_BTH), self.model.embed_tokens.weight)

    def normalize(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], eps=self.config["rms_norm_eps"])

    def split_heads(self, x_BTH: Tensor) -> Tensor:
        return x_BTH.unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)

    def rotated_heads(self, x_BTH: Tensor) -> Tensor:
        heads = self.normalize(self.split_heads(x_BTH))
        return rotate(heads, theta=self.config["rope_theta"])
