"""Change logits by what a text holds already: penalties, tokens that may not come, lengths.

Rules and their order are those of transformers 5.23, `GenerationMixin._get_logits_processor`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pleexport.runtime.generation_config import GenerationConfig

_NEVER = np.float32(-np.inf)


class LogitRules:
    """The rules of one answer.

    - `sequence_bias`: what is added to the logit of the last of some ids, after the others.
    - `repetition_penalty`: divides positive and multiplies negative logits of ids that the text
      holds. Source: arXiv 1909.05858, section 4.1. `encoder_repetition_penalty` does the reverse
      to the prompt's.
    - `no_repeat_ngram_size`: no so many ids in a row come twice. `encoder_no_repeat_ngram_size`: no
      so many of the prompt come again.
    - `bad_words_ids`: sequences that do not come; an end of the text is never one.
    - `min_new_tokens`, or without it `min_length`, which counts the prompt too: no end before.
    - `forced_bos_token_id`: what follows a prompt of one token; `forced_eos_token_id`: the last
      token that there is room for.
    - `exponential_decay_length_penalty`: from so many tokens on, the end becomes likelier by a
      factor for each.
    - `suppress_tokens`: never come; `begin_suppress_tokens`: not as the first that is chosen.

    Ids beyond the vocabulary cannot come anyway.

    Args:
        prompt_ids: what is continued.
        eos: ids that end a text.
        max_length: most tokens of prompt and answer.
    """

    def __init__(
        self,
        config: GenerationConfig,
        *,
        prompt_ids: Sequence[int],
        eos: frozenset[int],
        max_length: int,
    ) -> None:
        self._config = config
        self._prompt = np.asarray(prompt_ids, dtype=np.int64)
        self._eos = np.asarray(sorted(eos), dtype=np.int64)
        self._max_length = max_length
        self._min_length = config.min_length or 0
        if config.min_new_tokens is not None:
            self._min_length = len(self._prompt) + config.min_new_tokens
        # Tokens that are forced before the first that is chosen.
        self._forced_first = int(len(prompt_ids) == 1 and config.forced_bos_token_id is not None)
        forced = config.forced_eos_token_id
        self._last = [forced] if isinstance(forced, int) else forced
        # A later entry for the same ids replaces an earlier one, and all of these come before words
        # that are forbidden.
        biased = {tuple(ids): bias for ids, bias in config.sequence_bias or ()}
        ends = {(i,) for i in eos}
        words = {tuple(ids) for ids in config.bad_words_ids or ()} - ends
        self._biases = list(biased.items())
        self._words = [(word, -np.inf) for word in sorted(words)]
        # An id may be 0.
        self._changes = any(getattr(config, name) is not None for name in _RULES)

    def apply(self, logits_V: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits `[vocab]` as the rules leave them; minus infinity is a token that may not come.

        Args:
            ids: the text so far, the prompt first.
        """
        if not self._changes:
            return logits_V
        config, scores_V, text = self._config, logits_V.copy(), np.asarray(ids, dtype=np.int64)
        new = len(text) - len(self._prompt)
        _bias(scores_V, text, self._biases)
        _penalise(scores_V, self._prompt, 1 / (config.encoder_repetition_penalty or 1.0))
        _penalise(scores_V, text, config.repetition_penalty or 1.0)
        for source, size in (
            (text, config.no_repeat_ngram_size),
            (self._prompt, config.encoder_no_repeat_ngram_size),
        ):
            if size:
                _forbid(scores_V, _continuations(source, text, size))
        _bias(scores_V, text, self._words)
        if len(text) < self._min_length:
            _forbid(scores_V, self._eos)
        if config.forced_bos_token_id is not None and len(text) == 1:
            _force(scores_V, [config.forced_bos_token_id])
        if self._last is not None and len(text) == self._max_length - 1:
            _force(scores_V, self._last)
        if config.exponential_decay_length_penalty:
            start, factor = config.exponential_decay_length_penalty
            _favour(scores_V, self._eos, factor, tokens=new - start)
        _forbid(scores_V, config.suppress_tokens or ())
        if new == self._forced_first:
            _forbid(scores_V, config.begin_suppress_tokens or ())
        return scores_V


_RULES = (
    "sequence_bias",
    "encoder_repetition_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def _known(
    scores_V: NDArray[np.float32], ids: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """The ids that the vocabulary has, each once."""
    unique = np.unique(np.asarray(ids, dtype=np.int64))
    known: NDArray[np.int64] = unique[(unique >= 0) & (unique < len(scores_V))]
    return known


def _forbid(scores_V: NDArray[np.float32], ids: Sequence[int] | NDArray[np.int64]) -> None:
    scores_V[_known(scores_V, ids)] = _NEVER


def _force(scores_V: NDArray[np.float32], ids: Sequence[int]) -> None:
    scores_V[:] = _NEVER
    scores_V[_known(scores_V, ids)] = 0


def _penalise(scores_V: NDArray[np.float32], ids: NDArray[np.int64], penalty: float) -> None:
    if penalty == 1.0:
        return
    seen = _known(scores_V, ids)
    values, factor = scores_V[seen], np.float32(penalty)
    scores_V[seen] = np.where(values < 0, values * factor, values / factor)


def _favour(
    scores_V: NDArray[np.float32], ids: NDArray[np.int64], factor: float, *, tokens: int
) -> None:
    """Add to logits what their size is multiplied by, less the size itself."""
    if tokens <= 0:
        return
    known = _known(scores_V, ids)
    values = scores_V[known]
    with np.errstate(over="ignore", invalid="ignore"):
        grown = values + np.abs(values) * np.float32(factor**tokens - 1)
    scores_V[known] = np.where(np.isfinite(values), grown, values)


def _bias(
    scores_V: NDArray[np.float32],
    text: NDArray[np.int64],
    biases: Sequence[tuple[tuple[int, ...], float]],
) -> None:
    for ids, bias in biases:
        before, last = ids[:-1], ids[-1]
        begins = len(text) - len(before)
        if begins >= 0 and 0 <= last < len(scores_V) and tuple(text[begins:].tolist()) == before:
            scores_V[last] += np.float32(bias)


def _continuations(
    source: NDArray[np.int64], text: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """What follows in `source` wherever it has the last `size - 1` ids of the text."""
    if len(source) < size or len(text) < size - 1:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(source, size)
    same = (windows[:, :-1] == text[len(text) - size + 1 :]).all(axis=1)
    found: NDArray[np.int64] = windows[same, -1]
    return found
