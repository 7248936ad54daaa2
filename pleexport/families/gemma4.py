"""Gemma 4 with per-layer embeddings (E2B, E4B).

Source: transformers `models/gemma4`. Shape suffixes as in `gemma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pleexport.checkpoint.quantized import read_quantization
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.families import decoder, gemma
from pleexport.families.config_reader import AS_PUBLISHED, NOT_THIS_VARIANT, ConfigReader
from pleexport.model import (
    ACTIVATIONS,
    GraphInputs,
    GraphOutputs,
    Model,
    Published,
    Unused,
    Weight,
)

if TYPE_CHECKING:
    from pleexport.families.layers import Parameters

MODEL_TYPES = ("gemma4", "gemma4_text")
# Ids that stand for image, video and audio features, with the ids that transformers defaults to.
PLACEHOLDERS = {"image_token_id": 258_880, "video_token_id": 258_884, "audio_token_id": 258_881}


@dataclass(frozen=True)
class Gemma4Config:
    """The fields that the dense graph depends on."""

    attentions: tuple[gemma.Attention, ...]
    first_shared_layer: int
    hidden_size: int
    activation: str
    final_softcap: float | None
    eps: float


def configure(config: dict[str, Any], *, dtype: str) -> Model:
    """Read a config.json; see `model.Family.configure`."""
    text = gemma.open_config(config, read_elsewhere=("quantization_config",))
    _refuse_variants(text)
    layers, hidden = text.integer("num_hidden_layers"), text.integer("hidden_size")
    text.get("quantization_config")
    quantization = read_quantization(config)
    # Some lookups of codes are multiplied by the exact scale; others by one in the dtype.
    scale_dtype = "fp64" if quantization and quantization.exact_multipliers else dtype
    embed_tokens, per_layer = gemma.tables(
        text, num_layers=layers, dtype=scale_dtype, outside="error"
    )
    shared = gemma.read_shared_layers(text, layers)
    attentions = _attentions(text, layers, shared)
    settings = Gemma4Config(
        attentions=tuple(attentions),
        first_shared_layer=layers - shared,
        hidden_size=hidden,
        activation=text.choice("hidden_activation", ACTIVATIONS),
        final_softcap=text.optional_positive("final_logit_softcapping"),
        eps=text.positive("rms_norm_eps"),
    )
    weights, unused = _weights(text, settings, width=per_layer.width)
    head, unused_head = decoder.head_weight(
        config, text, vocab=embed_tokens.rows, hidden=hidden, tied=True
    )
    num_rows = min(embed_tokens.rows, per_layer.rows)
    pad = text.integer("pad_token_id", minimum=0, default=0)
    model = Model(
        family="gemma4",
        num_layers=layers,
        vocab_size=embed_tokens.rows,
        num_rows=num_rows,
        max_context=text.integer("max_position_embeddings"),
        tables=(embed_tokens, per_layer),
        weights=(*weights, head),
        caches=gemma.caches(attentions),
        forward=_Forward(settings),
        unused=unused | unused_head,
        row_aliases=_placeholder_aliases(config, num_rows, pad) if "text_config" in config else {},
        text_prefixes=gemma.TEXT_PREFIXES,
        ignored_prefixes=gemma.TOWERS,
        eos_token_ids=decoder.read_eos(config, text),
        published=PUBLISHED,
        transformers=gemma.transformers_original("gemma4_text"),
    )
    text.finish()
    return model


# Source: the Hugging Face parameter counts and model cards of the published checkpoints.
PUBLISHED = (
    Published("Gemma 4 E2B", 4_628_569_344, 5_123_178_051, "5.1B", "2.8B", "2.3B"),
    Published("Gemma 4 E4B", 7_463_013_376, 7_996_156_490, "8.0B", "3.5B", "4.5B"),
)


@dataclass(frozen=True)
class _Forward:
    """Gemma 4's logits. Source: transformers `Gemma4TextModel`, `Gemma4TextDecoderLayer`."""

    config: Gemma4Config

    def __call__(self, w: Parameters, inputs: GraphInputs) -> GraphOutputs:
        from pleexport.families import layers

        config = self.config
        context = decoder.AttentionContext(w, inputs)
        per_layer_BTLP = gemma.per_layer_inputs(
            w,
            inputs.rows,
            projection_scale=config.hidden_size**-0.5,
            mix_scale=2**-0.5,
            eps=config.eps,
        )
        per_layer_BTP = gemma.by_layer(per_layer_BTLP)
        x_BTH, hidden = inputs.rows["inputs_embeds"], []
        for i, attention in enumerate(config.attentions):
            if i == config.first_shared_layer:
                context.narrow()
                x_BTH = x_BTH.index_select(1, inputs.logit_positions)
                narrowed_BTLP = per_layer_BTLP.index_select(1, inputs.logit_positions)
                per_layer_BTP = gemma.by_layer(narrowed_BTLP)
            layer = w.below(f"layers.{i}")

            normed = layer.rms_norm("input_layernorm", x_BTH, config.eps)
            attended = gemma.attend(layer.below("self_attn"), normed, attention, context)
            x_BTH = x_BTH + layer.rms_norm("post_attention_layernorm", attended, config.eps)

            normed = layer.rms_norm("pre_feedforward_layernorm", x_BTH, config.eps)
            fed = decoder.gated_mlp(layer.below("mlp"), normed, config.activation)
            x_BTH = x_BTH + layer.rms_norm("post_feedforward_layernorm", fed, config.eps)

            x_BTH = x_BTH + gemma.gate_per_layer_input(
                layer,
                x_BTH,
                per_layer_BTP[i],
                activation=config.activation,
                eps=config.eps,
            )
            x_BTH = x_BTH * layer["layer_scalar"]
            hidden.append(x_BTH)
        if config.first_shared_layer == len(config.attentions):
            x_BTH = x_BTH.index_select(1, inputs.logit_positions)
        logits = w.linear("lm_head", w.rms_norm("norm", x_BTH, config.eps))
        return GraphOutputs(layers.softcap(logits, config.final_softcap), context.caches, hidden)


