"""Generate a text: read the prompt, choose tokens, stop in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import VERIFY_HINT, InputError
from pleexport.process import memory, page_faults
from pleexport.runtime.blob import Blob
from pleexport.runtime.drafting import Drafter, Drafting
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.logit_rules import LogitRules
from pleexport.runtime.reader import Reader
from pleexport.runtime.sampling import Sampling
from pleexport.runtime.stats import Stats, Token
from pleexport.runtime.stopping import AnswerText
from pleexport.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """How to continue a prompt.

    Attributes:
        config: how tokens are chosen, and how long the text may take.
        max_new_tokens: most tokens to write.
        seed: makes sampling repeatable.
        stop: strings that end the text; they are not part of it.
        eos: ids that end it.
        ends: ids that rules take for an end; as `eos`, unless these are to be passed over.
        drafter: guesses tokens that are read ahead, or None.
    """

    config: GenerationConfig
    max_new_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    eos: frozenset[int]
    ends: frozenset[int]
    drafter: Drafter | None = None


def generate(
    reader: Reader,
    blob: Blob,
    tokenizer: Tokenizer | None,
    prompt_ids: list[int],
    request: Request,
    stats: Stats,
) -> Iterator[Token]:
    """Continue a prompt, token by token.

    A prompt that begins with the whole text that was read has only its new part read.

    Args:
        stats: filled while tokens come.
    """
    watch = _Watch(reader, blob, stats)
    ids = list(prompt_ids)
    with reader.alone() as turn:
        reader.forget_guesses()
        known = len(reader.ids)
        if not (known and known < len(ids) and ids[:known] == reader.ids):
            reader.reset()
        reader.rows_read.clear()
        new_ids = ids[len(reader.ids) :]
        stats.prompt_tokens = len(new_ids)
        logits = reader.read(new_ids, keep=1)[-1]
    watch.prefilled()
    config, generator = request.config, np.random.default_rng(request.seed)
    sampling = Sampling.of(config)
    rules = LogitRules(
        config,
        prompt_ids=prompt_ids,
        eos=request.ends,
        max_length=len(prompt_ids) + request.max_new_tokens,
    )
    text = AnswerText(tokenizer.stream(ids) if tokenizer else None, request.stop)
    drafting = Drafting(reader, request.drafter, stats)
    for count in range(1, request.max_new_tokens + 1):
        token_id = sampling.choose(rules.apply(_checked(logits), ids), generator)
        watch.chosen(count)
        if token_id in request.eos:
            stats.finish_reason = "eos"
            break
        ids.append(token_id)
        piece = text.push(token_id)
        if text.stopped:
            stats.finish_reason = "stop"
        elif count == request.max_new_tokens:
            stats.finish_reason = "length"
        elif len(ids) >= reader.context:
            stats.finish_reason = "context"
        elif token_id >= blob.num_rows:
            stats.finish_reason = "no row"
        elif config.max_time is not None and watch.seconds > config.max_time:
            stats.finish_reason = "time"
        piece += text.flush() if stats.finish_reason not in ("", "stop") else ""
        if text.stopped:
            stats.finish_reason = "stop"
        watch.finished()
        yield Token(token_id, piece)
        if stats.finish_reason:
            return
        wanted = min(request.max_new_tokens - count, reader.context - len(ids))
        with reader.alone(turn):
            logits = drafting.logits_after(ids, wanted=wanted)
    held = text.flush()
    watch.finished()
    if held:
        yield Token(token_id, held)


def _checked(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits, if they are numbers."""
    if not np.isfinite(logits_V).all():
        raise InputError(
            "the model's logits are not finite",
            hint=VERIFY_HINT,
        )
    return logits_V


class _Watch:
    """Fills the statistics of one call."""

    def __init__(self, reader: Reader, blob: Blob, stats: Stats) -> None:
        self._reader, self._blob, self._stats = reader, blob, stats
        self._started, self._faults = time.perf_counter(), page_faults()
        self._first_at = 0.0

    @property
    def seconds(self) -> float:
        """Since the call began."""
        return time.perf_counter() - self._started

    def prefilled(self) -> None:
        self._stats.prefill_seconds = time.perf_counter() - self._started

    def chosen(self, count: int) -> None:
        """A token was chosen, the `count`-th."""
        self._stats.generated_tokens = count
        if count == 1:
            self._first_at = time.perf_counter()
            self._stats.first_token_seconds = self._first_at - self._started

    def finished(self) -> None:
        """A token is ready; what takes time to find out is found out with the last."""
        stats, rows = self._stats, self._reader.rows_read
        stats.decode_seconds = time.perf_counter() - self._first_at
        stats.rows = sum(map(len, rows))
        stats.row_bytes = stats.rows * self._blob.row_bytes
        minor, major = page_faults()
        stats.minor_page_faults = minor - self._faults[0]
        stats.major_page_faults = major - self._faults[1]
        if stats.finish_reason:
            stats.pages = self._blob.pages(np.concatenate(rows))
            now = memory()
            stats.anonymous_bytes, stats.file_backed_bytes = now.anonymous, now.file_backed
