"""Count parameters from a model and the headers of its checkpoint."""

from __future__ import annotations

import math

from pleexport.checkpoint.matching import MatchedModel
from pleexport.inspection.info import Counts, Tower
from pleexport.model import Model


def find_towers(model: Model, matched: MatchedModel | None) -> tuple[list[Tower], int]:
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


def count_parameters(
    model: Model, matched: MatchedModel | None, towers: list[Tower], scalars: int
) -> Counts:
    """Parameters of a model and its checkpoint.

    Args:
        matched: None where there is only a config.
        scalars: tensors without a dimension.
    """
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
