"""What parity finds out, and the verdict that follows from it.

`parity.json` and `pleexport verify --json` are these structs, field by field; other tools read
them.
"""

from __future__ import annotations

import msgspec

from pleexport.runtime.bundle import ParitySummary


class TableCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One table, every row read back.

    Attributes:
        lossless: rows must equal the source bit for bit. Otherwise values must be within half a
            quantization step; with 4 bits, whose scales are searched, a group of values must be as
            close to the source as rounding to nearest would bring it.
        max_error: largest absolute difference, multiplier applied.
        max_steps: largest difference, in the quantization steps that clip nothing.
        first_bad_row: token id, or None.
    """

    table: str
    dtype: str
    lossless: bool
    rows: int
    max_error: float
    max_steps: float | None
    first_bad_row: int | None
    first_bad_layer: int | None


class LogitsCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Logits of one way to feed the text, against the original's.

    Attributes:
        mode: "prefill" (at once), "chunked" (uneven pieces) or "step" (one by one, with cache).
        max_error, mean_error: absolute; `logit_range` is what they are measured against.
        kl: mean KL divergence from the original, nats per token.
        correlation: of the logits with the original's, the mean of each position taken off.
        top1_agreement: share of positions with the same best token; near ties count as agreement
            and are counted in `near_ties`.
    """

    mode: str
    tokens: int
    max_error: float
    mean_error: float
    logit_range: float
    kl: float
    correlation: float
    top1_agreement: float
    near_ties: int

    @property
    def relative_error(self) -> float:
        """Largest error as a share of the range of the logits."""
        return self.max_error / self.logit_range


class GreedyCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Greedy text against the original's.

    Attributes:
        equal_tokens: how many agree before the first difference.
        near_tie: the first difference is between two logits closer than rounding.
    """

    tokens: int
    equal_tokens: int
    near_tie: bool


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What rounding costs on a text: KL divergence in nats per token, and perplexity.

    Attributes:
        what: "tables" (original weights), "dense" (original tables) or "both".
        top1_agreement: share of positions with the same best token.
    """

    what: str
    kl: float
    perplexity: float
    top1_agreement: float


class ParityReport(msgspec.Struct):
    """The outcome of `verify`.

    Attributes:
        exact: the bundle is held to float32 noise instead of a KL limit.
        layer_errors: by layer, relative error of what it hands on (root mean square).
        first_diverging_layer: None where none is beyond the limit.
        original_perplexity: of the original, on the tokens that `fidelity` was measured on; None
            where these are random.
        failures: one sentence for each check that failed; empty when passed.
    """

    oracle: str
    exact: bool
    tables: list[TableCheck]
    logits: list[LogitsCheck]
    text: GreedyCheck | None
    layer_errors: list[float]
    first_diverging_layer: int | None
    original_perplexity: float | None
    fidelity: list[Fidelity]
    fidelity_tokens: int
    failures: list[str]

    @property
    def passed(self) -> bool:
        """The verdict."""
        return not self.failures

    @property
    def max_logit_error(self) -> float:
        """Largest logit error of all modes, as a share of the range."""
        return max(check.relative_error for check in self.logits)

    def summary(self) -> ParitySummary:
        """The manifest's line about it."""
        return ParitySummary(True, self.passed, self.max_logit_error)
