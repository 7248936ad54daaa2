"""Does a bundle compute what the PyTorch original computes? Rows, logits, greedy text.

A bundle with fp32 weights and lossless tables must agree within float32 noise. Any other is judged
by how far its predictions move: the KL divergence from the original, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import LOSSLESS
from pleexport.parity.fidelity import measure_fidelity
from pleexport.parity.greedy import check_greedy
from pleexport.parity.layers import first_diverging_layer, layer_errors
from pleexport.parity.logits import check_logits, compared_positions, feed_modes, parity_ids
from pleexport.parity.metrics import logit_range
from pleexport.parity.oracle import Oracle
from pleexport.parity.report import LogitsCheck, ParityReport
from pleexport.parity.rows import check_table
from pleexport.runtime.blob import Blob
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.runner import Runner

# Largest logit error of an exact bundle, as a share of the range of the logits.
EXACT_LOGITS = 1e-4
# Rounded bundles, by the coarser of their two dtypes: the largest mean KL divergence, and the least
# correlation of the logits with the original's. Rounding stays well inside; wrong rows or weights
# are far outside, also where flat predictions keep the divergence small.
KL_LIMITS = {"fp16": 0.01, "int8": 0.05, "int4": 0.5}
LEAST_CORRELATION = {"fp16": 0.999, "int8": 0.95, "int4": 0.7}
_PROMPT_TOKENS = 16


def compare(
    bundle: Bundle,
    *,
    matched: MatchedModel,
    oracle: Oracle,
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
        check_table(
            blob, matched=matched, table=table, lossless=lossless[table.name], progress=progress
        )
        for table in matched.model.tables
    ]
    runner = Runner(bundle)
    ids = parity_ids(runner, text_ids)
    compared = compared_positions(runner, tokens=len(ids))
    reference = oracle.logits(ids, keep=compared)
    report = ParityReport(
        oracle=oracle.name,
        exact=exact,
        tables=tables,
        logits=[
            check_logits(mode, reference=reference, got=got)
            for mode, got in feed_modes(runner, ids=ids, compared=compared)
        ],
        text=check_greedy(
            runner,
            oracle=oracle,
            prompt=ids[:_PROMPT_TOKENS],
            logit_range=logit_range(reference),
        ),
        layer_errors=[],
        first_diverging_layer=None,
        original_perplexity=None,
        fidelity=[],
        fidelity_tokens=0,
        failures=[],
    )
    del reference
    if not exact:
        result = measure_fidelity(
            runner, matched=matched, oracle=oracle, ids=text_ids or ids, window=compared
        )
        report.original_perplexity = result.original_perplexity
        report.fidelity_tokens = result.tokens
        report.fidelity = list(result.entries)
    del runner  # else the dense weights are in memory twice
    report.layer_errors = list(layer_errors(bundle, blob=blob, oracle=oracle, ids=ids))
    report.first_diverging_layer = first_diverging_layer(report.layer_errors, exact=exact)
    report.failures = _failures(report, bundle)
    return report


def _computing_dtypes(bundle: Bundle) -> set[str]:
    manifest = bundle.manifest
    return {manifest.weight_dtype, manifest.head_dtype, manifest.cache_dtype} - {"none"}


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
