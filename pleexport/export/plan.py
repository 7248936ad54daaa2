"""What a build will write, known before it starts; `inspect` shows the same plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pleexport import targets
from pleexport.backends import registry
from pleexport.backends.base import Backend, WeightStorage
from pleexport.backends.describe import describe
from pleexport.checkpoint.checkpoint import GENERATION_CONFIG, Checkpoint
from pleexport.checkpoint.text_files import licences
from pleexport.contract import GraphContract
from pleexport.dtypes import QUANTIZED, packed_bytes
from pleexport.errors import TargetError
from pleexport.export.budget import choose
from pleexport.export.layout import Part, lay_out
from pleexport.export.options import Settings
from pleexport.export.sensitivity import Sensitivity, TypicalSensitivity
from pleexport.model import Model
from pleexport.runtime.blob_layout import Segment
from pleexport.sizes import size_text
from pleexport.tied_layout import TiedLayout

# Room for manifest and reports, for the graph's structure, and for what aligns a matrix's tensors.
_OTHER_BYTES = 64 << 10
_BYTES_OF_A_WEIGHT = 2 << 10
_BYTES_OF_A_MATRIX = 3 << 10


@dataclass(frozen=True)
class Plan:
    """A bundle before it is written; sizes in bytes.

    Attributes:
        settings: with the dtypes that a budget chose.
        context: positions that it is built for.
        segments: of the blob's rows.
        tied: the output head, where a table's rows are read out of it; None where all tables are in
            the blob.
        sizes: of the large files, by name.
        parts: what these files are made of.
        costs: of the parts, what a budget predicts; see `Choice`.
        cache_bytes: states, and keys and values of a full context.
        resident_bytes: what has to stay in memory: dense weights once loaded, and cache.
        problems: limits of the target that it exceeds, with the numbers.
        delivery: what the target's store cannot deliver in one piece.
    """

    model: Model
    settings: Settings
    backend: Backend
    storage: WeightStorage
    contract: GraphContract
    context: int
    segments: list[Segment]
    tied: TiedLayout | None
    sizes: dict[str, int]
    parts: list[Part]
    costs: Mapping[str, float]
    cache_bytes: int
    resident_bytes: int
    problems: list[str]
    delivery: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the large files."""
        return sum(self.sizes.values())

    @property
    def read_bytes(self) -> int:
        """What a token reads: all dense weights, and a row of each table."""
        return sum(part.read_bytes for part in self.parts)

    @property
    def predicted_divergence(self) -> float | None:
        """Nats per token, where a budget chose dtypes."""
        return sum(self.costs.values()) if self.costs else None

    def shares(self) -> list[float | None]:
        """By part the share of the predicted divergence; what two parts share is the first's."""
        told: set[str] = set()
        found: list[float | None] = []
        for part in self.parts:
            cost = None if part.name in told else self.costs.get(part.name)
            told.add(part.name)
            total = self.predicted_divergence
            found.append(None if cost is None or not total else cost / total)
        return found

    def chosen(self) -> list[str]:
        """What a budget chose, as aligned lines; none where it had nothing to choose."""
        if not self.costs:
            return []
        name = max(len(part.name) for part in self.parts)
        lines = [f"{'':{name}}  number  dtype       bytes  share of the predicted divergence"]
        for part, share in zip(self.parts, self.shares(), strict=True):
            size, told = size_text(part.nbytes), "" if share is None else f"{share:.1%}"
            line = f"{part.name:{name}}  {part.count:6}  {part.dtype:5}  {size:>10}  {told:>6}"
            lines.append(line.rstrip())
        what = f"predicted divergence {self.predicted_divergence:.1e} nats per token"
        return [*lines, f"{'together':{name}}  {size_text(self.nbytes)}, {what}"]

    def check(self) -> None:
        """Refuse what the target cannot hold.

        Raises:
            TargetError: with the numbers.
        """
        if self.problems:
            raise TargetError(
                f"the bundle does not fit target `{self.settings.target.name}`: "
                f"{'; '.join(self.problems)}",
                hint="choose smaller dtypes, or another target",
            )


