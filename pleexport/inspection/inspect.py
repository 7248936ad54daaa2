"""Say what a checkpoint is made of, from its config and the headers of its files alone."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from pleexport import families, targets
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import TABLE_DTYPES, torch_name
from pleexport.errors import CheckpointError
from pleexport.export.blob_writer import blob_bytes
from pleexport.export.options import of_target
from pleexport.export.plan import make_plan
from pleexport.export.segments import plan_segments, row_stride
from pleexport.model import Model, Published, Table
from pleexport.runtime.blob_layout import MINIMUM_PAGE_SIZE
from pleexport.runtime.bundle import BLOB
from pleexport.show import inspection as inspection_text
from pleexport.targets import Target


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of parameters; a tied head is counted once, as the main embedding.

    Attributes:
        stored: what the files hold, tensors without a dimension left out; with only a config, what
            a text-only checkpoint holds.
        live: what the whole published model computes with: text model and towers.
        text: what the text model computes with.
        main_embedding: the tables that belong to no layer.
        per_layer_embedding: the tables that belong to layers; only they can leave memory.
        dense: the text model without its tables.
        folded: tensors that a build merges into rows of tables; they are nowhere afterwards.
        resident: what has to stay in memory for text: `text` without the per-layer tables,
            what is merged into them, and without a main embedding that is not the head too.
        dead: tensors of layers that use another layer's keys and values.
        buffers: numbers in the checkpoint that the original does not count as parameters.
        towers: parts of a multimodal model that are left out.
        head_copies: copies of a tied head, which nothing reads.
        scalars: tensors without a dimension; in no other count.
    """

    stored: int
    live: int
    text: int
    main_embedding: int
    per_layer_embedding: int
    dense: int
    folded: int
    resident: int
    dead: int
    buffers: int
    towers: int
    head_copies: int
    scalars: int


class Tower(msgspec.Struct, frozen=True):
    """A part of a multimodal checkpoint that is left out; size in bytes."""

    name: str
    parameters: int
    nbytes: int


class StoredTable(msgspec.Struct, frozen=True, kw_only=True):
    """One table in one dtype.

    Attributes:
        dtype: as a build names it.
        segment_dtype: what "source" means here, otherwise the same.
        row_bytes: codes and scales of one token id.
        table_bytes: of all rows, without what aligns them.
    """

    dtype: str
    segment_dtype: str
    row_bytes: int
    table_bytes: int


class TableInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A lookup table.

    Attributes:
        layers: None for a table that belongs to no layer.
        width: elements of one layer's vector.
        is_head: the output head reads it too, so that it cannot leave memory.
    """

    name: str
    rows: int
    layers: int | None
    width: int
    parameters: int
    is_head: bool
    stored: list[StoredTable]


class BlobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The blob of all tables in one dtype; sizes in bytes.

    Attributes:
        row_stride: from one row to the next: all tables, aligned.
    """

    dtype: str
    row_stride: int
    file_bytes: int


class Effective(msgspec.Struct, frozen=True, kw_only=True):
    """The "effective" parameter count, and how it comes about.

    Attributes:
        label: the rounded figure, e.g. "2.3B".
        parameters: the same without rounding.
        published_name: the published model whose towers are counted although they are not here;
            None where everything that is counted is.
        explanation: sentences.
    """

    label: str
    parameters: int
    published_name: str | None
    explanation: list[str]


class TargetEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a build for a target will weigh; sizes in bytes.

    Attributes:
        bundle_bytes: dense weights and blob; tokenizer and reports come on top.
        cache_bytes: keys and values of a full context.
        resident_bytes: dense weights as ONNX Runtime holds them, and cache.
        fits: whether the target's limits allow it.
        problems: the limits that do not, with the numbers.
        delivery: what the target's store cannot deliver in one piece.
    """

    target: str
    table_dtype: str
    weight_dtype: str
    cache_dtype: str
    context: int
    graph_bytes: int
    blob_bytes: int
    bundle_bytes: int
    cache_bytes: int
    resident_bytes: int
    fits: bool
    problems: list[str]
    delivery: list[str]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What `inspect` finds out.

    Attributes:
        dtype: the checkpoint's own, e.g. "bf16".
        vocab: token ids that the head knows.
        context: largest number of positions.
        weights: "found" and fitting the config, "none", or "unusable", as the notes explain.
    """

    path: str
    family: str
    model_type: str
    dtype: str
    layers: int
    vocab: int
    context: int
    weights: str
    counts: Counts
    tables: list[TableInfo]
    blobs: list[BlobInfo]
    towers: list[Tower]
    effective: Effective
    targets: list[TargetEstimate]
    notes: list[str]


def inspect(path: str | Path) -> ModelInfo:
    """Describe a checkpoint without reading its weights.

    A folder that has only a config is described as the text-only checkpoint that fits it, and so
    is one whose weights do not fit their config; a note says why.

    Args:
        path: a Hugging Face folder, or a file of a family that has no config.
    Raises:
        CheckpointError: no folder, no config, or damaged files.
        UnsupportedError: the model has no tables, or is of no known family.
    """
    checkpoint = Checkpoint(path)
    model = families.resolve(checkpoint)
    notes: list[str] = []
    matched = _bind(model, checkpoint, notes)
    towers, scalars = _towers(model, matched)
    counts = _count(model, matched, towers, scalars)
    _note_other_dtypes(matched, checkpoint, notes)
    source = checkpoint.dtype
    if scalars:
        notes.append(f"{scalars:,} tensors without a dimension (single numbers) are in no count.")
    if published := _published(model, counts):
        notes.append(_published_note(published, counts))
    return ModelInfo(
        path=str(path),
        family=model.family,
        model_type=str(checkpoint.config.get("model_type", model.family)),
        dtype=source,
        layers=model.num_layers,
        vocab=model.vocab_size,
        context=model.max_context,
        weights="found" if matched else "unusable" if checkpoint.files else "none",
        counts=counts,
        tables=[_table(model, table, source) for table in model.tables],
        blobs=_blobs(model, source),
        towers=towers,
        effective=_effective(model, counts),
        targets=[estimate(model, targets.load(name), source) for name in targets.names()],
        notes=notes,
    )


def estimate(model: Model, target: Target, source: str) -> TargetEstimate:
    """What a build of a model for a target will weigh.

    Args:
        source: the checkpoint's dtype, e.g. "bf16".
    """
    plan = make_plan(model.with_cache(target.cache_dtype), of_target(target), source=source)
    blob = plan.sizes[BLOB]
    return TargetEstimate(
        target=target.name,
        table_dtype=target.table_dtype,
        weight_dtype=target.weight_dtype,
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
    )


def _bind(model: Model, checkpoint: Checkpoint, notes: list[str]) -> MatchedModel | None:
    """The matched, or None with a note why there is none."""
    if not checkpoint.files:
        notes.append(
            "No weights in the folder: the counts are those of a text-only checkpoint that fits "
            "config.json."
        )
        return None
    try:
        return MatchedModel(model, checkpoint)
    except CheckpointError as err:
        notes.append(
            "The weights do not fit the model, so a build would be refused; the counts are those "
            f"of a text-only checkpoint that does fit. {err.message}"
        )
        return None


def _towers(model: Model, matched: MatchedModel | None) -> tuple[list[Tower], int]:
    """The parts that are left out, and the number of tensors without a dimension."""
    if matched is None:
        return [], 0
    entries = matched.checkpoint.entries
    scalars = {name for name, entry in entries.items() if not entry.shape}
    scalars_of: dict[str, int] = {}
    for name in scalars:
        part = model.ignored_part(name) or ""
        scalars_of[part] = scalars_of.get(part, 0) + 1
    towers = [
        Tower(part.name, part.parameters - scalars_of.get(part.name, 0), part.nbytes)
        for part in matched.left_out
    ]
    return towers, len(scalars)


