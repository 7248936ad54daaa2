"""What a build of a quantized checkpoint loses, and what it rounds for the first time."""

from __future__ import annotations

from collections.abc import Iterable

from pleexport.export.plan import Plan
from pleexport.model import Weight
from pleexport.sizes import size_text


def notes_on_codes(plan: Plan) -> list[str]:
    """What is rounded a second time, and what stays as wide as the checkpoint has it.

    Args:
        plan: of any checkpoint; there is nothing to say of one that holds no codes.
    """
    if not plan.model.is_quantized:
        return []
    return [*_on_matrices(plan), *_on_tables(plan)]


def _on_matrices(plan: Plan) -> Iterable[str]:
    storage, asked = plan.storage, plan.settings.weights
    matrices = [weight for weight in plan.model.weights if weight.precision != "full"]
    rounded = [
        w
        for w in matrices
        if w.codes and not asked.keeps_codes(w) and storage.dtype_of(w) != "fp32"
    ]
    if rounded:
        own, new = (
            _named(w.codes.dtype for w in rounded if w.codes),
            _named(storage.dtype_of(w) for w in rounded),
        )
        option = "--head-dtype" if _is_head(rounded) else "--weight-dtype"
        yield (
            f"{len(rounded)} matrices are rounded a second time, from the checkpoint's own codes "
            f"({own}) to {new}, which loses some of what it was rounded for; the parity report "
            f"says how much, and `{option} source` keeps the codes"
        )
    narrowed = [w for w in matrices if not w.codes and storage.dtype_of(w) != "fp32"]
    if narrowed and asked.dtype == "source":
        yield (
            f"{len(narrowed)} matrices that the checkpoint holds in numbers are rounded to "
            f"{_named(storage.dtype_of(w) for w in narrowed)}, `{narrowed[0].name}` first; "
            "`--weight-dtype fp32` rounds nothing"
        )


def _on_tables(plan: Plan) -> Iterable[str]:
    wide = 0
    for table in plan.model.tables:
        own = [s for s in plan.segments if s.table == table.name]
        if not own:  # its rows are the head's, of which the notes on matrices tell
            continue
        dtype = own[0].dtype
        kept = table.segment_codes is not None and plan.settings.table_dtype == "source"
        if table.codes and not kept and dtype != "fp32":
            yield (
                f"table `{table.name}` is rounded a second time, from the checkpoint's own codes "
                f"({table.codes.dtype}) to {dtype}, which loses some of what it was rounded for; "
                "`--table-dtype source` keeps the codes"
            )
        elif plan.settings.table_dtype == "source" and not kept:
            wide += table.rows * sum(segment.code_bytes for segment in own)
    if wide:
        yield (
            f"tables of {size_text(wide)} are stored as wide as the checkpoint has them; "
            "`--table-dtype int8` narrows them"
        )


def _named(dtypes: Iterable[str]) -> str:
    return ", ".join(sorted(set(dtypes)))


def _is_head(weights: list[Weight]) -> bool:
    return [w.precision for w in weights] == ["head"]
