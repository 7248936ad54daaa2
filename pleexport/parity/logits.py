"""Are a bundle's logits the original's, however a text is fed?

Shape suffixes: T positions, V token ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pleexport.parity.metrics import (
    NEAR_TIE,
    absolute_errors,
    correlation,
    logit_range,
    mean_kl,
)
from pleexport.parity.report import LogitsCheck
from pleexport.runtime.runner import Runner

# How often the id in the middle of the text comes again.
_REPEATED = 64
# Tokens behind the longest window and a whole chunk, so that every ring wraps around.
_BEYOND_WINDOW = 64
_LOGITS_BYTES = 128 << 20
_LEAST_COMPARED = 128
_SEED = 20_240_517


def parity_ids(runner: Runner, text_ids: Sequence[int] | None) -> list[int]:
    """The ids to compare on: enough for every ring to wrap around, where the context allows.

    A text that is too short is repeated. Random ids leave out those that stand for others. In the
    middle, one id comes again and again: where keys are alike, rounding errors add up.
    """
    windows = [c.window for c in runner.bundle.decoder.contract.caches if c.window is not None]
    longest = min(max(windows, default=0), runner.context)
    # One less than the context, so that the greedy text has a place.
    length = max(min(longest + runner.chunk + _BEYOND_WINDOW, runner.context - 1), 1)
    if text_ids:
        ids = np.resize(np.asarray(text_ids), length)
    else:
        own = np.setdiff1d(np.arange(runner.blob.num_rows), [i for i, _ in runner.blob.row_aliases])
        ids = np.random.default_rng(_SEED).choice(own, length)
    middle = length // 2
    ids[middle : middle + min(_REPEATED, length // 4)] = ids[middle]
    return [int(i) for i in ids]


def compared_positions(runner: Runner, *, tokens: int) -> int:
    """How many of the last positions have their logits compared: all, or what fits in memory."""
    row_bytes = 4 * runner.bundle.decoder.contract.vocab_size
    return min(tokens, max(_LEAST_COMPARED, _LOGITS_BYTES // row_bytes))


def feed_modes(
    runner: Runner, *, ids: Sequence[int], compared: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Logits `[compared, V]` of a text's last positions, by the name of the way it was fed.

    "prefill" is as `Runner.logits` does it; "chunked" starts, ends and wraps rings at odd places;
    "step" goes token by token where logits are compared.
    """
    first = len(ids) - compared
    even = [*range(0, len(ids), runner.chunk), len(ids)]
    single = sorted({*(cut for cut in even if cut < first), *range(first, len(ids) + 1)})
    uneven = _uneven_cuts(len(ids), largest=runner.chunk)
    for mode, cuts in (("prefill", even), ("chunked", uneven), ("step", single)):
        runner.reset()
        pieces = []
        for begin, end in itertools.pairwise(cuts):
            wanted = min(end - first, end - begin)
            # `keep=0` would give all of them; the next call writes into the same array.
            got = runner.feed(ids[begin:end], keep=max(wanted, 1))
            if wanted > 0:
                pieces.append(got.copy())
        yield mode, np.concatenate(pieces)


def check_logits(
    mode: str, *, reference: NDArray[np.float32], got: NDArray[np.float32]
) -> LogitsCheck:
    """Compare logits `[T, V]` with the original's."""
    spread = logit_range(reference)
    largest, mean = absolute_errors(reference, got=got)
    best_T = got.argmax(-1)
    agree_T = best_T == reference.argmax(-1)
    # How far behind the original's best token it sees the one that the bundle likes best.
    gaps_T = reference.max(-1) - np.take_along_axis(reference, best_T[:, None], -1)[:, 0]
    near_T = ~agree_T & (gaps_T <= NEAR_TIE * spread)
    return LogitsCheck(
        mode=mode,
        tokens=len(reference),
        max_error=largest,
        mean_error=mean,
        logit_range=spread,
        kl=mean_kl(reference, got=got),
        correlation=correlation(reference, got=got),
        top1_agreement=float((agree_T | near_T).mean()),
        near_ties=int(near_T.sum()),
    )


def _uneven_cuts(length: int, *, largest: int) -> list[int]:
    """Where a text is cut into pieces of 1, 3, 7, 15, ... tokens."""
    cuts, size = [0], 1
    while cuts[-1] < length:
        cuts.append(min(cuts[-1] + size, length))
        size = min(2 * size + 1, largest)
    return cuts
