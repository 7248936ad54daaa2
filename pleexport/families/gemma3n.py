"""Gemma 3n (E2B, E4B): AltUp, LAuReL, activation sparsity and per-layer embeddings.

Source: transformers `models/gemma3n`. Shape suffixes as in `gemma`, and S AltUp streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from pleexport.dtypes import rounded
from pleexport.families import decoder, gemma
from pleexport.families.config_reader import ConfigReader
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
    from torch import Tensor

    from pleexport.families.layers import Parameters

MODEL_TYPES = ("gemma3n", "gemma3n_text")
DEFAULT_THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
# The original renormalises AltUp streams no further down than this mean square.
SMALLEST_MEAN_SQUARE = 1e-5


@dataclass(frozen=True)
class Gemma3nConfig:
    """The fields that the dense graph depends on.

    Attributes:
        sparsity: by layer, the share of gate activations that is cut off; 0 for none.
        router_scale, projection_scale, mix_scale: constants, rounded as the original holds them.
    """

    attentions: tuple[gemma.Attention, ...]
    first_shared_layer: int
    intermediate_sizes: tuple[int, ...]
    sparsity: tuple[float, ...]
    streams: int
    active: int
    correct_scale: bool
    activation: str
    final_softcap: float | None
    eps: float
    router_scale: float
    projection_scale: float
    mix_scale: float


def configure(config: dict[str, Any], *, dtype: str) -> Model:
    """Read a config.json; see `model.Family.configure`."""
    multimodal = "text_config" in config
    text = gemma.open_config(config)
    layers, hidden = text.integer("num_hidden_layers"), text.integer("hidden_size")
    embed_tokens, per_layer = gemma.tables(
        text, num_layers=layers, dtype=dtype, outside="error" if multimodal else "row 0"
    )
    shared = gemma.read_shared_layers(text, layers)
    settings = Gemma3nConfig(
        attentions=tuple(_attentions(text, layers, shared)),
        first_shared_layer=layers - shared,
        intermediate_sizes=tuple(_intermediate_sizes(text, layers)),
        sparsity=tuple(_sparsity(text, layers)),
        streams=text.integer("altup_num_inputs"),
        active=text.integer("altup_active_idx", minimum=0),
        correct_scale=text.flag("altup_correct_scale", default=True),
        activation=text.choice("hidden_activation", ACTIVATIONS),
        final_softcap=text.positive("final_logit_softcapping", default=30.0),
        eps=text.positive("rms_norm_eps"),
        router_scale=rounded(1 / hidden, dtype),
        projection_scale=rounded(hidden**-0.5, dtype),
        mix_scale=rounded(2**-0.5, dtype),
    )
    if settings.active >= settings.streams:
        raise text.malformed("altup_active_idx", f"less than {settings.streams}")
    text.get("altup_coef_clip")  # clips while training only
    weights, unused = _weights(text, settings, hidden=hidden, width=per_layer.width)
    head, unused_head = decoder.head_weight(
        config, text, vocab=embed_tokens.rows, hidden=hidden, tied=True
    )
    model = Model(
        family="gemma3n",
        num_layers=layers,
        vocab_size=embed_tokens.rows,
        num_rows=_text_rows(config, embed_tokens.rows, per_layer.rows),
        max_context=text.integer("max_position_embeddings"),
        tables=(embed_tokens, per_layer),
        weights=(*weights, head),
        caches=gemma.caches(settings.attentions),
        forward=_Forward(settings),
        unused=unused | unused_head,
        text_prefixes=gemma.TEXT_PREFIXES,
        ignored_prefixes=gemma.TOWERS,
        eos_token_ids=decoder.read_eos(config, text),
        published=PUBLISHED,
        counts_only_tables_out=True,
        transformers=gemma.transformers_original(
            "gemma3n_text", float_fields=frozenset({"altup_coef_clip"}), stream_axis=0
        ),
    )
    text.finish()
    return model


# Source: the Hugging Face parameter counts and model cards of the published checkpoints.
PUBLISHED = (
    Published("Gemma 3n E2B", 4_435_182_688, None, None, None, "1.91B"),
    Published("Gemma 3n E4B", 6_835_235_568, None, None, None, "about 4B"),
)


@dataclass(frozen=True)
class _Forward:
    """Gemma 3n's logits. Source: transformers `Gemma3nTextModel`, `Gemma3nTextDecoderLayer`."""

    config: Gemma3nConfig

    def __call__(self, w: Parameters, inputs: GraphInputs) -> GraphOutputs:
        from pleexport.families import layers

        config = self.config
        context = decoder.AttentionContext(w, inputs)
        per_layer_BTLP = gemma.per_layer_inputs(
            w,
            inputs.rows,
            projection_scale=config.projection_scale,
            mix_scale=config.mix_scale,
            eps=config.eps,
        )
        per_layer_BTP = gemma.by_layer(per_layer_BTLP)
        streams_BTSH, hidden = self._open_streams(w, inputs.rows["inputs_embeds"]), []
        for i in range(len(config.attentions)):
            if i == config.first_shared_layer:
                context.narrow()
                streams_BTSH = streams_BTSH.index_select(1, inputs.logit_positions)
                narrowed_BTLP = per_layer_BTLP.index_select(1, inputs.logit_positions)
                per_layer_BTP = gemma.by_layer(narrowed_BTLP)
            layer = w.below(f"layers.{i}")
            streams_BTSH = self._layer(layer, i, streams_BTSH, per_layer_BTP[i], context)
            hidden.append(streams_BTSH)
        if config.first_shared_layer == len(config.attentions):
            streams_BTSH = streams_BTSH.index_select(1, inputs.logit_positions)
        x_BTH = w.rms_norm("norm", self._close_streams(w, streams_BTSH), config.eps)
        logits = layers.softcap(w.linear("lm_head", x_BTH), config.final_softcap)
        return GraphOutputs(logits, context.caches, hidden)

    def _layer(
        self,
        w: Parameters,
        index: int,
        streams_BTSH: Tensor,
        per_layer_BTP: Tensor,
        context: decoder.AttentionContext,
    ) -> Tensor:
        import torch

        config = self.config
        predicted_BTSH = self._predict(w.below("altup"), streams_BTSH)
        active_BTH = predicted_BTSH[:, :, config.active]
        normed = w.rms_norm("input_layernorm", active_BTH, config.eps)
        low_rank = w.linear("laurel.linear_right", w.linear("laurel.linear_left", normed))
        laurel = normed + w.rms_norm("laurel.post_laurel_norm", low_rank, config.eps)
        attended = gemma.attend(w.below("self_attn"), normed, config.attentions[index], context)
        attended = w.rms_norm("post_attention_layernorm", attended, config.eps)
        x_BTH = (active_BTH + attended + laurel) / math.sqrt(2)

        normed = w.rms_norm("pre_feedforward_layernorm", x_BTH, config.eps)
        fed = self._feed_forward(w.below("mlp"), index, normed)
        x_BTH = x_BTH + w.rms_norm("post_feedforward_layernorm", fed, config.eps)

        corrected_BTSH = self._correct(w.below("altup"), predicted_BTSH, x_BTH)
        first_BTH = corrected_BTSH[:, :, config.active]
        if config.correct_scale:
            first_BTH = first_BTH * w["altup.correct_output_scale"]
        added = gemma.gate_per_layer_input(
            w, first_BTH, per_layer_BTP, activation=config.activation, eps=config.eps
        )
        # Stream 0 stays as it is, whichever stream is the active one.
        return torch.cat(
            (corrected_BTSH[:, :, :1], corrected_BTSH[:, :, 1:] + added.unsqueeze(2)), dim=2
        )

    def _feed_forward(self, w: Parameters, index: int, x_BTH: Tensor) -> Tensor:
        """Gated MLP whose gate keeps only what is far above its mean. Source: `_gaussian_topk`."""
        from pleexport.families import layers

        gate, sparsity = w.linear("gate_proj", x_BTH), self.config.sparsity[index]
        if sparsity > 0:
            mean = gate.mean(-1, keepdim=True)
            deviation = (gate - mean).square().mean(-1, keepdim=True).sqrt()
            cutoff = mean + deviation * NormalDist().inv_cdf(sparsity)
            gate = layers.activation("relu", gate - cutoff)
        gate = layers.activation(self.config.activation, gate)
        return w.linear("down_proj", gate * w.linear("up_proj", x_BTH))

    def _modalities(self, w: Parameters, x_BTH: Tensor) -> Tensor:
        """`[B, T, S]`: what the router makes of a stream."""
        routed = w.rms_norm("router_norm", x_BTH, self.config.eps) * self.config.router_scale
        return w.linear("modality_router", routed).tanh()

    def _predict(self, w: Parameters, streams_BTSH: Tensor) -> Tensor:
        """AltUp's prediction of every stream. Source: arXiv 2301.13310, algorithm 1."""
        from pleexport.families import layers

        modalities = self._modalities(w, streams_BTSH[:, :, self.config.active])
        mix_BTSS = layers.split_last(
            w.linear("prediction_coefs", modalities), self.config.streams, self.config.streams
        )
        predicted: Tensor = streams_BTSH + mix_BTSS @ streams_BTSH
        return predicted

    def _correct(self, w: Parameters, predicted_BTSH: Tensor, computed_BTH: Tensor) -> Tensor:
        """AltUp's correction by what the layer computed."""
        innovation_BTH = computed_BTH - predicted_BTSH[:, :, self.config.active]
        factors_BTS = w.linear("correction_coefs", self._modalities(w, computed_BTH)) + 1.0
        return predicted_BTSH + innovation_BTH.unsqueeze(2) * factors_BTS.unsqueeze(-1)

    def _open_streams(self, w: Parameters, x_BTH: Tensor) -> Tensor:
        """`[B, T, S, H]`: the embedding, and projections of it with its magnitude."""
        import torch

        streams = [x_BTH]
        for i in range(self.config.streams - 1):
            streams.append(_rescale(w.linear(f"altup_projections.{i}", x_BTH), like=x_BTH))
        return torch.stack(streams, dim=2)

    def _close_streams(self, w: Parameters, streams_BTSH: Tensor) -> Tensor:
        """`[B, T, H]`: the mean of all streams, projected back, with the magnitude of the first."""
        import torch

        first_BTH = streams_BTSH[:, :, 0]
        streams = [first_BTH]
        for i in range(self.config.streams - 1):
            projected = w.linear(f"altup_unembed_projections.{i}", streams_BTSH[:, :, i + 1])
            streams.append(_rescale(projected, like=first_BTH))
        return torch.stack(streams, dim=2).mean(dim=2)


