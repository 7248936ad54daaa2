"""From an adapter's tensors to changes of a model's tensors, each adapter tensor used once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pleexport.checkpoint.adapters.adapter import Adapter, AdapterTensor
from pleexport.checkpoint.adapters.config import AS_SAVED, MERGE_ELSEWHERE
from pleexport.checkpoint.adapters.merging import (
    Resized,
    Stored,
    Values,
    WithAddend,
    WithProduct,
    WithRows,
)
from pleexport.checkpoint.adapters.names import Role, key_of
from pleexport.errors import CheckpointError, PleexportError, UnsupportedError
from pleexport.model import Model

# "base" and "saved" are whole tensors, see `names.Role`; the others change what is there.
Kind = Literal["base", "saved", "product", "rows"]
Tensors = dict[tuple[Role, str], AdapterTensor]


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of a model.

    Attributes:
        key: of the tensor.
        names: of the adapter's tensors, for errors.
        apply: what the tensor holds afterwards, of what it held, and the checkpoint's dtype.
    """

    key: str
    kind: Kind
    names: tuple[str, ...]
    apply: Callable[[Values, str], Values]

    @property
    def is_whole(self) -> bool:
        """Whether it replaces the tensor."""
        return self.kind in ("base", "saved")


@dataclass(frozen=True)
class Unread:
    """Tensors of an adapter that change nothing that is exported.

    Attributes:
        first: the name of one.
        reason: why nothing reads them.
    """

    first: str
    count: int
    reason: str


def changes_of(adapter: Adapter, model: Model) -> tuple[list[Change], list[Unread]]:
    """What an adapter changes in a model: whole tensors first, then what is added to them.

    Raises:
        CheckpointError: tensors that belong to nothing or do not fit.
        UnsupportedError: tensors that cannot be merged.
    """
    keys = _keys(model)
    changes: list[Change] = []
    unread: dict[str, list[str]] = {}
    for module, tensors in adapter.modules.items():
        stem = key_of(module)
        names = [tensor.name.full for tensor in tensors.values()]
        if part := _left_out(model, stem, {leaf for _, leaf in tensors}):
            unread.setdefault(part, []).extend(names)
            continue
        for (_, leaf), tensor in tensors.items():
            if f"{stem}.{leaf}" not in keys:
                raise _belongs_to_nothing(adapter, tensor.name.full, f"{stem}.{leaf}")
        by_token = keys.get(f"{stem}.weight", False)
        changes += _whole(adapter, stem, tensors, by_token=by_token)
        changes += _product(adapter, module, stem, tensors, by_token=by_token)
        changes += _rows(adapter, module, stem, tensors)
    order: Mapping[Kind, int] = {"base": 0, "saved": 1, "product": 2, "rows": 2}
    left = [Unread(names[0], len(names), reason) for reason, names in unread.items()]
    return sorted(changes, key=lambda change: order[change.kind]), left


def _keys(model: Model) -> dict[str, bool]:
    """Of each tensor that can be changed, whether it has a row for each token id."""
    keys = {w.name: w.precision == "head" for w in model.weights if w.constant is None}
    return keys | {key: True for table in model.tables for key in table.keys}


def _left_out(model: Model, stem: str, leaves: set[str]) -> str | None:
    """Why nothing that is exported reads a module's tensors; None where something does."""
    if part := model.ignored_part(f"{stem}."):
        return f"they are of the {part}, which is left out"
    heads = {weight.name for weight in model.weights}
    reasons = [
        model.unused[f"{stem}.{leaf}"].reason
        for leaf in leaves
        if f"{stem}.{leaf}" in model.unused and f"{stem}.{leaf}" not in heads
    ]
    return reasons[0] if len(reasons) == len(leaves) else None


def _whole(adapter: Adapter, stem: str, tensors: Tensors, *, by_token: bool) -> Iterator[Change]:
    for (role, leaf), tensor in tensors.items():
        if role not in ("base", "saved"):
            continue
        if role == "saved" and adapter.weight != 1.0:
            raise UnsupportedError(
                f"`{adapter.folder}` saves `{tensor.name.full}` whole, which a weight of "
                f"{adapter.weight:g} has no meaning for",
                hint="leave the weight out",
            )
        kind: Kind = "base" if role == "base" else "saved"
        yield Change(
            f"{stem}.{leaf}", kind, (tensor.name.full,), _replaced(adapter, tensor, by_token)
        )


def _replaced(
    adapter: Adapter, tensor: AdapterTensor, by_token: bool
) -> Callable[[Values, str], Values]:
    def apply(values: Values, dtype: str) -> Values:
        # A vocabulary may have changed; no other size may.
        fixed = 1 if by_token and len(tensor.shape) == 2 else 0
        if tensor.shape[fixed:] != values.shape[fixed:]:
            raise _does_not_fit(adapter, tensor, values.shape)
        return Stored(tensor.file, tensor.name.full, dtype=dtype)

    return apply


