"""What tables and bundles will weigh, from the same plan that a build follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from pleexport.dtypes import TABLE_DTYPES
from pleexport.export.blob_writer import blob_bytes
from pleexport.export.options import of_target
from pleexport.export.plan import make_plan
from pleexport.export.segments import plan_segments, row_stride
from pleexport.inspection.info import BlobInfo, PartInfo, StoredTable, TableInfo, TargetEstimate
from pleexport.model import Model, Table
from pleexport.runtime.blob_layout import MINIMUM_PAGE_SIZE
from pleexport.runtime.bundle import BLOB
from pleexport.targets import Target


def estimate(
    model: Model, target: Target, source: str, *, copied: Iterable[Path] = ()
) -> TargetEstimate:
    """What a build of a model for a target will weigh.

    Args:
        source: the checkpoint's dtype, e.g. "bf16".
        copied: files that a bundle gets as they are.
    """
    settings = of_target(target, quantized=model.is_quantized)
    model = model.with_cache(target.cache_dtype).on(target.processor)
    plan = make_plan(model, settings, source=source, copied=copied)
    blob = plan.sizes[BLOB]
    return TargetEstimate(
        target=target.name,
        table_dtype=plan.settings.table_dtype,
        weight_dtype=plan.settings.weights.dtype,
        cache_dtype=target.cache_dtype,
        context=plan.context,
        graph_bytes=plan.nbytes - blob,
        blob_bytes=blob,
        bundle_bytes=plan.nbytes,
        cache_bytes=plan.cache_bytes,
        resident_bytes=plan.resident_bytes,
        fits=not plan.problems,
        problems=plan.problems,
        delivery=plan.delivery,
        read_bytes=plan.read_bytes,
        parts=[
            PartInfo(share=share, **dataclasses.asdict(part))
            for part, share in zip(plan.parts, plan.shares(), strict=True)
        ],
        predicted_divergence=plan.predicted_divergence,
    )


def describe_table(model: Model, table: Table, source: str) -> TableInfo:
    """One table in every dtype that a build can store it in.

    Args:
        source: the checkpoint's dtype, e.g. "bf16".
    """
    stored = []
    for dtype in TABLE_DTYPES:
        segments = plan_segments([table], dtype, source)
        stored_as = segments[0].dtype
        row = sum(segment.end - segment.offset for segment in segments)
        stored.append(
            StoredTable(
                dtype=dtype,
                segment_dtype=stored_as,
                row_bytes=row,
                table_bytes=row * table.rows,
            )
        )
    return TableInfo(
        name=table.name,
        rows=table.rows,
        layers=table.layers,
        width=table.width,
        parameters=table.rows * table.row_width,
        is_head=any(weight.source_key in table.keys for weight in model.weights),
        stored=stored,
    )


def estimate_blobs(model: Model, source: str) -> list[BlobInfo]:
    """The blob of all tables in every dtype."""
    blobs = []
    for dtype in TABLE_DTYPES:
        segments = plan_segments(model.tables, dtype, source)
        nbytes = blob_bytes(model, segments, MINIMUM_PAGE_SIZE)
        blobs.append(BlobInfo(dtype=dtype, row_stride=row_stride(segments), file_bytes=nbytes))
    return blobs