def _rescale(x_BTH: Tensor, *, like: Tensor) -> Tensor:
    """x with the root mean square of `like`."""
    target = like.square().mean(-1, keepdim=True).sqrt()
    own = x_BTH.square().mean(-1, keepdim=True).clamp(min=SMALLEST_MEAN_SQUARE).sqrt()
    return x_BTH * target / own


def _text_rows(config: dict[str, Any], rows: int, per_layer_rows: int) -> int:
    """Ids that the text tables embed: all, or those before the first id of another modality."""
    if "text_config" not in config:
        return rows
    offsets = [
        tower.get("vocab_offset")
        for tower in (config.get("vision_config"), config.get("audio_config"))
        if isinstance(tower, dict)
    ]
    return min([rows, per_layer_rows, *(n for n in offsets if type(n) is int and n > 0)])


def _attentions(text: ConfigReader, layers: int, shared: int) -> list[gemma.Attention]:
    layer_types = gemma.read_layer_types(text, layers)
    kv_layers = gemma.kv_layers(layer_types, shared)
    window = text.integer("sliding_window")
    attentions: list[gemma.Attention] = []
    for i, layer_type in enumerate(layer_types):
        attention = gemma.Attention(
            layer=i,
            layer_type=layer_type,
            kv_layer=kv_layers[i],
            heads=text.integer("num_attention_heads"),
            kv_heads=text.integer("num_key_value_heads"),
            head_dim=text.integer("head_dim", minimum=2),
            window=window if layer_type == "sliding_attention" else None,
            value_is_key=False,
            eps=text.positive("rms_norm_eps"),
        )
        gemma.check_heads(attention, attentions)
        attentions.append(attention)
    return attentions


