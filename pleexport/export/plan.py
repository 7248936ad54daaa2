"""What a build will write, known before it starts; `inspect` shows the same plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pleexport import targets
from pleexport.backends import registry
from pleexport.backends.base import Backend, WeightStorage
from pleexport.backends.describe import describe
from pleexport.contract import GraphContract
from pleexport.dtypes import QUANTIZED, packed_bytes
from pleexport.errors import TargetError
from pleexport.export.blob_writer import blob_bytes
from pleexport.export.options import Settings
from pleexport.export.segments import plan_segments
from pleexport.model import Model
from pleexport.runtime.blob_layout import Segment
from pleexport.runtime.bundle import BLOB


@dataclass(frozen=True)
class Plan:
    """A bundle before it is written; sizes in bytes.

    Attributes:
        context: positions that it is built for.
        segments: of the blob's rows.
        sizes: of the large files, by name.
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
    sizes: dict[str, int]
    cache_bytes: int
    resident_bytes: int
    problems: list[str]
    delivery: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the large files."""
        return sum(self.sizes.values())

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


def make_plan(model: Model, settings: Settings, *, source: str) -> Plan:
    """Plan a bundle.

    Args:
        model: with the cache that the settings ask for.
        source: the checkpoint's dtype, which the table dtype "source" means.
    Raises:
        TargetError: a context beyond the model's, or dtypes that the backend lacks.
        UnsupportedError: the backend cannot compute such a model.
    """
    target = settings.target
    if settings.context is not None and not 1 <= settings.context <= model.max_context:
        raise TargetError(
            f"context {settings.context} is not possible; the model knows 1 to "
            f"{model.max_context} positions",
            hint="choose fewer with `--context`",
        )
    context = settings.context or min(target.context, model.max_context)
    backend = registry.load(settings.backend)
    backend.check(model, settings.weights)
    storage = backend.storage(settings.weights)
    segments = plan_segments(
        model.tables, settings.table_dtype, source, trained_grid=settings.trained_grid
    )
    sizes = backend.planned_files(model, storage) | {
        BLOB: blob_bytes(model, segments, target.page_size)
    }
    cache = cache_bytes(model, context)
    resident = cache + sum(storage.resident_bytes(weight) for weight in model.weights)
    return Plan(
        model=model,
        settings=_as_stored(settings, model, storage),
        backend=backend,
        storage=storage,
        contract=describe(model, backend, context=context),
        context=context,
        segments=segments,
        sizes=sizes,
        cache_bytes=cache,
        resident_bytes=resident,
        problems=targets.exceeded(target, resident_bytes=resident, sizes=sizes),
        delivery=targets.delivery_notes(target, sizes),
    )


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
