"""What generating yields: tokens, and what they took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        text: the whole characters that it completes, "" while one is incomplete.
    """

    id: int
    text: str


@dataclass
class Stats:
    """What the last call took.

    Attributes:
        finish_reason: "eos", "stop", "length" (max_new_tokens), "time", "context", or "no row"
            after an id that the model cannot read; "" while it runs.
        prompt_tokens: tokens that were prefilled; those of an earlier turn are not read again.
        decode_calls: calls of the graph after the prompt; fewer than tokens where drafts come true.
        drafted_tokens: guesses that were read ahead.
        accepted_tokens: guesses that came true.
        first_token_seconds: from the call to the first token.
        rows: rows looked up.
        row_bytes: bytes of these rows, in all files.
        pages: distinct pages of the files that these rows lie on.
        anonymous_bytes, file_backed_bytes: resident memory at the end; None where not known.
    """

    finish_reason: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_calls: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    rows: int = 0
    row_bytes: int = 0
    pages: int = 0
    minor_page_faults: int = 0
    major_page_faults: int = 0
    anonymous_bytes: int | None = None
    file_backed_bytes: int | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_call(self) -> float:
        """Tokens after the first for each call that gave some."""
        return (self.generated_tokens - 1) / self.decode_calls if self.decode_calls else 0.0

    @property
    def acceptance(self) -> float:
        """The share of guesses that came true."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0
