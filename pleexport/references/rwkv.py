"""RWKV with DeepEmbed tables, one token at a time, from the raw tensors of a checkpoint.

Four variants: 7a, 7b, 8 rc00 and the 8 rc00 hybrid. 7b and the hybrid add DeepEmbed attention
(DEA) to the recurrence. Written to be read next to the originals, not to be fast, and apart from
the code that exports, so that the two can be compared.

Shape suffixes: C width, H heads, N head size, F feed-forward width, L layers, V vocabulary,
T tokens so far, D width of DEA's queries and keys, R rank of a DeepEmbed row, W = R * R (7a, 7b)
or C (8 rc00, hybrid) its elements.

Source: BlinkDL/RWKV-LM `RWKV-v7/rwkv_{v7a,v7b,v8_rc00,v8_rc00_hybrid}_demo.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pleexport.errors import UnsupportedError

# All are literals of the originals, whatever the sizes of a model.
LAYER_NORM_EPS = 1e-5
GROUP_NORM_EPS = 64e-5
L2_NORM_EPS = 1e-12
LOG_DECAY = -0.606531  # -exp(-0.5)


@dataclass(frozen=True)
class Attention:
    """What tells DEA of 7b from DEA of the hybrid.

    Attributes:
        key, value: the two factors of the projection, below `qkv.`.
        cap, divisor: scores are `cap * tanh(q k / divisor)`; also for keys that are not 256 wide.
        token_shift: queries, keys and values are mixed with those of the token before.
    """

    key: tuple[str, str]
    value: tuple[str, str]
    cap: float
    divisor: float
    token_shift: bool


@dataclass(frozen=True)
class Variant:
    """One published architecture.

    Attributes:
        tables: by graph input, the name of a layer's lookup table.
        embeds_norm: the embedding is normalised by `ln0`; the original of the hybrid does not.
        projects_embeds: a row has the embedding, projected by `{table}_x`, added to it.
        matrix_rows: a row of `deep_embeds` is a matrix inside the feed-forward; else a factor of
            its output.
    """

    name: str
    tables: Mapping[str, str]
    embeds_norm: bool
    projects_embeds: bool
    matrix_rows: bool
    attention: Attention | None = None


# Those with more tables come first: their keys include the keys of those with fewer.
VARIANTS = (
    Variant(
        name="RWKV-7b",
        tables={
            "deep_embeds": "ffn.s_emb",
            "key_embeds": "qkv.k_emb",
            "value_embeds": "qkv.v_emb",
        },
        embeds_norm=True,
        projects_embeds=True,
        matrix_rows=True,
        attention=Attention(
            key=("k1", "k2"), value=("v1", "v2"), cap=64.0, divisor=1024.0, token_shift=True
        ),
    ),
    Variant(
        name="RWKV-7a",
        tables={"deep_embeds": "ffn.s_emb"},
        embeds_norm=True,
        projects_embeds=True,
        matrix_rows=True,
    ),
    Variant(
        name="RWKV-8 rc00 hybrid",
        tables={
            "deep_embeds": "ffn.enn",
            "key_embeds": "qkv.ennk",
            "value_embeds": "qkv.emm",
        },
        embeds_norm=False,
        projects_embeds=False,
        matrix_rows=False,
        attention=Attention(
            key=("kk.weight", "kkup.weight"),
            value=("vv.weight", "vvup.weight"),
            cap=32.0,
            divisor=512.0,
            token_shift=False,
        ),
    ),
    Variant(
        name="RWKV-8 rc00",
        tables={"deep_embeds": "ffn.enn"},
        embeds_norm=True,
        projects_embeds=False,
        matrix_rows=False,
    ),
)


def recognise(keys: Iterable[str]) -> Variant:
    """The variant that a checkpoint's keys belong to.

    Raises:
        UnsupportedError: it is none of `VARIANTS`.
    """
    held = set(keys)
    for variant in VARIANTS:
        if all(f"blocks.0.{table}.weight" in held for table in variant.tables.values()):
            return variant
    raise UnsupportedError(
        "the checkpoint is no RWKV with DeepEmbed tables: it has neither "
        "`blocks.0.ffn.s_emb.weight` (7a, 7b) nor `blocks.0.ffn.enn.weight` (8 rc00, hybrid)",
        hint="use a general exporter for it",
    )


class Weights:
    """The tensors below a prefix, in float32; each is widened when it is first used."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        prefix: str = "",
        widened: dict[str, Tensor] | None = None,
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._widened = {} if widened is None else widened

    def below(self, name: str) -> Weights:
        """The tensors whose names go on with `name` and a dot."""
        return Weights(self._tensors, f"{self._prefix}{name}.", self._widened)

    def __getitem__(self, name: str) -> Tensor:
        """A whole tensor; one of `[1, 1, C]` comes as `[C]`."""
        key = self._prefix + name
        if key not in self._widened:
            tensor = self._tensors[key].detach().float()
            self._widened[key] = tensor.flatten() if tensor.ndim == 3 else tensor
        return self._widened[key]

    def row(self, table: str, token_id: int) -> Tensor:
        """One row of a table; the table itself is neither widened nor kept."""
        return self._tensors[f"{self._prefix}{table}.weight"][token_id].detach().float()

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x times a matrix: those called `*.weight` are `[outputs, inputs]`, others transposed."""
        return self[name] @ x if name.endswith(".weight") else x @ self[name]

    def low_rank(self, first: str, second: str, x: Tensor) -> Tensor:
        """x times two matrices in turn."""
        return self.linear(second, self.linear(first, x))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Layer norm with its weight and bias."""
        weight, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        return F.layer_norm(x, x.shape, weight, bias, LAYER_NORM_EPS)


