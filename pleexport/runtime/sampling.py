"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import InputError
from pleexport.runtime.generation_config import GenerationConfig

# Source: transformers 5.23, `TopHLogitsWarper`.
_TOP_H_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens; the default is greedy. What is cut off is so in this order.

    Attributes:
        temperature: 0 for greedy; otherwise logits are divided by it.
        top_h: of the 100 likeliest tokens, keep the first ones as long as they have no more than
            this share of the entropy.
        top_k: keep the k likeliest tokens, and what is as likely as the last; 0 for all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach p.
        min_p: keep tokens at least this fraction as likely as the likeliest one.
        typical_p: keep the smallest set of tokens with this probability whose information is
            closest to the expected one. Source: arXiv 2202.00666.
        epsilon_cutoff: keep tokens of this probability; eta_cutoff: or of
            `sqrt(eta) exp(-entropy)`, if that is less. Source: arXiv 2210.15191.
    """

    temperature: float = 0.0
    top_h: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampling:
        """What a config asks for."""
        if not config.do_sample:
            return cls()
        temperature = 1.0 if config.temperature is None else config.temperature
        named = {name: getattr(config, name) for name in cls.__dataclass_fields__}
        given = {name: value for name, value in named.items() if value is not None}
        return cls(**given | {"temperature": temperature})

    def choose(self, scores_V: NDArray[np.float32], generator: np.random.Generator) -> int:
        """The next token's id.

        Args:
            scores_V: logits; minus infinity is a token that may not come.
        Raises:
            InputError: no token may come.
        """
        best = int(scores_V.argmax())
        if not np.isfinite(scores_V[best]):
            raise InputError(
                "the generation options leave no token that may come next",
                hint="suppress or forbid fewer tokens, or generate with `--greedy`",
            )
        if self.temperature == 0:
            return best
        candidates, probabilities = self.distribution(scores_V)
        # Every token waits for a time of its own, the likely ones less, and the first to come is
        # chosen. Logits that differ by little, as those of a token alone and of one
        # among many do, so give the same token. Sums of sorted probabilities would not: tokens
        # change places in them.
        waits_V = generator.standard_exponential(len(scores_V))
        return int(candidates[np.argmin(waits_V[candidates] / probabilities)])

    def distribution(
        self, scores_V: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ids that may be chosen, likeliest first, and their probabilities."""
        ids = _likeliest(scores_V, _TOP_H_TOKENS if self.top_h else self.top_k)
        ids = ids[:_TOP_H_TOKENS] if self.top_h else ids
        scores = scores_V[ids].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature is greedy
            scores = (scores - scores[0]) / self.temperature
        # All but the last three keep a beginning of what is sorted.
        if self.top_h:
            probabilities = _softmax(scores)
            summed = np.cumsum(-probabilities * np.log(np.maximum(probabilities, 1e-300)))
            scores = scores[: max(1, int((summed <= self.top_h * summed[-1]).sum()))]
            if self.top_k:
                scores = scores[: int((scores >= scores[min(self.top_k, len(scores)) - 1]).sum())]
        probabilities = _softmax(scores)
        before = np.cumsum(probabilities) - probabilities
        kept = (before < self.top_p) & (probabilities >= self.min_p * probabilities[0])
        scores = scores[: max(1, int(kept.sum()))]
        ids = ids[: len(scores)]
        for keeps in (self._typical, self._above_epsilon, self._above_eta):
            kept = keeps(_softmax(scores))
            ids, scores = ids[kept], scores[kept]
        return ids, _softmax(scores)

    def _typical(self, probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        if self.typical_p >= 1:
            return np.ones(len(probabilities), dtype=bool)
        information = -np.log(np.maximum(probabilities, 1e-300))
        distance = np.abs(information - (probabilities * information).sum())
        order = np.argsort(distance, kind="stable")
        reached = int((np.cumsum(probabilities[order]) < self.typical_p).sum())
        kept: NDArray[np.bool_] = distance <= distance[order[min(reached, len(order) - 1)]]
        return kept

    def _above_epsilon(self, probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        return _at_least(probabilities, self.epsilon_cutoff)

    def _above_eta(self, probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        if not self.eta_cutoff:
            return np.ones(len(probabilities), dtype=bool)
        entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum()
        least = min(self.eta_cutoff, np.sqrt(self.eta_cutoff) * np.exp(-entropy))
        return _at_least(probabilities, least)


def _likeliest(scores_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids that may come, best first: at least `count`, with what is as good as the last; 0: all."""
    least = _LEAST_SCORE
    if 0 < count < len(scores_V):
        least = max(least, np.partition(scores_V, len(scores_V) - count)[len(scores_V) - count])
    ids = np.flatnonzero(scores_V >= least)
    return ids[np.argsort(-scores_V[ids], kind="stable")]


_LEAST_SCORE = np.finfo(np.float32).min


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of scores of which the largest is near 0."""
    exponentials = np.exp(scores - scores.max())
    normalised: NDArray[np.float64] = exponentials / exponentials.sum()
    return normalised


def _at_least(probabilities: NDArray[np.float64], least: float) -> NDArray[np.bool_]:
    """Which are that likely; the likeliest always is."""
    kept: NDArray[np.bool_] = probabilities >= min(least, probabilities.max())
    return kept
