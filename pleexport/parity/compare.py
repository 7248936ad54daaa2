"""Does a bundle compute what the PyTorch original computes? Rows, logits, greedy text.

A bundle with fp32 weights and lossless tables must agree within float32 noise. Any other is judged
by how far its predictions move: the KL divergence from the original, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import LOSSLESS
from pleexport.model import Codes
from pleexport.parity.fidelity import NOTHING_ROUNDED, measure_fidelity
from pleexport.parity.greedy import check_greedy
from pleexport.parity.layers import first_diverging_layer, layer_errors, takes_a_build
from pleexport.parity.logits import check_logits, compared_positions, feed_modes, parity_ids
from pleexport.parity.metrics import logit_range
from pleexport.parity.oracle import Oracle
from pleexport.parity.report import ParityReport, TextCheck, find_failures
from pleexport.parity.rows import check_table
from pleexport.runtime.blob import Blob
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.runner import Runner

# How much of the text greedy text goes on from.
_PROMPT_TOKENS = 16


def compare(
    bundle: Bundle,
    *,
    matched: MatchedModel,
    oracle: Oracle,
    text_ids: Sequence[int] | None = None,
    tokenizer: TextCheck | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> ParityReport:
    """Run all levels, one after the other, and assemble the report.

    Args:
        text_ids: a text to measure logits and fidelity on; random ids where there is none.
        tokenizer: what was found out about text and ids.
        progress: called with the number of rows checked since its last call.
    """
    blob = bundle.open_blob()
    lossless, computing_dtypes = _lossless_tables(blob, matched), _computing_dtypes(bundle)
    if matched.model.leaves_rounding_out:
        computing_dtypes.add("int8")  # what is left out moves logits as far as rounding would
    # Rounded activations jump by a whole step where float32 noise turns a half.
    model = matched.model
    is_smooth = not (model.rounds_activations or model.leaves_rounding_out)
    exact = all(lossless.values()) and computing_dtypes == {"fp32"} and is_smooth
    tables = tuple(
        check_table(
            blob, matched=matched, table=table, lossless=lossless[table.name], progress=progress
        )
        for table in matched.model.tables
    )

    runner = Runner(bundle)
    ids = parity_ids(runner, text_ids)
    compared = compared_positions(runner, tokens=len(ids))
    reference = oracle.logits(ids, keep=compared)
    logits = tuple(
        check_logits(mode, reference=reference, got=got)
        for mode, got in feed_modes(runner, ids=ids, compared=compared)
    )
    spread = logit_range(reference)
    del reference  # as much memory as a window of fidelity takes
    greedy = check_greedy(runner, oracle=oracle, prompt=ids[:_PROMPT_TOKENS], logit_range=spread)
    cost = NOTHING_ROUNDED
    if not exact:
        cost = measure_fidelity(
            runner, matched=matched, oracle=oracle, ids=text_ids or ids, window=compared
        )
    del runner  # layers open a session of their own, and dense weights are in memory once

    find = partial(
        find_failures,
        exact=exact,
        tables=tables,
        logits=logits,
        greedy=greedy,
        computing_dtypes=computing_dtypes,
        tokenizer=tokenizer,
    )
    errors: tuple[float, ...] = ()
    if not takes_a_build(bundle) or find(first_diverging_layer=None):
        errors = layer_errors(bundle, matched=matched, blob=blob, oracle=oracle, ids=ids)
    diverging = first_diverging_layer(errors, exact=exact)
    return ParityReport(
        oracle=oracle.name,
        exact=exact,
        tables=tables,
        logits=logits,
        text=greedy,
        layer_errors=errors,
        first_diverging_layer=diverging,
        original_perplexity=cost.original_perplexity,
        fidelity=cost.entries,
        fidelity_tokens=cost.tokens,
        failures=find(first_diverging_layer=diverging),
        tokenizer=tokenizer,
    )


def _lossless_tables(blob: Blob, matched: MatchedModel) -> dict[str, bool]:
    """By table, whether the blob's dtype holds its rows as they are."""
    found = {}
    for table in matched.model.tables:
        segment = next(s for s in blob.segments if s.table == table.name)
        codes = Codes(segment.dtype, segment.group_size or 0, segment.scale_dtype or "")
        holds = segment.dtype in LOSSLESS[table.source_dtype(matched.dtype)]
        # A head with codes is looked up in only where it keeps them.
        own = table.codes is not None and blob.tied_table == table.name
        found[table.name] = holds or own or codes == table.segment_codes
    return found


def _computing_dtypes(bundle: Bundle) -> set[str]:
    """What dense weights, head and caches are stored in."""
    manifest = bundle.manifest
    return {manifest.weight_dtype, manifest.head_dtype, manifest.cache_dtype} - {"none"}
