"""Small models whose tables need no checkpoint, and blobs of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pleexport.codes import QuantizedRows, join_codes
from pleexport.dtypes import bits
from pleexport.export.blob_writer import write_blob
from pleexport.export.segments import plan_segments
from pleexport.model import Codes, Table
from pleexport.tied_layout import TiedLayout, tied_checksums

PAGE_SIZE = 16_384
KINDS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


class Model(NamedTuple):
    tables: tuple[Table, ...]
    num_rows: int
    row_aliases: dict[int, int]


@dataclass(frozen=True)
class Source:
    """What `write_blob` needs of a model whose tensors were found in a checkpoint."""

    model: Model
    tensors: dict[str, NDArray[Any] | QuantizedRows]

    @property
    def dtype(self) -> str:
        names = {np.dtype(t): n for n, t in KINDS.items()}
        dtypes = {t.dtype for t in self.tensors.values() if not isinstance(t, QuantizedRows)}
        (dtype,) = {names[dtype] for dtype in dtypes} or {"bf16"}
        return dtype

    def rows(self, table: Table, rows: NDArray[np.int64] | slice) -> NDArray[Any] | QuantizedRows:
        tensor = self.tensors[table.name]
        if isinstance(tensor, QuantizedRows):
            return QuantizedRows(tensor.codes[rows], tensor.scales[rows])
        return tensor[rows]

    def vectors(self, name: str) -> NDArray[np.float32]:
        """`[rows, segments, width]`, multiplier left out, each element on its own."""
        (found,) = (t for t in self.model.tables if t.name == name)
        tensor = self.tensors[name]
        if not isinstance(tensor, QuantizedRows):
            return tensor.astype(np.float32).reshape(len(tensor), -1, found.width)
        assert found.codes is not None
        groups = np.arange(found.width) // found.codes.group_size
        return tensor.codes.astype(np.float32) * tensor.scales.astype(np.float32)[..., groups]


def table(
    name: str,
    *,
    width: int,
    layers: int | None,
    multiplier: float,
    rows: int,
    codes: Codes | None = None,
) -> Table:
    return Table(name, (f"{name}.weight",), rows, layers, width, name, multiplier, codes=codes)


def mixed(count: int, *, seed: int) -> NDArray[np.uint64]:
    """Fixed numbers below 65,536 that no random generator has to reproduce."""
    counter = np.arange(count, dtype=np.uint64) + np.uint64(seed)
    return counter * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)


def values(rows: int, width: int, *, seed: int) -> NDArray[np.float32]:
    """Numbers in [-2, 2)."""
    numbers = mixed(rows * width, seed=seed).astype(np.float32)
    return ((numbers - 32768) / 16384).reshape(rows, width)


def quantized_rows(of: Table, *, seed: int) -> QuantizedRows:
    """All codes that there are, and scales that use all bits of their dtype."""
    assert of.codes is not None
    segments, wide = of.layers or 1, bits(of.codes.dtype)
    codes = mixed(of.rows * segments * of.width, seed=seed) >> np.uint64(16 - wide)
    signed = codes.astype(np.int64) - 2 ** (wide - 1)
    groups = -(-of.width // of.codes.group_size)
    scales = (mixed(of.rows * segments * groups, seed=seed + 1).astype(np.float64) + 1) / 3e6
    return QuantizedRows(
        signed.astype(np.int8).reshape(of.rows, segments, of.width),
        scales.astype(KINDS[of.codes.scale_dtype]).reshape(of.rows, segments, groups),
    )


def quantized(tables: tuple[Table, ...], aliases: dict[int, int]) -> Source:
    tensors = {t.name: quantized_rows(t, seed=100 * i) for i, t in enumerate(tables)}
    return Source(Model(tables, tables[0].rows, aliases), tensors)


def phone_source() -> Source:
    """As in Gemma 4's checkpoints for phones: one scale for a token and layer."""
    main, per_layer = Codes("int2", 10, "fp32"), Codes("int4", 7, "fp32")
    return quantized(
        (
            table("embed_tokens", width=10, layers=None, multiplier=39.191835, rows=6, codes=main),
            table("per_layer", width=7, layers=3, multiplier=16.0, rows=6, codes=per_layer),
        ),
        {3: 0, 5: 0},
    )


def mixed_source() -> Source:
    main, per_layer = Codes("int8", 8, "fp32"), Codes("int2", 4, "fp16")
    return quantized(
        (
            table("embed_tokens", width=21, layers=None, multiplier=1.5, rows=60, codes=main),
            table("per_layer", width=9, layers=2, multiplier=0.7, rows=60, codes=per_layer),
        ),
        {59: 1},
    )


def source(
    *, rows: int, width: int, layers: int, layer_width: int, aliases: dict[int, int]
) -> Source:
    tables = (
        table("embed_tokens", width=width, layers=None, multiplier=39.25, rows=rows),
        table("per_layer", width=layer_width, layers=layers, multiplier=2.828125, rows=rows),
    )
    tensors = {t.name: values(rows, t.row_width, seed=i) for i, t in enumerate(tables)}
    return Source(Model(tables, rows, aliases), tensors)


