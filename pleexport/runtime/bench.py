"""Time a bundle: prefill, decode, first token; warm, or with the blob out of the page cache."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from pleexport.errors import InputError
from pleexport.progress import Progress
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.runner import Runner

_SEED = 7


class Timing(msgspec.Struct):
    """Medians over the repetitions; seconds and tokens per second."""

    prompt_tokens: int
    decode_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    slowest_first_token_seconds: float


class BenchResult(msgspec.Struct):
    """What `bench` measured; memory in bytes at the end, None where the system does not tell.

    Attributes:
        spin: whether threads spun while they waited.
        load_to_first_token_seconds: until the first token of the first prompt length.
    """

    load_seconds: float
    load_to_first_token_seconds: float
    cold: bool
    threads: int
    spin: bool
    repeat: int
    timings: list[Timing]
    anonymous_bytes: int | None
    file_backed_bytes: int | None


def bench(
    bundle: Path,
    *,
    prompt_tokens: Sequence[int],
    decode_tokens: int,
    repeat: int,
    cold: bool,
    threads: int,
    spin: bool | None = None,
    packed_weights: Path | None,
    verify: bool = True,
    progress: Progress,
) -> BenchResult:
    """Measure a bundle on random token ids.

    Args:
        verify: compare what is loaded with its checksums, as a runner does.
        cold: drop the blob's pages before each run; needs posix_fadvise.
    Raises:
        InputError: a prompt that does not fit, or a number below 1.
    """
    for name, value in (
        ("decode tokens", decode_tokens),
        ("repeat", repeat),
        *(("prompt tokens", n) for n in prompt_tokens),
    ):
        if value < 1:
            raise InputError(
                f"{name} is {value}; it must be 1 or more", hint="leave it out for the default"
            )
    opened = Bundle(bundle, verify=verify)
    longest = max(prompt_tokens) + decode_tokens
    if longest > opened.manifest.context:
        raise InputError(
            f"{longest} tokens of prompt and decoding exceed the bundle's context of "
            f"{opened.manifest.context}",
            hint="choose shorter prompts, or build with a larger `--context`",
        )
    started = time.perf_counter()
    runner = Runner(opened, threads=threads, spin=spin, packed_weights=packed_weights)
    load_seconds = time.perf_counter() - started
    first = _random_ids(runner, prompt_tokens[0])
    next(runner.generate(first, max_new_tokens=1, greedy=True, ignore_eos=True))
    load_to_first_token_seconds = time.perf_counter() - started
    timings = []
    with progress.count("Measuring", len(prompt_tokens) * (repeat + 1), "runs") as update:
        for count in prompt_tokens:
            timings.append(_time(runner, count, decode_tokens, repeat, cold, update))
    return BenchResult(
        load_seconds=load_seconds,
        load_to_first_token_seconds=load_to_first_token_seconds,
        cold=cold,
        threads=threads or os.cpu_count() or 1,
        spin=opened.manifest.spin if spin is None else spin,
        repeat=repeat,
        timings=timings,
        anonymous_bytes=runner.stats.anonymous_bytes,
        file_backed_bytes=runner.stats.file_backed_bytes,
    )


def _time(
    runner: Runner,
    count: int,
    decode: int,
    repeat: int,
    cold: bool,
    update: Callable[[int], object],
) -> Timing:
    runs = []
    for attempt in range(repeat + 1):  # the first warms up and is not counted
        ids = _random_ids(runner, count, attempt)
        if cold:
            runner.blob.forget_pages()
        runner.reset()
        for _ in runner.generate(ids, max_new_tokens=decode, greedy=True, ignore_eos=True):
            pass
        if attempt:
            runs.append(runner.stats)
        update(1)
    first = [run.first_token_seconds for run in runs]
    return Timing(
        prompt_tokens=count,
        decode_tokens=decode,
        prefill_tokens_per_second=statistics.median(r.prefill_tokens_per_second for r in runs),
        decode_tokens_per_second=statistics.median(r.decode_tokens_per_second for r in runs),
        first_token_seconds=statistics.median(first),
        slowest_first_token_seconds=max(first),
    )


def _random_ids(runner: Runner, count: int, attempt: int = 0) -> list[int]:
    generator = np.random.default_rng((_SEED, count, attempt))
    ids: list[int] = generator.integers(0, runner.blob.num_rows, count).tolist()
    return ids
