"""Does a bundle compute what the PyTorch original computes? Rows, logits, greedy text.

A bundle with fp32 weights and lossless tables must agree within float32 noise. Any other is judged
by how far its predictions move: the KL divergence from the original, in nats per token.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from pleexport.backends.base import Original
from pleexport.backends.registry import load
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import LOSSLESS, WeightDtype
from pleexport.errors import InputError
from pleexport.export.trace import trace
from pleexport.model import Table
from pleexport.parity.oracle import Oracle
from pleexport.quantize import group_scales
from pleexport.runtime.blob import Blob
from pleexport.runtime.bundle import Bundle, ParitySummary
from pleexport.runtime.runner import Runner
from pleexport.weights import BlockSize, WeightRequest

# Largest logit error of an exact bundle, as a share of the range of the logits.
EXACT_LOGITS = 1e-4
# Largest relative error (root mean square) of a layer's output before it counts as diverging.
EXACT_LAYER = 1e-3
QUANTIZED_LAYER = 0.5
# Rounded bundles, by the coarser of their two dtypes: the largest mean KL divergence, and the least
# correlation of the logits with the original's. Rounding stays well inside; wrong rows or weights
# are far outside, also where flat predictions keep the divergence small.
KL_LIMITS = {"fp16": 0.01, "int8": 0.05, "int4": 0.5}
LEAST_CORRELATION = {"fp16": 0.999, "int8": 0.95, "int4": 0.7}
# Two best logits closer than this share of the range may swap places by rounding alone.
NEAR_TIE = 1e-4
_ROWS_PER_BATCH_BYTES = 8 << 20
_GREEDY_TOKENS = 32
_REPEATED = 64
_FIDELITY_TOKENS = 4096
_LOGITS_BYTES = 128 << 20
_LEAST_COMPARED = 128
_LARGE_GRAPH_BYTES = 64 << 20
_SEED = 20_240_517


class TableCheck(msgspec.Struct):
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


class LogitsCheck(msgspec.Struct):
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


class TextCheck(msgspec.Struct):
    """Greedy text against the original's.

    Attributes:
        equal_tokens: how many agree before the first difference.
        near_tie: the first difference is between two logits closer than rounding.
    """

    tokens: int
    equal_tokens: int
    near_tie: bool


class Fidelity(msgspec.Struct):
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
        layer_errors: by layer, relative error of what it hands on (root mean square). Empty where
            logits agree and hidden values of so large a bundle would take another build.
        first_diverging_layer: None where none is beyond the limit.
        original_perplexity: of the original, on the tokens that `fidelity` was measured on; None
            where these are random.
        failures: one sentence for each check that failed; empty when passed.
    """

    oracle: str
    exact: bool
    tables: list[TableCheck]
    logits: list[LogitsCheck]
    text: TextCheck | None
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


