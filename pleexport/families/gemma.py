"""What Gemma 3n and Gemma 4 share: tables, attention with shared K/V, per-layer inputs.

Shape suffixes: B = 1 sequence, T tokens, H hidden, L layers, P width of a per-layer vector,
N heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pleexport.dtypes import rounded
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.families.config_reader import AS_PUBLISHED, NOT_THIS_VARIANT, ConfigReader
from pleexport.families.decoder import AttentionContext, linear
from pleexport.families.rope import inverse_frequencies
from pleexport.model import (
    Cache,
    Table,
    TransformersOriginal,
    Unused,
    Weight,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pleexport.families.layers import Parameters

# Multimodal, repacked and text-only checkpoints, and a bare text model.
TEXT_PREFIXES: dict[str, tuple[str, ...]] = {
    "model.language_model.": ("",),
    "language_model.model.": ("language_model.", ""),
    "model.": ("",),
    "": (),
}
LAYER_TYPES = ("sliding_attention", "full_attention")
# Parts of multimodal checkpoints that are left out; repacks have them at the top.
TOWERS = {
    "model.vision_tower.": "vision tower",
    "model.audio_tower.": "audio tower",
    "model.embed_vision.": "vision projection",
    "model.embed_audio.": "audio projection",
    "vision_tower.": "vision tower",
    "audio_tower.": "audio tower",
    "embed_vision.": "vision projection",
    "embed_audio.": "audio projection",
}
# What `transformers`' text model calls the keys of multimodal checkpoints and of repacks.
KEY_MAPPING = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
# Config fields that it refuses as integers; a JSON writer may put 30 for 30.0.
FLOAT_FIELDS = frozenset(
    {"attention_dropout", "final_logit_softcapping", "initializer_range", "rms_norm_eps"}
)

# What the top level of a multimodal config says of the other modalities.
_MODALITIES = ("audio_", "image_", "mm_", "video_", "vision_")


def open_config(config: dict[str, Any], *, read_elsewhere: Sequence[str] = ()) -> ConfigReader:
    """The text part of a config; the rest of a multimodal one has been checked.

    Args:
        read_elsewhere: fields of the whole config that the family has read.
    Raises:
        CheckpointError, UnsupportedError: as `ConfigReader`.
    """
    if "text_config" not in config:
        return ConfigReader(config, where="config.json")
    outer = ConfigReader(config, where="config.json")
    text = outer.get("text_config")
    if not isinstance(text, dict):
        raise outer.malformed("text_config", "an object")
    for name in config:
        if name.startswith(_MODALITIES) or name.endswith(("_token_id", "_token_index")):
            outer.get(name)
    outer.get("tie_word_embeddings")
    for name in read_elsewhere:
        outer.get(name)
    outer.finish()
    return ConfigReader(text, where="config.json: text_config")


@dataclass(frozen=True)
class Attention:
    """The attention of one layer.

    Attributes:
        kv_layer: the layer whose keys and values it attends to; itself, or an earlier one.
        value_is_key: values are made by the key projection (`attention_k_eq_v`).
        window: positions that a token sees, its own included; None for all.
    """

    layer: int
    layer_type: str
    kv_layer: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    value_is_key: bool
    eps: float

    @property
    def owns_cache(self) -> bool:
        """Whether the layer makes keys and values of its own."""
        return self.kv_layer == self.layer

    @property
    def inv_freq_name(self) -> str:
        """Name of the constant that holds its rotary frequencies."""
        return f"rotary_emb.{self.layer_type}_{self.head_dim}"

    @property
    def cache(self) -> Cache:
        """The cache it writes."""
        return Cache(self.layer, self.kv_heads, self.head_dim, self.window)


def transformers_original(
    model_type: str, *, float_fields: frozenset[str] = frozenset(), stream_axis: int | None = None
) -> TransformersOriginal:
    """How `transformers` loads the original.

    Args:
        float_fields: those beside what all Gemmas have.
    """
    return TransformersOriginal(
        model_type=model_type,
        key_mapping=KEY_MAPPING,
        inherited={"tie_word_embeddings": True},
        float_fields=FLOAT_FIELDS | float_fields,
        renamed_modules={"language_model": "model"},
        stream_axis=stream_axis,
    )


def caches(attentions: Sequence[Attention]) -> tuple[Cache, ...]:
    """The caches of a model's layers."""
    sharing = [a for a in attentions if not a.owns_cache]
    return tuple(
        replace(a.cache, shared_by=tuple(b.layer for b in sharing if b.kv_layer == a.layer))
        for a in attentions
        if a.owns_cache
    )