def make_plan(
    model: Model,
    settings: Settings,
    *,
    source: str,
    sensitivity: Sensitivity | None = None,
    copied: Iterable[Path] = (),
    equal_codes: bool = False,
) -> Plan:
    """Plan a bundle.

    Args:
        model: with the cache that the settings ask for.
        source: the checkpoint's dtype, which the table dtype "source" means.
        sensitivity: what a budget chooses dtypes by; what is typical by default.
        copied: files that a bundle gets as they are.
        equal_codes: the codes of the head are those of the input embedding, which headers do not
            tell.
    Raises:
        TargetError: a context beyond the model's, dtypes that the backend lacks, or too few bytes.
        UnsupportedError: the backend cannot compute such a model.
    """
    target = settings.target
    if settings.context is not None and not 1 <= settings.context <= model.max_context:
        raise TargetError(
            f"context {settings.context} is not possible; the model knows 1 to "
            f"{model.max_context} positions",
            hint="choose one of these with `--context`",
        )
    context = settings.context or min(target.context, model.max_context)
    backend = registry.load(settings.backend)
    backend.check(model, settings.weights)
    lay = partial(lay_out, model, backend=backend, source=source, equal_codes=equal_codes)
    choice = choose(
        model,
        settings,
        backend,
        lay,
        source=source,
        sensitivity=sensitivity or TypicalSensitivity(model),
        beside_bytes=sum(p.stat().st_size for p in copied) + _structure_bytes(model),
    )
    layout = lay(choice.settings)
    storage, sizes = layout.storage, layout.sizes
    delivery = targets.delivery_notes(target, sizes)
    cache = cache_bytes(model, context)
    resident = cache + sum(storage.resident_bytes(weight) for weight in model.weights)
    return Plan(
        model=model,
        settings=_as_stored(choice.settings, model, storage),
        backend=backend,
        storage=storage,
        contract=describe(model, backend, context=context),
        context=context,
        segments=layout.segments,
        tied=layout.tied,
        sizes=sizes,
        parts=layout.parts(),
        costs=choice.costs,
        cache_bytes=cache,
        resident_bytes=resident,
        problems=targets.exceeded(target, resident_bytes=resident, sizes=sizes),
        delivery=[*delivery, choice.remark] if choice.remark else delivery,
    )


def copied_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """What a bundle gets beside its tokenizer as it is, by the names that it has there."""
    generation = checkpoint.folder / GENERATION_CONFIG
    found = {GENERATION_CONFIG: generation} if generation.is_file() else {}
    # What lies beside a single file may be of something else.
    own = checkpoint.path.is_dir() or checkpoint.repository
    return found | licences(checkpoint.folder) if own else found


def _structure_bytes(model: Model) -> int:
    """About what a bundle has beside its large files, and beside what is copied into it."""
    matrices = sum(weight.precision != "full" for weight in model.weights)
    named = _BYTES_OF_A_WEIGHT * len(model.weights) + _BYTES_OF_A_MATRIX * matrices
    return _OTHER_BYTES + named


def _as_stored(settings: Settings, model: Model, storage: WeightStorage) -> Settings:
    """The same settings, whose dtypes are those of what lies on a trained grid, if all does."""
    weights, table_dtype = settings.weights, settings.table_dtype
    most = [weight for weight in model.weights if weight.precision == "quantizable"]
    if most and all(w.on_grid and storage.dtype_of(w) == "int4" for w in most):
        weights = replace(weights, dtype="int4")
    if settings.trained_grid and table_dtype in QUANTIZED and all(t.on_grid for t in model.tables):
        table_dtype = "int4"
    return replace(settings, weights=weights, table_dtype=table_dtype)


def cache_bytes(model: Model, context: int) -> int:
    """Bytes of states, and of keys and values of `context` positions.

    A window holds no more than its own. What is looked up again for the whole text is in memory
    for as long as a call takes.
    """
    states = sum(state.nbytes for state in model.states)
    looked_up = sum(4 * context * table.row_width for table in model.tables if table.whole_text)
    held = sum(
        packed_bytes(buffer.width, buffer.dtype)
        * cache.heads
        * min(cache.window or context, context)
        for cache in model.caches
        for buffer in cache.buffers
    )
    return states + looked_up + held
