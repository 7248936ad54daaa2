"""Timings of a bundle as text."""

from __future__ import annotations

from pleexport.runtime.bench import BenchResult
from pleexport.show.tables import aligned
from pleexport.sizes import size_text


def describe_bench(result: BenchResult) -> str:
    """The result as text."""
    rows: list[tuple[str, ...]] = [
        ("prompt", "prefill tok/s", "decode tok/s", "first token", "slowest")
    ]
    rows += [
        (
            str(t.prompt_tokens),
            f"{t.prefill_tokens_per_second:,.0f}",
            f"{t.decode_tokens_per_second:,.1f}",
            f"{t.first_token_seconds * 1e3:,.1f} ms",
            f"{t.slowest_first_token_seconds * 1e3:,.1f} ms",
        )
        for t in result.timings
    ]
    lines = aligned(rows, align=">>>>>")
    state = "blob dropped from the page cache" if result.cold else "warm"
    waiting = "spinning" if result.spin else "waiting"
    lines.append(
        f"\n{state}, {result.threads} {waiting} threads, median of {result.repeat}; "
        f"loaded in {result.load_seconds:.2f} s, "
        f"first token after {result.load_to_first_token_seconds:.2f} s"
    )
    if result.anonymous_bytes is not None and result.file_backed_bytes is not None:
        lines.append(
            f"memory: {size_text(result.anonymous_bytes)} anonymous, "
            f"{size_text(result.file_backed_bytes)} file-backed"
        )
    return "\n".join(lines)