def _count(model: Model, matched: MatchedModel | None, towers: list[Tower], scalars: int) -> Counts:
    table_keys = {key for table in model.tables for key in table.keys}
    main = sum(t.rows * t.row_width for t in model.tables if t.layers is None)
    per_layer = sum(t.rows * t.row_width for t in model.tables if t.layers is not None)
    own = [w for w in model.weights if w.constant is None and w.source_key not in table_keys]
    dense = sum(weight.size for weight in own if not weight.is_buffer)
    buffers = sum(weight.size for weight in own if weight.is_buffer)
    folds: dict[str, int] = {}
    for table in model.tables:
        folds |= {k: math.prod(n) for k, n in table.sources.items() if k not in table_keys}
    dead, copies = _unused(model, matched)
    heads = {w.source_key for w in model.weights if w.source_key in table_keys}
    resident_tables = sum(t.rows * t.row_width for t in model.tables if heads & {*t.keys})
    tower = sum(tower.parameters for tower in towers)
    folded = sum(folds.values())
    text = main + per_layer + dense + folded
    return Counts(
        stored=text + tower + dead + buffers + copies,
        live=text + tower,
        text=text,
        main_embedding=main,
        per_layer_embedding=per_layer,
        dense=dense,
        folded=folded,
        resident=dense + resident_tables,
        dead=dead,
        buffers=buffers,
        towers=tower,
        head_copies=copies,
        scalars=scalars,
    )


def _unused(model: Model, matched: MatchedModel | None) -> tuple[int, int]:
    """Elements of sharing layers' tensors, and of copies of a tied head.

    With only a config, all of the first are counted, as in published checkpoints, and none of the
    second, as in those.
    """
    heads = {weight.name for weight in model.weights if weight.key is not None}
    if matched is None:
        sizes = [math.prod(u.shape) for key, u in model.unused.items() if key not in heads]
        return sum(sizes), 0
    entries = matched.checkpoint.entries
    copies = {name for name in matched.ignored if any(name.endswith(head) for head in heads)}
    return (
        sum(entries[name].size for name in matched.ignored if name not in copies),
        sum(entries[name].size for name in copies),
    )


def _note_other_dtypes(
    matched: MatchedModel | None, checkpoint: Checkpoint, notes: list[str]
) -> None:
    """Say that tensors are stored in another dtype than config.json names."""
    stored = set()
    if matched and checkpoint.config:
        stored = {e.dtype for t in matched.model.tables for e in matched.entries(t)}
    if stored - {checkpoint.dtype}:
        notes.append(
            f"config.json says {torch_name(checkpoint.dtype)}, and the tables are stored as "
            f"{', '.join(sorted(stored))}: they are rounded to it, as the original does."
        )


def _table(model: Model, table: Table, source: str) -> TableInfo:
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


def _blobs(model: Model, source: str) -> list[BlobInfo]:
    blobs = []
    for dtype in TABLE_DTYPES:
        segments = plan_segments(model.tables, dtype, source)
        nbytes = blob_bytes(model, segments, MINIMUM_PAGE_SIZE)
        blobs.append(BlobInfo(dtype=dtype, row_stride=row_stride(segments), file_bytes=nbytes))
    return blobs


def _effective(model: Model, counts: Counts) -> Effective:
    if model.counts_only_tables_out:
        return _effective_core(counts)
    published = _published(model, counts)
    if published is None or published.stored is None or counts.towers:
        return _effective_difference(counts, stored=counts.stored, name=None)
    whole = _effective_difference(counts, stored=published.stored, name=published.name)
    here = _effective_difference(counts, stored=counts.stored, name=None)
    note = (
        "There are no vision and audio towers here, which the published figure counts; the "
        f"same rule gives {here.label} for the {counts.stored:,} parameters of the text part "
        f"({_rounded(here.parameters)} without rounding)."
    )
    explanation = [*whole.explanation[:-1], note, whole.explanation[-1]]
    return msgspec.structs.replace(whole, explanation=explanation)


