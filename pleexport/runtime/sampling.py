"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; the default is greedy.

    Attributes:
        temperature: 0 for greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 for all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach p.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the
            text holds already. Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1.
    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature < np.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be {expected}",
                    hint="leave it out for the default",
                )

    def choose(
        self, logits_V: NDArray[np.float32], ids: list[int], generator: np.random.Generator
    ) -> int:
        """The next token's id, given the ids of the text so far.

        Raises:
            InputError: the logits are not numbers.
        """
        if not np.isfinite(logits_V).all():
            raise InputError(
                "the model's logits are not finite",
                hint="`pleexport verify BUNDLE` tells whether its files are damaged",
            )
        if self.repetition_penalty != 1.0:
            logits_V = logits_V.copy()
            seen = np.unique(np.asarray(ids, dtype=np.int64))
            values = logits_V[seen]
            penalty = np.float32(self.repetition_penalty)
            logits_V[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self.temperature == 0:
            return int(logits_V.argmax())
        candidates, probabilities = self._distribution(logits_V)
        # Every token waits for a time of its own, the likely ones less, and the first to come is
        # chosen. Logits that differ by little, as those of a token alone and of one
        # among many do, so give the same token. Sums of sorted probabilities would not: tokens
        # change places in them.
        waits_V = generator.standard_exponential(len(logits_V))
        return int(candidates[np.argmin(waits_V[candidates] / probabilities)])

    def _distribution(
        self, logits_V: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ids that may be chosen, most likely first, and their probabilities."""
        count = min(self.top_k, len(logits_V)) or len(logits_V)
        candidates = np.argpartition(-logits_V, count - 1)[:count]
        candidates = candidates[np.argsort(-logits_V[candidates], kind="stable")]
        values = logits_V[candidates].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature is greedy
            probabilities = np.exp((values - values[0]) / self.temperature)
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        kept = (before < self.top_p) & (probabilities >= self.min_p * probabilities[0])
        return candidates[kept], probabilities[kept] / probabilities[kept].sum()