def _intermediate_sizes(text: ConfigReader, layers: int) -> list[int]:
    """One size for all layers, or a list."""
    if isinstance(text.get("intermediate_size"), list):
        sizes: list[int] = text.per_layer("intermediate_size", layers, int)
        if min(sizes) < 1:
            raise text.malformed("intermediate_size", "positive sizes")
        return sizes
    return [text.integer("intermediate_size")] * layers


def _sparsity(text: ConfigReader, layers: int) -> list[float]:
    """The list in the config, or the default: the first ten layers of a deep model are cut."""
    if not text.has("activation_sparsity_pattern"):
        text.get("activation_sparsity_pattern")
        sparse = 10 if layers > 10 else 0
        return [0.95] * sparse + [0.0] * (layers - sparse)
    values = text.per_layer("activation_sparsity_pattern", layers, (int, float))
    if not all(0 <= value < 1 for value in values):
        raise text.malformed("activation_sparsity_pattern", "shares from 0 to below 1")
    return [float(value) for value in values]


def _rope_parameters(text: ConfigReader) -> dict[str, Any]:
    """`rope_parameters`, or the older `rope_theta` and `rope_local_base_freq`."""
    saved = text.get("rope_parameters") or {}
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(name) or {}, dict) for name in gemma.LAYER_TYPES
    ):
        raise text.malformed("rope_parameters", "an object with one entry for each layer type")
    text.require("rope_scaling", (None,))
    parameters = {name: dict(saved.get(name) or {}) for name in gemma.LAYER_TYPES}
    older = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    for layer_type, name in older.items():
        theta = text.number(name, default=DEFAULT_THETA[layer_type])
        parameters[layer_type].setdefault("rope_theta", theta)
    return parameters