def kv_layers(layer_types: list[str], shared: int) -> list[int]:
    """For each layer, the layer whose keys and values it uses.

    The last `shared` layers use those of the last unshared layer of their own type.

    Raises:
        CheckpointError: a sharing layer has no layer of its type before it.
    """
    own = len(layer_types) - shared
    last_of_type = {layer_type: i for i, layer_type in enumerate(layer_types[:own])}
    for i, layer_type in enumerate(layer_types):
        if layer_type not in last_of_type:
            raise CheckpointError(
                f"config.json: layer {i} shares the keys of a `{layer_type}` layer before layer "
                f"{own}, but there is none",
                hint=AS_PUBLISHED,
            )
    return [i if i < own else last_of_type[layer_type] for i, layer_type in enumerate(layer_types)]


def check_heads(attention: Attention, earlier: list[Attention]) -> None:
    """Raise CheckpointError where the head counts or sizes of a layer do not fit together."""
    a = attention
    if a.heads % a.kv_heads:
        raise CheckpointError(
            f"config.json: layer {a.layer} has {a.heads} heads for {a.kv_heads} key heads; "
            "the first must be a multiple of the second",
            hint=AS_PUBLISHED,
        )
    if a.head_dim % 2:
        raise CheckpointError(
            f"config.json: layer {a.layer} has head_dim {a.head_dim}; rotary embeddings need an "
            "even one",
            hint=AS_PUBLISHED,
        )
    if a.kv_layer < len(earlier):
        shared = earlier[a.kv_layer]
        if (shared.kv_heads, shared.head_dim) != (a.kv_heads, a.head_dim):
            raise CheckpointError(
                f"config.json: layer {a.layer} shares keys of {a.kv_heads} x {a.head_dim} with "
                f"layer {a.kv_layer}, which has {shared.kv_heads} x {shared.head_dim}",
                hint=AS_PUBLISHED,
            )


def read_layer_types(config: ConfigReader, count: int) -> list[str]:
    """The `layer_types` of a config."""
    layer_types: list[str] = config.per_layer("layer_types", count, str)
    unknown = sorted(set(layer_types) - set(LAYER_TYPES))
    if unknown:
        raise UnsupportedError(
            f"config.json: layer type `{unknown[0]}` is not implemented; "
            f"implemented: {', '.join(LAYER_TYPES)}",
            hint=NOT_THIS_VARIANT,
        )
    return layer_types


def read_shared_layers(config: ConfigReader, count: int) -> int:
    """`num_kv_shared_layers`, checked."""
    shared = config.integer("num_kv_shared_layers", minimum=0)
    if shared >= count:
        raise config.malformed("num_kv_shared_layers", f"fewer than the {count} layers")
    return shared


def tables(
    config: ConfigReader, *, num_layers: int, dtype: str, outside: Literal["row 0", "error"]
) -> tuple[Table, Table]:
    """The input embedding and the per-layer embeddings.

    Their scales sqrt(width) are held in the checkpoint's dtype by the original.

    Raises:
        UnsupportedError: the model has no per-layer tables.
    """
    hidden = config.integer("hidden_size")
    width = config.integer("hidden_size_per_layer_input", minimum=0, default=0)
    if width == 0:
        raise UnsupportedError(
            "this model has no per-layer embedding tables (`hidden_size_per_layer_input` is 0 or "
            "missing), so there is nothing to split off",
            hint="Gemma 4 26B-A4B and 31B have none; use a general exporter for them",
        )
    return (
        Table(
            name="embed_tokens",
            keys=("embed_tokens.weight",),
            rows=config.integer("vocab_size"),
            layers=None,
            width=hidden,
            multiplier=rounded(math.sqrt(hidden), dtype),
            graph_input="inputs_embeds",
        ),
        Table(
            name="embed_tokens_per_layer",
            keys=("embed_tokens_per_layer.weight",),
            rows=config.integer("vocab_size_per_layer_input"),
            layers=num_layers,
            width=width,
            multiplier=rounded(math.sqrt(width), dtype),
            graph_input="per_layer_inputs",
            outside=outside,
        ),
    )


def attention_weights(
    attention: Attention, *, hidden: int, bias: bool
) -> tuple[list[Weight], dict[str, Unused]]:
    """The tensors of one layer's attention, and those that checkpoints carry for nothing."""
    prefix, a = f"layers.{attention.layer}.self_attn", attention
    # Keys and values are few, are shared by many layers, and lose most when rounded to 4 bits.
    keys = linear(
        f"{prefix}.k_proj", a.kv_heads * a.head_dim, hidden, bias=bias, precision="sensitive"
    )
    keys.append(Weight(f"{prefix}.k_norm.weight", (a.head_dim,)))
    if not a.value_is_key:
        keys += linear(
            f"{prefix}.v_proj", a.kv_heads * a.head_dim, hidden, bias=bias, precision="sensitive"
        )
    used = [
        *linear(f"{prefix}.q_proj", a.heads * a.head_dim, hidden, bias=bias),
        *linear(f"{prefix}.o_proj", hidden, a.heads * a.head_dim, bias=bias),
        Weight(f"{prefix}.q_norm.weight", (a.head_dim,)),
    ]
    if a.owns_cache:
        return used + keys, {}
    reason = f"layer {a.layer} uses the keys and values of layer {a.kv_layer}"
    return used, {weight.name: Unused(weight.shape, reason) for weight in keys}


