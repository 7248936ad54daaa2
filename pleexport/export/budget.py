"""Choose the bits of each matrix and table so that a bundle has at most so many bytes.

Tables and the output head are few and large, so all their combinations are tried. The many small
matrices are then narrowed in the order of what a saved byte costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from pleexport.backends.base import Backend, WeightStorage
from pleexport.dtypes import QUANTIZED, TableDtype, WeightDtype, bits
from pleexport.errors import TargetError
from pleexport.export.layout import Layout, kind_of
from pleexport.export.options import Settings
from pleexport.export.sensitivity import Sensitivity
from pleexport.model import Model, Table, Weight
from pleexport.sizes import size_text


@dataclass(frozen=True)
class _Option:
    """One way to store a matrix or a table.

    Attributes:
        nbytes: of a matrix; what tables take is known of all together.
        cost: predicted KL divergence, nats per token.
    """

    dtype: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class _Item:
    """A matrix or a table with its options, the widest first."""

    name: str
    kind: str
    options: tuple[_Option, ...]


@dataclass(frozen=True)
class _Step:
    """One small matrix made narrower.

    Attributes:
        price: what a saved byte costs; no less than in the steps before it of the same matrix.
    """

    item: int
    option: int
    saved: int
    price: float


@dataclass(frozen=True)
class Choice:
    """What a budget led to.

    Attributes:
        settings: with the dtypes chosen.
        costs: by kind of matrix and by table, the predicted KL divergence in nats per token; empty
            where nothing had to be chosen.
        remark: why the budget is not kept; None where it is.
    """

    settings: Settings
    costs: Mapping[str, float]
    remark: str | None = None


def choose(
    model: Model,
    settings: Settings,
    backend: Backend,
    lay: Callable[[Settings], Layout],
    *,
    source: str,
    sensitivity: Sensitivity,
    beside_bytes: int,
) -> Choice:
    """Narrow what may be narrowed, for the least predicted divergence within the budget.

    The budget is `settings.max_bytes`, and else what the target's store delivers. Within the
    second, a bundle that fits is left as the target wants it, and nothing becomes wider.

    Args:
        lay: lays the large files out.
        source: the checkpoint's dtype.
        beside_bytes: of all files but the large ones.
    Raises:
        TargetError: `settings.max_bytes` cannot be kept.
    """
    limit = settings.max_bytes or settings.target.limits.largest_delivery_bytes
    asked = lay(settings)
    if limit is None or (settings.max_bytes is None and asked.nbytes + beside_bytes <= limit):
        return Choice(settings, {})
    room = limit - beside_bytes
    menu = _Menu(model, settings, backend, lay, source)
    least = menu.nbytes({name: dtypes[-1] for name, dtypes in menu.dtypes.items()})
    if least > room:
        kept = "the checkpoint's own codes are not rounded again"
        why = f" ({kept})" if menu.keeps_codes else ""
        if settings.max_bytes is None:
            fewer = f"the least that can be written has {size_text(least + beside_bytes)}{why}"
            return Choice(settings, {}, fewer)
        raise TargetError(
            f"a bundle of at most {size_text(limit)} is asked for, and the least that can be "
            f"written has {size_text(least + beside_bytes)}{why}",
            hint="allow more bytes, or leave out dtypes that you asked for",
        )
    large, small = menu.items(sensitivity)
    picked = _cheapest(large, small, room, menu.nbytes)
    costs: dict[str, float] = {}
    for item in (*large, *small):
        (option,) = (o for o in item.options if o.dtype == picked[item.name])
        costs[item.kind] = costs.get(item.kind, 0.0) + option.cost
    return Choice(menu.with_dtypes(picked), costs)


class _Menu:
    """What each matrix and table may be stored as, and how large a bundle is then.

    Attributes:
        dtypes: by name of a matrix or table, the widest first; one where nothing is left to choose.
        keeps_codes: whether something stays as a quantized checkpoint has it.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        backend: Backend,
        lay: Callable[[Settings], Layout],
        source: str,
    ) -> None:
        self._settings, self._backend, self._lay, self._source = settings, backend, lay, source
        self._matrices = {w.name: w for w in model.weights if w.precision != "full"}
        self._tables = {t.name: t for t in model.tables}
        self.dtypes = {name: self._of_table(table) for name, table in self._tables.items()}
        self.dtypes |= {name: self._of_matrix(weight) for name, weight in self._matrices.items()}
        self.keeps_codes = any(map(settings.weights.keeps_codes, model.weights)) or any(
            table.codes is not None and settings.table_dtype == "source" for table in model.tables
        )

    def with_dtypes(self, picked: Mapping[str, str]) -> Settings:
        """The settings with the dtypes picked, by name."""
        request, default = self._settings.weights, self._settings.table_dtype
        dtypes = {
            name: cast(WeightDtype, picked[name])
            for name, weight in self._matrices.items()
            if picked[name] != request.dtype_of(weight)
        }
        tables = {
            name: cast(TableDtype, picked[name]) for name in self._tables if picked[name] != default
        }
        return replace(self._settings, weights=replace(request, dtypes=dtypes), table_dtypes=tables)

    def nbytes(self, picked: Mapping[str, str]) -> int:
        """Bytes of the large files with the dtypes picked."""
        whole = {name: dtypes[0] for name, dtypes in self.dtypes.items()} | dict(picked)
        return self._lay(self.with_dtypes(whole)).nbytes

    def items(self, sensitivity: Sensitivity) -> tuple[list[_Item], list[_Item]]:
        """Tables and heads, and all other matrices, with what each option costs."""
        block_size = self._settings.weights.block_size
        large: list[_Item] = []
        small: list[_Item] = []
        for name, table in self._tables.items():
            options = [
                _Option(d, 0, sensitivity.table(table, d) if d in QUANTIZED else 0.0)
                for d in self.dtypes[name]
            ]
            large.append(_Item(name, name, tuple(options)))
        for name, weight in self._matrices.items():
            own = self._settings.weights.keeps_codes(weight)
            options = [
                _Option(
                    d,
                    self._stored(weight, d).file_bytes(weight),
                    sensitivity.matrix(weight, d, block_size=block_size)
                    if d in QUANTIZED and not own
                    else 0.0,
                )
                for d in self.dtypes[name]
            ]
            item = _Item(name, kind_of(name), tuple(options))
            (large if weight.precision == "head" else small).append(item)
        return large, small

    def _of_table(self, table: Table) -> list[str]:
        settings = self._settings
        default: str = settings.table_dtype
        if "tables" not in settings.open or (table.codes is not None and default == "source"):
            return [default]
        width = bits(table.source_dtype(self._source) if default == "source" else default)
        return self._wide_to_narrow(default, width, QUANTIZED)

    def _of_matrix(self, weight: Weight) -> list[str]:
        request = self._settings.weights
        default = request.dtype_of(weight)
        part = "head" if weight.precision == "head" else "weights"
        if part not in self._settings.open or request.keeps_codes(weight):
            return [default]
        # Gates and the like keep 8 bits, whatever the budget.
        narrower = ("int8",) if weight.precision == "sensitive" else QUANTIZED
        dtypes = self._wide_to_narrow(default, bits(default), narrower)
        return [d for d in dtypes if d == default or self._stored(weight, d).dtype_of(weight) == d]

    def _stored(self, weight: Weight, dtype: str) -> WeightStorage:
        """How the backend stores a matrix that is asked for in a dtype."""
        dtypes = {weight.name: cast(WeightDtype, dtype)}
        return self._backend.storage(replace(self._settings.weights, dtypes=dtypes))

    def _wide_to_narrow(self, default: str, width: int, others: Sequence[str]) -> list[str]:
        """A default and what else may be chosen; nothing wider unless bytes were asked for."""
        widest = max(width, bits("int8")) if self._settings.max_bytes else width
        found = {default: width} | {d: bits(d) for d in others if bits(d) <= widest}
        return sorted(found, key=lambda dtype: -found[dtype])