def bf16_source() -> Source:
    plain = source(rows=5, width=20, layers=2, layer_width=8, aliases={4: 1})
    tensors = {name: v.astype(ml_dtypes.bfloat16) for name, v in plain.tensors.items()}
    special = [0.0, -0.0, 1e-40, 3.0e36, -1.0 / 3.0]
    tensors["embed_tokens"][2, : len(special)] = np.array(special, dtype=ml_dtypes.bfloat16)
    return Source(plain.model, tensors)


def int4_source() -> Source:
    made = source(rows=6, width=72, layers=3, layer_width=32, aliases={})
    made.tensors["embed_tokens"][1] = 0  # a group of zeros has the scale 0
    made.tensors["per_layer"][2] *= 1e-7  # scales that float16 holds as subnormal numbers
    return made


VECTOR_SOURCES: dict[str, tuple[Callable[[], Source], str]] = {
    "int8": (
        lambda: source(rows=5, width=200, layers=2, layer_width=12, aliases={3: 0, 4: 0}),
        "int8",
    ),
    "int4": (int4_source, "int4"),
    "odd-width": (
        lambda: source(rows=4, width=33, layers=2, layer_width=7, aliases={}),
        "int4",
    ),
    "bf16-source": (bf16_source, "source"),
    "fp16": (lambda: source(rows=3, width=6, layers=2, layer_width=5, aliases={}), "fp16"),
    "fp32": (lambda: source(rows=3, width=5, layers=1, layer_width=3, aliases={2: 1}), "fp32"),
    "int2-int4-kept": (phone_source, "source"),
    "int8-int2-kept": (mixed_source, "source"),
}


def example() -> Source:
    """The blob of the hexdump: three token ids, the last an alias of the first."""
    main, per_layer = Codes("int2", 5, "fp32"), Codes("int4", 2, "fp16")
    return quantized(
        (
            table("embed_tokens", width=5, layers=None, multiplier=2.25, rows=3, codes=main),
            table("per_layer", width=3, layers=2, multiplier=1.75, rows=3, codes=per_layer),
        ),
        {2: 0},
    )


def write(made: Source, path: Path, table_dtype: str) -> None:
    segments = plan_segments(made.model.tables, table_dtype, made.dtype)  # type: ignore[arg-type]
    write_blob(made, path, segments=segments, page_size=PAGE_SIZE)  # type: ignore[arg-type]


class TiedSource(NamedTuple):
    """A matrix in codes, with what goes into its file."""

    layout: TiedLayout
    codes: NDArray[np.uint8]  # [rows, code_bytes], packed, each plus 2**(bits - 1)
    scales: NDArray[np.float32]

    @property
    def vectors(self) -> NDArray[np.float32]:
        """`[rows, width]`, multiplier applied, each element on its own."""
        wide, width = bits(self.layout.dtype), self.layout.width
        single = self.codes[..., None] >> np.arange(0, 8, wide) & (2**wide - 1)
        signed = single.reshape(len(self.codes), -1)[:, :width] - 2 ** (wide - 1)
        scales = self.scales[:, np.arange(width) // self.layout.group_size]
        return signed.astype(np.float32) * scales * np.float32(self.layout.multiplier)


def tied_source(
    dtype: str, *, rows: int, width: int, group_size: int, multiplier: float
) -> TiedSource:
    layout = TiedLayout("head", "embed_tokens", rows, width, dtype, group_size, multiplier)
    wide, padded = bits(dtype), layout.num_groups * group_size
    codes = mixed(rows * padded, seed=bits(dtype)) >> np.uint64(16 - wide)
    codes = codes.astype(np.uint8).reshape(rows, padded)
    codes[:, width:] = 2 ** (wide - 1)
    scales = (mixed(rows * layout.num_groups, seed=9).astype(np.float64) - 30_000) / 3e6
    scales = scales.astype(np.float32).reshape(rows, layout.num_groups)
    return TiedSource(layout, join_codes(codes, bits=wide) if wide < 8 else codes, scales)


TIED_SOURCES: dict[str, Callable[[], TiedSource]] = {
    "int8": lambda: tied_source("int8", rows=4, width=40, group_size=16, multiplier=39.25),
    "int4": lambda: tied_source("int4", rows=20, width=33, group_size=16, multiplier=39.25),
    "int2": lambda: tied_source("int2", rows=5, width=50, group_size=32, multiplier=39.191835),
}


def tied_example() -> TiedSource:
    """The file of the hexdump: three rows of five elements."""
    return tied_source("int4", rows=3, width=5, group_size=16, multiplier=2.25)


def write_tied(made: TiedSource, path: Path) -> None:
    layout, ids = made.layout, np.arange(made.layout.rows)
    sums = tied_checksums(made.codes, made.scales, ids)
    parts = (made.codes, made.scales.astype("<f4"), sums.astype("<u8"))
    head = layout.head("xxh3-128:" + "0123456789abcdef" * 2)
    path.write_bytes(head + b"".join(part.tobytes() for part in parts))
