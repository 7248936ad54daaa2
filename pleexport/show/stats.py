"""Statistics of a run as text."""

from __future__ import annotations

import msgspec

from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.sampling import Sampling
from pleexport.runtime.stats import Stats
from pleexport.show.tables import aligned
from pleexport.sizes import size_text

# Fields without an effect where nothing is sampled.
_SAMPLED = Sampling.__dataclass_fields__.keys()
_MOST_LISTED = 4


def describe_stats(stats: Stats, config: GenerationConfig, *, as_chat: bool = False) -> str:
    """Statistics of a run as text.

    Args:
        config: how it chose its tokens.
        as_chat: whether the prompt was a conversation in the form of a chat template.
    """
    memory = "not known on this system"
    if stats.anonymous_bytes is not None and stats.file_backed_bytes is not None:
        memory = (
            f"{size_text(stats.anonymous_bytes)} anonymous, "
            f"{size_text(stats.file_backed_bytes)} file-backed"
        )
    rows = [
        (
            "prefill",
            f"{stats.prompt_tokens} tokens, {stats.prefill_tokens_per_second:,.0f} tokens/s",
        ),
        (
            "decode",
            f"{stats.generated_tokens} tokens, {stats.decode_tokens_per_second:,.1f} tokens/s",
        ),
        *_draft_rows(stats),
        ("first token", f"{stats.first_token_seconds * 1e3:,.1f} ms"),
        ("memory", memory),
        (
            "lookups",
            f"{stats.rows:,} rows, {size_text(stats.row_bytes)}, {stats.pages:,} distinct pages",
        ),
        (
            "page faults",
            f"{stats.minor_page_faults:,} minor, {stats.major_page_faults:,} major",
        ),
        ("ended by", stats.finish_reason),
        ("prompt", "in the form of the chat template" if as_chat else "as it was given"),
        ("chosen by", describe_config(config)),
    ]
    return "\n".join(aligned(rows, align="<<"))


def describe_config(config: GenerationConfig) -> str:
    """The fields of a generation config that say something, in their order; long ones cut."""
    fields = msgspec.to_builtins(config)
    if not fields.get("do_sample"):
        fields = {name: value for name, value in fields.items() if name not in _SAMPLED}
    told = [f"{name} {_short(value)}" for name, value in fields.items() if name != "do_sample"]
    return ", ".join(["sampling" if fields.get("do_sample") else "the likeliest token", *told])


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > _MOST_LISTED:
        return f"of {len(value)} entries"
    return str(value)


def _draft_rows(stats: Stats) -> list[tuple[str, str]]:
    """What drafts brought, where there were any."""
    if not stats.drafted_tokens:
        return []
    return [
        (
            "drafts",
            f"{stats.accepted_tokens:,} of {stats.drafted_tokens:,} tokens accepted "
            f"({stats.acceptance:.0%}), {stats.tokens_per_call:.1f} tokens a call",
        )
    ]
