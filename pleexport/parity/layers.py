"""Where does a bundle leave the original? What each layer hands on, compared."""

from __future__ import annotations

from collections.abc import Sequence

from pleexport.backends.registry import load
from pleexport.parity.metrics import relative_rms
from pleexport.parity.oracle import Oracle
from pleexport.runtime.blob import Blob
from pleexport.runtime.bundle import Bundle

# Largest relative error (root mean square) of a layer's output before it counts as diverging.
EXACT_LAYER = 1e-3
QUANTIZED_LAYER = 0.5


def layer_errors(
    bundle: Bundle, *, blob: Blob, oracle: Oracle, ids: Sequence[int]
) -> tuple[float, ...]:
    """By layer, the relative error of what it hands on to the next.

    Opens the graph once more, as one that gives hidden values: a session of the runner has none.
    """
    graph, rows = bundle.decoder, blob.lookup(blob.row_ids(ids))
    vectors = {lookup.name: rows[lookup.table] for lookup in graph.contract.lookup_inputs}
    got = load(graph.backend).hidden_values(bundle.path, graph, vectors, len(ids))
    return tuple(relative_rms(a, got=b) for a, b in zip(oracle.hidden(ids), got, strict=True))


def first_diverging_layer(errors: Sequence[float], *, exact: bool) -> int | None:
    """The first layer whose error is beyond the limit; None where there is none."""
    limit = EXACT_LAYER if exact else QUANTIZED_LAYER
    # Turned around, so that a NaN diverges.
    return next((i for i, error in enumerate(errors) if not error <= limit), None)