def _refuse_variants(text: ConfigReader) -> None:
    text.require("enable_moe_block", (None, False))
    for unused_without_experts in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        text.get(unused_without_experts)
    # "vision" lets image tokens see each other; text stays causal.
    text.require("use_bidirectional_attention", (None, False, "vision"))


def _attentions(text: ConfigReader, layers: int, shared: int) -> list[gemma.Attention]:
    layer_types = gemma.read_layer_types(text, layers)
    # transformers makes the last layer a full one, whatever the config says.
    layer_types[-1] = "full_attention"
    kv_layers = gemma.kv_layers(layer_types, shared)
    overrides = _per_layer_overrides(text, layer_types)
    key_is_value = text.flag("attention_k_eq_v", default=False)
    heads, window = text.integer("num_attention_heads"), text.integer("sliding_window")
    head_dim, kv_heads = text.integer("head_dim", minimum=2), text.integer("num_key_value_heads")
    eps = text.positive("rms_norm_eps")
    attentions: list[gemma.Attention] = []
    for i, layer_type in enumerate(layer_types):
        override, full = overrides[i], layer_type == "full_attention"
        attention = gemma.Attention(
            layer=i,
            layer_type=layer_type,
            kv_layer=kv_layers[i],
            heads=heads,
            kv_heads=override.get("num_key_value_heads", kv_heads),
            head_dim=override.get("head_dim", head_dim),
            window=None if full else window,
            value_is_key=key_is_value and full,
            eps=eps,
        )
        gemma.check_heads(attention, attentions)
        attentions.append(attention)
    return attentions


def _per_layer_overrides(text: ConfigReader, layer_types: list[str]) -> list[dict[str, int]]:
    """For each layer, the head sizes that differ from the config's own.

    transformers 5.23 saves them as `per_layer_config`; published configs say `global_head_dim` and
    `num_global_key_value_heads` of all full layers.
    """
    global_head_dim = text.integer("global_head_dim", minimum=2, default=512)
    global_kv_heads = text.get("num_global_key_value_heads")
    saved = text.get("per_layer_config")
    if saved is None:
        full: dict[str, int] = {"head_dim": global_head_dim}
        if global_kv_heads is not None and text.flag("attention_k_eq_v", default=False):
            full["num_key_value_heads"] = text.integer("num_global_key_value_heads")
        return [full if t == "full_attention" else {} for t in layer_types]
    overrides: list[dict[str, int]] = [{} for _ in layer_types]
    try:
        for key, values in saved.items():
            overrides[int(key)] = {k: v for k, v in values.items() if not (k == "skip" and not v)}
    except (AttributeError, ValueError, IndexError) as err:
        raise text.malformed("per_layer_config", "a map from layer number to fields") from err
    for i, override in enumerate(overrides):
        for name, value in override.items():
            if name not in ("head_dim", "num_key_value_heads"):
                raise UnsupportedError(
                    f"config.json: `per_layer_config` changes `{name}` of layer {i}, which is not "
                    "implemented",
                    hint=NOT_THIS_VARIANT,
                )
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"config.json: `per_layer_config` gives layer {i} `{name}` = {value!r}; "
                    "expected a positive integer",
                    hint=AS_PUBLISHED,
                )
    return overrides


def _weights(
    text: ConfigReader, settings: Gemma4Config, *, width: int
) -> tuple[list[Weight], dict[str, Unused]]:
    hidden, layers = settings.hidden_size, len(settings.attentions)
    bias = text.flag("attention_bias", default=False)
    double_wide = text.flag("use_double_wide_mlp", default=False)
    weights = gemma.per_layer_input_weights(num_layers=layers, hidden=hidden, width=width)
    unused: dict[str, Unused] = {}
    for i, attention in enumerate(settings.attentions):
        used, dead = gemma.attention_weights(attention, hidden=hidden, bias=bias)
        wide = double_wide and not attention.owns_cache
        weights += used
        weights += decoder.mlp_weights(
            i, hidden=hidden, intermediate=text.integer("intermediate_size") * (2 if wide else 1)
        )
        weights += gemma.norm_weights(i, hidden=hidden)
        weights.append(Weight(f"layers.{i}.layer_scalar", (1,), is_buffer=True))
        unused |= dead
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict):
        raise text.malformed("rope_parameters", "an object with one entry for each layer type")
    weights += gemma.rotary_weights(list(settings.attentions), rope)
    weights.append(Weight("norm.weight", (hidden,)))
    return weights, unused


def _placeholder_aliases(config: dict[str, Any], num_rows: int, pad: int) -> dict[int, int]:
    """Placeholder ids look up the padding row. Source: transformers `Gemma4Model.forward`."""
    reader = ConfigReader(config, where="config.json")
    ids = [reader.get(name, default) for name, default in PLACEHOLDERS.items()]
    return {i: pad for i in ids if type(i) is int and 0 <= i < num_rows and i != pad}
