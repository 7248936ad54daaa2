"""What a build will write, known before it starts; `inspect` shows the same plan."""

from __future__ import annotations

from dataclasses import dataclass

from pleexport import targets
from pleexport.backends import registry
from pleexport.backends.base import Backend, WeightStorage
from pleexport.backends.describe import describe
from pleexport.contract import GraphContract
from pleexport.dtypes import QUANTIZED, bits, packed_bytes
from pleexport.errors import TargetError
from pleexport.export.blob_writer import blob_bytes
from pleexport.export.options import Settings
from pleexport.export.segments import plan_segments
from pleexport.model import Model
from pleexport.runtime.blob_layout import Segment
from pleexport.runtime.bundle import BLOB
from pleexport.tied_layout import TiedLayout


@dataclass(frozen=True)
class Plan:
    """A bundle before it is written; sizes in bytes.

    Attributes:
        context: positions that it is built for.
        segments: of the blob's rows.
        tied: the output head, where a table's rows are read out of it; None where all tables are in
            the blob.
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
    tied: TiedLayout | None
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


def make_plan(model: Model, settings: Settings, *, source: str, equal_codes: bool = False) -> Plan:
    """Plan a bundle.

    Args:
        model: with the cache that the settings ask for.
        source: the checkpoint's dtype, which the table dtype "source" means.
        equal_codes: the codes of the head are those of the input embedding, which headers do not
            tell.
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
    tied = _tied(model, settings, storage, equal_codes=equal_codes)
    own_rows = [table for table in model.tables if tied is None or table.name != tied.table]
    segments = plan_segments(own_rows, settings.table_dtype, source)
    sizes = backend.planned_files(model, storage, tied=tied) | {
        BLOB: blob_bytes(model, segments, target.page_size)
    }
    cache = cache_bytes(model, context)
    resident = cache + sum(storage.resident_bytes(weight) for weight in model.weights)
    return Plan(
        model=model,
        settings=settings,
        backend=backend,
        storage=storage,
        contract=describe(model, backend, context=context),
        context=context,
        segments=segments,
        tied=tied,
        sizes=sizes,
        cache_bytes=cache,
        resident_bytes=resident,
        problems=targets.exceeded(target, resident_bytes=resident, sizes=sizes),
        delivery=targets.delivery_notes(target, sizes),
    )


def _tied(
    model: Model, settings: Settings, storage: WeightStorage, *, equal_codes: bool
) -> TiedLayout | None:
    """The head whose stored rows are looked up in place of a table's; None for none.

    It holds the same numbers, with at least the bits that the build wants in the table. The blob
    keeps a table.
    """
    head, table, codes = model.head, model.table_of_head, storage.row_codes(model.head)
    if table is None or codes is None or len(model.tables) == 1:
        return None
    if head.codes or table.codes:
        same = equal_codes and settings.weights.keeps_codes(head)
    else:
        asked, tied = settings.table_dtype, head.source_key == table.keys[0]
        same = tied and asked in QUANTIZED and bits(asked) <= bits(codes.dtype)
    if not same:
        return None
    return TiedLayout(
        weight=head.name,
        table=table.name,
        rows=table.rows,
        width=table.width,
        dtype=codes.dtype,
        group_size=codes.group_size,
        multiplier=table.multiplier,
    )


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
