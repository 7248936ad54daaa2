"""What the large files of a bundle hold under given settings, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass

from pleexport.backends.base import Backend, WeightStorage
from pleexport.dtypes import QUANTIZED, bits
from pleexport.export.blob_writer import blob_bytes
from pleexport.export.options import Settings
from pleexport.export.segments import plan_segments
from pleexport.model import Model
from pleexport.runtime.blob_layout import Segment
from pleexport.runtime.bundle import BLOB
from pleexport.tied_layout import TiedLayout

_VECTORS = ("norms and other vectors", "fp32")


@dataclass(frozen=True)
class Part:
    """Matrices of one kind in one dtype, or a table; sizes in bytes.

    Attributes:
        name: what their names have in common, or the table's.
        kind: "table", "matrices" or "vectors".
        count: of a table's layers, of matrices or of vectors.
        read_bytes: what a token reads of it.
    """

    name: str
    kind: str
    dtype: str
    count: int
    parameters: int
    nbytes: int
    read_bytes: int


@dataclass(frozen=True)
class Layout:
    """How tables and weights are stored.

    Attributes:
        segments: of the blob's rows.
        tied: the output head, where a table's rows are read out of it; None where all tables are in
            the blob.
        sizes: of the large files in bytes, by name.
    """

    model: Model
    storage: WeightStorage
    segments: list[Segment]
    tied: TiedLayout | None
    sizes: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the large files."""
        return sum(self.sizes.values())

    def parts(self) -> list[Part]:
        """What the files are made of: tables, then matrices by kind, then what stays float32."""
        parts = []
        for table in self.model.tables:
            size = table.row_width * self.model.num_rows
            if self.tied and self.tied.table == table.name:
                row = self.tied.code_bytes + self.tied.scale_bytes
                # Beside the head's codes and scales: checksums, and a page before them.
                more = self.tied.nbytes - self.storage.file_bytes(self.model.head)
                parts.append(Part(table.name, "table", self.tied.dtype, 1, size, more, row))
                continue
            own = [s for s in self.segments if s.table == table.name]
            row = sum(s.end - s.offset for s in own)
            nbytes = row * self.model.num_rows
            parts.append(Part(table.name, "table", own[0].dtype, len(own), size, nbytes, row))
        counted: dict[tuple[str, str], list[int]] = {}
        for weight in self.model.weights:
            key = _VECTORS
            if weight.precision != "full":
                key = (kind_of(weight.name), self.storage.dtype_of(weight))
            sums = counted.setdefault(key, [0, 0, 0])
            for i, value in enumerate((1, weight.size, self.storage.file_bytes(weight))):
                sums[i] += value
        # Kinds keep the model's order; what stays as it is comes last.
        kinds = list(dict.fromkeys(name for name, _ in counted if name != _VECTORS[0]))
        order = sorted(counted, key=lambda key: [*kinds, _VECTORS[0]].index(key[0]))
        for name, dtype in order:
            count, size, nbytes = counted[name, dtype]
            kind = "vectors" if name == _VECTORS[0] else "matrices"
            parts.append(Part(name, kind, dtype, count, size, nbytes, nbytes))
        return parts


def lay_out(
    model: Model, settings: Settings, *, backend: Backend, source: str, equal_codes: bool = False
) -> Layout:
    """Lay a bundle's large files out.

    Args:
        source: the checkpoint's dtype, which the table dtype "source" means.
        equal_codes: the codes of the head are those of the input embedding, which headers do not
            tell.
    """
    storage = backend.storage(settings.weights)
    tied = _tied(model, settings, storage, equal_codes=equal_codes)
    own_rows = [table for table in model.tables if tied is None or table.name != tied.table]
    dtypes = {table.name: settings.dtype_of_table(table) for table in own_rows}
    segments = plan_segments(own_rows, settings.table_dtype, source, dtypes=dtypes)
    blob = blob_bytes(model, segments, settings.target.page_size)
    sizes = backend.planned_files(model, storage, tied=tied) | {BLOB: blob}
    return Layout(model, storage, segments, tied, sizes)


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
        asked = settings.dtype_of_table(table)
        tied = head.source_key == table.keys[0]
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


def kind_of(name: str) -> str:
    """A matrix's name without the numbers of layers: `mlp.down_proj`."""
    words = name.removesuffix(".weight").split(".")
    named = [word for word in words if not word.isdigit()]
    return ".".join(named[1:] if named[0] in ("layers", "blocks") else named)
