"""Caches that are written in place, and attention by ExecuTorch's own operators.

Shape suffixes: B = 1 sequence, T tokens, Q tokens that attend, N heads, K heads of a cache,
C slots of a cache, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
import torch
from torch import Tensor

from pleexport.backends.executorch.operators import operator
from pleexport.errors import UnsupportedError
from pleexport.operators import attention_bias

llama = torch.ops.llama


@dataclass(frozen=True)
class HeldCache:
    """A tensor `[B, C, K, D]` of a cache; whoever reads it reads what was written so far."""

    tensor: Tensor
    window: int | None


class Attention:
    """What the attentions of one pass share.

    Values are known by identity: they are the tracer's, and live as long as the pass.
    """

    def __init__(self, position_ids_BT: Tensor, logit_positions_Q: Tensor) -> None:
        self._positions = position_ids_BT
        self._logit_positions = logit_positions_Q
        # What positions of queries may be: those of all tokens, or of those that want logits.
        self._query_ids = [position_ids_BT]
        # Masks by what they were made from, which is kept so that ids stay unique.
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._start: Any = None

    def narrowed(self, x: Tensor, axis: int, index: Tensor) -> Tensor:
        """`index_select`, which is remembered where it selects positions of queries."""
        found = torch.index_select(x, axis, index)
        if x is self._positions and index is self._logit_positions:
            self._query_ids.append(found)
        return found

    def write(self, cache: HeldCache, new_BTKD: Tensor, slots_BT: Tensor) -> HeldCache:
        """Write new entries in place."""
        if cache.window is None:
            llama.update_cache(new_BTKD, cache.tensor, self._first(cache.tensor.shape[1]))
        else:
            llama.update_cache_with_indices(new_BTKD, cache.tensor, 0, slots_BT)
        return cache

    def attend_window(
        self, query_BQND: Tensor, keys: Tensor, values: Tensor, bias_BQC: Tensor
    ) -> Tensor:
        """See `operators.attend_window`."""
        heads, shared, size = query_BQND.shape[2], keys.shape[2], query_BQND.shape[3]
        if shared > 1 or heads == 1:
            mask = self._mask(bias_BQC, 1)
            found = llama.custom_sdpa(query_BQND, keys, values, 0, mask, 0.0, False, 1.0)
            return operator("merge")(found)
        # Query heads as rows: one large product in place of many small ones.
        rows = query_BQND.reshape(1, -1, 1, size)
        mask = self._mask(bias_BQC, heads)
        found = llama.custom_sdpa(rows, keys, values, 0, mask, 0.0, False, 1.0)
        return operator("merge")(found.reshape(1, -1, heads, size))

    def attend_context(
        self,
        query_BQND: Tensor,
        keys: Tensor,
        values: Tensor,
        query_ids_BQ: Tensor,
        held_C: Tensor,
        *,
        softcap: float,
        window: int,
    ) -> Tensor:
        """See `operators.attend_context`."""
        if softcap:
            raise UnsupportedError(
                "ExecuTorch's attention has no softcap, and a layer of this model caps its scores",
                hint="build with `--backend onnx`",
            )
        plain = any(query_ids_BQ is ids for ids in self._query_ids)
        if window or not plain:
            bias = attention_bias(query_ids_BQ, held_C, window=window or None)
            return self.attend_window(query_BQND, keys, values, bias)
        return operator("merge")(_attend_causal(query_BQND, keys, values, query_ids_BQ[0]))

    def _first(self, capacity: Any) -> Any:
        """The first position of the call, as a number that the tracer knows the range of."""
        if self._start is None:
            self._start = self._positions[0, 0].item()
            torch._check(self._start >= 0)
        torch._check(self._start < capacity)
        torch._check(self._start + self._positions.shape[1] <= capacity)
        return self._start

    def _mask(self, bias_BQC: Tensor, repeats: int) -> Tensor:
        """`[Q * repeats, C]`: made once for all layers that share a bias."""
        key = id(bias_BQC), repeats
        if key not in self._masks:
            mask = bias_BQC[0]
            if repeats > 1:
                mask = mask.unsqueeze(1).expand(-1, repeats, -1).flatten(0, 1)
            self._masks[key] = bias_BQC, mask
        return self._masks[key][1]


def _attend_causal(query_BQND: Tensor, keys: Tensor, values: Tensor, ids_Q: Tensor) -> Tensor:
    """`[B, Q, N, D]`, for queries at consecutive positions that see all up to their own.

    ExecuTorch's kernel takes one head after the other. A single token is a third faster when the
    query heads of a key head are rows of one product, as if they were tokens: without the causal
    mask, and with the first of them so far back that the last is where the token is.
    """
    heads, shared, size = query_BQND.shape[2], keys.shape[2], query_BQND.shape[3]
    repeats = heads // shared

    def many(query: Tensor, keys: Tensor, values: Tensor, first: Tensor) -> Tensor:
        found: Tensor = llama.custom_sdpa(query, keys, values, first.item(), None, 0.0, True, 1.0)
        return found

    def one(query: Tensor, keys: Tensor, values: Tensor, first: Tensor) -> Tensor:
        tokens = query.shape[1]
        grouped = query.reshape(1, tokens, shared, repeats, size).transpose(2, 3)
        rows = grouped.reshape(1, tokens * repeats, shared, size)
        start = first.item() + 1 - repeats
        found = llama.custom_sdpa(rows, keys, values, start, None, 0.0, False, 1.0)
        split = found.reshape(1, tokens, repeats, shared, size).transpose(2, 3)
        joined: Tensor = split.reshape(1, tokens, heads, size)
        return joined

    if repeats == 1:
        return many(query_BQND, keys, values, ids_Q[0])
    chosen: Tensor = torch.cond(
        ids_Q[0] == ids_Q[-1], one, many, (query_BQND, keys, values, ids_Q[0])
    )
    return chosen
