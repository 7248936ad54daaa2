"""Where does a bundle leave the original? What each layer hands on, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pleexport.backends.base import Original
from pleexport.backends.registry import load
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import WeightDtype
from pleexport.parity.metrics import relative_rms
from pleexport.parity.oracle import Oracle
from pleexport.runtime.blob import Blob
from pleexport.runtime.bundle import Bundle, Manifest
from pleexport.weights import BlockSize, WeightRequest

# Largest relative error (root mean square) of a layer's output before it counts as diverging.
EXACT_LAYER = 1e-3
QUANTIZED_LAYER = 0.5
# A graph beyond it takes minutes to build.
_LARGE_GRAPH_BYTES = 64 << 20


def takes_a_build(bundle: Bundle) -> bool:
    """Whether hidden values of a bundle take as long as building a large graph."""
    graph = bundle.decoder
    nbytes = sum((bundle.path / name).stat().st_size for name in graph.files)
    return load(graph.backend).hidden_values_build and nbytes > _LARGE_GRAPH_BYTES


def layer_errors(
    bundle: Bundle, *, matched: MatchedModel, blob: Blob, oracle: Oracle, ids: Sequence[int]
) -> tuple[float, ...]:
    """By layer, the relative error of what it hands on to the next.

    Opens the graph once more, as one that gives hidden values: a session of the runner has none.
    """
    from pleexport.families.trace import trace  # needs torch, which checking files does not

    graph, rows = bundle.decoder, blob.lookup(blob.row_ids(ids))
    vectors = {lookup.name: rows[lookup.table] for lookup in graph.contract.lookup_inputs}
    backend = load(graph.backend)
    original = Original(
        matched=matched,
        storage=backend.storage(_weight_request(bundle.manifest)),
        trace=lambda: trace(matched.model, graph.contract),
    )
    got = backend.hidden_values(bundle.path, graph, vectors, len(ids), original=original)
    return tuple(relative_rms(a, got=b) for a, b in zip(oracle.hidden(ids), got, strict=True))


def _weight_request(manifest: Manifest) -> WeightRequest:
    """How a bundle's build wanted dense weights to be stored."""
    return WeightRequest(
        cast(WeightDtype, manifest.weight_dtype),
        cast(BlockSize, manifest.block_size),
        manifest.symmetric,
        cast(WeightDtype, manifest.head_dtype),
        cast(dict[str, WeightDtype], manifest.weight_dtypes),
        trained_grid=manifest.trained_grid,
        per_channel=manifest.per_channel,
    )


def first_diverging_layer(errors: Sequence[float], *, exact: bool) -> int | None:
    """The first layer whose error is beyond the limit; None where there is none."""
    limit = EXACT_LAYER if exact else QUANTIZED_LAYER
    # Turned around, so that a NaN diverges.
    return next((i for i, error in enumerate(errors) if not error <= limit), None)
