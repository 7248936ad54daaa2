"""What parity finds out, and the verdict that follows from it.

`parity.json` and `pleexport verify --json` are these structs, field by field; other tools read
them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from pleexport.runtime.bundle import ParitySummary

# Largest logit error of an exact bundle, as a share of the range of the logits.
EXACT_LOGITS = 1e-4
# Rounded bundles, by the coarsest of their dtypes: the largest mean KL divergence, and the least
# correlation of the logits with the original's. Rounding stays well inside; wrong rows or weights
# are far outside, also where flat predictions keep the divergence small.
KL_LIMITS = {"fp16": 0.01, "int8": 0.05, "int4": 0.5}
LEAST_CORRELATION = {"fp16": 0.999, "int8": 0.95, "int4": 0.7}


class TextCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Text and ids against the original's tokenizer.

    Attributes:
        original: its name; None where it was not compared.
        not_compared: why not, as a clause. Streams are compared with decodings all the same.
        template: the file with the chat template; None where there is none.
        texts, conversations, streams: how many were compared. Streams are ids of texts, and ids as
            a model might write them.
        refused: of the conversations, those for which the original's template has no prompt, and
            ours has none either.
        formatted: conversations that the bundle's chat format renders as the template does; None
            where there is no such format.
        differences: for each kind of comparison one sentence, if anything differs.
    """

    original: str | None
    not_compared: str | None
    template: str | None
    texts: int
    conversations: int
    refused: int
    formatted: int | None = None
    streams: int
    differences: tuple[str, ...]


class TableCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One table, every row read back.

    Attributes:
        lossless: rows must equal the source bit for bit. Otherwise values must be within half a
            quantization step; where scales are searched, which is with 4 bits and in a tied head, a
            group of values must be as close to the source as rounding to nearest would bring it.
        max_error: largest absolute difference, multiplier applied.
        max_steps: largest difference, in the quantization steps that clip nothing.
        first_bad_row: token id, or None.
        tied: the rows are those of the output head.
    """

    table: str
    dtype: str
    lossless: bool
    rows: int
    max_error: float
    max_steps: float | None
    first_bad_row: int | None
    first_bad_layer: int | None
    tied: bool = False


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
        tokens: how many were compared; a text ends with an id that has no row.
        equal_tokens: how many agree before the first difference.
        near_tie: the first difference is between two logits closer than rounding.
    """

    tokens: int
    equal_tokens: int
    near_tie: bool


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What rounding costs on a text: KL divergence in nats per token, and perplexity.

    Attributes:
        what: "tables" (original weights), "dense" (original tables), "both", or "activations" (the
            original, which rounds none; of a bundle that rounds none).
        top1_agreement: share of positions with the same best token.
    """

    what: str
    kl: float
    perplexity: float
    top1_agreement: float


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of `verify`.

    Attributes:
        exact: the bundle is held to float32 noise instead of a KL limit.
        tokenizer: of text, ids and prompts; None where the bundle has no tokenizer.
        layer_errors: by layer, relative error of what it hands on (root mean square). Empty where
            logits agree and hidden values of so large a bundle would take another build.
        first_diverging_layer: None where none is beyond the limit.
        original_perplexity: of the original, on the tokens that `fidelity` was measured on; None
            where these are random.
        text: of greedy text; None where the context has no place for one.
        failures: one sentence for each check that failed, see `find_failures`; empty when passed.
    """

    oracle: str
    exact: bool
    tokenizer: TextCheck | None = None
    tables: tuple[TableCheck, ...]
    logits: tuple[LogitsCheck, ...]
    text: GreedyCheck | None
    layer_errors: tuple[float, ...]
    first_diverging_layer: int | None
    original_perplexity: float | None
    fidelity: tuple[Fidelity, ...]
    fidelity_tokens: int
    failures: tuple[str, ...]

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


def find_failures(
    *,
    exact: bool,
    tables: Sequence[TableCheck],
    logits: Sequence[LogitsCheck],
    greedy: GreedyCheck | None,
    first_diverging_layer: int | None,
    computing_dtypes: Collection[str],
    tokenizer: TextCheck | None = None,
) -> tuple[str, ...]:
    """One sentence for each check that failed; a bundle passes where there is none.

    Args:
        exact: hold the bundle to float32 noise instead of a KL limit.
        computing_dtypes: of dense weights, head and caches.
    """
    where = (
        f"; layer {first_diverging_layer} is the first that diverges"
        if first_diverging_layer is not None
        else ""
    )
    failures = [f"text: {difference}" for difference in tokenizer.differences] if tokenizer else []
    failures += [_table_problem(check) for check in tables if check.first_bad_row is not None]
    coarsest = _coarsest({table.dtype for table in tables} | {*computing_dtypes})
    for check in logits:
        problem = _exact_problem(check) if exact else _rounded_problem(check, coarsest)
        if problem:
            failures.append(f"logits, {check.mode}: {problem}{where}")
    # Rounding may lead to another text, which is no worse for it.
    if exact and greedy and greedy.equal_tokens < greedy.tokens and not greedy.near_tie:
        failures.append(
            f"greedy text differs from the original's at token {greedy.equal_tokens}{where}"
        )
    # A layer that diverges is a failure of its own where nothing behind it shows.
    if exact and not failures and where:
        failures.append(f"hidden states differ{where}")
    return tuple(failures)


def write_report(report: ParityReport, path: Path) -> None:
    """Write a report as JSON."""
    encoded = msgspec.json.encode(report_fields(report))
    path.write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")


def report_fields(report: ParityReport) -> dict[str, object]:
    """The fields of a report as JSON has them, and its verdict as `passed`."""
    fields: dict[str, object] = msgspec.to_builtins(report)
    return fields | {"passed": report.passed}


def _coarsest(dtypes: Collection[str]) -> str:
    """The dtype whose limits count; floats of every kind count as "fp16".

    A checkpoint's own codes are exact, but what they are multiplied with is rounded to 8 bits.
    """
    if "int4" in dtypes or "int2" in dtypes:
        return "int4"
    return "int8" if {"int8", "source"} & {*dtypes} else "fp16"


def _table_problem(check: TableCheck) -> str:
    layer = "" if check.first_bad_layer is None else f", layer {check.first_bad_layer}"
    expected = "the source" if check.lossless else "as close to the source as it should be"
    return (
        f"table `{check.table}`: the row of token id {check.first_bad_row}{layer} is not "
        f"{expected} (largest error {check.max_error:.3g})"
    )


# Both ask for what passes, not for what fails: a NaN is neither, and fails.
def _exact_problem(check: LogitsCheck) -> str | None:
    if check.relative_error <= EXACT_LOGITS:
        return None
    return f"largest error {check.relative_error:.2e} of the range exceeds {EXACT_LOGITS:.0e}"


def _rounded_problem(check: LogitsCheck, coarsest: str) -> str | None:
    if not check.kl <= KL_LIMITS[coarsest]:
        return f"KL divergence {check.kl:.3g} nats exceeds {KL_LIMITS[coarsest]:g}"
    if not check.correlation >= LEAST_CORRELATION[coarsest]:
        return (
            f"correlation {check.correlation:.3f} with the original's is below "
            f"{LEAST_CORRELATION[coarsest]:g}"
        )
    return None
