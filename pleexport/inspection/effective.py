"""The "effective" parameter count that makers state, and how it comes about."""

from __future__ import annotations

import msgspec

from pleexport.inspection.info import Counts, Effective
from pleexport.model import Model, Published


def effective_count(model: Model, counts: Counts) -> Effective:
    """The figure by the rule of the model's makers, with its explanation."""
    if model.counts_only_tables_out:
        return _effective_core(counts)
    published = find_published(model, counts)
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


def find_published(model: Model, counts: Counts) -> Published | None:
    """The published model of this shape."""
    return next((p for p in model.published if p.live_text == counts.text), None)


def published_note(published: Published, counts: Counts) -> str:
    """What the makers of a published shape say of it."""
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
