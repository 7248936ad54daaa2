"""How a checkpoint wants its text generated: its `generation_config.json`, as a manifest has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any

import msgspec


class GenerationConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What decoding one text obeys, by the names that a `generation_config.json` has for it.

    None, or a field's absence, is that nothing is said.

    Attributes:
        do_sample: choose by chance; otherwise the likeliest token.
        temperature, top_k, top_p, min_p, top_h, typical_p, epsilon_cutoff, eta_cutoff: see
            `Sampling`.
        repetition_penalty and all below down to `forced_eos_token_id`: see `LogitRules`.
        max_new_tokens: most tokens of an answer.
        max_length: most tokens of prompt and answer; what `max_new_tokens` says comes first.
        max_time: seconds after which no further token is begun.
        stop_strings: end an answer; they are not part of it.
    Source: transformers 5.23, `GenerationConfig`.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    sequence_bias: list[tuple[list[int], float]] | None = None
    encoder_repetition_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    max_time: float | None = None
    stop_strings: str | list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they are written."""
        own = self.stop_strings or ()
        return (own,) if isinstance(own, str) else tuple(own)

    def overridden(self, options: Mapping[str, Any]) -> GenerationConfig:
        """The same with other values for some fields; a temperature says whether to sample.

        Args:
            options: by field.
        Raises:
            msgspec.ValidationError: an unknown field, or a value of the wrong kind.
        """
        given = msgspec.to_builtins(msgspec.convert(options, GenerationConfig))
        if "temperature" in given:
            given["do_sample"] = given["temperature"] > 0
        if "max_new_tokens" in given:
            given["max_length"] = None
        return msgspec.structs.replace(self, **given)

    def out_of_range(self) -> str | None:
        """What is wrong with the first field that has an impossible value, e.g. "top_k is -1; it
        must be 0 or more"."""
        for name, (valid, expected) in _RANGES.items():
            value = getattr(self, name)
            # Asks for what is valid: a NaN is nothing of it.
            if value is not None and not valid(value):
                return f"{name} is {value}; it must be {expected}"
        return None


_Range = tuple[Callable[[Any], bool], str]
_COUNT: _Range = (lambda n: n >= 0, "0 or more")
_SHARE: _Range = (lambda p: 0 <= p <= 1, "from 0 to 1")
_PENALTY: _Range = (lambda p: 1e-3 <= p <= 1e3, "from 0.001 to 1000")
_ID: _Range = (lambda i: abs(i) < 1 << 31, "a token id")
_IDS: _Range = (lambda ids: all(map(_ID[0], ids)), "a list of token ids")
_SEQUENCES: _Range = (
    lambda words: all(ids and _IDS[0](ids) for ids in words),
    "lists of one or more token ids",
)
_RANGES: dict[str, _Range] = {
    "temperature": (lambda t: 0 <= t < inf, "0 or more"),
    "top_k": _COUNT,
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_h": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "typical_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "epsilon_cutoff": (lambda p: 0 <= p < 1, "from 0 and below 1"),
    "eta_cutoff": (lambda p: 0 <= p < 1, "from 0 and below 1"),
    "sequence_bias": (
        lambda pairs: (
            _SEQUENCES[0]([ids for ids, _ in pairs]) and all(isfinite(bias) for _, bias in pairs)
        ),
        "pairs of one or more token ids and a finite number",
    ),
    "encoder_repetition_penalty": _PENALTY,
    "repetition_penalty": _PENALTY,
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "bad_words_ids": _SEQUENCES,
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "exponential_decay_length_penalty": (
        lambda pair: pair[0] >= 0 and 0 < pair[1] < inf,
        "a number of tokens, 0 or more, and a factor above 0",
    ),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "forced_bos_token_id": _ID,
    "forced_eos_token_id": (lambda ids: _IDS[0]([ids] if isinstance(ids, int) else ids), _IDS[1]),
    "max_new_tokens": (lambda n: n >= 1, "1 or more"),
    "max_length": (lambda n: n >= 1, "1 or more"),
    "max_time": (lambda s: 0 < s < inf, "above 0"),
}