def _product(
    adapter: Adapter, module: str, stem: str, tensors: Tensors, *, by_token: bool
) -> Iterator[Change]:
    """LoRA's two matrices, `[R, K]` and `[V, R]`; those of a lookup are `[R, V]` and `[K, R]`."""
    given = {
        role: t for (role, leaf), t in tensors.items() if role in _OF_PRODUCT and leaf != "bias"
    }
    if not given:
        return
    of_lookup = "A of lookup" in given or "B of lookup" in given
    a = given.get("A of lookup" if of_lookup else "A")
    b = given.get("B of lookup" if of_lookup else "B")
    magnitude = given.get("magnitude")
    if a is None or b is None or len(given) != 2 + (magnitude is not None):
        alone = next(iter(given.values())).name.full
        raise CheckpointError(
            f"`{adapter.folder}` has `{alone}` and not both matrices of that product, A and B",
            hint=AS_SAVED,
        )
    if adapter.config.dora != (magnitude is not None):
        raise CheckpointError(
            f"`{adapter.folder}`: `use_dora` is {str(adapter.config.dora).lower()}, and `{module}` "
            f"has {'a' if magnitude else 'no'} magnitude vector",
            hint=AS_SAVED,
        )
    rank = adapter.config.rank_of(module)
    for tensor, axis in ((a, 0), (b, 1)):
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            raise CheckpointError(
                f"`{adapter.folder}`: `{tensor.name.full}` has shape {list(tensor.shape)}, and "
                f"adapter_config.json gives it rank {rank}",
                hint=f"{AS_SAVED}; shards of DeepSpeed or FSDP have to be gathered first",
            )
    scale = adapter.weight * adapter.config.scale_of(module)
    key, names = f"{stem}.weight", tuple(tensor.name.full for tensor in given.values())

    def apply(values: Values, dtype: str) -> Values:
        left, right = (a.array().T, b.array().T) if of_lookup else (b.array(), a.array())
        fitted = values
        if by_token and len(values.shape) == 2 and len(left) != values.shape[0]:
            fitted = Resized(values, len(left), dtype=dtype)
        made = (len(left), right.shape[1])
        if fitted.shape != made:
            raise CheckpointError(
                f"`{adapter.folder}`: `{a.name.full}` and `{b.name.full}` make {list(made)}, which "
                f"does not fit {list(values.shape)} of the base",
                hint=_OTHER_BASE,
            )
        norms = None
        if magnitude is not None:
            norms = magnitude.vector()
            count = right.shape[1] if of_lookup else len(left)
            if norms.shape != (count,):
                raise _does_not_fit(adapter, magnitude, (count,))
            norms = norms.reshape(1, -1) if of_lookup else norms.reshape(-1, 1)
        # PEFT rounds what it adds to a lookup, unless norms follow.
        rounded = dtype if of_lookup and norms is None else "fp32"
        return WithProduct(fitted, left, right, scale=scale, delta_dtype=rounded, magnitude=norms)

    yield Change(key, "product", names, apply)
    bias = tensors.get(("B", "bias"))
    if bias is not None:

        def add(values: Values, _dtype: str) -> Values:
            if bias.shape != values.shape:
                raise _does_not_fit(adapter, bias, values.shape)
            return WithAddend(values, bias.vector() * scale)

        yield Change(f"{stem}.bias", "product", (bias.name.full,), add)


_OTHER_BASE = "pass the base that the adapter was trained on, of the same size"
_OF_PRODUCT = ("A", "B", "A of lookup", "B of lookup", "magnitude")


def _rows(adapter: Adapter, module: str, stem: str, tensors: Tensors) -> Iterator[Change]:
    """Rows of trained tokens."""
    tensor = tensors.get(("tokens", "weight"))
    if tensor is None:
        return
    indices = adapter.config.token_indices
    ids = next((found for end, found in indices.items() if end and module.endswith(end)), None)
    ids = ids or indices.get("") or next(iter(indices.values()), [])
    if adapter.weight != 1.0:
        raise UnsupportedError(
            f"`{adapter.folder}` saves rows of tokens (`{tensor.name.full}`), which a weight of "
            f"{adapter.weight:g} has no meaning for",
            hint="leave the weight out",
        )
    if len(tensor.shape) != 2 or tensor.shape[0] != len(ids) or len(set(ids)) != len(ids):
        raise CheckpointError(
            f"`{adapter.folder}`: `{tensor.name.full}` has shape {list(tensor.shape)}, and "
            f"adapter_config.json names {len(set(ids))} tokens for it",
            hint=AS_SAVED,
        )

    def apply(values: Values, dtype: str) -> Values:
        if tensor.shape[1:] != values.shape[1:]:
            raise _does_not_fit(adapter, tensor, values.shape)
        rows = max(values.shape[0], max(ids) + 1)
        fitted = values if rows == values.shape[0] else Resized(values, rows, dtype=dtype)
        return WithRows(fitted, ids, tensor.array(), dtype=dtype)

    yield Change(f"{stem}.weight", "rows", (tensor.name.full,), apply)


def _belongs_to_nothing(adapter: Adapter, name: str, key: str) -> PleexportError:
    if key.endswith(".bias"):
        return CheckpointError(
            f"`{adapter.folder}`: `{name}` changes `{key}`, and the base has no such bias",
            hint="pass the base that the adapter was trained on",
        )
    return UnsupportedError(
        f"`{adapter.folder}`: tensor `{name}` belongs to nothing in the base model; there is no "
        f"`{key}`",
        hint=f"pass the base that the adapter was trained on; if it is, {MERGE_ELSEWHERE}",
    )


def _does_not_fit(
    adapter: Adapter, tensor: AdapterTensor, shape: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"`{adapter.folder}`: tensor `{tensor.name.full}` has shape {list(tensor.shape)}, which "
        f"does not fit {list(shape)} of the base",
        hint=_OTHER_BASE,
    )
