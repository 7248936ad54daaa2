"""A checkpoint with adapters merged into it: the same names, and tensors that are merged when read.

Several adapters are merged in the order given, each into what the one before made, as repeated
`merge_and_unload` does. For plain LoRA that is the sum of their weighted products, as
`add_weighted_adapter(combination_type="cat")` gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pleexport.checkpoint.adapters.adapter import Adapter
from pleexport.checkpoint.adapters.changes import Change, changes_of
from pleexport.checkpoint.adapters.merging import (
    MergedTensor,
    Resized,
    Stored,
    Values,
    same_values,
)
from pleexport.checkpoint.beside import ADAPTER_BESIDE
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.model import Model, Rows
from pleexport.safetensors_file import TensorEntry

# What a config calls the rows of a table, by the table's tensor.
_ROWS_IN_CONFIG = {
    "embed_tokens.weight": "vocab_size",
    "embed_tokens_per_layer.weight": "vocab_size_per_layer_input",
}


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are those of its base, with adapters merged.

    Attributes:
        base: the checkpoint that they are merged into.
        adapters: in the order in which they are merged.
        merged: by name, the tensors that they change.
        changed_repeatedly: whether something is added to one of these more than once.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        merged: Mapping[str, MergedTensor],
        *,
        name: str,
        config: dict[str, Any],
        left_out: set[str],
        changed_repeatedly: bool,
        notes: Sequence[str],
    ) -> None:
        self.path, self.folder, self.config = base.path, base.folder, config
        self.files, self._name, self.repository = base.files, name, base.repository
        self.base, self.adapters, self.merged = base, list(adapters), dict(merged)
        named = ", ".join(f"`{a.name}`" + _share(a.weight) for a in adapters)
        changed = f"{named} merged into `{base.name}`: {len(merged)} tensors change"
        beside = any(a.folder.resolve() == base.folder.resolve() for a in adapters)
        of_base = [n for n in base.notes if not (beside and n.startswith(ADAPTER_BESIDE))]
        self.notes = [*of_base, changed, *notes]
        self.read_by_transformers = False
        self._left_out = left_out
        self.changed_repeatedly = changed_repeatedly

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """See `Checkpoint`."""
        own = {n: e for n, e in self.base.entries.items() if n not in self._left_out}
        return own | {name: tensor.entry for name, tensor in self.merged.items()}

    def array(self, name: str) -> NDArray[Any]:
        """See `Checkpoint`; what is merged is copied into memory as a whole."""
        return self.part(name, slice(None)) if name in self.merged else self.base.array(name)

    def part(self, name: str, rows: Rows, columns: slice = slice(None)) -> NDArray[Any]:
        """See `Checkpoint`."""
        if name in self.merged:
            return self.merged[name].part(rows, columns)
        return self.base.part(name, rows, columns)


def merge_adapters(
    base: MatchedModel, adapters: Sequence[Adapter], *, name: str
) -> AdaptedCheckpoint:
    """The checkpoint of a model, with adapters merged.

    Args:
        name: what a bundle is called after.
    Raises:
        UnsupportedError: the model is none that adapters are merged into.
        CheckpointError: a tensor of an adapter does not fit.
    """
    checkpoint = base.checkpoint
    _refuse_base(checkpoint, base.model)
    base.check_tied_head()
    merge = _Merge(base)
    for adapter in adapters:
        merge.add(adapter)
    return AdaptedCheckpoint(
        checkpoint,
        adapters,
        merge.tensors(),
        name=name,
        config=merge.config(),
        left_out=merge.left_out,
        changed_repeatedly=any(count > 1 for count in merge.additions.values()),
        notes=merge.notes,
    )


def adapters_of(checkpoint: Checkpoint) -> list[Adapter]:
    """The adapters that a checkpoint has merged into it."""
    return checkpoint.adapters if isinstance(checkpoint, AdaptedCheckpoint) else []


def _share(weight: float) -> str:
    return "" if weight == 1.0 else f" times {weight:g}"


def _refuse_base(checkpoint: Checkpoint, model: Model) -> None:
    if model.transformers is None:
        raise UnsupportedError(
            f"`{checkpoint.path}` is of the family `{model.family}`, which transformers does not "
            "load, so that PEFT's adapters are none of it",
            hint="merge the adapter with the tool that it was trained with, and build the result",
        )
    if model.is_quantized:
        raise UnsupportedError(
            f"`{checkpoint.path}` holds codes, and an adapter cannot be merged into them",
            hint="pass the full-precision checkpoint of the same model as the base",
        )


class _Merge:
    """The tensors of a model while adapters change them, one after the other.

    Attributes:
        tied: whether the head still is the input embedding.
        left_out: names of the base that the merged checkpoint does not have.
        additions: by key, how often something was added to a tensor.
    """

    def __init__(self, base: MatchedModel) -> None:
        self._base, self._model = base, base.model
        self._dtype = base.checkpoint.dtype
        self._values: dict[str, Values] = {}
        self._whole: set[str] = set()
        self._head, self._embedding = self._model.head.name, self._model.tables[0].keys[0]
        self.tied = self._model.head.key is not None
        # A copy of a tied head is read by nobody, and would contradict what is merged.
        self.left_out = {base.full_name(self._head)} if self.tied else set()
        self.additions: Counter[str] = Counter()
        self.notes: list[str] = []

    def add(self, adapter: Adapter) -> None:
        """Let an adapter change the tensors.

        Raises:
            CheckpointError: a tensor of it fits nothing, or has another shape.
        """
        changes, unread = changes_of(adapter, self._model)
        of_tied = [c for c in changes if c.key in (self._embedding, self._head)]
        if self.tied and {c.kind for c in of_tied} >= {"product", "rows"}:
            raise UnsupportedError(
                f"`{adapter.folder}` has both LoRA and trained tokens for a head that is tied to "
                "the input embedding; peft itself loses the first when it merges them",
                hint="train it again with `modules_to_save=['embed_tokens', 'lm_head']` in place "
                "of either",
            )
        before = dict(self._values)
        for change in (c for c in changes if c.is_whole):
            if change.kind == "saved" and change in of_tied and self.tied:
                self._untie(adapter)
            self._apply(adapter, change, before)
        # Tables and head get their rows before anything is added to them, as in a resized model.
        parts = [change for change in changes if not change.is_whole]
        first = {self._embedding, self._head} if self.tied else {self._embedding}
        for change in sorted(parts, key=lambda c: (c.key not in first, c.key == self._head)):
            if change.key not in first:
                self._fit_rows()
            self._apply(adapter, change, before)
        self._fit_rows()
        if self.tied and any(not change.is_whole for change in of_tied):
            self.notes.append(
                f"the head is tied to the input embedding: what `{adapter.name}` changes in one "
                "is changed in both, as peft's `merge_and_unload` does"
            )
        self.notes += [
            f"{left.count} tensors of the adapter `{adapter.name}` change nothing, "
            f"`{left.first}` first: {left.reason}"
            for left in unread
        ]

    def _fit_rows(self) -> None:
        """Give tables and head as many rows as the input embedding has by now.

        Raises:
            CheckpointError: an adapter gave the head another number.
        """
        rows = self._now(self._embedding).shape[0]
        if not self.tied:
            head_rows = self._now(self._head).shape[0]
            if rows != head_rows and self._is_given(self._head):
                if self._is_given(self._embedding):
                    raise CheckpointError(
                        f"the adapters leave the head with {head_rows} rows and the input "
                        f"embedding with {rows}",
                        hint="save both: `modules_to_save=['embed_tokens', 'lm_head']`",
                    )
                rows = head_rows
            self._resize(self._embedding, rows, "the input embedding")
            self._resize(self._head, rows, "the output head")
        if rows != self._model.vocab_size:
            for table in self._model.tables[1:]:
                if table.keys[0] not in self._whole:
                    self._resize(table.keys[0], rows, f"`{table.name}`")

    def _is_given(self, key: str) -> bool:
        """Whether an adapter says how many rows a tensor has."""
        return key in self._whole or self._now(key).shape != self._of_base(key).shape

    def config(self) -> dict[str, Any]:
        """The base's config, with the sizes and the tying that adapters changed."""
        config = dict(self._base.checkpoint.config)
        nested = isinstance(config.get("text_config"), dict)
        text = dict(config["text_config"]) if nested else config
        for key, name in _ROWS_IN_CONFIG.items():
            if key in self._values:
                text[name] = self._values[key].shape[0]
        if self._model.head.key is not None and not self.tied:
            text["tie_word_embeddings"] = config["tie_word_embeddings"] = False
        return config | {"text_config": text} if nested else config

    def tensors(self) -> dict[str, MergedTensor]:
        """By name, what is merged."""
        named = {self._name(key): values for key, values in self._values.items()}
        return {name: MergedTensor(name, v, self._dtype) for name, v in named.items()}

    def _apply(self, adapter: Adapter, change: Change, before: Mapping[str, Values]) -> None:
        """Let one change have its effect.

        Args:
            before: what earlier adapters have changed.
        """
        key = self._embedding if self.tied and change.key == self._head else change.key
        now = self._now(key)
        changed = change.apply(now, self._dtype)
        if change.is_whole:
            if key in self._values and self._is_no_change(change, changed, key):
                return
            if key in before or (key in self._whole and change.kind == "base"):
                raise CheckpointError(
                    f"`{adapter.folder}` saves `{change.names[0]}` whole, but that tensor has been "
                    "changed already",
                    hint="leave one of the adapters out, or merge them where they were trained",
                )
            self._whole.add(key)
        else:
            self.additions[key] += 1
        self._values[key] = changed

    def _is_no_change(self, change: Change, changed: Values, key: str) -> bool:
        """Whether a whole tensor is what is there, or a copy of what the base has."""
        if same_values(changed, self._now(key)):
            return True
        return change.kind == "base" and same_values(changed, self._of_base(key))

    def _untie(self, adapter: Adapter) -> None:
        self._values[self._head] = self._now(self._embedding)
        self.tied, self.left_out = False, set()
        self.notes.append(
            f"`{adapter.name}` saves the head or the input embedding whole, so they are no longer "
            "tied"
        )

    def _resize(self, key: str, rows: int, what: str) -> None:
        now = self._now(key)
        if now.shape[0] == rows:
            return
        self._values[key] = Resized(now, rows, dtype=self._dtype)
        if rows > now.shape[0]:
            self.notes.append(
                f"the vocabulary has {rows:,} ids, and no adapter brings rows of {what} for those "
                f"from {now.shape[0]:,} on: they get the mean of all others, as "
                "`resize_token_embeddings` of transformers gives it"
            )

    def _now(self, key: str) -> Values:
        return self._values.get(key) or self._of_base(key)

    def _of_base(self, key: str) -> Values:
        checkpoint, tied = self._base.checkpoint, self._model.head.key is not None
        source = self._embedding if tied and key == self._head else key
        return Stored(checkpoint, self._base.full_name(source), dtype=self._dtype)

    def _name(self, key: str) -> str:
        """The name in the merged checkpoint; an untied head stands beside the text model."""
        name = self._base.full_name(key)
        if name in self._base.checkpoint.entries:
            return name
        return [self._base.prefix, *self._model.text_prefixes[self._base.prefix]][-1] + key


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint's tokenizer is: the last adapter's that brings one, else the weights'."""
    for adapter in reversed(adapters_of(checkpoint)):
        if (adapter.folder / "tokenizer.json").is_file():
            return adapter.folder
    return checkpoint.folder