@dataclass
class LayerState:
    """What a layer remembers of a text.

    Attributes:
        att_x, ffn_x: the normalised inputs of the token before, `[C]`.
        wkv: the recurrence, `[H, N, N]`; values down, keys across.
        unshifted: DEA's query, key and value of the token before, ahead of shift and norm.
        keys, values: DEA's of all tokens, after shift and norm.
    """

    att_x: Tensor
    ffn_x: Tensor
    wkv: Tensor
    unshifted: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class RwkvReference:
    """Logits of a text, token by token.

    Args:
        tensors: the checkpoint as it is saved, of any float dtype.
    Raises:
        UnsupportedError: the keys are of no known variant.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._variant = recognise(tensors)
        self.name = f"plain {self._variant.name} reference"
        self._weights = Weights(tensors)
        count = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
        self._blocks = [self._weights.below(f"blocks.{i}") for i in range(count)]

    def start(self) -> list[LayerState]:
        """The state ahead of a text, by layer."""
        heads, size = self._blocks[0]["att.r_k"].shape
        width = heads * size
        return [
            LayerState(torch.zeros(width), torch.zeros(width), torch.zeros(heads, size, size))
            for _ in self._blocks
        ]

    def vectors(self, token_id: int) -> dict[str, Tensor]:
        """What a token looks up, by graph input.

        `inputs_embeds` is `[C]`, `deep_embeds` `[L, W]`; with DEA there are also `key_embeds`
        `[L, D]` and `value_embeds` `[L, C]`.
        """
        embeds_C = self._weights.row("emb", token_id)
        if self._variant.embeds_norm:
            embeds_C = self._blocks[0].layer_norm("ln0", embeds_C)
        found = {"inputs_embeds": embeds_C}
        for graph_input, table in self._variant.tables.items():
            rows = [block.row(table, token_id) for block in self._blocks]
            if self._variant.projects_embeds:
                projected = [b.linear(f"{table}_x.weight", embeds_C) for b in self._blocks]
                rows = [row + x for row, x in zip(rows, projected, strict=True)]
            found[graph_input] = torch.stack(rows)
        return found

    def step(
        self, vectors: Mapping[str, Tensor], state: list[LayerState]
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits `[V]` after one more token, and what each layer hands on, `[C]`.

        Args:
            vectors: what the token looks up.
            state: of the text up to here; updated in place.
        """
        x_C = vectors["inputs_embeds"]
        value_first_C: Tensor | None = None
        hidden = []
        for i, (block, layer) in enumerate(zip(self._blocks, state, strict=True)):
            rows = {name: rows[i] for name, rows in vectors.items() if name != "inputs_embeds"}
            mixed_C, value_C = time_mix(
                block.below("att"), block.layer_norm("ln1", x_C), value_first_C, layer
            )
            if value_first_C is None:
                value_first_C = value_C
            if self._variant.attention is not None:  # it takes x as it is, without `ln1`
                mixed_C = mixed_C + attend(
                    block.below("qkv"), x_C, rows, layer, self._variant.attention
                )
            x_C = x_C + mixed_C
            x_C = x_C + channel_mix(
                block.below("ffn"),
                block.layer_norm("ln2", x_C),
                rows["deep_embeds"],
                layer,
                matrix_rows=self._variant.matrix_rows,
            )
            hidden.append(x_C)
        logits_V: Tensor = self._weights["head.weight"] @ self._weights.layer_norm("ln_out", x_C)
        return logits_V, hidden


