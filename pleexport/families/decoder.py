"""What decoders have in common, whatever their family: heads, feed-forward parts, attention.

Shape suffixes: B = 1 sequence, T tokens, H hidden, N heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pleexport.families.config_reader import ConfigReader
from pleexport.model import CONTEXT_BLOCK, GraphInputs, Precision, Unused, Weight, cache_steps

if TYPE_CHECKING:
    from torch import Tensor

    from pleexport.families.layers import Parameters


def read_eos(config: dict[str, Any], text: ConfigReader) -> tuple[int, ...]:
    """`eos_token_id`, of the whole model or of its text part: none, one or several."""
    eos = config.get("eos_token_id")
    eos = text.get("eos_token_id") if eos is None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise text.malformed("eos_token_id", "an id or a list of ids")
    return tuple(ids)


def linear(
    name: str,
    outputs: int,
    inputs: int,
    *,
    bias: bool = False,
    precision: Precision = "quantizable",
) -> list[Weight]:
    """The weight `[outputs, inputs]` of a linear layer, and its bias if it has one."""
    weight = Weight(f"{name}.weight", (outputs, inputs), precision)
    return [weight, Weight(f"{name}.bias", (outputs,))] if bias else [weight]


def mlp_weights(layer: int, *, hidden: int, intermediate: int, bias: bool = False) -> list[Weight]:
    """The gated feed-forward tensors of one layer."""
    return [
        *linear(f"layers.{layer}.mlp.gate_proj", intermediate, hidden, bias=bias),
        *linear(f"layers.{layer}.mlp.up_proj", intermediate, hidden, bias=bias),
        *linear(f"layers.{layer}.mlp.down_proj", hidden, intermediate, bias=bias),
    ]


def head_weight(
    config: dict[str, Any], text: ConfigReader, *, vocab: int, hidden: int, tied: bool
) -> tuple[Weight, dict[str, Unused]]:
    """The output head; a tied one reads the input embedding, whatever else a file holds.

    Args:
        tied: what a config means that does not say.
    """
    tied = text.flag("tie_word_embeddings", default=tied)
    if isinstance(config.get("tie_word_embeddings"), bool):
        tied = config["tie_word_embeddings"]
    name, shape = "lm_head.weight", (vocab, hidden)
    if tied:
        head = Weight(name, shape, "head", key="embed_tokens.weight")
        return head, {name: Unused(shape, "the head is tied to the input embedding")}
    return Weight(name, shape, "head"), {}


def gated_mlp(w: Parameters, x_BTH: Tensor, activation: str) -> Tensor:
    """A gated feed-forward part, `[B, T, H]`."""
    from pleexport.families import layers

    gate = layers.activation(activation, w.linear("gate_proj", x_BTH))
    return w.linear("down_proj", gate * w.linear("up_proj", x_BTH))


class AttentionContext:
    """What the attentions of one call share: positions, rotary angles, masks, caches.

    Once `narrow` was called, queries are the positions that want logits only.
    """

    def __init__(self, weights: Parameters, inputs: GraphInputs) -> None:
        self._weights = weights
        self._inputs = inputs
        self._query_ids = inputs.position_ids
        self._angles: dict[str, tuple[Tensor, Tensor]] = {}
        self._biases: dict[tuple[int | None, bool], Tensor] = {}
        # By whether a cache has a window, since all rings have one capacity.
        self._slots: dict[bool, Tensor] = {}
        self._held: dict[bool, Tensor] = {}
        self.caches = dict(inputs.caches)

    def narrow(self) -> None:
        """Drop the query positions whose logits are not wanted."""
        self._query_ids = self._inputs.position_ids.index_select(1, self._inputs.logit_positions)
        self._angles.clear()
        self._biases.clear()

    def angles(self, name: str) -> tuple[Tensor, Tensor]:
        """Rotary angles of the query positions."""
        from pleexport.families import layers

        if name not in self._angles:
            self._angles[name] = layers.rotary_angles(self._query_ids, self._weights[name])
        return self._angles[name]

    def write(self, layer: int, keys_BTKD: Tensor, values_BTKD: Tensor) -> None:
        """Put a layer's new keys and values into its cache.

        The weights may have the steps that a checkpoint was trained to round them to.
        """
        from pleexport.families import layers

        slides = self._inputs.windows[layer] is not None
        if slides not in self._slots:
            self._slots[slides] = layers.slots(
                self._inputs.position_ids, capacity=self._inputs.capacities[layer]
            )
        steps = [self._weights.optional(name) for name in cache_steps(layer)]
        self.caches[layer] = layers.update_cache(
            self.caches[layer], keys_BTKD, values_BTKD, self._slots[slides], steps
        )

    def attend(
        self,
        query_BQND: Tensor,
        *,
        kv_layer: int,
        window: int | None,
        strict: bool = False,
        softcap: float = 0.0,
    ) -> Tensor:
        """What the query positions find in a cache, `[B, Q, N * D]`; scores are not scaled.

        Args:
            kv_layer: the layer whose cache it is.
            window: positions that a token sees, its own included; None for all.
            strict: it does not see its own; the first token of a text finds zeros.
            softcap: of scores; 0 for none. For layers without a window only.
        """
        import torch

        from pleexport import operators

        cache, query_ids = self.caches[kv_layer], self._query_ids
        if strict:
            query_ids = query_ids - 1
            window = None if window is None else window - 1
        if self._inputs.windows[kv_layer] is None:
            attended: Tensor = operators.attend_context(
                query_BQND,
                list(cache),
                query_ids,
                self._held_by(kv_layer),
                CONTEXT_BLOCK,
                softcap,
                window or 0,
            )
        else:
            assert not softcap
            if (window, strict) not in self._biases:
                self._biases[window, strict] = operators.attention_bias(
                    query_ids, self._held_by(kv_layer), window=window
                )
            attended = operators.attend_window(query_BQND, *cache, self._biases[window, strict])
        return torch.where(query_ids.unsqueeze(2) >= 0, attended, 0.0) if strict else attended

    def _held_by(self, layer: int) -> Tensor:
        """The position in each slot of a layer's cache."""
        from pleexport.families import layers

        slides = self._inputs.windows[layer] is not None
        if slides not in self._held:
            self._held[slides] = layers.held_positions(
                self._inputs.position_ids, capacity=self._inputs.capacities[layer]
            )
        return self._held[slides]
