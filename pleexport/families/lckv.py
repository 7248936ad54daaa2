"""LCKV: a Llama whose layers share keys and values, also those of layers above.

A layer that attends to one above sees the keys and values of earlier tokens only, since the own
ones are not there yet; the first token finds zeros. So a token has to pass all layers before the
next one begins. Source: arXiv 2405.10637; github.com/whyNLP/LCKV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pleexport.families import decoder, llama
from pleexport.families.config_reader import ConfigReader
from pleexport.model import Cache, GraphInputs, GraphOutputs, Model, Reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pleexport.families.layers import Parameters

MODEL_TYPES = ("lckv-llama",)
DEFAULT_WINDOW = 4096
# How the original approximates what is computed exactly here, and how it trains.
APPROXIMATIONS = ("forward_passes", "backward_passes", "use_sequential", "num_encoders")


@dataclass(frozen=True)
class Attended:
    """What a layer attends to.

    Attributes:
        layer: whose keys and values.
        window: positions that a token sees, its own included; None for all.
        strict: it does not see its own.
    """

    layer: int
    window: int | None
    strict: bool


def configure(config: dict[str, Any], *, dtype: str) -> Model:
    """Read a config.json; see `model.Family.configure`."""
    reader = ConfigReader(config, where="config.json")
    c = llama.read_config(reader)
    for name in APPROXIMATIONS:
        reader.get(name)
    attended = _attended(reader, c.layers)
    above = any(one.layer > i for i, one in enumerate(attended))
    return llama.build_model(
        config,
        reader,
        c,
        family="lckv",
        makes_keys={one.layer for one in attended},
        caches=_caches(c, attended),
        strict_attention=any(one.strict for one in attended),
        tokens_per_call=1 if above else None,
        forward=_Forward(c, attended),
        reference=_reference,
    )


def _attended(reader: ConfigReader, layers: int) -> tuple[Attended, ...]:
    """For each layer its number in `layer_types`, with an "s" where it slides."""
    strict = reader.flag("force_nodiag", default=False)
    window = reader.integer("sliding_window", default=DEFAULT_WINDOW)
    own = "_".join(str(i) for i in range(layers))
    text = reader.get("layer_types")
    text = own if text is None else text
    parts = text.split("_") if isinstance(text, str) else []
    numbers = [part.removesuffix("s") for part in parts]
    if len(parts) != layers or not all(
        n.isascii() and n.isdigit() and len(n) < 6 and int(n) < layers for n in numbers
    ):
        raise reader.malformed(
            "layer_types", f"the numbers of {layers} layers, joined by `_`, each with or without s"
        )
    attended = []
    for i, (part, number) in enumerate(zip(parts, map(int, numbers), strict=True)):
        one = Attended(number, window if part.endswith("s") else None, strict or number > i)
        if one.strict and one.window == 1:
            raise reader.malformed("sliding_window", "at least 2, as a token does not see itself")
        attended.append(one)
    return tuple(attended)


def _caches(c: llama.LlamaConfig, attended: tuple[Attended, ...]) -> tuple[Cache, ...]:
    """One for each layer that is attended to, of all positions where any layer sees all."""
    windows: dict[int, int | None] = {}
    for one in attended:
        is_all = one.window is None or windows.get(one.layer, 0) is None
        windows[one.layer] = None if is_all else one.window
    return tuple(
        Cache(
            i,
            c.kv_heads,
            c.head_dim,
            windows[i],
            shared_by=tuple(j for j, one in enumerate(attended) if one.layer == i and j != i),
        )
        for i in sorted(windows)
    )


def _reference(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Reference:
    from pleexport.references.lckv import LckvReference

    return LckvReference(tensors, config)


@dataclass(frozen=True)
class _Forward:
    """LCKV's logits."""

    config: llama.LlamaConfig
    attended: tuple[Attended, ...]

    def __call__(self, w: Parameters, inputs: GraphInputs) -> GraphOutputs:
        c, x_BTH, hidden = self.config, inputs.rows["inputs_embeds"], []
        context = decoder.AttentionContext(w, inputs)
        for i, one in enumerate(self.attended):
            layer = w.below(f"layers.{i}")
            attention = layer.below("self_attn")
            normed = layer.rms_norm("input_layernorm", x_BTH, c.eps)
            if i in context.caches:
                context.write(i, *llama.key_value(attention, normed, c, context))
            attended = context.attend(
                llama.query(attention, normed, c, context),
                kv_layer=one.layer,
                window=one.window,
                strict=one.strict,
            )
            x_BTH = llama.finish_layer(layer, x_BTH, attended, c)
            hidden.append(x_BTH)
        return GraphOutputs(llama.logits(w, x_BTH, inputs, c), context.caches, hidden)
