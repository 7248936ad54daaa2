"""The text that `pleexport inspect` prints."""

from __future__ import annotations

import msgspec

from pleexport.inspection.info import ModelInfo, PartInfo, TargetEstimate
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.show.stats import describe_config
from pleexport.show.tables import aligned, paragraph
from pleexport.sizes import size_text


def describe_model(info: ModelInfo) -> str:
    """Aligned plain text, at most 100 columns, a blank line between its parts."""
    parts = [
        _head(info),
        _adapters(info),
        _parameters(info),
        _tables(info),
        _sizes(info),
        _effective(info),
        _text(info),
        _targets(info),
        _bits(info),
        _ignored(info),
        _notes(info),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(info: ModelInfo) -> list[str]:
    weights = {
        "found": "weights fit",
        "none": "config only, no weights",
        "unusable": "weights do not fit, see the notes",
    }
    facts = [
        f"{info.layers} layers",
        f"vocabulary {info.vocab:,}",
        f"context {info.context:,}",
        info.dtype,
    ]
    return [info.path, f"  {info.model_type}: {', '.join(facts)}; {weights[info.weights]}"]


def _adapters(info: ModelInfo) -> list[str]:
    rows = [["", "weight", "parameters", "", "trained on"]]
    rows += [
        [a.name, f"{a.weight:g}", f"{a.parameters:,}", a.form, a.trained_on or "-"]
        for a in info.adapters
    ]
    lines = ["Adapters, merged in this order", *aligned(rows, align="<>><<", indent=2)]
    return lines if info.adapters else []


def _parameters(info: ModelInfo) -> list[str]:
    counts = info.counts
    main = "looked up, and the output head too: stays in memory"
    if not any(table.is_head for table in info.tables):
        main = "looked up only: can leave memory"
    entries = [
        ("per-layer embedding", counts.per_layer_embedding, "looked up only: can leave memory"),
        ("main embedding", counts.main_embedding, main),
        ("dense", counts.dense, "multiplied: stays in memory"),
        *(
            (tower.name, tower.parameters, f"left out of a build: {size_text(tower.nbytes)}")
            for tower in info.towers
        ),
        ("merged into rows", counts.folded, "multiplied once, while building"),
        ("unused", counts.dead, "the original does not read them"),
        ("unused copy of the head", counts.head_copies, "the head is tied"),
        ("buffers", counts.buffers, "needed, not counted as parameters"),
    ]
    rows = [
        [name, f"{count:,}", f"{count / counts.stored:.1%}", meaning]
        for name, count, meaning in entries
        if count
    ]
    rows.append(["stored", f"{counts.stored:,}", "100.0%", ""])
    lines = aligned(rows, align="<>><", indent=2)
    # As wide as the numbers, which the rule sums up.
    width = lines[-1].index("%") - 1
    return ["Parameters", *lines[:-1], "  " + "-" * width, lines[-1]]


def _tables(info: ModelInfo) -> list[str]:
    rows = [["", "token ids", "layers", "width", "parameters"]]
    for table in info.tables:
        layers = "-" if table.layers is None else f"{table.layers:,}"
        rows.append(
            [table.name, f"{table.rows:,}", layers, f"{table.width:,}", f"{table.parameters:,}"]
        )
    return ["Tables", *aligned(rows, align="<>>>>", indent=2)]


def _sizes(info: ModelInfo) -> list[str]:
    first = info.tables[0].stored
    rows = [["", "", *(_dtype_title(s.dtype, s.segment_dtype) for s in first)]]
    for table in info.tables:
        rows.append([table.name, "row", *(f"{stored.row_bytes:,}" for stored in table.stored)])
        rows.append(["", "table", *(size_text(stored.table_bytes) for stored in table.stored)])
    rows.append(["blob, aligned", "row", *(f"{blob.row_stride:,}" for blob in info.blobs)])
    rows.append(["", "file", *(size_text(blob.file_bytes) for blob in info.blobs)])
    title = "Bytes, by the dtype the tables are stored in (int8, int4: with scales)"
    return [title, *aligned(rows, align="<<" + ">" * len(first), indent=2)]


def _dtype_title(dtype: str, segment_dtype: str) -> str:
    return f"source={segment_dtype}" if dtype == "source" else dtype


def _effective(info: ModelInfo) -> list[str]:
    name = info.effective.published_name
    whole = f" (published figure of {name}, towers included)" if name else ""
    lines = [f'"Effective" parameters: {info.effective.label}{whole}']
    for sentence in info.effective.explanation:
        lines += paragraph(sentence)
    return lines


def _text(info: ModelInfo) -> list[str]:
    text = info.text
    tokens = f", {text.tokens:,} tokens" if text.tokens else ""
    config = msgspec.convert(info.generation, GenerationConfig)
    rows = [
        ("tokenizer", f"{text.tokenizer}{tokens}" if text.tokenizer else "none"),
        ("added tokens", _some(text.added_tokens)),
        ("chat template", f"in {text.chat_template}" if text.chat_template else "none"),
        ("generation", describe_config(config)),
    ]
    return ["Text", *aligned(rows, align="<<", indent=2)]


def _some(texts: list[str]) -> str:
    """How many there are, and the first."""
    if not texts:
        return "none"
    shown = ", ".join(repr(text) for text in texts[:3])
    return f"{len(texts):,}: {shown}{', ...' if len(texts) > 3 else ''}"


def _targets(info: ModelInfo) -> list[str]:
    rows = [["", "tables", "dense", "context", "blob", "graph", "bundle", "in memory", "fits"]]
    rows += [
        [
            estimate.target,
            _table_dtypes(estimate),
            estimate.weight_dtype,
            f"{estimate.context:,}",
            size_text(estimate.blob_bytes),
            size_text(estimate.graph_bytes),
            size_text(estimate.bundle_bytes),
            size_text(estimate.resident_bytes),
            "yes" if estimate.fits else "NO",
        ]
        for estimate in info.targets
    ]
    lines = ["Estimated bundles, by target (in memory: dense weights and a full cache)"]
    lines += aligned(rows, align="<" + ">" * 8, indent=2)
    for estimate in info.targets:
        lines += _remarks(estimate)
    return lines


def _table_dtypes(estimate: TargetEstimate) -> str:
    """What the target wants, or what the tables have where they differ."""
    stored = dict.fromkeys(part.dtype for part in estimate.parts if part.kind == "table")
    return estimate.table_dtype if len(stored) < 2 else ", ".join(stored)


def _bits(info: ModelInfo) -> list[str]:
    """Targets that store all alike share a column."""
    alike: dict[str, list[TargetEstimate]] = {}
    for estimate in info.targets:
        stored = [(part.name, part.dtype, part.count) for part in estimate.parts]
        alike.setdefault(repr(stored), []).append(estimate)
    columns = [estimates[0] for estimates in alike.values()]
    header = [", ".join(e.target for e in estimates) for estimates in alike.values()]
    names = dict.fromkeys(part.name for estimate in columns for part in estimate.parts)
    rows = [["", "number", *header]]
    for name in names:
        own = [[part for part in estimate.parts if part.name == name] for estimate in columns]
        rows.append([name, f"{sum(p.count for p in own[0]):,}", *map(_stored_as, own)])
    rows.append(["a token reads", "", *(size_text(e.read_bytes) for e in columns)])
    lines = ["Bits of tables and matrices, by target (a token reads a row, and all matrices)"]
    lines += aligned(rows, align="<>" + ">" * len(columns), indent=2)
    for estimate in info.targets:
        if estimate.predicted_divergence is not None:
            lines += paragraph(
                f"{estimate.target}: dtypes are chosen so that the store delivers the bundle; "
                f"shapes alone predict {estimate.predicted_divergence:.1e} nats per token, and a "
                "build looks at the weights too."
            )
    return lines


def _stored_as(parts: list[PartInfo]) -> str:
    """Dtype and bytes of all matrices of a kind; how many have each, where dtypes differ."""
    total = size_text(sum(part.nbytes for part in parts))
    if len(parts) == 1:
        return f"{parts[0].dtype} {total:>9}"
    return f"{' + '.join(f'{part.count} {part.dtype}' for part in parts)} {total:>9}"


def _remarks(estimate: TargetEstimate) -> list[str]:
    lines = []
    for problem in estimate.problems:
        lines += paragraph(f"{estimate.target} does not fit: {problem}.")
    for note in estimate.delivery:
        lines += paragraph(f"{estimate.target}: {note}.")
    return lines


def _ignored(info: ModelInfo) -> list[str]:
    lines = ["Not read"]
    for kind in info.ignored:
        lines += paragraph(f"{kind.what}: {', '.join(kind.names)}")
    return lines if info.ignored else []


def _notes(info: ModelInfo) -> list[str]:
    lines = ["Notes"]
    for note in info.notes:
        first, *details = note.split("\n")
        lines += paragraph(first)
        lines += [f"  {detail}" for detail in details]
    return lines if info.notes else []
