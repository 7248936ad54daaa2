"""From a checkpoint to a sealed bundle."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import msgspec

from pleexport.checkpoint.adapters.adapted import adapters_of, tokenizer_folder
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.digests import digests_of, source_files
from pleexport.checkpoint.finite import bytes_to_check, check_finite
from pleexport.checkpoint.foreign import refuse_foreign
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.text_files import refuse_links_out
from pleexport.checkpoint.trained_grid import mark_grids, notes_on_grids
from pleexport.contract import Artifact
from pleexport.dtypes import QUANTIZED
from pleexport.errors import (
    BundleError,
    CheckFailed,
    CheckpointError,
    MissingDependencyError,
    PleexportError,
    TargetError,
)
from pleexport.export.blob_writer import write_blob
from pleexport.export.chat_format import find_chat_format
from pleexport.export.generation import read_generation_config
from pleexport.export.notes import notes_on_codes
from pleexport.export.options import BuildOptions, resolve
from pleexport.export.plan import Plan, copied_files, make_plan
from pleexport.export.replacing import check_replaceable
from pleexport.export.sealing import seal
from pleexport.export.sensitivity import MeasuredSensitivity, SampledSensitivity, Sensitivity
from pleexport.export.text_files import TextFiles, text_files
from pleexport.families.opening import open_model
from pleexport.model import Model
from pleexport.parallel import Work, beside
from pleexport.parity.text import check_text
from pleexport.progress import Progress
from pleexport.runtime.bundle import (
    BLOB,
    DECODER,
    PARITY,
    SCHEMA,
    AdapterRecord,
    Bundle,
    Manifest,
    ParitySummary,
    Source,
    SourceFile,
)
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.tokenizer import TOKENIZERS, Tokenizer, open_tokenizer, tokenizer_files
from pleexport.sizes import size_text
from pleexport.staging import followed, scratch_folder, staged_folder

if TYPE_CHECKING:
    from pleexport.export.gradients import Gradients

_ELSEWHERE = "choose another folder with `--out`"
# Room for the graph's structure, tokenizer and reports beside weights and blob.
_OVERHEAD_BYTES = 64 << 20
# More changes importances by little, and every 512 read all weights once.
_CALIBRATION_TOKENS = 4096
# Each 128 read all weights twice.
_GRADIENT_TOKENS = 512


def build(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[BuildOptions],
) -> Bundle:
    """Write a bundle.

    Args:
        checkpoint: a Hugging Face folder, or a file of a family that has no config; or where else
            it lies, see `find_remote`.
        out: folder of the bundle; `{checkpoint}-{target}` here by default.
        options: see `BuildOptions`.
    Returns:
        the sealed bundle.
    Raises:
        PleexportError: anything that a user can mend; nothing is left at `out`.
        CheckFailed: the bundle does not compute what the original does.
    """
    with scratch_folder() as scratch:
        return _build(checkpoint, out, options, progress or Progress(quiet=True), scratch)


def _build(
    checkpoint: str | Path,
    out: str | Path | None,
    options: BuildOptions,
    progress: Progress,
    scratch: Path,
) -> Bundle:
    opened, model = open_model(
        checkpoint,
        adapters=options.get("adapters"),
        base=options.get("base"),
        revision=options.get("revision"),
        token=options.get("token"),
        offline=bool(options.get("offline")),
        progress=progress,
    )
    for note in opened.notes:
        progress.note(f"note: {note}")
    settings = resolve(options, quantized=model.is_quantized)
    destination = Path(out) if out else Path(f"{opened.name}-{settings.target.name}")
    overwrite = bool(options.get("overwrite"))
    check = partial(check_replaceable, followed(destination), overwrite=overwrite)
    check()
    model = model.with_cache(settings.cache_dtype).on(settings.target.processor)
    if not settings.activation_rounding:
        model = model.without_activation_rounding()
    matched = MatchedModel(model, opened)
    for note in matched.checkpoint.notes[len(opened.notes) :]:
        progress.note(f"note: {note}")
    generation, generation_notes = read_generation_config(opened.generation_config)
    given = options.get("tokenizer")
    place = Path(given or tokenizer_folder(opened))
    refuse_links_out(opened.folder)
    if place.is_dir():
        refuse_links_out(place)
    for file in (tokenizer_files(place) | copied_files(opened)).values():
        refuse_foreign(file)
    text = text_files(place, scratch)
    copied = text.files | copied_files(opened)
    tokenizer = open_tokenizer(text.files)
    if tokenizer is None and given is not None:
        raise CheckpointError(
            f"there is no {' or '.join(TOKENIZERS)} at `{given}`",
            hint="`--tokenizer` takes one of these files, or the folder that holds it",
        )
    matched = mark_grids(matched)
    calibration_ids = _calibration_ids(tokenizer, options.get("calibrate"), matched.model)
    chat = find_chat_format(tokenizer)
    has_tokenizer = tokenizer is not None
    del tokenizer  # one with 262,144 tokens takes 0.2 GB
    plan = make_plan(
        matched.model,
        settings,
        source=matched.dtype,
        equal_codes=matched.head_has_codes_of_its_table(),
        sensitivity=_sensitivity(matched, calibration_ids, progress),
        copied=copied.values(),
    )
    plan.backend.require()
    if calibration_ids:
        _check_calibration(plan)
    matched.check_tied_head()
    plan.check()
    with staged_folder(
        destination, error=BundleError, elsewhere=_ELSEWHERE, check=check
    ) as staging:
        _check_disk(staging, plan)
        to_read = sum(path.stat().st_size for path in source_files(opened))
        with progress.bytes("Checking weights", bytes_to_check(matched) + to_read) as update:
            check_finite(matched, progress=update)
            source = _source(opened, update)
        _say_what_is_special(matched, plan, has_tokenizer, progress, given=given is not None)
        for note in (*text.notes, *generation_notes, *chat.notes(_eos_token_ids(matched))):
            progress.note(f"note: {note}")
        tables_digest, artifact = _write_model(matched, plan, calibration_ids, staging, progress)
        for name, file in copied.items():
            shutil.copyfile(file, staging / name)
        manifest = Manifest(
            schema=SCHEMA,
            family=plan.model.family,
            graphs={DECODER: artifact},
            context=plan.context,
            eos_token_ids=_eos_token_ids(matched),
            generation=None if generation == GenerationConfig() else generation,
            chat_format=chat.form,
            no_chat_format=chat.problem,
            table_dtype=plan.settings.table_dtype,
            table_dtypes=dict(plan.settings.table_dtypes),
            weight_dtype=plan.settings.weights.dtype,
            weight_dtypes=dict(plan.settings.weights.dtypes),
            head_dtype=plan.storage.dtype_of(plan.model.head),
            block_size=settings.weights.block_size,
            symmetric=settings.weights.symmetric,
            trained_grid=any(plan.settings.weights.on_grid(w) for w in plan.model.weights),
            per_channel=settings.weights.per_channel,
            cache_dtype=settings.cache_dtype,
            activation_rounding=settings.activation_rounding,
            calibration_tokens=len(calibration_ids),
            max_bytes=settings.max_bytes,
            target=settings.target.name,
            spin=settings.target.spin,
            source=source,
            adapters=[AdapterRecord(a.name, a.weight, a.digest()) for a in adapters_of(opened)],
            tables_digest=tables_digest,
            versions=_versions(),
            parity=ParitySummary(checked=False),
            files=[],
        )
        if options.get("verify") is not False:
            summary = _verify(Bundle(staging, unsealed=manifest), matched, text, progress)
            manifest = msgspec.structs.replace(manifest, parity=summary)
        seal(staging, manifest)
    return Bundle(destination)


def _calibration_ids(
    tokenizer: Tokenizer | None, calibrate: str | Path | None, model: Model
) -> list[int]:
    """The ids of the text to calibrate on; none where there is no such text."""
    if calibrate is None:
        return []
    if tokenizer is None:
        raise CheckpointError(
            f"there is no tokenizer, so `{calibrate}` cannot be read as tokens",
            hint=f"put {' or '.join(TOKENIZERS)} beside the weights, or add `--tokenizer PATH`",
        )
    ids = tokenizer.encode_file(Path(calibrate), num_rows=model.num_rows)
    return ids[:_CALIBRATION_TOKENS]


def _check_calibration(plan: Plan) -> None:
    """Refuse a text that nothing is rounded by."""
    dtypes = {plan.storage.dtype_of(weight) for weight in plan.model.weights}
    if not dtypes & set(QUANTIZED):
        raise TargetError(
            "calibration chooses scales of int8 and int4 weights, and these are "
            f"{', '.join(sorted(dtypes))}",
            hint="add `--weight-dtype int4`, or leave `--calibrate` out",
        )


def _sensitivity(
    matched: MatchedModel, calibration_ids: list[int], progress: Progress
) -> Sensitivity:
    """What a budget chooses by: the text where there is one. Nothing is read before it has to."""
    if not calibration_ids:
        return SampledSensitivity(matched)
    ids = calibration_ids[:_GRADIENT_TOKENS]

    def measure() -> Gradients:
        from pleexport.export.gradients import gradients

        with progress.count("Measuring gradients on the text", len(ids), "tokens") as update:
            return gradients(matched, ids, progress=update)

    return MeasuredSensitivity(matched, ids, measure)


def _check_disk(folder: Path, plan: Plan) -> None:
    working = plan.backend.working_bytes(plan.model, plan.storage)
    free, needed = shutil.disk_usage(folder).free, plan.nbytes + working + _OVERHEAD_BYTES
    if free < needed:
        raise PleexportError(
            f"`{folder.parent}` has {size_text(free)} free; the bundle needs {size_text(needed)}",
            hint=f"free some space, or {_ELSEWHERE}",
        )


def _say_what_is_special(
    matched: MatchedModel,
    plan: Plan,
    has_tokenizer: bool,
    progress: Progress,
    *,
    given: bool,
) -> None:
    """Note what is left out, and what the bundle will lack.

    Args:
        given: whether the build was told where the tokenizer is.
    """
    for part in matched.left_out:
        progress.note(
            f"note: the {part.name} is left out: {part.parameters:,} parameters, "
            f"{size_text(part.nbytes)}"
        )
    if matched.ignored:
        first = matched.ignored[0]
        unused = matched.model.unused.items()
        reason = next(u.reason for key, u in unused if first.endswith(key))
        progress.note(
            f"note: {len(matched.ignored)} tensors are not used by the model, "
            f"`{first}` first: {reason}"
        )
    folder = tokenizer_folder(matched.checkpoint)
    if has_tokenizer and not given and folder != matched.checkpoint.folder:
        progress.note(f"note: the tokenizer is that of the adapter `{folder.resolve().name}`")
    if not has_tokenizer:
        progress.note(
            f"warning: there is no {' or '.join(TOKENIZERS)} beside the weights; the bundle "
            "will take token ids only"
        )
    notes = [*notes_on_grids(matched), *plan.storage.notes(plan.model), *notes_on_codes(plan)]
    for note in (*notes, *plan.delivery):
        progress.note(f"note: {note}")
    for line in plan.chosen():
        progress.note(line)


def _write_model(
    matched: MatchedModel,
    plan: Plan,
    calibration_ids: list[int],
    folder: Path,
    progress: Progress,
) -> tuple[str, Artifact]:
    """Write blob and dense graph; rows are written while the graph is traced.

    Returns:
        the digest of the tables, and what the backend wrote.
    """
    try:
        from pleexport.export.calibration import importance
        from pleexport.families.trace import trace
    except ImportError as err:
        raise MissingDependencyError(
            f"building needs {err.name}", hint="pip install 'pleexport[export]'"
        ) from err
    important = {}
    if calibration_ids:
        count = len(calibration_ids)
        with progress.count("Measuring inputs on the text", count, "tokens") as update:
            important = importance(matched, calibration_ids, progress=update)
    with progress.bytes("Writing rows and weights", plan.nbytes) as update:
        work = Work(update)

        def write_rows() -> str:
            return write_blob(
                matched,
                folder / BLOB,
                segments=plan.segments,
                page_size=plan.settings.target.page_size,
                progress=work.advance,
            )

        with beside(write_rows, work) as rows:
            program = trace(plan.model, plan.contract)
            artifact = plan.backend.lower(
                program,
                matched,
                plan.storage,
                folder,
                tied=plan.tied,
                importance=important,
                progress=work.advance,
            )
            return rows.result(), artifact


def _eos_token_ids(matched: MatchedModel) -> list[int]:
    """End-of-text ids: those of the generation config come first, as in transformers."""
    eos = matched.checkpoint.generation_config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    found = [i for i in ids if type(i) is int] or list(matched.model.eos_token_ids)
    return [i for i in found if abs(i) < 1 << 31]  # no other id can come


def _source(checkpoint: Checkpoint, progress: Callable[[int], object]) -> Source:
    """What the manifest says of a checkpoint; nothing of where it lies on this machine."""
    paths, origin = source_files(checkpoint), checkpoint.repository
    digests = digests_of(paths, progress=progress)
    return Source(
        repository=origin.name if origin else None,
        commit=origin.commit if origin else None,
        files=[
            SourceFile(path.relative_to(checkpoint.folder).as_posix(), path.stat().st_size, digest)
            for path, digest in zip(paths, digests, strict=True)
        ],
    )


def _versions() -> dict[str, str]:
    """Of what every build uses; those of its packages a backend tells with its graph."""
    names = ("pleexport", "numpy", "tokenizers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version()}


def _verify(
    bundle: Bundle, matched: MatchedModel, text: TextFiles, progress: Progress
) -> ParitySummary:
    from pleexport.parity.report import write_report
    from pleexport.parity.verify import compare_with_original

    tokenizer = open_tokenizer(bundle.tokenizer_files)
    checked = check_text(tokenizer, text.original, bundle.manifest.chat_format)
    report = compare_with_original(bundle, matched, checked=checked, progress=progress)
    write_report(report, bundle.path / PARITY)
    if not report.passed:
        raise CheckFailed(
            "the bundle does not compute what the original does: " + "; ".join(report.failures),
            hint="nothing was kept; `--no-verify` keeps the bundle for a closer look",
        )
    return report.summary()
