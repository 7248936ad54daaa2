"""What the Llama-like families share: config, weights, attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pleexport.errors import UnsupportedError
from pleexport.families.config_reader import NOT_THIS_VARIANT, ConfigReader
from pleexport.families.decoder import (
    AttentionContext,
    gated_mlp,
    head_weight,
    linear,
    mlp_weights,
    read_eos,
)
from pleexport.families.rope import inverse_frequencies
from pleexport.model import (
    ACTIVATIONS,
    Cache,
    Forward,
    GraphInputs,
    MakeReference,
    Model,
    Table,
    Weight,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pleexport.families.layers import Parameters

INV_FREQ = "rotary_emb.inv_freq"
PREFIXES: dict[str, tuple[str, ...]] = {"model.": ("",), "": ()}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and options of a Llama."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str
    eps: float
    attention_bias: bool
    mlp_bias: bool
    max_context: int


def read_config(reader: ConfigReader) -> LlamaConfig:
    """Read the fields of transformers' `LlamaConfig`, rotary ones left out.

    Raises:
        CheckpointError, UnsupportedError: as `ConfigReader`.
    """
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=heads)
    head_dim = reader.integer("head_dim", minimum=2, default=max(hidden // heads, 2))
    check_heads(reader, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    reader.require("pretraining_tp", (None, 1))
    return LlamaConfig(
        vocab=reader.integer("vocab_size"),
        hidden=hidden,
        layers=reader.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=reader.integer("intermediate_size"),
        activation=reader.choice("hidden_act", ACTIVATIONS),
        eps=reader.positive("rms_norm_eps"),
        attention_bias=reader.flag("attention_bias", default=False),
        mlp_bias=reader.flag("mlp_bias", default=False),
        max_context=reader.integer("max_position_embeddings"),
    )


def check_heads(reader: ConfigReader, *, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise CheckpointError where head counts or sizes do not fit together."""
    if heads % kv_heads:
        raise reader.malformed("num_key_value_heads", f"a divisor of the {heads} heads")
    if head_dim % 2:
        raise reader.malformed("head_dim", "an even number, as rotary embeddings need it")


def rotary_weight(reader: ConfigReader, head_dim: int) -> Weight:
    """The rotary frequencies as a constant.

    Older configs hold `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.

    Raises:
        CheckpointError, UnsupportedError: as `families.rope.inverse_frequencies`.
    """
    scaling, parameters = reader.get("rope_scaling"), reader.get("rope_parameters")
    chosen: Any = parameters or scaling or {}
    if not isinstance(chosen, dict):
        name = "rope_parameters" if parameters else "rope_scaling"
        raise reader.malformed(name, "an object")
    values = {"rope_theta": reader.get("rope_theta", 10_000.0)} | chosen
    if values.get("rope_type", values.get("type")) == "proportional":
        raise UnsupportedError(
            "config.json: rope type 'proportional' is not a Llama's", hint=NOT_THIS_VARIANT
        )
    frequencies = inverse_frequencies(
        ConfigReader(values, where="config.json: rope_parameters"), head_dim=head_dim
    )
    return Weight(INV_FREQ, frequencies.shape, constant=frequencies, is_buffer=True)


def embedding(vocab: int, hidden: int) -> Table:
    """The input embedding."""
    return Table(
        name="embed_tokens",
        keys=("embed_tokens.weight",),
        rows=vocab,
        layers=None,
        width=hidden,
        graph_input="inputs_embeds",
    )