def time_mix(
    w: Weights, x_C: Tensor, value_first_C: Tensor | None, state: LayerState
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-7: what it adds, and the layer's own value; both `[C]`.

    Args:
        value_first_C: the value of layer 0 for the same token; None in layer 0.
    """
    heads, size = w["r_k"].shape
    back_C = state.att_x - x_C
    state.att_x = x_C
    x = {name: x_C + back_C * w[f"x_{name}"] for name in "rwkvag"}

    receptance_C = w.linear("receptance.weight", x["r"])
    key_C = w.linear("key.weight", x["k"])
    value_C = w.linear("value.weight", x["v"])
    decay = w["w0"] + w.linear("w2", torch.tanh(w.linear("w1", x["w"])))
    decay_C = torch.exp(LOG_DECAY * torch.sigmoid(decay))
    rate_C = torch.sigmoid(w["a0"] + w.low_rank("a1", "a2", x["a"]))
    gate_C = w.linear("g2", torch.sigmoid(w.linear("g1", x["g"])))

    removed_HN = F.normalize((key_C * w["k_k"]).view(heads, size), dim=-1, eps=L2_NORM_EPS)
    key_C = key_C * (1 + (rate_C - 1) * w["k_a"])
    if value_first_C is not None:
        share_C = torch.sigmoid(w["v0"] + w.low_rank("v1", "v2", x["v"]))
        value_C = value_C + (value_first_C - value_C) * share_C

    receptance_HN, key_HN, value_HN, decay_HN, rate_HN = (
        y.view(heads, size) for y in (receptance_C, key_C, value_C, decay_C, rate_C)
    )
    found_HN = torch.einsum("hij,hj->hi", state.wkv, removed_HN)
    state.wkv = (
        state.wkv * decay_HN[:, None, :]
        - found_HN[:, :, None] * (removed_HN * rate_HN)[:, None, :]
        + value_HN[:, :, None] * key_HN[:, None, :]
    )
    read_HN = torch.einsum("hij,hj->hi", state.wkv, receptance_HN)
    normed_HN = F.layer_norm(read_HN, (size,), eps=GROUP_NORM_EPS)  # a group is a head
    read_C = normed_HN.view(-1) * w["ln_x.weight"] + w["ln_x.bias"]
    bonus_H1 = (receptance_HN * key_HN * w["r_k"]).sum(dim=-1, keepdim=True)
    read_C = read_C + (bonus_H1 * value_HN).view(-1)
    return w.linear("output.weight", read_C * gate_C), value_C


def channel_mix(
    w: Weights, x_C: Tensor, deep_embed_W: Tensor, state: LayerState, *, matrix_rows: bool
) -> Tensor:
    """What the feed-forward adds, `[C]`.

    7a and 7b multiply its hidden values by a product of x, before the token shift, with the
    row as a matrix; 8 rc00 multiplies its output by the row.
    """
    shifted_C = x_C + (state.ffn_x - x_C) * w["x_k"]
    state.ffn_x = x_C
    hidden_F = torch.relu(w.linear("key.weight", shifted_C)) ** 2
    if not matrix_rows:
        return w.linear("value.weight", hidden_F) * deep_embed_W
    low_R = w.linear("s1", x_C)
    low_R = low_R @ deep_embed_W.view(len(low_R), len(low_R))
    return w.linear("value.weight", hidden_F * (w.linear("s2", low_R) + w["s0"]))


def attend(
    w: Weights, x_C: Tensor, rows: Mapping[str, Tensor], state: LayerState, kind: Attention
) -> Tensor:
    """What DEA adds, `[C]`: one head, no positions, scores capped."""
    query_D = w.linear("qq.weight", x_C)
    key_D = w.low_rank(*kind.key, x_C) * rows["key_embeds"]
    value_C = torch.tanh(w.low_rank(*kind.value, x_C)) * rows["value_embeds"]
    if kind.token_shift:
        new = [query_D, key_D, value_C]
        before = state.unshifted or [torch.zeros_like(y) for y in new]
        state.unshifted = new
        query_D, key_D, value_C = (
            y + (back - y) * w[f"x_{name}"]
            for name, y, back in zip("qkv", new, before, strict=True)
        )
    state.keys.append(w.layer_norm("lnk", key_D))
    state.values.append(w.layer_norm("lnv", value_C))
    dots_T = torch.stack(state.keys) @ w.layer_norm("lnq", query_D)
    scores_T = kind.cap * torch.tanh(dots_T / kind.divisor)
    return torch.softmax(scores_T, dim=0) @ torch.stack(state.values)
