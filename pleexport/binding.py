"""Match a model's tensors to a checkpoint's, and say everything that does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint import Checkpoint
from pleexport.errors import CheckpointError
from pleexport.families.base import Model, Table, Weight
from pleexport.safetensors_file import DTYPES, TensorEntry

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
_MAX_PROBLEMS_SHOWN = 20
_ROWS_COMPARED = 4096


@dataclass(frozen=True)
class LeftOut:
    """A part of the checkpoint that is not converted: a tower of a multimodal model."""

    name: str
    tensors: int
    parameters: int
    nbytes: int


class Binding:
    """A model whose tensors were all found in a checkpoint.

    Raises:
        CheckpointError: tensors are missing, have the wrong shape or dtype, or are used by nothing;
            all of them are named at once, with the nearest known name.
    """

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.prefix = _text_prefix(model, checkpoint)
        self.left_out, self.ignored = self._check()

    def entry(self, item: Table | Weight) -> TensorEntry:
        """The checkpoint's tensor behind a table or a weight that is not a constant."""
        key = item.key if isinstance(item, Table) else item.source_key
        return self.checkpoint.entries[self._full_name(key)]

    @property
    def dtype(self) -> str:
        """The dtype of the tensors that `rows` gives, e.g. "BF16"."""
        return self.checkpoint.dtype

    def rows(self, item: Table | Weight, rows: NDArray[np.int64] | slice) -> NDArray[np.generic]:
        """Rows of a table or weight, in the checkpoint's dtype; a slice is not copied.

        A tensor that is stored in another dtype than the config names is rounded to the config's,
        as the original does when it loads it.
        """
        view: NDArray[np.generic] = self.checkpoint.array(self.entry(item).name)[rows]
        return view.astype(DTYPES[self.dtype], copy=False)

    def check_tied_head(self) -> None:
        """Refuse a head that the config ties and the files contradict; reads both.

        Raises:
            CheckpointError: the file's own head differs from what it is tied to.
        """
        for weight in self.model.weights:
            own = self._full_name(weight.name)
            if weight.key is None or own not in self.checkpoint.entries:
                continue
            mine, tied = self.checkpoint.array(own), self.checkpoint.array(self.entry(weight).name)
            for begin in range(0, len(mine), _ROWS_COMPARED):
                rows = slice(begin, begin + _ROWS_COMPARED)
                if not np.array_equal(mine[rows], tied[rows]):
                    raise CheckpointError(
                        f"`{self.checkpoint.path}` ties its head to `{weight.key}`, but holds a "
                        f"different `{own}`",
                        hint="set `tie_word_embeddings` to false in config.json, or remove the "
                        "tensor",
                    )

    def _full_name(self, key: str) -> str:
        for name in _candidates(self.prefix, key):
            if name in self.checkpoint.entries:
                return name
        return self.prefix + key

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for table in self.model.tables:
            yield self._full_name(table.key), (table.rows, table.row_width)
        for weight in self.model.weights:
            if weight.constant is None:
                yield self._full_name(weight.source_key), weight.shape

    def _check(self) -> tuple[list[LeftOut], list[str]]:
        entries, expected = self.checkpoint.entries, dict(self._expected())
        problems = []
        unused = {self._full_name(key) for key in self.model.unused}
        towers: dict[str, list[TensorEntry]] = {}
        unknown = []
        for name, entry in entries.items():
            if name in expected or name in unused:
                continue
            tower = _tower(self.model, name)
            if tower is None:
                unknown.append(name)
            else:
                towers.setdefault(tower, []).append(entry)
        missing = [name for name in expected if name not in entries]
        for name in missing:
            problems.append(f"tensor `{name}` is missing{_nearest(name, unknown)}")
        for name in unknown:
            problems.append(f"tensor `{name}` is used by nothing{_nearest(name, missing)}")
        for name, shape in expected.items():
            if name in entries and entries[name].shape != shape:
                problems.append(
                    f"tensor `{name}` has shape {list(entries[name].shape)}; "
                    f"the config asks for {list(shape)}"
                )
            elif name in entries and entries[name].dtype not in FLOAT_DTYPES:
                problems.append(
                    f"tensor `{name}` has dtype {entries[name].dtype}; "
                    f"expected one of {', '.join(FLOAT_DTYPES)}"
                )
        if problems:
            raise _everything(self.checkpoint, problems)
        left_out = [
            LeftOut(name, len(es), sum(e.size for e in es), sum(e.nbytes for e in es))
            for name, es in towers.items()
        ]
        return left_out, sorted(name for name in unused if name in entries)


def _text_prefix(model: Model, checkpoint: Checkpoint) -> str:
    key = model.tables[0].key
    for prefix in model.text_prefixes:
        if prefix + key in checkpoint.entries:
            return prefix
    if not checkpoint.entries:
        raise CheckpointError(
            f"`{checkpoint.path}` holds no safetensors files",
            hint="`pleexport inspect` works without weights; a build needs them",
        )
    near = _nearest(model.text_prefixes[0] + key, list(checkpoint.entries))
    raise CheckpointError(
        f"`{checkpoint.path}` has no tensor `{key}` under any of the known prefixes "
        f"{', '.join(repr(p) for p in model.text_prefixes)}{near}"
    )


def _candidates(prefix: str, key: str) -> tuple[str, ...]:
    """Names that a key may have; a head lies beside the text model, not inside it."""
    return prefix + key, prefix.removesuffix("model.") + key, key


def _tower(model: Model, name: str) -> str | None:
    parts = name.removeprefix("model.").split(".")
    return model.ignored_prefixes.get(parts[0])


def _nearest(name: str, candidates: list[str]) -> str:
    """A hint at the candidate that looks most alike, the layer number counting in full."""
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.85)
    return f" (the nearest name is `{matches[0]}`)" if matches else ""


def _everything(checkpoint: Checkpoint, problems: list[str]) -> CheckpointError:
    shown = problems[:_MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    if len(shown) == 1:
        return CheckpointError(f"`{checkpoint.path}`: {shown[0]}")
    listed = "".join(f"\n  - {problem}" for problem in shown)
    return CheckpointError(
        f"`{checkpoint.path}` does not fit its config, {len(problems)} problems:{listed}"
    )
