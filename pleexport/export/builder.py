"""From a checkpoint to a sealed bundle."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from pleexport import families, targets
from pleexport.backends.onnx.storage import BITS, BLOCK_SIZES, WEIGHT_DTYPES, WeightFormat
from pleexport.checkpoint.checkpoint import GENERATION_CONFIG, Checkpoint
from pleexport.checkpoint.matching import Binding
from pleexport.contract import describe
from pleexport.errors import (
    CheckFailed,
    CheckpointError,
    MissingDependencyError,
    PleexportError,
    TargetError,
)
from pleexport.export.blob_writer import blob_bytes, write_blob
from pleexport.inspection.inspect import resident_bytes
from pleexport.model import CACHE_DTYPES, CacheDtype, Model
from pleexport.parallel import beside
from pleexport.progress import Progress
from pleexport.runtime.blob_layout import TABLE_DTYPES, Segment, plan_segments
from pleexport.runtime.bundle import (
    BLOB,
    GRAPH,
    GRAPH_DATA,
    PARITY,
    SCHEMA,
    Bundle,
    Manifest,
    ParitySummary,
    seal,
    staging_folder,
)
from pleexport.runtime.tokenizer import TOKENIZERS, Text, open_text, tokenizer_files
from pleexport.targets import Target

BACKENDS = ("onnx",)
_VERSIONED = ("pleexport", "torch", "onnx-ir", "onnxscript", "numpy")
# Room for the graph's structure, tokenizer and reports beside weights and blob.
_OVERHEAD_BYTES = 64 << 20
# More changes importances by little, and every 512 read all weights once.
_CALIBRATION_TOKENS = 4096


@dataclass(frozen=True)
class Plan:
    """What a build will write, known before it starts.

    Attributes:
        sizes: bytes by file name.
    """

    target: Target
    table_dtype: str
    weights: WeightFormat
    cache_dtype: CacheDtype
    context: int
    calibration_ids: Sequence[int]
    segments: list[Segment]
    sizes: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the large files."""
        return sum(self.sizes.values())