def per_layer_input_weights(*, num_layers: int, hidden: int, width: int) -> list[Weight]:
    """The tensors that mix looked-up vectors into the layers; see `per_layer_inputs`."""
    weights = [
        *linear("per_layer_model_projection", num_layers * width, hidden, precision="sensitive"),
        Weight("per_layer_projection_norm.weight", (width,)),
    ]
    for i in range(num_layers):
        weights += linear(f"layers.{i}.per_layer_input_gate", width, hidden, precision="sensitive")
        weights += linear(f"layers.{i}.per_layer_projection", hidden, width, precision="sensitive")
        weights.append(Weight(f"layers.{i}.post_per_layer_input_norm.weight", (hidden,)))
    return weights


def norm_weights(layer: int, *, hidden: int) -> list[Weight]:
    """The four norms around attention and feed-forward of one layer."""
    names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    return [Weight(f"layers.{layer}.{name}.weight", (hidden,)) for name in names]


def rotary_weights(
    attentions: list[Attention], rope_parameters: dict[str, dict[str, Any]]
) -> list[Weight]:
    """The rotary frequencies that the attentions name, as constants."""
    weights = {}
    for a in attentions:
        where = f"config.json: rope_parameters.{a.layer_type}"
        parameters = rope_parameters.get(a.layer_type)
        if not isinstance(parameters, dict):
            raise CheckpointError(
                f"{where} is {parameters!r}; expected an object", hint=AS_PUBLISHED
            )
        frequencies = inverse_frequencies(
            ConfigReader(parameters, where=where), head_dim=a.head_dim
        )
        weights[a.inv_freq_name] = Weight(
            a.inv_freq_name, frequencies.shape, constant=frequencies, is_buffer=True
        )
    return list(weights.values())


def attend(w: Parameters, x_BTH: Tensor, a: Attention, context: AttentionContext) -> Tensor:
    """One layer's attention, `[B, T, H]`.

    Norms come before the rotation; values are normalised without a weight; the scale is 1.
    Source: transformers `Gemma4TextAttention`, `Gemma3nTextAttention`.
    """
    from pleexport import operators
    from pleexport.families import layers

    query = layers.split_last(w.linear("q_proj", x_BTH), a.heads, a.head_dim)
    query = w.rms_norm("q_norm", query, a.eps)
    query = operators.rotate(query, *context.angles(a.inv_freq_name))
    if a.owns_cache:
        key = layers.split_last(w.linear("k_proj", x_BTH), a.kv_heads, a.head_dim)
        value = key
        if not a.value_is_key:
            value = layers.split_last(w.linear("v_proj", x_BTH), a.kv_heads, a.head_dim)
        key = operators.rotate(w.rms_norm("k_norm", key, a.eps), *context.angles(a.inv_freq_name))
        context.write(a.layer, key, layers.rms_normalize(value, a.eps))
    return w.linear("o_proj", context.attend(query, kv_layer=a.kv_layer, window=a.window))


def per_layer_inputs(
    w: Parameters,
    rows: Any,
    *,
    projection_scale: float,
    mix_scale: float,
    eps: float,
) -> Tensor:
    """`[B, T, L, P]`: the looked-up vectors mixed with a projection of the input embedding.

    Source: transformers `Gemma4TextModel.project_per_layer_inputs`.
    """
    from pleexport.families import layers

    identity_BTLP, embeds_BTH = rows["per_layer_inputs"], rows["inputs_embeds"]
    context = w.linear("per_layer_model_projection", embeds_BTH) * projection_scale
    context = layers.split_last(context, *identity_BTLP.shape[2:])
    context = w.rms_norm("per_layer_projection_norm", context, eps)
    mixed: Tensor = (context + identity_BTLP) * mix_scale
    return mixed


def by_layer(per_layer_BTLP: Tensor) -> Sequence[Tensor]:
    """By layer, its vectors `[B, T, P]`; all are cut in one operation."""
    return per_layer_BTLP.flatten(2).chunk(per_layer_BTLP.shape[2], dim=-1)


def gate_per_layer_input(
    w: Parameters, x_BTH: Tensor, per_layer_BTP: Tensor, *, activation: str, eps: float
) -> Tensor:
    """What one layer's per-layer vector adds to the hidden state, `[B, T, H]`."""
    from pleexport.families import layers

    gate = layers.activation(activation, w.linear("per_layer_input_gate", x_BTH))
    return w.rms_norm(
        "post_per_layer_input_norm", w.linear("per_layer_projection", gate * per_layer_BTP), eps
    )
