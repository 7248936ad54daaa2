"""Llama with value embeddings: in some layers, a looked-up row is added to the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pleexport.families import decoder, llama
from pleexport.families.config_reader import ConfigReader
from pleexport.model import Cache, GraphInputs, GraphOutputs, Model, Reference, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pleexport.families.layers import Parameters

MODEL_TYPES = ("llama_value_embeddings",)


def configure(config: dict[str, Any], *, dtype: str) -> Model:
    """Read a config.json; see `model.Family.configure`."""
    reader = ConfigReader(config, where="config.json")
    c = llama.read_config(reader)
    with_table = _layers_with_table(reader, c.layers)
    value_embeds = Table(
        name="value_embeds",
        keys=tuple(f"layers.{i}.self_attn.value_embeds.weight" for i in with_table),
        rows=c.vocab,
        layers=len(with_table),
        width=c.kv_heads * c.head_dim,
        graph_input="value_embeds",
    )
    return llama.build_model(
        config,
        reader,
        c,
        family="llama_value_embeddings",
        tables=(value_embeds,),
        makes_keys=range(c.layers),
        caches=_caches(c),
        forward=_Forward(c, with_table),
        reference=_reference,
    )


def _layers_with_table(reader: ConfigReader, layers: int) -> list[int]:
    found = reader.get("value_embedding_layers")
    if (
        not isinstance(found, list)
        or not found
        or len({*map(str, found)}) != len(found)
        or not all(type(i) is int and 0 <= i < layers for i in found)
    ):
        raise reader.malformed("value_embedding_layers", f"a list of some of {layers} layers")
    return sorted(found)


def _caches(c: llama.LlamaConfig) -> tuple[Cache, ...]:
    return tuple(Cache(i, c.kv_heads, c.head_dim, window=None) for i in range(c.layers))


def _reference(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Reference:
    from pleexport.references.llama_value_embeddings import LlamaValueEmbeddingsReference

    return LlamaValueEmbeddingsReference(tensors, config)


@dataclass(frozen=True)
class _Forward:
    """The logits of a Llama with value embeddings."""

    config: llama.LlamaConfig
    with_table: list[int]

    def __call__(self, w: Parameters, inputs: GraphInputs) -> GraphOutputs:
        c, x_BTH, hidden = self.config, inputs.rows["inputs_embeds"], []
        context = decoder.AttentionContext(w, inputs)
        for i in range(c.layers):
            layer = w.below(f"layers.{i}")
            attention = layer.below("self_attn")
            normed = layer.rms_norm("input_layernorm", x_BTH, c.eps)
            key, value = llama.key_value(attention, normed, c, context)
            if i in self.with_table:
                rows = inputs.rows["value_embeds"][:, :, self.with_table.index(i)]
                value = value + rows.reshape(value.shape)
            context.write(i, key, value)
            query = llama.query(attention, normed, c, context)
            attended = context.attend(query, kv_layer=i, window=None)
            x_BTH = llama.finish_layer(layer, x_BTH, attended, c)
            hidden.append(x_BTH)
        return GraphOutputs(llama.logits(w, x_BTH, inputs, c), context.caches, hidden)
