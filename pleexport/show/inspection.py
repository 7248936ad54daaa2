"""The text that `pleexport inspect` prints."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from pleexport.sizes import size_text

if TYPE_CHECKING:
    from pleexport.inspection.inspect import ModelInfo, TargetEstimate

_COLUMNS = 96
_NO_BREAK = "\u00a0"


def render(info: ModelInfo) -> str:
    """Aligned plain text, at most 100 columns, a blank line between its parts."""
    parts = [
        _head(info),
        _parameters(info),
        _tables(info),
        _sizes(info),
        _effective(info),
        _targets(info),
        _notes(info),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def columns(rows: list[list[str]], *, left: int = 1) -> list[str]:
    """Rows of cells as indented lines; the first `left` columns are flush left, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


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
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"  {name:<{widths[0]}}  {count:>{widths[1]}}  {share:>{widths[2]}}  {meaning}".rstrip()
        for name, count, share, meaning in rows
    ]
    rule = "  " + "-" * (sum(widths) + 4)
    return ["Parameters", *lines[:-1], rule, lines[-1]]


def _tables(info: ModelInfo) -> list[str]:
    rows = [["", "token ids", "layers", "width", "parameters"]]
    for table in info.tables:
        layers = "-" if table.layers is None else f"{table.layers:,}"
        rows.append(
            [table.name, f"{table.rows:,}", layers, f"{table.width:,}", f"{table.parameters:,}"]
        )
    return ["Tables", *columns(rows)]


def _sizes(info: ModelInfo) -> list[str]:
    first = info.tables[0].stored
    rows = [["", "", *(_dtype_title(s.dtype, s.segment_dtype) for s in first)]]
    for table in info.tables:
        rows.append([table.name, "row", *(f"{stored.row_bytes:,}" for stored in table.stored)])
        rows.append(["", "table", *(size_text(stored.table_bytes) for stored in table.stored)])
    rows.append(["blob, aligned", "row", *(f"{blob.row_stride:,}" for blob in info.blobs)])
    rows.append(["", "file", *(size_text(blob.file_bytes) for blob in info.blobs)])
    title = "Bytes, by the dtype the tables are stored in (int8, int4: with scales)"
    return [title, *columns(rows, left=2)]


def _dtype_title(dtype: str, segment_dtype: str) -> str:
    return f"source={segment_dtype}" if dtype == "source" else dtype


def _effective(info: ModelInfo) -> list[str]:
    name = info.effective.published_name
    whole = f" (published figure of {name}, towers included)" if name else ""
    lines = [f'"Effective" parameters: {info.effective.label}{whole}']
    for sentence in info.effective.explanation:
        lines += _paragraph(sentence)
    return lines


def _targets(info: ModelInfo) -> list[str]:
    rows = [["", "tables", "dense", "context", "blob", "graph", "bundle", "in memory", "fits"]]
    rows += [
        [
            estimate.target,
            estimate.table_dtype,
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
    lines += columns(rows)
    for estimate in info.targets:
        lines += _remarks(estimate)
    return lines


def _remarks(estimate: TargetEstimate) -> list[str]:
    lines = []
    for problem in estimate.problems:
        lines += _paragraph(f"{estimate.target} does not fit: {problem}.")
    for note in estimate.delivery:
        lines += _paragraph(f"{estimate.target}: {note}.")
    return lines


def _notes(info: ModelInfo) -> list[str]:
    lines = ["Notes"]
    for note in info.notes:
        first, *details = note.split("\n")
        lines += _paragraph(first)
        lines += [f"  {detail}" for detail in details]
    return lines if info.notes else []


def _paragraph(sentence: str) -> list[str]:
    # A number and its unit stay on one line.
    joined = re.sub(r"(?<=\d) (?=[GMk]?B\b)", _NO_BREAK, sentence)
    lines = textwrap.wrap(
        joined,
        _COLUMNS,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]