def _effective_core(counts: Counts) -> Effective:
    """Everything but the tables, tensors of sharing layers included."""
    effective = counts.dense + counts.dead
    label = _rounded(effective)
    return Effective(
        label=label,
        parameters=effective,
        published_name=None,
        explanation=[
            f"{label}: {counts.dense:,} parameters outside the embedding tables, plus "
            f"{counts.dead:,} in the key and value tensors that sharing layers carry and never "
            f"use, are {effective:,}.",
            _what_can_leave(counts),
        ],
    )


def _effective_difference(counts: Counts, *, stored: int, name: str | None) -> Effective:
    """The difference of two rounded figures; below a billion, nothing is rounded first.

    Args:
        stored: parameters of the whole checkpoint.
        name: the published model that `stored` belongs to, if it is not the one at hand.
    """
    embedding = counts.main_embedding + counts.per_layer_embedding
    effective, label, explanation = stored - embedding, _rounded(stored - embedding), []
    if stored >= 1e9:
        tenths, part_tenths = round(stored / 1e8), round(embedding / 1e8)
        total, part = f"{tenths / 10:.1f}B", f"{part_tenths / 10:.1f}B"
        label = f"{(tenths - part_tenths) / 10:.1f}B"
        explanation.append(
            f"{label}{f', as published for {name}' if name else ''}: {total} stored minus {part} "
            f"embedding, both rounded first; so is the share, {part} of {total} = "
            f"{part_tenths / tenths:.0%}."
        )
    explanation += [
        f"Without rounding: {stored:,} stored minus {embedding:,} embedding = {effective:,} "
        f"({_rounded(effective)}); the embedding is {embedding / stored:.1%} of what is stored.",
        "Stored counts everything in the files, used or not; embedding counts the main table and "
        f"the per-layer table ({counts.main_embedding:,} and {counts.per_layer_embedding:,}).",
        _what_can_leave(counts),
    ]
    return Effective(
        label=label, parameters=effective, published_name=name, explanation=explanation
    )


def _what_can_leave(counts: Counts) -> str:
    tied = counts.resident > counts.dense
    share = counts.per_layer_embedding / counts.stored
    return (
        f"What can leave memory: the per-layer embedding, {counts.per_layer_embedding:,} "
        f"({share:.0%} of what is stored here)"
        + (
            ". The main embedding cannot, although it counts as embedding: it is tied to the "
            "output head, which multiplies by all of it at every token"
            if tied
            else f", and the main embedding, {counts.main_embedding:,}, which is not the head"
        )
        + f". {counts.resident:,} parameters stay, for text."
    )


def _published(model: Model, counts: Counts) -> Published | None:
    """The published model of this shape."""
    return next((p for p in model.published if p.live_text == counts.text), None)


def _published_note(published: Published, counts: Counts) -> str:
    start = f"Published figures: this is the shape of {published.name}."
    if published.stored is None:
        return (
            f'{start} Its makers call it "{published.effective} effective": what is outside the '
            "tables, with the unused tensors of sharing layers."
        )
    same = published.stored == counts.stored
    embedding = counts.main_embedding + counts.per_layer_embedding
    return (
        f"{start} The published checkpoint stores {published.stored:,} parameters"
        + (", as this one does" if same else ", vision and audio towers included")
        + f'; "{published.effective} effective" is {published.total} stored minus '
        f"{published.embedding} embedding ({embedding:,})."
    )


def _rounded(count: int) -> str:
    """Billions or millions with two decimals; small counts in full."""
    for suffix, scale in (("B", 10**9), ("M", 10**6)):
        if count >= scale:
            return f"{count / scale:.2f}{suffix}"
    return f"{count:,}"


def render(info: ModelInfo) -> str:
    """The description for people: plain text, at most 100 columns."""
    return inspection_text.render(info)
