"""Embformer: keys, values and gates are looked up; nothing but the head is multiplied.

Queries are the normalised hidden state itself, norms have no weights, and the feed-forward part is
a gate and a fixed permutation of channels. Source: github.com/HighCWu/embformer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pleexport.families import decoder, llama
from pleexport.families.config_reader import ConfigReader
from pleexport.model import (
    ACTIVATIONS,
    Cache,
    GraphInputs,
    GraphOutputs,
    Model,
    Reference,
    Table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pleexport.families.layers import Parameters

MODEL_TYPES = ("embformer",)
LAYER_TYPES = ("full_attention", "sliding_attention")
DEFAULT_HEAD_DIM = 128
DEFAULT_FIRST_SLIDING = 28


@dataclass(frozen=True)
class EmbformerConfig:
    """Sizes and options.

    Attributes:
        windows: for each layer the positions that a token sees, its own included; None for all.
        shifts: the gated channels change places between heads.
    """

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    activation: str
    eps: float
    shifts: bool

    @property
    def caches(self) -> tuple[Cache, ...]:
        """One for each layer."""
        windows = enumerate(self.windows)
        return tuple(Cache(i, self.kv_heads, self.head_dim, window) for i, window in windows)


def configure(config: dict[str, Any], *, dtype: str) -> Model:
    """Read a config.json; see `model.Family.configure`."""
    reader = ConfigReader(config, where="config.json")
    c = _read(reader)
    head, unused = decoder.head_weight(config, reader, vocab=c.vocab, hidden=c.hidden, tied=False)
    reader.require("attention_bias", (None, False))
    rotary = llama.rotary_weight(reader, c.head_dim)
    model = Model(
        family="embformer",
        num_layers=len(c.windows),
        vocab_size=c.vocab,
        num_rows=c.vocab,
        max_context=reader.integer("max_position_embeddings"),
        tables=(
            llama.embedding(c.vocab, c.hidden),
            _table("key_embeds", "self_attn.k_embed", c, c.kv_heads * c.head_dim),
            _table("value_embeds", "self_attn.v_embed", c, c.kv_heads * c.head_dim),
            _table("gate_embeds", "ffn.gate_embed", c, c.hidden),
        ),
        weights=(head, rotary),
        caches=c.caches,
        forward=_Forward(c),
        unused=unused,
        text_prefixes=llama.PREFIXES,
        eos_token_ids=decoder.read_eos(config, reader),
        reference=_reference,
    )
    reader.finish()
    return replace(model, without_cache=_without_cache(model, c))


def _without_cache(model: Model, c: EmbformerConfig) -> Model:
    """Keys and values depend on ids and positions alone, so their rows can be read again."""
    tables = (replace(t, whole_text=t.name in ("key_embeds", "value_embeds")) for t in model.tables)
    return replace(model, tables=tuple(tables), caches=(), forward=_Forward(c, keeps=False))


def _read(reader: ConfigReader) -> EmbformerConfig:
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=heads)
    head_dim = reader.integer("head_dim", minimum=2, default=DEFAULT_HEAD_DIM)
    llama.check_heads(reader, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    if heads * head_dim != hidden:
        raise reader.malformed("head_dim", f"{hidden} / {heads}, as queries are the hidden state")
    return EmbformerConfig(
        vocab=reader.integer("vocab_size"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(reader, reader.integer("num_hidden_layers")),
        activation=reader.choice("hidden_act", ACTIVATIONS),
        eps=reader.positive("rms_norm_eps", default=1e-6),
        shifts=reader.flag("use_channel_shift", default=True),
    )


def _windows(reader: ConfigReader, layers: int) -> tuple[int | None, ...]:
    slides = reader.flag("use_sliding_window", default=False)
    first = reader.integer("max_window_layers", minimum=0, default=DEFAULT_FIRST_SLIDING)
    reader.get("sliding_window")
    window = reader.integer("sliding_window") if slides else None
    if not reader.has("layer_types"):
        reader.get("layer_types")
        return tuple(window if i >= first else None for i in range(layers))
    kinds = reader.per_layer("layer_types", layers, str)
    if not set(kinds) <= set(LAYER_TYPES) or (window is None and LAYER_TYPES[1] in kinds):
        raise reader.malformed("layer_types", "full_attention, or with a window sliding_attention")
    return tuple(window if kind == LAYER_TYPES[1] else None for kind in kinds)


def _table(graph_input: str, name: str, c: EmbformerConfig, width: int) -> Table:
    return Table(
        name=graph_input,
        keys=tuple(f"layers.{i}.{name}.weight" for i in range(len(c.windows))),
        rows=c.vocab,
        layers=len(c.windows),
        width=width,
        graph_input=graph_input,
    )


def _reference(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Reference:
    from pleexport.references.embformer import EmbformerReference

    return EmbformerReference(tensors, config)


@dataclass(frozen=True)
class _Forward:
    """Embformer's logits.

    Attributes:
        keeps: keys and values are kept from call to call.
    """

    config: EmbformerConfig
    keeps: bool = True

    def __call__(self, w: Parameters, inputs: GraphInputs) -> GraphOutputs:
        import torch

        from pleexport import operators
        from pleexport.families import layers

        c, x_BTH, hidden = self.config, inputs.rows["inputs_embeds"], []
        context = decoder.AttentionContext(w, inputs)
        query_angles = key_angles = context.angles(llama.INV_FREQ)
        positions = inputs.position_ids
        if not self.keeps:
            positions = torch.arange(inputs.rows["key_embeds"].shape[1]).unsqueeze(0)
            key_angles = layers.rotary_angles(positions, w[llama.INV_FREQ])

        def rotated(x_BTW: Tensor, heads: int, angles: tuple[Tensor, Tensor]) -> Tensor:
            normed = layers.rms_normalize(layers.split_last(x_BTW, heads, c.head_dim), c.eps)
            turned: Tensor = operators.rotate(normed, *angles)
            return turned

        for i, window in enumerate(c.windows):
            key, value, gate = (
                inputs.rows[name][:, :, i] for name in ("key_embeds", "value_embeds", "gate_embeds")
            )
            keys = rotated(key, c.kv_heads, key_angles)
            values = layers.split_last(value, c.kv_heads, c.head_dim)
            query = rotated(layers.rms_normalize(x_BTH, c.eps), c.heads, query_angles)
            query = query * c.head_dim**-0.5
            if self.keeps:
                context.write(i, keys, values)
                attended = context.attend(query, kv_layer=i, window=window)
            else:
                bias = operators.attention_bias(inputs.position_ids, positions[0], window=window)
                attended = operators.attend(
                    query, keys.transpose(1, 2), values.transpose(1, 2), bias
                )
            x_BTH = x_BTH + attended
            opened = layers.activation(c.activation, layers.rms_normalize(x_BTH, c.eps))
            x_BTH = x_BTH + self._shift(opened * gate)
            hidden.append(x_BTH)
        x_BTH = x_BTH.index_select(1, inputs.logit_positions)
        logits = w.linear("lm_head", layers.rms_normalize(x_BTH, c.eps))
        return GraphOutputs(logits, context.caches, hidden)

    def _shift(self, x_BTH: Tensor) -> Tensor:
        """Channel j of head i from head i + j, counted around the heads."""
        import torch

        heads, size = self.config.heads, self.config.head_dim
        if not self.config.shifts:
            return x_BTH
        source = [(i + j) % heads * size + j for i in range(heads) for j in range(size)]
        return x_BTH.index_select(2, torch.tensor(source))