def build(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    target: str = "laptop",
    table_dtype: str | None = None,
    weight_dtype: str | None = None,
    block_size: int | None = None,
    symmetric: bool = True,
    head_dtype: str | None = None,
    cache_dtype: str | None = None,
    context: int | None = None,
    backend: str | None = None,
    calibrate: str | Path | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle.

    Args:
        checkpoint: a Hugging Face folder, or a file of a family that has no config.
        out: folder of the bundle; `{checkpoint}-{target}` here by default.
        target: name of a target, or path of a target file.
        table_dtype: "source" (bit-exact), "fp32", "fp16", "bf16", "int8" or "int4"; the target's
            by default.
        weight_dtype: "fp32", "fp16", "int8" or "int4"; the target's by default.
        block_size: how many weights may share a scale in int8 and int4: 16, 32, 64, 128 or 256;
            the target's by default.
        symmetric: one zero point for all blocks; otherwise each has its own, which is closer to
            the original and takes half a byte or a byte a block.
        head_dtype: of the output head, like weight_dtype; the target's by default.
        cache_dtype: "fp32", "fp16" or "int8", how keys and values are held at run time in layers
            that see the whole context, or "none" where they can be looked up again; the target's
            by default.
        context: largest number of positions; the target's by default, the model's at most.
        backend: "onnx", the only one so far.
        calibrate: a text file like those that the model will meet; int8 and int4 weights are then
            rounded for the least error on it.
        tokenizer: a tokenizer.json, a vocabulary of RWKV's World tokenizer, or a folder with
            either; what lies beside the weights by default.
        overwrite: replace a bundle at `out`.
        verify: compare with the PyTorch original; a bundle that fails is not kept.
    Returns:
        the sealed bundle.
    Raises:
        PleexportError: anything that a user can mend; nothing is left at `out`.
        CheckFailed: the bundle does not compute what the original does.
    """
    progress = progress or Progress(quiet=True)
    _choice("backend", BACKENDS[0] if backend is None else backend, BACKENDS)
    source = Checkpoint(checkpoint)
    chosen = targets.load(target)
    cache = cast(CacheDtype, chosen.cache_dtype if cache_dtype is None else cache_dtype)
    _choice("cache dtype", cache, CACHE_DTYPES)
    model = families.resolve(source).with_cache(cache)
    binding = Binding(model, source)
    _ = source.generation_config  # to say now if it is malformed
    text_files = tokenizer_files(source.folder if tokenizer is None else Path(tokenizer))
    text = open_text(text_files)
    if text is None and tokenizer is not None:
        raise CheckpointError(f"there is no {' or '.join(TOKENIZERS)} at `{tokenizer}`")
    calibration_ids = _calibration_ids(text, calibrate, model)
    binding.check_tied_head()
    plan = make_plan(
        binding,
        chosen,
        table_dtype=chosen.table_dtype if table_dtype is None else table_dtype,
        weights=WeightFormat(
            chosen.weight_dtype if weight_dtype is None else weight_dtype,
            chosen.block_size if block_size is None else block_size,
            symmetric,
            chosen.head_dtype if head_dtype is None else head_dtype,
        ),
        cache_dtype=cache,
        context=context,
        calibration_ids=calibration_ids,
    )
    destination = Path(out) if out else Path(f"{source.name}-{plan.target.name}")
    with staging_folder(destination, overwrite=overwrite) as staging:
        _check_disk(staging, plan)
        _note_what_is_left_out(binding, progress)
        if text is None:
            progress.note(
                f"warning: there is no {' or '.join(TOKENIZERS)} beside the weights; the bundle "
                "will take token ids only"
            )
        for note in targets.delivery_notes(plan.target, plan.sizes):
            progress.note(f"note: {note}")
        digests = _write_model(binding, plan, staging, progress)
        for name, file in text_files.items():
            shutil.copyfile(file, staging / name)
        if (source.folder / GENERATION_CONFIG).is_file():
            shutil.copyfile(source.folder / GENERATION_CONFIG, staging / GENERATION_CONFIG)
        manifest = _manifest(binding, plan, digests)
        seal(staging, manifest)
        if verify:
            summary = _verify(Bundle(staging), binding, progress)
            (staging / "manifest.json").unlink()
            seal(staging, msgspec.structs.replace(manifest, parity=summary))
    return Bundle(destination)


def make_plan(
    binding: Binding,
    target: Target,
    *,
    table_dtype: str,
    weights: WeightFormat,
    cache_dtype: CacheDtype,
    context: int | None,
    calibration_ids: Sequence[int] = (),
) -> Plan:
    """Check dtypes and context, and compute the sizes of what will be written.

    Raises:
        TargetError: an unknown dtype or block size, a context beyond the model's, or files that
            exceed the target's limits; with the numbers.
    """
    _choice("table dtype", table_dtype, TABLE_DTYPES)
    _choice("weight dtype", weights.dtype, WEIGHT_DTYPES)
    if weights.head_dtype is not None:
        _choice("head dtype", weights.head_dtype, WEIGHT_DTYPES)
    _choice("block size", str(weights.block_size), tuple(map(str, BLOCK_SIZES)))
    model = binding.model
    if context is not None and not 1 <= context <= model.max_context:
        raise TargetError(
            f"context {context} is not possible; the model knows 1 to {model.max_context} positions"
        )
    if calibration_ids and not {weights.stored_dtype(w) for w in model.weights} & BITS.keys():
        raise TargetError(
            f"calibration chooses scales of int8 and int4 weights, and these are {weights.dtype}",
            hint="add `--weight-dtype int4`, or leave the text out",
        )
    segments = plan_segments(model.tables, table_dtype, binding.dtype)
    sizes = {
        GRAPH_DATA: sum(weights.stored_bytes(weight) for weight in model.weights),
        BLOB: blob_bytes(model, segments, target.page_size),
    }
    positions = context or min(target.context, model.max_context)
    resident = resident_bytes(model, weights, cache_dtype, positions)
    problems = targets.exceeded(target, resident_bytes=resident, sizes=sizes)
    if problems:
        raise TargetError(
            f"the bundle does not fit target `{target.name}`: {'; '.join(problems)}",
            hint="choose smaller dtypes, or another target",
        )
    return Plan(
        target=target,
        table_dtype=table_dtype,
        weights=weights,
        cache_dtype=cache_dtype,
        context=positions,
        calibration_ids=calibration_ids,
        segments=segments,
        sizes=sizes,
    )


def _choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TargetError(f"{what} `{value}` is not known; choose one of {', '.join(allowed)}")


def _note_what_is_left_out(binding: Binding, progress: Progress) -> None:
    for part in binding.left_out:
        progress.note(
            f"note: the {part.name} is left out: {part.parameters:,} parameters, "
            f"{part.nbytes / 1e6:,.1f} MB"
        )
    if binding.ignored:
        progress.note(
            f"note: {len(binding.ignored)} tensors are not used by the model, "
            f"`{binding.ignored[0]}` first: {_reason(binding)}"
        )


def _reason(binding: Binding) -> str:
    first = binding.ignored[0]
    return next(u.reason for key, u in binding.model.unused.items() if first.endswith(key))


def _calibration_ids(text: Text | None, calibrate: str | Path | None, model: Model) -> list[int]:
    if calibrate is None:
        return []
    if text is None:
        raise CheckpointError(
            f"there is no tokenizer, so `{calibrate}` cannot be read as tokens",
            hint=f"put {' or '.join(TOKENIZERS)} beside the weights, or add `--tokenizer PATH`",
        )
    ids = text.encode_file(Path(calibrate), num_rows=model.num_rows)
    return ids[:_CALIBRATION_TOKENS]


def _check_disk(folder: Path, plan: Plan) -> None:
    free, needed = shutil.disk_usage(folder).free, plan.nbytes + _OVERHEAD_BYTES
    if free < needed:
        raise PleexportError(
            f"`{folder.parent}` has {free / 1e9:.2f} GB free; "
            f"the bundle needs {needed / 1e9:.2f} GB",
            hint="free some space, or choose another folder with `--out`",
        )


def _write_model(binding: Binding, plan: Plan, folder: Path, progress: Progress) -> dict[str, str]:
    """Write blob and dense graph; rows are written while the graph is traced."""
    try:
        from pleexport.backends.onnx import lower
        from pleexport.export import trace
        from pleexport.export.calibration import importance
    except ImportError as err:
        raise MissingDependencyError(
            f"building needs {err.name}", hint="pip install 'pleexport[export]'"
        ) from err
    important = {}
    if plan.calibration_ids:
        count = len(plan.calibration_ids)
        with progress.count("Measuring inputs on the text", count, "tokens") as update:
            important = importance(binding, plan.calibration_ids, progress=update)
    with progress.bytes("Writing rows and weights", plan.nbytes) as update:

        def write_rows(check: Callable[[], None]) -> str:
            def advance(nbytes: int) -> None:
                check()
                update(nbytes)

            return write_blob(
                binding,
                folder / BLOB,
                table_dtype=plan.table_dtype,
                page_size=plan.target.page_size,
                progress=advance,
            )

        with beside(write_rows) as rows:

            def advance(nbytes: int) -> None:
                if rows.done():
                    rows.result()  # its error, before the work goes on
                update(nbytes)

            program = trace.trace(binding.model, plan.cache_dtype)
            translated = lower.translate(program, binding.model, plan.cache_dtype)
            graph = lower.attach_weights(translated, binding, plan.weights, important)
            weights = lower.save(graph, folder / GRAPH, progress=advance)
            return {"weights": weights, "tables": rows.result()}


def _manifest(binding: Binding, plan: Plan, digests: dict[str, str]) -> Manifest:
    model, source = binding.model, binding.checkpoint
    return Manifest(
        schema=SCHEMA,
        family=model.family,
        backend="onnx",
        contract=describe(model, plan.cache_dtype),
        context=plan.context,
        eos_token_ids=_eos_token_ids(model, source),
        table_dtype=plan.table_dtype,
        weight_dtype=plan.weights.dtype,
        head_dtype=next(
            plan.weights.stored_dtype(w) for w in model.weights if w.precision == "head"
        ),
        block_size=plan.weights.block_size,
        symmetric=plan.weights.symmetric,
        cache_dtype=plan.cache_dtype,
        calibration_tokens=len(plan.calibration_ids),
        target=plan.target.name,
        source_digest=digests,
        versions={name: _version(name) for name in _VERSIONED}
        | {"python": platform.python_version()},
        parity=ParitySummary(checked=False),
        files=[],
    )


def _eos_token_ids(model: Model, source: Checkpoint) -> list[int]:
    """End-of-text ids: those of the generation config come first, as in transformers."""
    eos = source.generation_config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    return [i for i in ids if type(i) is int] or list(model.eos_token_ids)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _verify(bundle: Bundle, binding: Binding, progress: Progress) -> ParitySummary:
    from pleexport.parity.verify import compare_with_original, write_report

    report = compare_with_original(bundle, binding, progress=progress)
    write_report(report, bundle.path / PARITY)
    if not report.passed:
        raise CheckFailed(
            "the bundle does not compute what the original does: " + "; ".join(report.failures),
            hint="nothing was kept; `--no-verify` keeps the bundle for a closer look",
        )
    return report.summary()
