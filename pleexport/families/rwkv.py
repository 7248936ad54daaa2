"""RWKV with DeepEmbed: 7a, 7b and 8 rc00, and its hybrid; recognised by their tensors.

Every layer has a row for each token that changes its feed-forward part. 7b and the hybrid also
attend to all earlier tokens, with keys and values that rows change (DeepEmbedAttention).

Shape suffixes: B = 1 sequence, T tokens, C width, H heads of size N, D width of
DeepEmbedAttention's keys. Source: github.com/BlinkDL/RWKV-LM, RWKV-v7; arXiv 2503.14456.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.families.decoder import AttentionContext, linear
from pleexport.model import (
    Cache,
    Fold,
    GraphInputs,
    GraphOutputs,
    Model,
    ReadRows,
    Reference,
    Rows,
    State,
    Table,
    Unused,
    Weight,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pleexport.families.layers import Parameters

Shapes = Mapping[str, tuple[int, ...]]

_SAVED_WHOLE = "save the model again with all its tensors, from the code that trained it"
# Nothing in these models knows a longest text.
MAX_CONTEXT = 1 << 20
END_OF_TEXT = 0
# The original's own numbers, whatever the sizes.
LAYER_NORM_EPS = 1e-5
HEAD_NORM_EPS = 64e-5
L2_NORM_EPS = 1e-12
LOG_DECAY = -0.606531


@dataclass(frozen=True)
class TokenAttention:
    """What differs between the two kinds of DeepEmbedAttention.

    Attributes:
        tables: the row that multiplies keys, and that for values.
        key, value: the two matrices that make keys, and values, ahead of the rows.
        transposed: these matrices are stored `[inputs, outputs]`.
        shifts: queries, keys and values mix with those of the token before.
        cap, divisor: scores are cap * tanh(q k / divisor).
    """

    tables: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    transposed: bool
    shifts: bool
    cap: float
    divisor: float


@dataclass(frozen=True)
class Variant:
    """What differs between the published variants.

    Attributes:
        marks: tensors of block 0 that only this variant and those with more marks have.
        embed: the feed-forward's table.
        gates: its rows are matrices that gate the feed-forward's inner values; otherwise they scale
            its output.
        normalizes: the embedding goes through `ln0`, and is projected onto the other tables.
    """

    family: str
    marks: tuple[str, ...]
    embed: str
    gates: bool
    normalizes: bool
    attention: TokenAttention | None = None


_ATTENTION_7B = TokenAttention(
    ("qkv.k_emb", "qkv.v_emb"), ("k1", "k2"), ("v1", "v2"), True, True, cap=64.0, divisor=1024.0
)
_ATTENTION_8 = TokenAttention(
    ("qkv.ennk", "qkv.emm"), ("kk", "kkup"), ("vv", "vvup"), False, False, cap=32.0, divisor=512.0
)
# Those with more marks first.
VARIANTS = (
    Variant("rwkv7b", ("ffn.s_emb", "qkv.k_emb"), "ffn.s_emb", True, True, _ATTENTION_7B),
    Variant("rwkv7a", ("ffn.s_emb",), "ffn.s_emb", True, True),
    Variant("rwkv8-hybrid", ("ffn.enn", "qkv.ennk"), "ffn.enn", False, False, _ATTENTION_8),
    Variant("rwkv8", ("ffn.enn",), "ffn.enn", False, True),
)


def recognize(shapes: Shapes) -> Model | None:
    """See `model.UnconfiguredFamily.recognize`."""
    if not {"emb.weight", "blocks.0.att.receptance.weight"} <= shapes.keys():
        return None
    for variant in VARIANTS:
        if all(f"blocks.0.{mark}.weight" in shapes for mark in variant.marks):
            return _model(variant, shapes)
    raise UnsupportedError(
        "this RWKV model has no DeepEmbed tables (`ffn.s_emb` or `ffn.enn`), so there is nothing "
        "to split off",
        hint="use a general exporter for it",
    )


def _model(variant: Variant, shapes: Shapes) -> Model:
    sizes = _Sizes.read(variant, shapes)
    weights, unused = _weights(variant, sizes, shapes)
    attention = variant.attention
    states = []
    for i in range(sizes.layers):
        states += [
            State(f"{i}.att_x", (sizes.width,)),
            State(f"{i}.ffn_x", (sizes.width,)),
            State(f"{i}.wkv", (sizes.heads, sizes.head_size, sizes.head_size)),
        ]
        if attention and attention.shifts:
            states += [
                State(f"{i}.query", (sizes.key_width,)),
                State(f"{i}.key", (sizes.key_width,)),
                State(f"{i}.value", (sizes.width,)),
            ]
    return Model(
        family=variant.family,
        num_layers=sizes.layers,
        vocab_size=sizes.vocab,
        num_rows=sizes.vocab,
        max_context=MAX_CONTEXT,
        tables=tuple(_tables(variant, sizes, shapes)),
        weights=tuple(weights),
        caches=_caches(variant, sizes),
        states=tuple(states),
        forward=_Forward(variant, sizes),
        unused=unused,
        eos_token_ids=(END_OF_TEXT,),
        reference=_reference,
    )


def _caches(variant: Variant, sizes: _Sizes) -> tuple[Cache, ...]:
    """Those of DeepEmbedAttention, one a layer."""
    layers = range(sizes.layers if variant.attention else 0)
    return tuple(Cache(i, 1, sizes.key_width, None, value_dim=sizes.width) for i in layers)


def _reference(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Reference:
    from pleexport.references.rwkv import RwkvReference

    return RwkvReference(tensors)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model, from the shapes of a few of its tensors.

    Attributes:
        key_width: of DeepEmbedAttention's keys; 0 without.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    head_size: int
    feed_forward: int
    key_width: int

    @staticmethod
    def read(variant: Variant, shapes: Shapes) -> _Sizes:
        vocab, width = _matrix(shapes, "emb.weight")
        heads, head_size = _matrix(shapes, "blocks.0.att.r_k")
        if heads * head_size != width:
            raise CheckpointError(
                f"tensor `blocks.0.att.r_k` has shape [{heads}, {head_size}], which are not "
                f"{width} elements as the rows of `emb.weight` have",
                hint=_SAVED_WHOLE,
            )
        blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
        key_width = _matrix(shapes, "blocks.0.qkv.qq.weight")[0] if variant.attention else 0
        return _Sizes(
            vocab=vocab,
            width=width,
            layers=len(blocks),
            heads=heads,
            head_size=head_size,
            feed_forward=_matrix(shapes, "blocks.0.ffn.key.weight")[0],
            key_width=key_width,
        )


def _matrix(shapes: Shapes, key: str) -> tuple[int, int]:
    shape = shapes.get(key)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise CheckpointError(f"tensor `{key}` {found}; expected a matrix", hint=_SAVED_WHOLE)
    return shape[0], shape[1]


def _tables(variant: Variant, sizes: _Sizes, shapes: Shapes) -> Iterator[Table]:
    norm = {f"blocks.0.ln0.{name}": (sizes.width,) for name in ("weight", "bias")}
    yield Table(
        name="emb",
        keys=("emb.weight",),
        rows=sizes.vocab,
        layers=None,
        width=sizes.width,
        graph_input="inputs_embeds",
        fold=Fold(norm, _normalized_embedding) if variant.normalizes else None,
    )
    names = {"deep_embeds": variant.embed}
    if variant.attention:
        names |= dict(zip(("key_embeds", "value_embeds"), variant.attention.tables, strict=True))
    for graph_input, name in names.items():
        keys = tuple(f"blocks.{i}.{name}.weight" for i in range(sizes.layers))
        width = _matrix(shapes, keys[0])[1]
        rank = _matrix(shapes, "blocks.0.ffn.s1")[1] if variant.gates else 0
        if graph_input == "deep_embeds" and variant.gates and width != rank**2:
            raise CheckpointError(
                f"tensor `{keys[0]}` has rows of {width} elements, which are no matrix of {rank} x "
                f"{rank}, as `blocks.0.ffn.s1` asks for",
                hint=_SAVED_WHOLE,
            )
        fold = None
        if variant.gates:
            projections = {
                f"blocks.{i}.{name}_x.weight": (width, sizes.width) for i in range(sizes.layers)
            }
            sources = {"emb.weight": (sizes.vocab, sizes.width)} | norm | projections
            fold = Fold(sources, _Projected(keys, tuple(projections)))
        yield Table(name, keys, sizes.vocab, sizes.layers, width, graph_input, fold=fold)


def _normalized_embedding(read: ReadRows, rows: Rows) -> NDArray[np.float32]:
    """The embedding after `ln0`, `[n, C]`."""
    x = read("emb.weight", rows)
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(LAYER_NORM_EPS))
    weight, bias = (read(f"blocks.0.ln0.{name}", slice(None)) for name in ("weight", "bias"))
    normalized: NDArray[np.float32] = x * weight + bias
    return normalized


@dataclass(frozen=True)
class _Projected:
    """Rows plus the normalised embedding, projected; by layer the keys of both."""

    keys: tuple[str, ...]
    projections: tuple[str, ...]

    def __call__(self, read: ReadRows, rows: Rows) -> NDArray[np.float32]:
        embedding = _normalized_embedding(read, rows)
        return np.concatenate(
            [
                read(key, rows) + embedding @ read(projection, slice(None)).T
                for key, projection in zip(self.keys, self.projections, strict=True)
            ],
            axis=1,
        )


def _weights(
    variant: Variant, sizes: _Sizes, shapes: Shapes
) -> tuple[list[Weight], dict[str, Unused]]:
    width, weights, unused = sizes.width, [], dict[str, Unused]()

    def vector(name: str, size: int) -> Weight:
        return Weight(name, (size,), leading_ones=2 if len(shapes.get(name, ())) == 3 else 0)

    def norm(name: str, size: int) -> list[Weight]:
        return [vector(f"{name}.{part}", size) for part in ("weight", "bias")]

    def low_rank(first: str, second: str, outputs: int, *, transposed: bool = True) -> list[Weight]:
        shape = _matrix(shapes, first if transposed else f"{first}.weight")
        rank = shape[1] if transposed else shape[0]
        return [
            Weight(
                f"{name}.weight",
                shape,
                "sensitive",
                key=name if transposed else None,
                transposed=transposed,
            )
            for name, shape in ((first, (rank, width)), (second, (outputs, rank)))
        ]

    for i in range(sizes.layers):
        att, ffn, qkv = (f"blocks.{i}.{part}" for part in ("att", "ffn", "qkv"))
        weights += norm(f"blocks.{i}.ln1", width) + norm(f"blocks.{i}.ln2", width)
        weights += norm(f"{att}.ln_x", width)
        weights += [vector(f"{att}.x_{name}", width) for name in "rwkvag"]
        weights += [vector(f"{att}.{name}", width) for name in ("w0", "a0", "k_k", "k_a")]
        weights.append(Weight(f"{att}.r_k", (sizes.heads, sizes.head_size)))
        for name in ("receptance", "output", "key", "value"):
            weights += linear(f"{att}.{name}", width, width)
        for name in "wag":
            weights += low_rank(f"{att}.{name}1", f"{att}.{name}2", width)
        mix = [vector(f"{att}.v0", width)]
        if i > 0 or f"{att}.v1" in shapes:
            mix += low_rank(f"{att}.v1", f"{att}.v2", width)
        if i > 0:
            weights += mix
        else:  # the first layer's values are what the others mix in
            reason = "the first layer mixes no values of an earlier one"
            unused |= {w.source_key: Unused(w.source_shape, reason) for w in mix}
        weights.append(vector(f"{ffn}.x_k", width))
        weights += linear(f"{ffn}.key", sizes.feed_forward, width)
        weights += linear(f"{ffn}.value", width, sizes.feed_forward)
        if variant.gates:
            weights += low_rank(f"{ffn}.s1", f"{ffn}.s2", sizes.feed_forward)
            weights.append(vector(f"{ffn}.s0", sizes.feed_forward))
        if attention := variant.attention:
            query = (("q", sizes.key_width), ("k", sizes.key_width), ("v", width))
            weights += linear(f"{qkv}.qq", sizes.key_width, width, precision="sensitive")
            for pair, outputs in ((attention.key, sizes.key_width), (attention.value, width)):
                first, second = (f"{qkv}.{name}" for name in pair)
                weights += low_rank(first, second, outputs, transposed=attention.transposed)
            for name, size in query:
                weights += norm(f"{qkv}.ln{name}", size)
                if attention.shifts:
                    weights.append(vector(f"{qkv}.x_{name}", size))
    if not variant.normalizes:
        for part in ("weight", "bias"):
            unused[f"blocks.0.ln0.{part}"] = Unused((width,), "the original does not apply it")
    weights += norm("ln_out", width)
    weights.append(Weight("head.weight", (sizes.vocab, width), "head"))
    return weights, unused


@dataclass(frozen=True)
class _Forward:
    """Logits of RWKV with DeepEmbed."""

    variant: Variant
    sizes: _Sizes

    def __call__(self, w: Parameters, inputs: GraphInputs) -> GraphOutputs:
        x_BTC = inputs.rows["inputs_embeds"]
        first_BTC: Tensor | None = None
        states: dict[str, Tensor] = {}
        context = AttentionContext(w, inputs)
        hidden = []
        for i in range(self.sizes.layers):
            block = w.below(f"blocks.{i}")
            before = {name: inputs.states.get(f"{i}.{name}") for name in _STATES}
            rows = {n: v[:, :, i] for n, v in inputs.rows.items() if n != "inputs_embeds"}
            layer = _Layer(self.variant, self.sizes, block, rows, before)
            added = layer.time_mix(block.layer_norm("ln1", x_BTC, LAYER_NORM_EPS), first_BTC)
            first_BTC = layer.value_BTC if first_BTC is None else first_BTC
            if self.variant.attention:
                added = added + layer.attend(x_BTC, i, self.variant.attention, context)
            x_BTC = x_BTC + added
            x_BTC = x_BTC + layer.channel_mix(block.layer_norm("ln2", x_BTC, LAYER_NORM_EPS))
            states |= {f"{i}.{name}": value for name, value in layer.after.items()}
            hidden.append(x_BTC)
        x_BTC = x_BTC.index_select(1, inputs.logit_positions)
        logits = w.linear("head", w.layer_norm("ln_out", x_BTC, LAYER_NORM_EPS))
        return GraphOutputs(logits, context.caches, hidden, states)


_STATES = ("att_x", "ffn_x", "wkv", "query", "key", "value")


class _Layer:
    """One layer of one call; `after` fills with the states that it hands on."""

    def __init__(
        self,
        variant: Variant,
        sizes: _Sizes,
        block: Parameters,
        rows: Mapping[str, Tensor],
        before: Mapping[str, Any],
    ) -> None:
        self._variant, self._sizes = variant, sizes
        self._block, self._rows, self._before = block, rows, before
        self.after: dict[str, Tensor] = {}
        self.value_BTC: Tensor

    def time_mix(self, x_BTC: Tensor, first_BTC: Tensor | None) -> Tensor:
        """What the recurrence adds, `[B, T, C]`.

        Args:
            first_BTC: the values of layer 0; None in layer 0.
        """
        import torch
        import torch.nn.functional as F  # noqa: N812

        from pleexport import operators

        w = self._block.below("att")
        shift = self._shifted("att_x", x_BTC) - x_BTC
        x = {name: x_BTC + shift * w[f"x_{name}"] for name in "rwkvag"}
        receptance, key, value = (
            w.linear(name, x[name[0]]) for name in ("receptance", "key", "value")
        )
        decay = w["w0"] + w.linear("w2", torch.tanh(w.linear("w1", x["w"])))
        rate = torch.sigmoid(w["a0"] + w.linear("a2", w.linear("a1", x["a"])))
        gate = w.linear("g2", torch.sigmoid(w.linear("g1", x["g"])))
        if first_BTC is not None:
            share = torch.sigmoid(w["v0"] + w.linear("v2", w.linear("v1", x["v"])))
            value = value + (first_BTC - value) * share
        self.value_BTC = value
        to_remove = self._heads(key * w["k_k"])
        length = torch.linalg.vector_norm(to_remove, dim=-1, keepdim=True)
        removed = to_remove / length.clamp_min(L2_NORM_EPS)
        key = key * (1 + (rate - 1) * w["k_a"])

        log_decay = self._heads(LOG_DECAY * torch.sigmoid(decay))
        r, k, v = self._heads(receptance), self._heads(key), self._heads(value)
        read, self.after["wkv"] = operators.wkv7(
            r, log_decay, k, v, -removed, removed * self._heads(rate), self._before["wkv"]
        )
        read = F.layer_norm(read, (self._sizes.head_size,), eps=HEAD_NORM_EPS)
        read = read.reshape(x_BTC.shape)
        read = read * w["ln_x.weight"] + w["ln_x.bias"]
        bonus = (r * k * w["r_k"]).sum(-1, keepdim=True) * v
        read = read + bonus.reshape(x_BTC.shape)
        return w.linear("output", read * gate)

    def channel_mix(self, x_BTC: Tensor) -> Tensor:
        """What the feed-forward part adds, `[B, T, C]`."""
        import torch

        from pleexport.families import layers

        w, row = self._block.below("ffn"), self._rows["deep_embeds"]
        shifted = x_BTC + (self._shifted("ffn_x", x_BTC) - x_BTC) * w["x_k"]
        inner = torch.square(torch.relu(w.linear("key", shifted)))
        if not self._variant.gates:
            return w.linear("value", inner) * row
        low = w.linear("s1", x_BTC).unsqueeze(-2)
        rank = low.shape[-1]
        gate = (low @ layers.split_last(row, rank, rank)).squeeze(-2)
        return w.linear("value", inner * (w.linear("s2", gate) + w["s0"]))

    def attend(
        self,
        x_BTC: Tensor,
        index: int,
        attention: TokenAttention,
        context: AttentionContext,
    ) -> Tensor:
        """What DeepEmbedAttention of layer `index` adds, `[B, T, C]`.

        Keys and values are kept as they are attended to, so that only new tokens need rows.
        """
        import torch

        w = self._block.below("qkv")

        def low_rank(names: tuple[str, str]) -> Tensor:
            return w.linear(names[1], w.linear(names[0], x_BTC))

        made = {
            "query": w.linear("qq", x_BTC),
            "key": low_rank(attention.key) * self._rows["key_embeds"],
            "value": torch.tanh(low_rank(attention.value)) * self._rows["value_embeds"],
        }
        for name, x in made.items():
            if attention.shifts:
                made[name] = x + (self._shifted(name, x) - x) * w[f"x_{name[0]}"]
            made[name] = w.layer_norm(f"ln{name[0]}", made[name], LAYER_NORM_EPS).unsqueeze(2)
        context.write(index, made["key"], made["value"])
        return context.attend(
            made["query"] * (attention.cap / attention.divisor),
            kv_layer=index,
            window=None,
            softcap=attention.cap,
        )

    def _shifted(self, state: str, x_BTC: Tensor) -> Tensor:
        """For each token what the one before had; keeps the last for the next call."""
        from pleexport.families import layers

        self.after[state] = x_BTC[:, -1]
        return layers.token_shift(x_BTC, self._before[state])

    def _heads(self, x_BTC: Tensor) -> Tensor:
        from pleexport.families import layers

        return layers.split_last(x_BTC, self._sizes.heads, self._sizes.head_size)
