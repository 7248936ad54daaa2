"""Say what a checkpoint is made of, from its config and the headers of its files alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from pleexport import targets
from pleexport.checkpoint.adapters.adapted import adapters_of, tokenizer_folder
from pleexport.checkpoint.adapters.adapter import AdapterChoice
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.foreign import recognized
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.trained_grid import mark_grids, notes_on_grids
from pleexport.dtypes import torch_name
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.export.generation import read_generation_config
from pleexport.export.plan import copied_files
from pleexport.families.opening import open_model
from pleexport.inspection.counts import count_parameters, find_towers
from pleexport.inspection.effective import effective_count, find_published, published_note
from pleexport.inspection.estimates import describe_table, estimate, estimate_blobs
from pleexport.inspection.info import AdapterInfo, Counts, Ignored, ModelInfo, TargetEstimate
from pleexport.inspection.text import describe_text
from pleexport.model import Model
from pleexport.parity.text import READ_FOR_TEXT
from pleexport.progress import Progress
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.tokenizer import tokenizer_files


def inspect(
    path: str | Path,
    *,
    adapters: Sequence[AdapterChoice] | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> ModelInfo:
    """Describe a checkpoint without reading its weights, but for a few rows of each matrix.

    These tell whether it was trained for a grid of 4 bits.

    A folder that has only a config is described as the text-only checkpoint that fits it, and so
    is one whose weights do not fit their config; a note says why.

    Args:
        path: a Hugging Face folder, of an adapter too, or a file of a family that has no config. Of
            a checkpoint that lies elsewhere only the config is fetched, no weights.
        adapters, base: as for a build; with adapters, the weights of a base are fetched too.
        revision, token, offline: of a checkpoint that lies elsewhere; see `find_remote`.
    Raises:
        CheckpointError: no folder, no config, or damaged files.
        UnsupportedError: the model has no tables, or is of no known family.
    """
    checkpoint, model = open_model(
        path,
        adapters=adapters,
        base=base,
        revision=revision,
        token=token,
        offline=offline,
        weights=False,
        progress=progress or Progress(quiet=True),
    )
    source, folder = checkpoint.dtype, tokenizer_folder(checkpoint)
    matched, unmatched_notes = _match(model, checkpoint)
    model = matched.model if matched else model
    towers, scalars = find_towers(model, matched)
    files = copied_files(checkpoint) | tokenizer_files(folder)
    copied = files.values()
    generation, generation_notes = _generation(checkpoint)
    counts = count_parameters(model, matched, towers, scalars)
    estimates, target_notes = _estimates(model, source, copied)
    return ModelInfo(
        path=str(path),
        family=model.family,
        model_type=str(checkpoint.config.get("model_type", model.family)),
        dtype=source,
        layers=model.num_layers,
        vocab=model.vocab_size,
        context=model.max_context,
        weights="found" if matched else "unusable" if checkpoint.files else "none",
        text=describe_text(folder),
        generation=msgspec.to_builtins(generation),
        counts=counts,
        tables=[describe_table(model, table, source) for table in model.tables],
        blobs=estimate_blobs(model, source),
        towers=towers,
        adapters=[
            AdapterInfo(a.name, a.weight, a.parameters, a.config.described(), a.config.base)
            for a in adapters_of(checkpoint)
        ],
        effective=effective_count(model, counts),
        targets=estimates,
        ignored=[
            Ignored(what, names)
            for what, names in checkpoint.others([*files, *READ_FOR_TEXT]).items()
        ],
        notes=[
            *unmatched_notes,
            *_sentences((matched.checkpoint if matched else checkpoint).notes),
            *_notes_on_files(copied),
            *_sentences(generation_notes),
            *_notes_on_dtypes(matched, checkpoint),
            *_notes_on_grids(matched),
            *_notes_on_counts(model, counts),
            *_sentences(target_notes),
        ],
    )


def _estimates(
    model: Model, source: str, copied: Iterable[Path]
) -> tuple[list[TargetEstimate], list[str]]:
    """A bundle for each target, and a note on each target that has no form of the model."""
    estimates, notes = [], []
    for name in targets.names():
        try:
            estimates.append(estimate(model, targets.load(name), source, copied=copied))
        except UnsupportedError as err:
            notes.append(f"there is no bundle for `{name}`: {err.message}")
    return estimates, notes


def _generation(checkpoint: Checkpoint) -> tuple[GenerationConfig, list[str]]:
    """What a bundle would generate by, and a note on each field that it would not obey."""
    try:
        return read_generation_config(checkpoint.generation_config)
    except CheckpointError as err:
        return GenerationConfig(), [err.message]


def _match(model: Model, checkpoint: Checkpoint) -> tuple[MatchedModel | None, list[str]]:
    """The model with its tensors, or None and a note why there is none."""
    if not checkpoint.files:
        return None, [
            "No weights in the folder: the counts are those of a text-only checkpoint that fits "
            "config.json."
        ]
    try:
        return mark_grids(MatchedModel(model, checkpoint)), []
    except CheckpointError as err:
        return None, [
            "The weights do not fit the model, so a build would be refused; the counts are those "
            f"of a text-only checkpoint that does fit. {err.message}"
        ]


def _notes_on_dtypes(matched: MatchedModel | None, checkpoint: Checkpoint) -> list[str]:
    """That tensors are stored in another dtype than config.json names; codes are none of its."""
    if matched is None or not checkpoint.config:
        return []
    in_numbers = [table for table in matched.model.tables if not table.codes]
    stored = {entry.dtype for table in in_numbers for entry in matched.entries(table)}
    if stored <= {checkpoint.dtype}:
        return []
    return [
        f"config.json says {torch_name(checkpoint.dtype)}, and the tables are stored as "
        f"{', '.join(sorted(stored))}: they are rounded to it, as the original does."
    ]


def _notes_on_grids(matched: MatchedModel | None) -> list[str]:
    """What was trained for a grid of 4 bits; the numbers of a build follow from it."""
    return _sentences(notes_on_grids(matched) if matched else [])


def _notes_on_files(files: Iterable[Path]) -> list[str]:
    """Files that a bundle would get, and that are something else, so that a build is refused."""
    found = ((file, recognized(file)) for file in files)
    return _sentences(kind.error(file).message for file, kind in found if kind)


def _sentences(notes: Iterable[str]) -> list[str]:
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def _notes_on_counts(model: Model, counts: Counts) -> list[str]:
    """What is in no count, and what the makers of this shape count."""
    notes = []
    if counts.scalars:
        notes.append(
            f"{counts.scalars:,} tensors without a dimension (single numbers) are in no count."
        )
    if published := find_published(model, counts):
        notes.append(published_note(published, counts))
    return notes