def compare(
    bundle: Bundle,
    matched: MatchedModel,
    oracle: Oracle,
    *,
    text_ids: Sequence[int] | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> ParityReport:
    """Run all three levels.

    Args:
        text_ids: a text to measure logits and fidelity on; random ids where there is none.
        progress: called with the number of rows checked since its last call.
    """
    blob = Blob(bundle.blob_path)
    dtypes = {s.table: s.dtype for s in blob.segments}
    lossless = {
        t.name: dtypes[t.name] in LOSSLESS[t.source_dtype(matched.dtype)]
        for t in matched.model.tables
    }
    exact = all(lossless.values()) and _computing_dtypes(bundle) == {"fp32"}
    tables = [
        check_table(blob, matched, table, lossless=lossless[table.name], progress=progress)
        for table in matched.model.tables
    ]
    runner = Runner(bundle)
    ids = parity_ids(runner, text_ids)
    compared = _compared_positions(runner, ids)
    reference = oracle.logits(ids, keep=compared)
    report = ParityReport(
        oracle=oracle.name,
        exact=exact,
        tables=tables,
        logits=[
            check_logits(mode, reference, got) for mode, got in _feed_modes(runner, ids, compared)
        ],
        text=check_text(runner, oracle, ids[: min(16, len(ids))], reference),
        layer_errors=[],
        first_diverging_layer=None,
        original_perplexity=None,
        fidelity=[],
        fidelity_tokens=0,
        failures=[],
    )
    del reference
    if not exact:
        _measure_fidelity(report, runner, matched, oracle, _windows(text_ids or ids, compared))
    del runner  # else the dense weights are in memory twice
    report.failures = _failures(report, bundle)
    if report.passed and _is_costly(bundle):
        return report
    report.layer_errors = layer_errors(bundle, matched, blob, oracle, ids)
    limit = EXACT_LAYER if exact else QUANTIZED_LAYER
    diverging = (i for i, error in enumerate(report.layer_errors) if not error <= limit)
    report.first_diverging_layer = next(diverging, None)
    report.failures = _failures(report, bundle)
    return report


def parity_ids(runner: Runner, text_ids: Sequence[int] | None) -> list[int]:
    """The ids to compare on: enough for every ring to wrap around, where the context allows.

    A text that is too short is repeated. Random ids leave out those that stand for others. In the
    middle, one id comes again and again: where keys are alike, rounding errors add up.
    """
    windows = [c.window for c in runner.bundle.decoder.contract.caches if c.window is not None]
    longest = min(max(windows, default=0), runner.context)
    length = max(min(longest + runner.chunk + 64, runner.context - 1), 1)
    if text_ids:
        ids = np.resize(np.asarray(text_ids), length)
    else:
        own = np.setdiff1d(np.arange(runner.blob.num_rows), [i for i, _ in runner.blob.row_aliases])
        ids = np.random.default_rng(_SEED).choice(own, length)
    middle = length // 2
    ids[middle : middle + min(_REPEATED, length // 4)] = ids[middle]
    return [int(i) for i in ids]


def check_table(
    blob: Blob,
    matched: MatchedModel,
    table: Table,
    *,
    lossless: bool,
    progress: Callable[[int], object] = lambda _: None,
) -> TableCheck:
    """Read every row of one table back through the reader and compare it with the source."""
    segments = [s for s in blob.segments if s.table == table.name]
    check = TableCheck(
        table=table.name,
        dtype=segments[0].dtype,
        lossless=lossless,
        rows=blob.num_rows,
        max_error=0.0,
        max_steps=None if lossless else 0.0,
        first_bad_row=None,
        first_bad_layer=None,
    )
    count, width = table.layers or 1, table.width
    multiplier = np.float32(table.multiplier)
    step = max(1, _ROWS_PER_BATCH_BYTES // (4 * table.row_width))
    for begin in range(0, blob.num_rows, step):
        ids = np.arange(begin, min(begin + step, blob.num_rows))
        source = matched.rows(table, table.source_rows(ids)).astype(np.float32)
        expected = source.reshape(len(ids), count, width)
        got = blob.lookup(ids)[table.name].reshape(expected.shape)
        difference = np.abs(got - expected * multiplier)
        # Maxima and comparisons that do not overlook a NaN.
        check.max_error = float(np.maximum(check.max_error, difference.max()))
        if lossless:
            bad = ~(difference.max(axis=-1) == 0)
        else:
            group, bits = segments[0].group_size, 8 if segments[0].dtype == "int8" else 4
            steps = _quantization_steps(expected, segments[0].dtype, group, bits)
            in_steps = difference / (steps * multiplier)
            check.max_steps = float(np.maximum(check.max_steps or 0.0, in_steps.max()))
            if segments[0].dtype == "int4":
                bad = _further_than_nearest(expected, got / multiplier, steps, group or 1)
            else:
                bad = ~(in_steps.max(axis=-1) <= 0.5 + 1e-3)
        if bad.any() and check.first_bad_row is None:
            row, layer = np.argwhere(bad)[0]
            check.first_bad_row = begin + int(row)
            check.first_bad_layer = None if table.layers is None else int(layer)
        progress(len(ids))
    return check


def check_logits(
    mode: str, reference: NDArray[np.float32], got: NDArray[np.float32]
) -> LogitsCheck:
    """Compare logits `[T, vocab]`."""
    pairs = zip(reference, got, strict=True)  # one position at a time bounds memory
    largest, means = np.array([(e.max(), e.mean()) for e in (np.abs(a - b) for a, b in pairs)]).T
    spread = float(reference.max() - reference.min())
    best = got.argmax(-1)
    agree = best == reference.argmax(-1)
    gaps = reference.max(-1) - np.take_along_axis(reference, best[:, None], -1)[:, 0]
    near = ~agree & (gaps <= NEAR_TIE * spread)
    return LogitsCheck(
        mode=mode,
        tokens=len(reference),
        max_error=float(largest.max()),
        mean_error=float(means.mean()),
        logit_range=spread,
        kl=mean_kl(reference, got),
        correlation=correlation(reference, got),
        top1_agreement=float((agree | near).mean()),
        near_ties=int(near.sum()),
    )


def check_text(
    runner: Runner, oracle: Oracle, prompt: list[int], reference: NDArray[np.float32]
) -> TextCheck | None:
    """Compare the greedy continuation of a prompt with what the original would write."""
    count = min(_GREEDY_TOKENS, runner.context - len(prompt))
    if count < 1:
        return None
    runner.reset()
    got = []
    with contextlib.suppress(InputError):  # logits that are no numbers choose no token
        for token in runner.generate(prompt, max_new_tokens=count, ignore_eos=True):
            got.append(token.id)
    # Up to the first difference, both have read the same tokens: one call tells what the original
    # would have chosen.
    logits = oracle.logits([*prompt, *got[:-1]], keep=len(got))
    expected = logits.argmax(-1)
    equal = next((i for i, id_ in enumerate(got) if id_ != expected[i]), len(got))
    near_tie = False
    if equal < len(got):
        spread = float(reference.max() - reference.min())
        gap = logits[equal, expected[equal]] - logits[equal, got[equal]]
        near_tie = bool(gap <= NEAR_TIE * spread)
    return TextCheck(tokens=count, equal_tokens=equal, near_tie=near_tie)


def layer_errors(
    bundle: Bundle, matched: MatchedModel, blob: Blob, oracle: Oracle, ids: Sequence[int]
) -> list[float]:
    """By layer, the relative error of what it hands on to the next."""
    graph, rows = bundle.decoder, blob.lookup(blob.row_ids(ids))
    vectors = {lookup.name: rows[lookup.table] for lookup in graph.contract.lookup_inputs}
    backend = load(graph.backend)
    original = Original(
        matched=matched,
        storage=backend.storage(_weight_request(bundle)),
        trace=lambda: trace(matched.model, graph.contract),
    )
    got = backend.hidden_values(bundle.path, graph, vectors, len(ids), original=original)
    expected = oracle.hidden(ids)
    return [
        float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(a**2)), 1e-30))
        for a, b in zip(expected, got, strict=True)
    ]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def mean_kl(reference: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Mean over positions of KL(reference || got), nats."""
    total = 0.0
    for a, b in zip(reference, got, strict=True):  # one position at a time bounds memory
        p, q = log_softmax(a), log_softmax(b)
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(reference)


def correlation(reference: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Correlation of logits `[T, vocab]`, each position's mean taken off."""
    both = first = second = 0.0
    for x, y in zip(reference, got, strict=True):
        a, b = x - x.mean(), y - y.mean()
        both += float(a @ b)
        first += float(a @ a)
        second += float(b @ b)
    return float(both / max(np.sqrt(first * second), 1e-30))


def _weight_request(bundle: Bundle) -> WeightRequest:
    """How a bundle's build wanted dense weights to be stored."""
    manifest = bundle.manifest
    return WeightRequest(
        cast(WeightDtype, manifest.weight_dtype),
        cast(BlockSize, manifest.block_size),
        manifest.symmetric,
        cast(WeightDtype, manifest.head_dtype),
    )


def _is_costly(bundle: Bundle) -> bool:
    """Whether hidden values would take long to get."""
    graph, sizes = bundle.decoder, {r.name: r.size for r in bundle.manifest.files}
    if not load(graph.backend).hidden_values_build:
        return False
    files = (sizes.get(n) or (bundle.path / n).stat().st_size for n in graph.files)
    return sum(files) > _LARGE_GRAPH_BYTES


def _computing_dtypes(bundle: Bundle) -> set[str]:
    manifest = bundle.manifest
    return {manifest.weight_dtype, manifest.head_dtype, manifest.cache_dtype} - {"none"}


def _compared_positions(runner: Runner, ids: list[int]) -> int:
    """How many of the last positions have their logits compared: all, or what fits in memory."""
    row_bytes = 4 * runner.bundle.decoder.contract.vocab_size
    return min(len(ids), max(_LEAST_COMPARED, _LOGITS_BYTES // row_bytes))


def _feed_modes(
    runner: Runner, ids: list[int], compared: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Logits of the last `compared` positions: at once, in uneven pieces, and token by token."""
    first = len(ids) - compared
    # 1, 3, 7, 15, ... tokens: starts, ends and wraps at odd places.
    uneven, size = [0], 1
    while uneven[-1] < len(ids):
        uneven.append(min(uneven[-1] + size, len(ids)))
        size = min(2 * size + 1, runner.chunk)
    even = [*range(0, len(ids), runner.chunk), len(ids)]
    single = sorted({*(cut for cut in even if cut < first), *range(first, len(ids) + 1)})
    for mode, cuts in (("prefill", even), ("chunked", uneven), ("step", single)):
        runner.reset()
        pieces = []
        for begin, end in itertools.pairwise(cuts):
            wanted = min(end - first, end - begin)
            got = runner.feed(ids[begin:end], keep=max(wanted, 1))
            if wanted > 0:
                pieces.append(got.copy())
        yield mode, np.concatenate(pieces)


def _quantization_steps(
    expected: NDArray[np.float32], dtype: str, group: int | None, bits: int
) -> NDArray[np.float32]:
    """By element, the distance between neighbouring codes, from the source alone."""
    if group is None:  # a narrower float: half a unit in the last place
        narrow = {"fp16": 2.0**-10, "bf16": 2.0**-7}[dtype]
        smallest = 2.0**-24 if dtype == "fp16" else 0.0
        return np.maximum(np.abs(expected) * np.float32(narrow), np.float32(max(smallest, 1e-38)))
    scales = group_scales(expected, bits=bits, group_size=group).astype(np.float32)
    steps = np.repeat(scales, group, axis=-1)[..., : expected.shape[-1]]
    return np.maximum(steps, np.float32(1e-38))


def _further_than_nearest(
    expected: NDArray[np.float32],
    got: NDArray[np.float32],
    steps: NDArray[np.float32],
    group: int,
) -> NDArray[Any]:
    """`[rows, layers]`: whether a group of values is further off than rounding to nearest.

    The stored scale is a float16, which moves every value by up to 2**-11 of itself.
    """
    starts = np.arange(0, expected.shape[-1], group)
    nearest = np.rint(expected / steps) * steps - expected
    error, bound, size = (
        np.sqrt(np.add.reduceat(np.square(values), starts, axis=-1))
        for values in (got - expected, nearest, expected)
    )
    close: NDArray[np.bool_] = error <= bound * (1 + 1e-3) + size * 2.0**-11
    return ~np.asarray(close.all(axis=-1))


def _windows(ids: Sequence[int], length: int) -> list[list[int]]:
    """A text in pieces that are each read from a fresh state; a last piece of one token is left."""
    ids = ids[:_FIDELITY_TOKENS]
    pieces = [[int(i) for i in ids[b : b + length]] for b in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1] or pieces


def _measure_fidelity(
    report: ParityReport,
    runner: Runner,
    matched: MatchedModel,
    oracle: Oracle,
    windows: list[list[int]],
) -> None:
    """Fill in what the tables cost, what the dense weights cost, and both together."""
    totals: dict[str, _Totals] = {
        what: _Totals() for what in ("original", "tables", "dense", "both")
    }
    for ids in windows:
        reference = oracle.logits(ids)
        stored, exact = _vectors(runner, matched, ids)
        totals["original"].add(reference, reference, ids)
        totals["tables"].add(reference, oracle.logits(ids, stored), ids)
        totals["dense"].add(reference, runner.logits(ids, vectors=exact), ids)
        totals["both"].add(reference, runner.logits(ids), ids)
    original = totals.pop("original")
    report.original_perplexity = original.perplexity if runner.tokenizer else None
    report.fidelity_tokens = original.tokens
    report.fidelity = [
        Fidelity(what, t.kl / t.tokens, t.perplexity, t.same / t.tokens)
        for what, t in totals.items()
    ]


class _Totals:
    """Sums over windows of a text."""

    def __init__(self) -> None:
        self.tokens = self.predicted = self.same = 0
        self.kl = self.loss = 0.0

    def add(
        self, reference: NDArray[np.float32], got: NDArray[np.float32], ids: Sequence[int]
    ) -> None:
        self.tokens += len(ids)
        self.same += int((got.argmax(-1) == reference.argmax(-1)).sum())
        self.kl += mean_kl(reference, got) * len(ids)
        self.predicted += len(ids) - 1
        self.loss += sum(-float(log_softmax(got[t])[ids[t + 1]]) for t in range(len(ids) - 1))

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss / max(self.predicted, 1)))


def _vectors(
    runner: Runner, matched: MatchedModel, ids: Sequence[int]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """By graph input, the looked-up vectors of a text: as stored, and as in the checkpoint."""
    lookups = runner.blob.lookup(runner.blob.row_ids(ids))
    tables = matched.model.tables
    stored = {table.graph_input: lookups[table.name] for table in tables}
    return stored, {t.graph_input: matched.vectors(t, np.asarray(ids)) for t in tables}


def _failures(report: ParityReport, bundle: Bundle) -> list[str]:
    failures = []
    for table in report.tables:
        if table.first_bad_row is not None:
            layer = "" if table.first_bad_layer is None else f", layer {table.first_bad_layer}"
            expected = "the source" if table.lossless else "as close to the source as it should be"
            failures.append(
                f"table `{table.table}`: the row of token id {table.first_bad_row}{layer} is not "
                f"{expected} (largest error {table.max_error:.3g})"
            )
    where = (
        f"; layer {report.first_diverging_layer} is the first that diverges"
        if report.first_diverging_layer is not None
        else ""
    )
    for check in report.logits:
        problem = _logits_problem(report, check, bundle)
        if problem:
            failures.append(f"logits, {check.mode}: {problem}{where}")
    text = report.text
    if report.exact and text and text.equal_tokens < text.tokens and not text.near_tie:
        failures.append(
            f"greedy text differs from the original's at token {text.equal_tokens}{where}"
        )
    if report.exact and not failures and where:
        failures.append(f"hidden states differ{where}")
    return failures


def _logits_problem(report: ParityReport, check: LogitsCheck, bundle: Bundle) -> str | None:
    if report.exact:
        if check.relative_error <= EXACT_LOGITS:
            return None
        return f"largest error {check.relative_error:.2e} of the range exceeds {EXACT_LOGITS:.0e}"
    dtypes = {table.dtype for table in report.tables} | _computing_dtypes(bundle) | {"fp16"}
    coarsest = next(dtype for dtype in ("int4", "int8", "fp16") if dtype in dtypes)
    if not check.kl <= KL_LIMITS[coarsest]:
        return f"KL divergence {check.kl:.3g} nats exceeds {KL_LIMITS[coarsest]:g}"
    if not check.correlation >= LEAST_CORRELATION[coarsest]:
        return (
            f"correlation {check.correlation:.3f} with the original's is below "
            f"{LEAST_CORRELATION[coarsest]:g}"
        )
    return None
