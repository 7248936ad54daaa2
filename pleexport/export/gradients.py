"""Measure on a text how much an error of a matrix or a table moves the predictions.

A small change d of a vector inside the model moves the predictions by a KL divergence of
1/2 E[(g d)**2], where g is the gradient of the log probability of a token that is drawn from the
model's own predictions (the Fisher information; Amari, "Natural Gradient Works Efficiently in
Learning", 1998). A matrix W that is off by D moves its output by D x, so with errors that know
nothing of each other the cost is 1/2 sum_ij E[g_i**2 x_j**2] D_ij**2. Of the expectation its sums
over i and over j are kept. Both factors have to come from the same token: where a norm follows, a
token with large outputs has small gradients.

The model runs in float32, some rows of one matrix in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pleexport.checkpoint.matching import MatchedModel
from pleexport.contract import pieces
from pleexport.export.calibration import CheckpointWeights, empty_cache
from pleexport.families.layers import Parameters
from pleexport.model import GraphInputs, Weight

# Activations of a window are in memory for its gradients.
_WINDOW = 128
_BATCH_VALUES = 8 << 20
_SEED = 0


@dataclass
class Gradients:
    """Sums over a text.

    Attributes:
        inputs: by matrix, E[|g|**2 x_j**2], `[K]`.
        outputs: by matrix, E[g_i**2 |x|**2], `[N]`.
        vectors: by table, E[g**2] of what is looked up, `[row width]`, before the multiplier.
    """

    inputs: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    outputs: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Take in inputs `[..., K]` of a matrix and the gradients `[..., N]` of its outputs."""
        x2, g2 = (t.flatten(0, -2).double().square() for t in (x, gradient))
        inputs = (g2.sum(1) @ x2).numpy()
        outputs = (x2.sum(1) @ g2).numpy()
        self.inputs[name] = self.inputs.get(name, 0) + inputs
        self.outputs[name] = self.outputs.get(name, 0) + outputs


def gradients(
    matched: MatchedModel,
    token_ids: Sequence[int],
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> Gradients:
    """The means over a text.

    Args:
        token_ids: read 128 at a time.
        progress: called with the number of tokens read since its last call.
    """
    sums = Gradients()
    weights = _ObservedParameters(matched, sums)
    ids = np.asarray(token_ids, dtype=np.int64)
    generator = np.random.default_rng(_SEED)
    for begin in range(0, len(ids), _WINDOW):
        window = ids[begin : begin + _WINDOW]
        _read(matched, weights, window, sums, generator)
        progress(len(window))
    for kept in (sums.inputs, sums.outputs, sums.vectors):
        kept.update({name: total / len(ids) for name, total in kept.items()})
    return sums


class _ObservedParameters(Parameters):
    """Weights of a checkpoint; products with matrices note what goes in, and gradients."""

    def __init__(self, matched: MatchedModel, sums: Gradients) -> None:
        super().__init__(CheckpointWeights(matched))
        self._matched, self._sums = matched, sums
        self._matrices = {w.name: w for w in matched.model.weights if w.precision != "full"}

    def linear(self, name: str, x: Tensor) -> Tensor:
        """As it is without rounding of activations, which has no gradient."""
        weight = self._matrices.get(f"{self.prefix}{name}.weight")
        if weight is None:
            return super().linear(name, x)
        product: Callable[..., Tensor] = _Product.apply
        outputs = product(x, weight, self._matched, self._sums)
        return outputs + self[f"{name}.bias"] if f"{name}.bias" in self else outputs


class _Product(torch.autograd.Function):
    """`x @ weight.T` for a matrix that is read anew for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        matched: MatchedModel,
        sums: Gradients,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.matched, ctx.sums = weight, matched, sums
        return torch.cat([x @ part.T for _, part in _parts(matched, weight)], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        ctx.sums.add(ctx.weight.name, x, gradient)
        parts = _parts(ctx.matched, ctx.weight)
        total = sum(gradient[..., rows] @ part for rows, part in parts)
        return total, None, None, None


def _parts(matched: MatchedModel, weight: Weight) -> Iterator[tuple[slice, Tensor]]:
    outputs, inputs = weight.shape
    step = max(1, _BATCH_VALUES // inputs)
    for begin in range(0, outputs, step):
        rows = slice(begin, min(begin + step, outputs))
        yield rows, torch.from_numpy(matched.read(weight, rows))


def _read(
    matched: MatchedModel,
    weights: Parameters,
    ids: NDArray[np.int64],
    sums: Gradients,
    generator: np.random.Generator,
) -> None:
    """Run the model on a text from its start, and back."""
    model = matched.model.with_cache("fp32")
    caches = {cache.layer: empty_cache(cache, len(ids)) for cache in model.caches}
    states = {s.name: torch.zeros(1, *s.shape) for s in model.states}
    looked_up: list[dict[str, Tensor]] = []
    drawn: list[Tensor] = []
    for piece in pieces(len(ids), model.tokens_per_call or len(ids)):
        begin, end = piece.start, piece.stop
        rows = {
            table.name: torch.from_numpy(
                matched.vectors(table, ids[0 if table.whole_text else begin : end])
            )[None].requires_grad_()
            for table in model.tables
        }
        looked_up.append(rows)
        inputs = GraphInputs(
            rows={table.graph_input: rows[table.name] for table in model.tables},
            position_ids=torch.arange(begin, end)[None],
            caches=caches,
            capacities={layer: tensors[0].shape[2] for layer, tensors in caches.items()},
            windows={cache.layer: cache.window for cache in model.caches},
            states=states,
            logit_positions=torch.arange(end - begin),
        )
        outputs = model.forward(weights, inputs)
        caches, states = dict(outputs.caches), dict(outputs.states)
        drawn.append(_log_probability_of_drawn(outputs.logits[0], generator))
    torch.autograd.backward(drawn)
    for table in model.tables:
        for rows in looked_up:
            gradient = rows[table.name].grad
            if gradient is not None:
                square = (gradient[0].double() * table.multiplier).square().sum(0).flatten()
                sums.vectors[table.name] = sums.vectors.get(table.name, 0) + square.numpy()


def _log_probability_of_drawn(logits_TV: Tensor, generator: np.random.Generator) -> Tensor:
    """The sum of the log probabilities of a token for each position, drawn from its logits."""
    log_TV = torch.log_softmax(logits_TV, dim=-1)
    sums_TV = log_TV.detach().exp().cumsum(dim=-1)
    chosen = torch.from_numpy(generator.random((len(logits_TV), 1), dtype=np.float32))
    ids_T1 = torch.searchsorted(sums_TV, chosen * sums_TV[:, -1:]).clamp_max(logits_TV.shape[1] - 1)
    return log_TV.gather(1, ids_T1).sum()
