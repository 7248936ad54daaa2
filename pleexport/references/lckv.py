"""Layer-condensed KV cache, one token at a time: a Llama whose layers share keys and values.

`layer_types` has one number for each layer: the layer whose keys and values it attends to. A layer
above has not seen the token yet, so only earlier tokens count; the first token finds zeros.

Source: arXiv 2405.10637, section 2.1; whyNLP/LCKV, `configuration_lckv.py` (`lckv-llama`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pleexport.references.llama_value_embeddings import Llama, TextState, attend, rotate


def read_targets(config: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """For each layer, the layer that it attends to, and its window or None.

    A number in `layer_types` may end in "s": that layer sees `sliding_window` positions, its own
    included. Without `layer_types`, all layers attend to themselves.
    """
    own_layers = "_".join(map(str, range(config["num_hidden_layers"])))
    window = config.get("sliding_window", 4096)
    return [
        (int(part.removesuffix("s")), window if part.endswith("s") else None)
        for part in (config.get("layer_types") or own_layers).split("_")
    ]


class LckvReference:
    """LCKV; `force_nodiag` hides a token's own keys from it in every layer.

    Args:
        off_by_one: what whyNLP/LCKV `dd21716` computes when it decodes: a layer that attends to one
            above sees a zero key and value first, and misses those of the token just before.
    """

    name = "step-by-step LCKV"

    def __init__(
        self, tensors: Mapping[str, Tensor], config: dict[str, Any], *, off_by_one: bool = False
    ) -> None:
        self._llama = Llama(tensors, config)
        self._targets = read_targets(config)
        self._makes_keys = {target for target, _ in self._targets}
        self._strict: bool = config.get("force_nodiag", False)
        self._off_by_one = off_by_one

    def start(self) -> TextState:
        """An empty text."""
        return TextState()

    def vectors(self, token_id: int) -> dict[str, Tensor]:
        """What a token looks up, by graph input: `[H]`."""
        return {"inputs_embeds": self._llama.row("model.embed_tokens.weight", token_id)}

    def step(self, vectors: Mapping[str, Tensor], state: TextState) -> tuple[Tensor, list[Tensor]]:
        """Logits `[V]` after one more token, and what each layer hands on, `[H]`."""
        llama, t = self._llama, state.position
        x = vectors["inputs_embeds"]
        handed_on = []
        for i in range(llama.num_layers):
            n = llama.norm(f"layers.{i}.input_layernorm", x)
            query = rotate(llama.heads(i, "q_proj", n), t, llama.inv_freq)
            if i in self._makes_keys:
                key = rotate(llama.heads(i, "k_proj", n), t, llama.inv_freq)
                state.keys[i].append(key)
                state.values[i].append(llama.heads(i, "v_proj", n))
            x = x + llama.output(i, attend(query, *self._seen(i, state)))
            x = x + llama.feed_forward(i, x)
            handed_on.append(x)
        state.position += 1
        return llama.logits(x), handed_on

    def _seen(self, layer: int, state: TextState) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values that a layer sees at the state's position."""
        target, window = self._targets[layer]
        keys, values = state.keys[target], state.values[target]
        above = target > layer
        if above and self._off_by_one:
            nothing = torch.zeros(self._llama.kv_width).reshape(-1, self._llama.head_dim)
            keys, values = [nothing, *keys], [nothing, *values]
        end = state.position + 1
        first = 0 if window is None else max(0, end - window)
        seen = slice(first, end - 1 if above or self._strict else end)
        return keys[seen], values[seen]