def layer_weights(c: LlamaConfig, *, makes_keys: Collection[int]) -> list[Weight]:
    """The tensors of all layers and the last norm.

    Args:
        makes_keys: the layers that have keys and values of their own.
    """
    weights = []
    for i in range(c.layers):
        prefix, width = f"layers.{i}.self_attn", c.heads * c.head_dim
        weights += linear(f"{prefix}.q_proj", width, c.hidden, bias=c.attention_bias)
        weights += linear(f"{prefix}.o_proj", c.hidden, width, bias=c.attention_bias)
        if i in makes_keys:
            for name in ("k_proj", "v_proj"):
                weights += linear(
                    f"{prefix}.{name}",
                    c.kv_heads * c.head_dim,
                    c.hidden,
                    bias=c.attention_bias,
                    precision="sensitive",
                )
        weights += mlp_weights(i, hidden=c.hidden, intermediate=c.intermediate, bias=c.mlp_bias)
        weights += [
            Weight(f"layers.{i}.{name}.weight", (c.hidden,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    return [*weights, Weight("norm.weight", (c.hidden,))]


def build_model(
    config: dict[str, Any],
    reader: ConfigReader,
    c: LlamaConfig,
    *,
    family: str,
    tables: tuple[Table, ...] = (),
    makes_keys: Collection[int],
    caches: tuple[Cache, ...],
    forward: Forward,
    reference: MakeReference,
    tokens_per_call: int | None = None,
    strict_attention: bool = False,
) -> Model:
    """The model of a Llama-like family; finishes the reader.

    Args:
        tables: those beside the input embedding.
        makes_keys: the layers that have keys and values of their own.
    Raises:
        CheckpointError, UnsupportedError: as `ConfigReader`.
    """
    head, unused = head_weight(config, reader, vocab=c.vocab, hidden=c.hidden, tied=False)
    rotary = rotary_weight(reader, c.head_dim)
    model = Model(
        family=family,
        num_layers=c.layers,
        vocab_size=c.vocab,
        num_rows=c.vocab,
        max_context=c.max_context,
        tables=(embedding(c.vocab, c.hidden), *tables),
        weights=(*layer_weights(c, makes_keys=makes_keys), rotary, head),
        caches=caches,
        tokens_per_call=tokens_per_call,
        strict_attention=strict_attention,
        forward=forward,
        unused=unused,
        text_prefixes=PREFIXES,
        eos_token_ids=read_eos(config, reader),
        reference=reference,
    )
    reader.finish()
    return model


def query(w: Parameters, x_BTH: Tensor, c: LlamaConfig, context: AttentionContext) -> Tensor:
    """Rotated queries `[B, T, N, D]`, scaled."""
    from pleexport import operators
    from pleexport.families import layers

    heads = layers.split_last(w.linear("q_proj", x_BTH), c.heads, c.head_dim)
    rotated: Tensor = operators.rotate(heads, *context.angles(INV_FREQ)) * c.head_dim**-0.5
    return rotated


def key_value(
    w: Parameters, x_BTH: Tensor, c: LlamaConfig, context: AttentionContext
) -> tuple[Tensor, Tensor]:
    """Rotated keys and plain values, both `[B, T, K, D]`."""
    from pleexport import operators
    from pleexport.families import layers

    key, value = (
        layers.split_last(w.linear(name, x_BTH), c.kv_heads, c.head_dim)
        for name in ("k_proj", "v_proj")
    )
    return operators.rotate(key, *context.angles(INV_FREQ)), value


def finish_layer(layer: Parameters, x_BTH: Tensor, attended: Tensor, c: LlamaConfig) -> Tensor:
    """What a layer hands on, `[B, T, H]`: its input, its attention, and its feed-forward part."""
    x_BTH = x_BTH + layer.linear("self_attn.o_proj", attended)
    normed = layer.rms_norm("post_attention_layernorm", x_BTH, c.eps)
    return x_BTH + gated_mlp(layer.below("mlp"), normed, c.activation)


def logits(w: Parameters, x_BTH: Tensor, inputs: GraphInputs, c: LlamaConfig) -> Tensor:
    """`[B, N, vocab]`, of the positions that want them."""
    x_BTH = x_BTH.index_select(1, inputs.logit_positions)
    return w.linear("lm_head", w.rms_norm("norm", x_BTH, c.eps))