def _weights(
    text: ConfigReader, settings: Gemma3nConfig, *, hidden: int, width: int
) -> tuple[list[Weight], dict[str, Unused]]:
    layers, streams = len(settings.attentions), settings.streams
    bias, rank = text.flag("attention_bias", default=False), text.integer("laurel_rank")
    weights = gemma.per_layer_input_weights(num_layers=layers, hidden=hidden, width=width)
    unused: dict[str, Unused] = {}
    for i, attention in enumerate(settings.attentions):
        used, dead = gemma.attention_weights(attention, hidden=hidden, bias=bias)
        altup, laurel = f"layers.{i}.altup", f"layers.{i}.laurel"
        weights += used
        weights += decoder.mlp_weights(
            i, hidden=hidden, intermediate=settings.intermediate_sizes[i]
        )
        weights += gemma.norm_weights(i, hidden=hidden)
        weights += [
            *decoder.linear(f"{laurel}.linear_left", rank, hidden),
            *decoder.linear(f"{laurel}.linear_right", hidden, rank),
            Weight(f"{laurel}.post_laurel_norm.weight", (hidden,)),
            # A few hundred numbers that steer all streams: not worth a rounding error.
            *decoder.linear(f"{altup}.correction_coefs", streams, streams, precision="full"),
            *decoder.linear(f"{altup}.prediction_coefs", streams**2, streams, precision="full"),
            *decoder.linear(f"{altup}.modality_router", streams, hidden, precision="full"),
            Weight(f"{altup}.router_norm.weight", (hidden,)),
        ]
        unused |= dead
        scale = Weight(f"{altup}.correct_output_scale", (hidden,))
        if settings.correct_scale:
            weights.append(scale)
        else:
            unused[scale.name] = Unused(scale.shape, "`altup_correct_scale` is false")
    for i in range(streams - 1):
        weights += decoder.linear(f"altup_projections.{i}", hidden, hidden)
        weights += decoder.linear(f"altup_unembed_projections.{i}", hidden, hidden)
    weights += gemma.rotary_weights(list(settings.attentions), _rope_parameters(text))
    weights.append(Weight("norm.weight", (hidden,)))
    return weights, unused
