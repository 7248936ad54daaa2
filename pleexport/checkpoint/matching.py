"""Match a model's tensors to a checkpoint's, and say everything that does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.checkpoint import Checkpoint, cut
from pleexport.checkpoint.quantized import read_codes
from pleexport.checkpoint.row_pieces import compute_rows
from pleexport.codes import QuantizedRows
from pleexport.dtypes import COMPUTED, FLOATS, bits, numpy_dtype, packed_bytes
from pleexport.errors import CheckpointError
from pleexport.model import Codes, Model, Rows, Table, Weight
from pleexport.safetensors_file import TensorEntry
from pleexport.sizes import align, groups

_MAX_PROBLEMS_SHOWN = 20
_ROWS_COMPARED = 4096
_JOIN = (
    "tensors without a number in them are what DeepSpeed (ZeRO 3) leaves in a model that was not "
    "gathered: remove the file where the shards of an index lie beside it, or join the parts with "
    "`zero_to_fp32.py`"
)
_ANOTHER = (
    "config.json and weights may be of two models, or a file may be incomplete: fetch the model "
    "again, or save it again with the code that trained it"
)
_MERGE = (
    "an adapter was saved inside the model: save `model.merge_and_unload()`, or the adapter alone"
)


@dataclass(frozen=True)
class LeftOut:
    """A part of the checkpoint that is not converted: a tower of a multimodal model."""

    name: str
    tensors: int
    parameters: int
    nbytes: int


class MatchedModel:
    """A model whose tensors were all found in a checkpoint.

    Raises:
        CheckpointError: tensors are missing, have the wrong shape or dtype, or are used by nothing;
            all of them are named at once, with the nearest known name.
    """

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.model = model
        self.checkpoint = _with_tied_embedding(model, checkpoint)
        self.prefix = _text_prefix(model, self.checkpoint)
        self._whole: dict[str, NDArray[np.float32]] = {}
        self.left_out, self.ignored = self._check()

    def entries(self, item: Table | Weight) -> list[TensorEntry]:
        """The checkpoint's tensors behind a table or a weight that is not a constant."""
        keys = item.keys if isinstance(item, Table) else (item.source_key,)
        if item.codes:
            keys = item.codes.keys
        return [self.checkpoint.entries[self.full_name(key)] for key in keys]

    def names(self) -> list[str]:
        """All tensors of the checkpoint that the model uses, each once."""
        return [*dict.fromkeys(name for name, _, _ in self._expected())]

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype, e.g. "bf16"."""
        return self.checkpoint.dtype

    def rows(self, table: Table, rows: Rows) -> NDArray[np.generic] | QuantizedRows:
        """Rows `[n, row width]` of a table in its source dtype, or its codes where it has them; a
        slice is not copied if it need not be.

        A tensor that is stored in another dtype than the config names is rounded to the config's,
        as the original does when it loads it.

        Raises:
            CheckpointError: rows that are computed are not finite.
        """
        if table.codes:
            return _in_segments(self._codes(table.codes, table.row_width, rows), table)
        if table.fold:
            compute = partial(table.fold.compute, self._read)
            with np.errstate(over="ignore", invalid="ignore"):  # a square may be infinite, as there
                found = compute_rows(compute, rows, count=self.model.num_rows)
            if not np.isfinite(found).all():
                raise CheckpointError(
                    f"`{self.checkpoint.path}`: rows that are computed from `{table.keys[0]}` "
                    "are not finite in float32",
                    hint="the training diverged, or the file is damaged: take an earlier "
                    "checkpoint, or fetch the file again",
                )
            return found
        dtype = numpy_dtype(self.dtype)
        parts = [self._part(key, rows).astype(dtype, copy=False) for key in table.keys]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def row_values(self, table: Table, rows: Rows) -> NDArray[np.float32]:
        """Rows `[n, row width]` of a table in float32."""
        found = self.rows(table, rows)
        if not isinstance(found, QuantizedRows):
            return found.astype(np.float32)
        assert table.codes is not None, table.name
        group_size = min(table.codes.group_size, table.width)
        return found.values(group_size).reshape(len(found.codes), -1)

    def codes(
        self, weight: Weight, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedRows:
        """A part of a matrix that the checkpoint holds in codes, `[n, 1, k]`.

        Args:
            columns: all of them, or some that begin at a multiple of 4 where a row is one group.
        """
        assert weight.codes is not None, weight.name
        return self._codes(weight.codes, weight.shape[1], rows, columns)

    def read(
        self, weight: Weight, rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """A part of a matrix in float32, as the original holds it.

        Args:
            columns: begins at a multiple of 4.
        """
        if weight.codes is None:
            stored = self._stored(weight, rows, columns)
            return stored.astype(np.float32) if weight.as_stored else self.widened(stored)
        width, size = weight.shape[1], weight.codes.group_size
        begin, end, _ = columns.indices(width)
        # Whole groups, where a row has several.
        first = begin if size >= width else begin // size * size
        last = end if size >= width else min(align(end, size), width)
        part = self._codes(weight.codes, width, rows, slice(first, last))
        return part.values(min(size, last - first))[:, 0, begin - first : end - first]

    def values(self, weight: Weight) -> NDArray[np.float32]:
        """A whole weight in float32."""
        if weight.constant is not None:
            return weight.constant
        return self.read(weight)

    def widened(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """A copy of stored values in float32, rounded to the checkpoint's dtype first."""
        return values.astype(numpy_dtype(self.dtype), copy=False).astype(np.float32)

    def vectors(self, table: Table, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """What token ids look up: `[T, width]`, or `[T, layers, width]`, multiplier applied."""
        aliases = self.model.row_aliases
        rows = table.source_rows(np.array([aliases.get(int(i), int(i)) for i in ids], np.int64))
        vectors = self.row_values(table, rows) * np.float32(table.multiplier)
        return vectors if table.layers is None else vectors.reshape(len(ids), table.layers, -1)

    def check_tied_head(self) -> None:
        """Refuse a head that the config ties and the files contradict; reads both.

        Raises:
            CheckpointError: the file's own head differs from what it is tied to.
        """
        for weight in self.model.weights:
            own = self.full_name(weight.name)
            if weight.key is None or own not in self.checkpoint.entries:
                continue
            (tied_to,) = self.entries(weight)
            mine, tied = self.checkpoint.array(own), self.checkpoint.array(tied_to.name)
            if not _equal(mine, tied):
                raise CheckpointError(
                    f"`{self.checkpoint.path}` ties its head to `{weight.key}`, but holds a "
                    f"different `{own}`",
                    hint="set `tie_word_embeddings` to false in config.json, or remove the tensor",
                )

    def head_has_codes_of_its_table(self) -> bool:
        """Whether the output head of a quantized checkpoint is its input embedding once more.

        Reads both, up to the first difference.
        """
        head, table = self.model.head, self.model.table_of_head
        if not head.codes or table is None or head.codes != table.codes:
            return False
        pairs = zip(head.codes.keys, table.codes.keys, strict=True)
        return all(_equal(self._array(a), self._array(b)) for a, b in pairs)

    def full_name(self, key: str) -> str:
        """The checkpoint's name of a key, where it has it."""
        # What is nowhere is missed where it belongs.
        places = (self.prefix, *self.model.text_prefixes[self.prefix])
        names = (place + key for place in places)
        return next((n for n in names if n in self.checkpoint.entries), self.prefix + key)

    def _array(self, key: str) -> NDArray[np.generic]:
        array: NDArray[np.generic] = self.checkpoint.array(self.full_name(key))
        return array

    def _part(self, key: str, rows: Rows, columns: slice = slice(None)) -> NDArray[np.generic]:
        part: NDArray[np.generic] = self.checkpoint.part(self.full_name(key), rows, columns)
        return part

    def _stored(self, weight: Weight, rows: slice, columns: slice) -> NDArray[np.generic]:
        """A part of a weight in its stored dtype; `widened` makes numbers of it."""
        if weight.transposed:
            return self._part(weight.source_key, columns, rows).T
        if weight.leading_ones:
            return cut(self._array(weight.source_key).reshape(weight.shape), rows, columns)
        return self._part(weight.source_key, rows, columns)

    def _read(self, key: str, rows: Rows) -> NDArray[np.float32]:
        if isinstance(rows, slice) and rows == slice(None):  # every batch of rows needs it
            if key not in self._whole:
                self._whole[key] = self._array(key).astype(np.float32, order="C")
            return self._whole[key]
        return self._part(key, rows).astype(np.float32, order="C")

    def _codes(
        self, how: Codes, width: int, rows: Rows, columns: slice = slice(None)
    ) -> QuantizedRows:
        codes, scales = (self._array(key) for key in how.keys)
        return read_codes(
            codes,
            scales,
            how,
            width=width,
            rows=rows,
            columns=columns,
            zero_points=self._array(how.zero_points) if how.zero_points else None,
        )

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        """Name, shape and dtypes of every tensor that the model needs."""
        for table in self.model.tables:
            if table.codes:
                yield from self._expected_codes(table.codes, table.rows, table.row_width)
                continue
            for key, shape in table.sources.items():
                yield self.full_name(key), shape, FLOATS
        for weight in self.model.weights:
            if weight.codes:
                yield from self._expected_codes(weight.codes, *weight.shape)
            elif weight.constant is None:
                yield self.full_name(weight.source_key), weight.source_shape, FLOATS

    def _expected_codes(
        self, how: Codes, rows: int, width: int
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        codes, scales = (self.full_name(key) for key in how.keys)
        zero_points, in_a_row = self.full_name(how.zero_points), width // how.group_size
        if how.in_words:
            words = groups(rows, 32 // bits(how.dtype))
            yield codes, (rows, groups(width, 32 // bits(how.dtype))), ("int32",)
            yield scales, (rows, in_a_row), COMPUTED
            yield self.full_name(how.shape), (2,), ("int64", "int32")
            if how.zero_points:
                yield zero_points, (words, in_a_row), ("int32",)
            return
        # Bytes of 8 bits are signed; what is packed is not.
        stored_as = how.dtype if how.dtype == "int8" else "uint8"
        yield codes, (rows, packed_bytes(width, how.dtype)), (stored_as,)
        yield scales, (rows, in_a_row), COMPUTED
        if how.zero_points:
            yield zero_points, (rows, in_a_row), ("int8",)

    def _lying_shapes(self) -> list[str]:
        """Tensors that repeat a matrix's shape, and say another."""
        shapes: list[tuple[Codes | None, tuple[int, ...]]] = [
            (t.codes, (t.rows, t.row_width)) for t in self.model.tables
        ]
        shapes += [(w.codes, w.shape) for w in self.model.weights]
        problems = []
        for codes, shape in shapes:
            if codes and codes.shape:
                name = self.full_name(codes.shape)
                said = self.checkpoint.array(name).tolist()
                if said != list(shape):
                    problems.append(
                        f"tensor `{name}` gives shape {said}; the model has {list(shape)}"
                    )
        return problems

    def _check(self) -> tuple[list[LeftOut], list[str]]:
        entries = self.checkpoint.entries
        expected = {name: (shape, dtypes) for name, shape, dtypes in self._expected()}
        problems = []
        unused = {self.full_name(key) for key in self.model.unused}
        towers: dict[str, list[TensorEntry]] = {}
        unknown = []
        for name, entry in entries.items():
            if name in expected or name in unused:
                continue
            tower = self.model.ignored_part(name)
            if tower is None:
                unknown.append(name)
            else:
                towers.setdefault(tower, []).append(entry)
        missing = [name for name in expected if name not in entries]
        for name in missing:
            problems.append(f"tensor `{name}` is missing{_nearest(name, unknown)}")
        for name in unknown:
            problems.append(f"tensor `{name}` is used by nothing{_nearest(name, missing)}")
        for name, (shape, dtypes) in expected.items():
            if name in entries and entries[name].shape != shape:
                problems.append(
                    f"tensor `{name}` has shape {list(entries[name].shape)}; "
                    f"the model has {list(shape)}"
                )
            elif name in entries and entries[name].dtype not in dtypes:
                problems.append(
                    f"tensor `{name}` has dtype {entries[name].dtype}; "
                    f"expected one of {', '.join(dtypes)}"
                )
        problems += self._lying_shapes() if not problems else []
        if problems:
            empty = [n for n in expected if n in entries and entries[n].shape == (0,)]
            raise _everything(self.checkpoint, problems, hint=_JOIN if empty else _ANOTHER)
        left_out = [
            LeftOut(name, len(es), sum(e.size for e in es), sum(e.nbytes for e in es))
            for name, es in towers.items()
        ]
        return left_out, sorted(name for name in unused if name in entries)


def _in_segments(rows: QuantizedRows, table: Table) -> QuantizedRows:
    """Rows `[n, 1, row width]` of a table with its segments apart, scales as the blob has them."""
    assert table.codes is not None, table.name
    shape = (len(rows.codes), table.layers or 1, -1)
    # One scale may be for several segments.
    repeated = max(1, table.codes.group_size // table.width)
    dtype = numpy_dtype(table.codes.scale_dtype)
    scales = rows.scales.repeat(repeated, axis=-1).astype(dtype, copy=False).reshape(shape)
    zero_points = rows.zero_points
    if zero_points is not None:
        zero_points = zero_points.repeat(repeated, axis=-1).reshape(shape)
    return QuantizedRows(rows.codes.reshape(shape), scales, zero_points)


def _equal(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    """Whether two tensors hold the same numbers; of mapped ones, a part at a time is in memory."""
    parts = (slice(begin, begin + _ROWS_COMPARED) for begin in range(0, len(one), _ROWS_COMPARED))
    return all(np.array_equal(one[rows], other[rows]) for rows in parts)


def _with_tied_embedding(model: Model, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its input embedding, which may be there by the name of a tied head only.

    `safetensors.torch.save_model` saves one of two names that share a tensor, and transformers
    reads it for both.
    """
    head, entries = model.head, checkpoint.entries
    others = [w.source_key for w in model.weights if w is not head and w.constant is None]
    if head.key is None or head.codes or not others:
        return checkpoint
    for prefix, places in model.text_prefixes.items():
        embedding = prefix + head.key
        if prefix + others[0] not in entries or embedding in entries:
            continue
        own = next((p + head.name for p in (prefix, *places) if p + head.name in entries), None)
        if own is not None:
            note = f"`{embedding}` is in no file, and is read from the head it is tied to, `{own}`"
            return checkpoint.renamed(own, embedding, note=note)
    return checkpoint


def _text_prefix(model: Model, checkpoint: Checkpoint) -> str:
    first = model.tables[0]
    key = first.codes.keys[0] if first.codes else first.keys[0]
    for prefix in model.text_prefixes:
        if prefix + key in checkpoint.entries:
            return prefix
    if not checkpoint.entries:
        raise CheckpointError(
            f"`{checkpoint.path}` holds no safetensors files",
            hint="`pleexport inspect` works without weights; a build needs them",
        )
    there = _same_tensor(model, key, list(checkpoint.entries))
    inside = any(".lora_A." in name or ".base_layer." in name for name in checkpoint.entries)
    raise CheckpointError(
        f"`{checkpoint.path}` has no tensor `{key}` under any of the known prefixes "
        f"{', '.join(repr(p) for p in model.text_prefixes)}; `{there}` is there",
        hint=_MERGE
        if inside
        else "rename the tensors as the model was published, or save it again",
    )


def _same_tensor(model: Model, key: str, names: list[str]) -> str:
    """What a checkpoint most likely calls a tensor; any of its names if nothing looks like it."""
    ends_alike = [name for name in names if name.endswith(f".{key}")]
    near = difflib.get_close_matches(next(iter(model.text_prefixes)) + key, names, n=1, cutoff=0.6)
    return next(iter((*ends_alike, *near, *names)))


def _nearest(name: str, candidates: list[str]) -> str:
    """A hint at the candidate that looks most alike, the layer number counting in full."""
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.85)
    return f" (the nearest name is `{matches[0]}`)" if matches else ""


def _everything(checkpoint: Checkpoint, problems: list[str], *, hint: str) -> CheckpointError:
    shown = problems[:_MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    if len(shown) == 1:
        return CheckpointError(f"`{checkpoint.path}`: {shown[0]}", hint=hint)
    listed = "".join(f"\n  - {problem}" for problem in shown)
    return CheckpointError(
        f"`{checkpoint.path}` does not fit the model, {len(problems)} problems:{listed}", hint=hint
    )
