"""What `inspect` finds out, as data."""

from __future__ import annotations

import msgspec


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


class AdapterInfo(msgspec.Struct, frozen=True):
    """An adapter that is merged.

    Attributes:
        weight: how much of it is taken.
        parameters: numbers in its file.
        form: "LoRA of rank 16", with what else it is.
        trained_on: the base that its config names; "" where it names none.
    """

    name: str
    weight: float
    parameters: int
    form: str
    trained_on: str


class TextInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a folder says of text.

    Attributes:
        tokenizer: its file; None where there is none.
        tokens: in its vocabulary, without added ones; 0 where that is not known.
        added_tokens: texts of tokens that are not in the vocabulary.
        chat_template: the file that has it; None where there is none.
    """

    tokenizer: str | None
    tokens: int
    added_tokens: list[str]
    chat_template: str | None


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


class PartInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Matrices of one kind in one dtype, or a table, as a build would store them; sizes in bytes.

    Attributes:
        name: what the matrices' names have in common, or the table's.
        kind: "table", "matrices" or "vectors".
        count: of a table's layers, of matrices or of vectors.
        read_bytes: what a token reads of it: a row of a table, all of the others.
        share: of the predicted divergence, where a budget chose dtypes; else None, and so for what
            is part of a kind that has its share already.
    """

    name: str
    kind: str
    dtype: str
    count: int
    parameters: int
    nbytes: int
    read_bytes: int
    share: float | None


class TargetEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a build for a target will weigh; sizes in bytes.

    Attributes:
        bundle_bytes: dense weights and blob; tokenizer and reports come on top.
        cache_bytes: keys and values of a full context.
        resident_bytes: dense weights as ONNX Runtime holds them, and cache.
        fits: whether the target's limits allow it.
        problems: the limits that do not, with the numbers.
        delivery: what the target's store cannot deliver in one piece.
        read_bytes: what a token reads: all dense weights, and a row.
        parts: what the bundle is made of.
        predicted_divergence: nats per token, where dtypes were chosen so that the bundle can be
            delivered; from shapes alone, as no weight was read. None where nothing was chosen.
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
    read_bytes: int
    parts: list[PartInfo]
    predicted_divergence: float | None


class Ignored(msgspec.Struct, frozen=True):
    """Files and folders beside the weights that a build reads nothing from, all of one kind."""

    what: str
    names: list[str]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What `inspect` finds out.

    Attributes:
        dtype: the checkpoint's own, e.g. "bf16".
        vocab: token ids that the head knows.
        context: largest number of positions.
        text: tokenizer and chat template.
        generation: what generates by default, by the names of a `generation_config.json`.
        weights: "found" and fitting the config, "none", or "unusable", as the notes explain.
        ignored: everything in the folder that a build reads nothing from.
    """

    path: str
    family: str
    model_type: str
    dtype: str
    layers: int
    vocab: int
    context: int
    weights: str
    text: TextInfo
    generation: dict[str, object]
    counts: Counts
    tables: list[TableInfo]
    blobs: list[BlobInfo]
    towers: list[Tower]
    adapters: list[AdapterInfo]
    effective: Effective
    targets: list[TargetEstimate]
    ignored: list[Ignored]
    notes: list[str]
