"""Measure on a text how much each input of a matrix matters.

Rounding a weight by e changes an output by e x, so what a text costs is the sum of e**2 x**2: the
mean of x**2 over the text is the importance of that input. The model runs in float32, one weight
of the checkpoint in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pleexport.checkpoint.matching import MatchedModel
from pleexport.contract import pieces
from pleexport.families.layers import Parameters
from pleexport.model import Cache, GraphInputs, Weight
from pleexport.sizes import align

_WINDOW = 512


def importance(
    matched: MatchedModel,
    token_ids: Sequence[int],
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, NDArray[np.float32]]:
    """By weight, the mean square `[K]` of each of its inputs.

    Args:
        token_ids: a text, read 512 tokens at a time.
        progress: called with the number of tokens read since its last call.
    """
    weights = _ObservedParameters(CheckpointWeights(matched), matched)
    ids = np.asarray(token_ids, dtype=np.int64)
    with torch.no_grad():
        for begin in range(0, len(ids), _WINDOW):
            window = ids[begin : begin + _WINDOW]
            _read(matched, weights, window)
            progress(len(window))
    return {name: (total / len(ids)).numpy() for name, total in weights.squares.items()}


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint in float32, read when they are used."""

    def __init__(self, matched: MatchedModel) -> None:
        self._binding = matched
        self._weights: dict[str, Weight] = {w.name: w for w in matched.model.weights}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._binding.values(self._weights[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class _ObservedParameters(Parameters):
    """Sums the squares of what goes into linear layers; logits are not computed."""

    def __init__(self, tensors: Mapping[str, Tensor], matched: MatchedModel) -> None:
        super().__init__(tensors)
        self.squares: dict[str, Tensor] = {}
        self._heads = {w.name: w.shape[0] for w in matched.model.weights if w.precision == "head"}

    def linear(self, name: str, x: Tensor) -> Tensor:
        key = f"{self.prefix}{name}.weight"
        square = x.square().flatten(0, -2).sum(0)
        self.squares[key] = self.squares.get(key, 0) + square
        if key in self._heads:
            return torch.empty(*x.shape[:-1], self._heads[key], device="meta")
        return super().linear(name, x)


def _read(matched: MatchedModel, weights: Parameters, ids: NDArray[np.int64]) -> None:
    """Run the model on a text from its start, in as many calls as it needs."""
    model = matched.model.with_cache("fp32")
    caches = {cache.layer: empty_cache(cache, len(ids)) for cache in model.caches}
    states = {s.name: torch.zeros(1, *s.shape) for s in model.states}
    for piece in pieces(len(ids), model.tokens_per_call or len(ids)):
        begin, end = piece.start, piece.stop
        inputs = GraphInputs(
            rows={
                table.graph_input: torch.from_numpy(
                    matched.vectors(table, ids[0 if table.whole_text else begin : end])
                )[None]
                for table in model.tables
            },
            position_ids=torch.arange(begin, end)[None],
            caches=caches,
            capacities={layer: tensors[0].shape[2] for layer, tensors in caches.items()},
            windows={cache.layer: cache.window for cache in model.caches},
            states=states,
            logit_positions=torch.arange(end - begin),
        )
        outputs = model.forward(weights, inputs)
        caches, states = dict(outputs.caches), dict(outputs.states)


def empty_cache(cache: Cache, positions: int) -> tuple[Tensor, ...]:
    """The tensors of a cache that has room for so many positions."""
    slots = align(positions, cache.block)
    return tuple(torch.zeros(1, cache.heads, slots, b.width) for b in cache.buffers)
