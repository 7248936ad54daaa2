"""Verify a bundle: its files, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pleexport.backends.describe import describe
from pleexport.backends.registry import load
from pleexport.checkpoint.adapters.adapted import adapters_of, tokenizer_folder
from pleexport.checkpoint.adapters.adapter import AdapterChoice
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.digests import digests_of, source_files
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.trained_grid import mark_grids
from pleexport.errors import CheckpointError, InputError
from pleexport.families.opening import open_model
from pleexport.parity.compare import compare
from pleexport.parity.oracle import open_oracle
from pleexport.parity.report import ParityReport, TextCheck
from pleexport.parity.text import check_text_of
from pleexport.progress import Progress
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.tokenizer import open_tokenizer

PARITY_TEXT = Path(__file__).with_name("parity_text.txt")


def verify(
    bundle: Bundle | str | Path,
    *,
    checkpoint: str | Path | None = None,
    adapters: Sequence[AdapterChoice] | None = None,
    base: str | Path | None = None,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> ParityReport | None:
    """Check a bundle's files, and compare it with the PyTorch original.

    Args:
        bundle: a folder, or an open bundle.
        checkpoint: what the bundle was built from, a folder or a file; without it, files only.
        adapters, base: as for the build.
        text: a text file to measure logits and fidelity on; a short English text by default.
        tokenizer: what the build was given as such; what lies beside the weights by default.
        revision, token, offline: of a checkpoint that lies elsewhere; see `find_remote`.
    Returns:
        the report, or None without a checkpoint.
    Raises:
        CheckFailed: a file is damaged. Parity failures are in the report.
        BundleError, CheckpointError: folders that cannot be used.
    """
    progress = progress or Progress(quiet=True)
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    with progress.bytes("Checking file digests", opened.nbytes) as update:
        opened.verify_files(update)
    blob = opened.open_blob()
    with progress.bytes("Checking row checksums", blob.nbytes) as update:
        blob.verify(update)
    if checkpoint is None:
        return None
    source, model = open_model(
        checkpoint,
        adapters=adapters,
        base=base,
        revision=revision,
        token=token,
        offline=offline,
        progress=progress,
    )
    _check_adapters(opened, source)
    graph = opened.decoder
    model = model.with_cache(opened.manifest.cache_dtype).on(graph.contract.processor)
    if not opened.manifest.activation_rounding:
        model = model.without_activation_rounding()
    matched = mark_grids(MatchedModel(model, source))
    for note in matched.checkpoint.notes:
        progress.note(f"note: {note}")
    context = opened.manifest.context
    if describe(model, load(graph.backend), context=context) != graph.contract:
        raise CheckpointError(
            f"`{opened.path}` was not built from `{source.path}`: their shapes differ",
            hint="pass the checkpoint that the bundle was built from",
        )
    with progress.step("Comparing text and ids"):
        checked = check_text_of(
            open_tokenizer(opened.tokenizer_files),
            Path(tokenizer or tokenizer_folder(source)),
            opened.manifest.chat_format,
        )
    return compare_with_original(opened, matched, text=text, checked=checked, progress=progress)


def _check_adapters(bundle: Bundle, source: Checkpoint) -> None:
    """Refuse a checkpoint with other adapters than the bundle was built with, or another base."""
    recorded = bundle.manifest.adapters
    given = [(a.digest(), a.weight) for a in adapters_of(source)]
    if given != [(record.digest, record.weight) for record in recorded]:
        names = ", ".join(f"`{r.name}:{r.weight:g}`" for r in recorded) or "no adapter"
        raise CheckpointError(
            f"`{bundle.path}` was built with {names}, and `{source.path}` is given with "
            f"{'others' if given else 'none'}",
            hint="pass the same adapters in the same order, each with `--adapter DIR:WEIGHT`",
        )
    built_from = bundle.manifest.source
    digests = {file.digest for file in built_from.files} if built_from else set()
    if recorded and set(digests_of(source_files(source))) != digests:
        raise CheckpointError(
            f"`{bundle.path}` was built from another base than `{source.path}`: its digest differs",
            hint="pass the base that the bundle was built from",
        )


def compare_with_original(
    bundle: Bundle,
    matched: MatchedModel,
    *,
    text: str | Path | None = None,
    checked: TextCheck | None = None,
    progress: Progress,
) -> ParityReport:
    """Parity of a bundle with the checkpoint that it was built from.

    Args:
        checked: what was found out about text and ids.
    """
    with progress.step("Loading the PyTorch original"):
        oracle = open_oracle(matched)
    ids = _text_ids(bundle, text, num_rows=matched.model.num_rows)
    rows = matched.model.num_rows * len(matched.model.tables)
    with progress.count("Comparing rows, logits and text", rows, "rows") as update:
        return compare(
            bundle,
            matched=matched,
            oracle=oracle,
            text_ids=ids,
            tokenizer=checked,
            progress=update,
        )


def _text_ids(bundle: Bundle, text: str | Path | None, *, num_rows: int) -> list[int] | None:
    """The ids of the text to measure on; None where there is no tokenizer."""
    if tokenizer := open_tokenizer(bundle.tokenizer_files):
        return tokenizer.encode_file(Path(text or PARITY_TEXT), num_rows=num_rows)
    if text:
        raise InputError(
            f"`{bundle.path}` has no tokenizer, so `{text}` cannot be read as tokens",
            hint="leave the text out; random token ids are used",
        )
    return None
