"""How far logits and hidden values are from the original's.

What needs float64 or a copy goes one position at a time: a text's logits alone may fill 128 MiB.

Shape suffixes: T positions, V token ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Two best logits closer than this share of the range may swap places by rounding alone.
NEAR_TIE = 1e-4
# Below it, a sum of squares counts as zero; nothing is divided by less.
_SMALLEST = 1e-30


def logit_range(logits_TV: NDArray[np.float32]) -> float:
    """Distance between the largest and the smallest logit of a text, which errors are shares of."""
    return float(logits_TV.max() - logits_TV.min())


def absolute_errors(
    reference_TV: NDArray[np.float32], *, got: NDArray[np.float32]
) -> tuple[float, float]:
    """The largest absolute error of logits `[T, V]`, and the mean one."""
    pairs = zip(reference_TV, got, strict=True)
    largest, means = np.array([(e.max(), e.mean()) for e in (np.abs(a - b) for a, b in pairs)]).T
    return float(largest.max()), float(means.mean())


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def mean_kl(reference_TV: NDArray[np.float32], *, got: NDArray[np.float32]) -> float:
    """Mean over positions of KL(reference || got) of logits `[T, V]`, nats."""
    total = 0.0
    for a, b in zip(reference_TV, got, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(reference_TV)


def correlation(reference_TV: NDArray[np.float32], *, got: NDArray[np.float32]) -> float:
    """Correlation of logits `[T, V]`, each position's mean taken off."""
    both = first = second = 0.0
    for x, y in zip(reference_TV, got, strict=True):
        # A shift of all logits of a position changes no prediction.
        a, b = x - x.mean(), y - y.mean()
        both += float(a @ b)
        first += float(a @ a)
        second += float(b @ b)
    return float(both / max(np.sqrt(first * second), _SMALLEST))


def relative_rms(expected: NDArray[np.float32], *, got: NDArray[Any]) -> float:
    """Root mean square of the error of two arrays of one shape, as a share of the expected's."""
    error = np.sqrt(np.mean((expected - got) ** 2))
    return float(error / max(np.sqrt(np.mean(expected**2)), _SMALLEST))
