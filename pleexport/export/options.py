"""What a build may be told, and what follows from that and its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast, get_args

from pleexport import targets
from pleexport.backends import registry
from pleexport.checkpoint.adapters.adapter import AdapterChoice
from pleexport.dtypes import (
    CACHE_DTYPES,
    QUANTIZED,
    TABLE_DTYPES,
    WEIGHT_DTYPES,
    CacheDtype,
    TableDtype,
    WeightDtype,
)
from pleexport.errors import TargetError
from pleexport.model import Table
from pleexport.sizes import parse_size
from pleexport.targets import Target
from pleexport.weights import BlockSize, WeightRequest

# What a budget may choose dtypes for, unless they were asked for.
PARTS = frozenset({"tables", "weights", "head"})


class BuildOptions(TypedDict, total=False):
    """Options of `build`; None is the same as leaving one out.

    Attributes:
        target: name of a target, or path of a target file; "laptop" by default.
        backend: "onnx" or "executorch"; the target's by default.
        table_dtype: "source" (bit-exact), "fp32", "fp16", "bf16", "int8" or "int4"; the target's
            by default, and "source" for a quantized checkpoint.
        weight_dtype: "source" (the codes of a quantized checkpoint), "fp32", "fp16", "int8" or
            "int4"; the target's by default, and "source" for a quantized checkpoint. What was
            trained for a grid of 4 bits is stored on it by default, tables likewise.
        block_size: how many weights may share a scale in int8 and int4: 16, 32, 64, 128 or 256;
            the target's by default. If given, no trained grid is followed, and matrices have blocks
            where the target would have one scale for each output.
        symmetric: one zero point for all blocks, the default; otherwise each has its own, which is
            closer to the original and takes half a byte or a byte a block.
        head_dtype: of the output head, like weight_dtype; the target's by default.
        cache_dtype: "fp32", "fp16" or "int8", how keys and values are held at run time in layers
            that see the whole context, or "none" where they can be looked up again; the target's
            by default.
        activation_rounding: round inputs and outputs of matrices where a checkpoint has scales for
            it, as the original does, the default; otherwise leave them as they are.
        context: largest number of positions; the target's by default, the model's at most.
        max_bytes: how large the bundle may be, as a number or like "2.2GB"; dtypes that are not
            asked for are then chosen for the least predicted divergence. What the target's store
            delivers by default, within which nothing becomes wider than the target says.
        calibrate: a text file like those that the model will meet; int8 and int4 weights are then
            rounded for the least error on it, and dtypes chosen for the least divergence.
        tokenizer: a tokenizer.json, a vocabulary of RWKV's World tokenizer, or a folder with
            either; what lies beside the weights by default.
        adapters: folders of adapters that are merged into the checkpoint, in this order; "DIR:0.5"
            or a pair of folder and number takes half of what one changes.
        base: of an adapter that is built by its own folder; what its config names by default.
        revision: a branch, tag or commit of the Hugging Face hub; the main branch by default.
        token: for the hub; the one that is logged in by default.
        offline: take what was fetched of the hub before, and ask nobody.
        overwrite: replace a bundle at the same place; False by default.
        verify: compare with the PyTorch original, the default; a bundle that fails is not kept.
    """

    target: str | None
    backend: str | None
    table_dtype: str | None
    weight_dtype: str | None
    block_size: int | None
    symmetric: bool | None
    head_dtype: str | None
    cache_dtype: str | None
    activation_rounding: bool | None
    context: int | None
    max_bytes: int | str | None
    calibrate: str | Path | None
    tokenizer: str | Path | None
    adapters: Sequence[AdapterChoice] | None
    base: str | Path | None
    revision: str | None
    token: str | None
    offline: bool | None
    overwrite: bool | None
    verify: bool | None


@dataclass(frozen=True)
class Settings:
    """What a bundle is to be: a target, and what a build says otherwise.

    Attributes:
        activation_rounding: whether the graph rounds activations where the original does.
        context: positions asked for; None for the target's, as far as the model goes.
        max_bytes: what was asked for; None for what the target's store delivers.
        open: of `PARTS`, those whose dtypes a budget may choose.
        table_dtypes: of tables that are stored otherwise, by name.
        trained_grid: tables that were trained for a grid of 4 bits are stored on it.
    """

    target: Target
    backend: str
    table_dtype: TableDtype
    weights: WeightRequest
    cache_dtype: CacheDtype
    context: int | None
    activation_rounding: bool = True
    max_bytes: int | None = None
    open: frozenset[str] = PARTS
    table_dtypes: Mapping[str, TableDtype] = field(default_factory=dict)
    trained_grid: bool = True

    def dtype_of_table(self, table: Table) -> TableDtype:
        """What one table is stored as."""
        asked = self.table_dtypes.get(table.name, self.table_dtype)
        return "int4" if self.trained_grid and table.on_grid and asked in QUANTIZED else asked


def of_target(target: Target, *, quantized: bool) -> Settings:
    """What a target asks for, with its own backend.

    Args:
        quantized: the checkpoint holds codes, and nothing is rounded a second time.
    """
    target = target.with_backend(target.backend)
    per_channel = target.per_channel
    asked = WeightRequest(
        target.weight_dtype,
        target.block_size,
        head_dtype=target.head_dtype,
        per_channel=per_channel,
    )
    return Settings(
        target=target,
        backend=target.backend,
        table_dtype="source" if quantized else target.table_dtype,
        weights=WeightRequest("source", per_channel=per_channel) if quantized else asked,
        cache_dtype=target.cache_dtype,
        context=None,
    )


def resolve(options: BuildOptions, *, quantized: bool = False) -> Settings:
    """What a build's options and its target ask for together.

    Args:
        quantized: the checkpoint holds codes, and nothing is rounded a second time unless asked.
    Raises:
        TargetError: an option has a value that is not known.
    """
    named = targets.load(options.get("target") or "laptop")

    def chosen(name: str, default: object, allowed: Sequence[object]) -> object:
        value = options.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise TargetError(
                f"{name.replace('_', ' ')} `{value}` is not known; choose one of "
                f"{', '.join(map(str, allowed))}",
                hint="`pleexport build --help` says what each means",
            )
        return value

    target = named.with_backend(cast(str, chosen("backend", named.backend, registry.NAMES)))
    default = of_target(target, quantized=quantized)
    symmetric = options.get("symmetric")
    max_bytes = options.get("max_bytes")
    return Settings(
        target=target,
        backend=target.backend,
        table_dtype=cast(TableDtype, chosen("table_dtype", default.table_dtype, TABLE_DTYPES)),
        weights=WeightRequest(
            cast(WeightDtype, chosen("weight_dtype", default.weights.dtype, WEIGHT_DTYPES)),
            cast(BlockSize, chosen("block_size", default.weights.block_size, get_args(BlockSize))),
            True if symmetric is None else symmetric,
            cast(
                WeightDtype | None,
                chosen("head_dtype", default.weights.head_dtype, WEIGHT_DTYPES),
            ),
            trained_grid=options.get("block_size") is None
            and options.get("weight_dtype") in (None, "int4"),
            per_channel=target.per_channel and options.get("block_size") is None,
        ),
        cache_dtype=cast(CacheDtype, chosen("cache_dtype", target.cache_dtype, CACHE_DTYPES)),
        context=options.get("context"),
        activation_rounding=options.get("activation_rounding") is not False,
        max_bytes=None if max_bytes is None else _size(max_bytes),
        open=PARTS - _asked_for(options),
        trained_grid=options.get("table_dtype") in (None, "int4"),
    )


def _asked_for(options: BuildOptions) -> set[str]:
    """The parts whose dtypes are settled; the head goes with the weights."""
    asked = {"tables": options.get("table_dtype"), "weights": options.get("weight_dtype")}
    asked["head"] = options.get("head_dtype") or options.get("weight_dtype")
    return {part for part, dtype in asked.items() if dtype is not None}


def _size(given: int | str) -> int:
    """Bytes, of a number or of a text such as "2.2GB".

    Raises:
        TargetError: it is neither, or not above zero.
    """
    try:
        nbytes = given if isinstance(given, int) else parse_size(given)
    except ValueError:
        nbytes = 0
    if nbytes < 1:
        raise TargetError(
            f"max bytes `{given}` is no size; expected a number of bytes, kB, MB or GB",
            hint="write it like `--max-bytes 2.2GB`",
        )
    return nbytes