def _cheapest(
    large: Sequence[_Item],
    small: Sequence[_Item],
    room: int,
    nbytes: Callable[[Mapping[str, str]], int],
) -> dict[str, str]:
    """By name the dtypes of least cost that have room."""
    steps = sorted(_steps(small), key=lambda step: step.price)
    best: tuple[float, dict[str, str]] | None = None
    for options in itertools.product(*(item.options for item in large)):
        names = (item.name for item in large)
        picked = {name: o.dtype for name, o in zip(names, options, strict=True)}
        places = _narrowed(steps, len(small), nbytes(picked) - room)
        if places is None:
            continue
        chosen = [item.options[place] for item, place in zip(small, places, strict=True)]
        cost = sum(o.cost for o in (*options, *chosen))
        if best is None or cost < best[0]:
            own = {item.name: o.dtype for item, o in zip(small, chosen, strict=True)}
            best = cost, picked | own
    assert best is not None  # all at its narrowest has room
    return best[1]


def _steps(items: Sequence[_Item]) -> Iterator[_Step]:
    """All steps from one option of an item to the next."""
    for i, item in enumerate(items):
        price = 0.0
        for place, (wide, narrow) in enumerate(itertools.pairwise(item.options), 1):
            saved = wide.nbytes - narrow.nbytes
            price = max(price, (narrow.cost - wide.cost) / max(saved, 1))
            yield _Step(i, place, saved, price)


def _narrowed(steps: Sequence[_Step], count: int, excess: int) -> list[int] | None:
    """For each of `count` items the place of its option, so that `excess` bytes are saved.

    None where that cannot be.
    """
    places, taken = [0] * count, []
    for step in steps:
        if excess <= 0:
            break
        if step.option == places[step.item] + 1:
            places[step.item] = step.option
            excess -= step.saved
            taken.append(step)
    if excess > 0:
        return None
    for step in reversed(taken):  # what the last ones saved too much
        if places[step.item] == step.option and excess + step.saved <= 0:
            places[step.item] -= 1
            excess += step.saved
    return places
