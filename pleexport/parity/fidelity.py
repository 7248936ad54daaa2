"""What does rounding cost on a text? Tables and dense weights apart, and both together.

A bundle takes looked-up vectors from outside, and so does the original: its weights with the
bundle's vectors tell what the tables cost, the bundle's weights with the checkpoint's vectors what
the dense part does. Where a bundle leaves rounding of activations out, the original without it
tells what that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.matching import MatchedModel
from pleexport.parity.metrics import log_softmax, mean_kl
from pleexport.parity.oracle import Oracle
from pleexport.parity.report import Fidelity
from pleexport.runtime.runner import Runner

_FIDELITY_TOKENS = 4096


@dataclass(frozen=True)
class FidelityResult:
    """What rounding costs on a text.

    Attributes:
        original_perplexity: on the same tokens; None where they are random.
        tokens: how many it was measured on.
    """

    entries: tuple[Fidelity, ...]
    original_perplexity: float | None
    tokens: int


NOTHING_ROUNDED = FidelityResult(entries=(), original_perplexity=None, tokens=0)


def measure_fidelity(
    runner: Runner,
    *,
    matched: MatchedModel,
    oracle: Oracle,
    ids: Sequence[int],
    window: int,
) -> FidelityResult:
    """Measure what the tables cost, what the dense weights cost, and both together.

    Args:
        ids: a text; its first 4,096 tokens are measured on.
        window: tokens that are read from a fresh state at a time, since their logits are in memory.
    """
    totals = dict.fromkeys(("original", "tables", "dense", "both"), _Sums())
    if matched.model.leaves_rounding_out:
        totals["activations"] = _Sums()
    for piece in _windows(ids, window):
        reference = oracle.logits(piece)
        stored, exact = _vectors(runner, matched, piece)
        totals["original"] += _measure(reference, reference, piece)
        totals["tables"] += _measure(reference, oracle.logits(piece, stored), piece)
        totals["dense"] += _measure(reference, runner.logits(piece, vectors=exact), piece)
        totals["both"] += _measure(reference, runner.logits(piece), piece)
        if "activations" in totals:
            with oracle.without_activation_rounding():
                totals["activations"] += _measure(reference, oracle.logits(piece), piece)
    original = totals.pop("original")
    return FidelityResult(
        entries=tuple(sums.as_fidelity(what) for what, sums in totals.items()),
        # How well random ids are predicted says nothing.
        original_perplexity=original.perplexity if runner.tokenizer else None,
        tokens=original.tokens,
    )


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens of one or more windows.

    Attributes:
        predicted: tokens that follow another.
        loss: what their predictions cost, in nats.
    """

    tokens: int = 0
    same: int = 0
    kl: float = 0.0
    predicted: int = 0
    loss: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            tokens=self.tokens + other.tokens,
            same=self.same + other.same,
            kl=self.kl + other.kl,
            predicted=self.predicted + other.predicted,
            loss=self.loss + other.loss,
        )

    @property
    def perplexity(self) -> float:
        """Of the tokens that are predicted."""
        return float(np.exp(self.loss / max(self.predicted, 1)))

    def as_fidelity(self, what: str) -> Fidelity:
        """Means over the tokens."""
        return Fidelity(
            what=what,
            kl=self.kl / self.tokens,
            perplexity=self.perplexity,
            top1_agreement=self.same / self.tokens,
        )


def _measure(reference: NDArray[np.float32], got: NDArray[np.float32], ids: Sequence[int]) -> _Sums:
    """Compare the logits `[T, V]` of one window."""
    return _Sums(
        tokens=len(ids),
        same=int((got.argmax(-1) == reference.argmax(-1)).sum()),
        kl=mean_kl(reference, got=got) * len(ids),
        predicted=len(ids) - 1,
        loss=sum(-float(log_softmax(got[t])[ids[t + 1]]) for t in range(len(ids) - 1)),
    )


def _windows(ids: Sequence[int], length: int) -> list[list[int]]:
    """A text in pieces that are each read from a fresh state; a last piece of one token is left."""
    ids = ids[:_FIDELITY_TOKENS]
    pieces = [[int(i) for i in ids[b : b + length]] for b in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1] or pieces


def _vectors(
    runner: Runner, matched: MatchedModel, ids: Sequence[int]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """By graph input, the looked-up vectors of a text: as stored, and as in the checkpoint."""
    lookups = runner.blob.lookup(runner.blob.row_ids(ids))
    tables = matched.model.tables
    stored = {table.graph_input: lookups[table.name] for table in tables}
    return stored, {t.graph_input: matched.vectors(t, np.asarray(ids)) for t in tables}
