"""Targets: named device profiles, read from `targets/NAME.toml`. A target is data, not code."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, cast, get_args, get_origin

import msgspec

from pleexport.contract import Processor
from pleexport.dtypes import CacheDtype, TableDtype, WeightDtype
from pleexport.errors import TargetError
from pleexport.runtime.blob_layout import MINIMUM_PAGE_SIZE
from pleexport.sizes import size_text
from pleexport.weights import DEFAULT_BLOCK_SIZE, BlockSize
from pleexport.whole_file import read_whole

_HINT = "`pleexport targets android` shows a complete target"
_OWN = "check the path; `pleexport targets` lists those that need no file"
_COLUMNS = 92
# Packages of ONNX Runtime have this in their names. The first to have all operators that graphs
# use has `TensorScatter`.
_ONNX_RUNTIME, _OLDEST_ONNX_RUNTIME = "onnxruntime", (1, 25)

Backend = Literal["onnx", "executorch"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device or a store allows, in bytes; None where there is no such limit.

    Attributes:
        largest_file_bytes: of any file that the platform can use. A build beyond it is refused.
        memory_budget_bytes: for dense weights and cache; rows of the blob do not count, because
            they are mapped and can be dropped at any time. A build beyond it is refused.
        largest_pack_bytes: of one unit of the store's delivery. A larger file can still be cut
            or downloaded in another way, so this is said and not refused.
        largest_delivery_bytes: of everything that the store delivers. Said, not refused.
    """

    largest_file_bytes: Positive | None = None
    memory_budget_bytes: Positive | None = None
    largest_pack_bytes: Positive | None = None
    largest_delivery_bytes: Positive | None = None


class Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a target wants otherwise with one backend; None is as the target says.

    Attributes:
        runtime: packages that execute such a bundle there, with the oldest version to use.
    """

    table_dtype: TableDtype | None = None
    weight_dtype: WeightDtype | None = None
    block_size: BlockSize | None = None
    head_dtype: WeightDtype | None = None
    cache_dtype: CacheDtype | None = None
    runtime: dict[str, str] | None = None


class Packs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How `pleexport package` lays a bundle out.

    Attributes:
        form: `play` for asset packs of Google Play, `web` for files that a page fetches.
        delivery: when Google Play brings packs to a device.
        starter_share: of the table, what a page fetches before all else of it.
    """

    form: Literal["play", "web"]
    delivery: Literal["on-demand", "fast-follow"] = "on-demand"
    starter_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.019


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device profile.

    Attributes:
        name: the file's name without `.toml`, unless the file gives another.
        description: one line.
        backend: what bundles are written for unless the build says otherwise.
        processor: what computes there; a graph for a GPU has other operators.
        page_size: bytes, a power of two; the blob's rows begin at a multiple of it.
        table_dtype: how tables are stored unless the build says otherwise.
        weight_dtype: how dense weights are stored, likewise.
        block_size: how many weights may share a scale, likewise; matters to int8 and int4.
        per_channel: int8 with one scale for each output in place of blocks, unless a build asks
            for a block size.
        head_dtype: how the output head is stored, likewise; None for what goes with weight_dtype.
        cache_dtype: of keys and values in layers that see the whole context, likewise.
        context: positions that a bundle is built for, capped by the model's own maximum.
        opset: version of the ONNX operators.
        spin: whether threads spin while they wait for work, unless a runner is told otherwise.
        runtime: packages that execute a bundle there, with the oldest version to use.
        packaging: what to do with a bundle's files on that platform.
        packs: how a package of a bundle is laid out; None where there are none.
        backends: by backend, what the target wants otherwise.
    """

    name: Name
    description: Text
    backend: Backend
    processor: Processor = "cpu"
    page_size: Annotated[int, msgspec.Meta(ge=MINIMUM_PAGE_SIZE, le=1 << 20)]
    table_dtype: TableDtype
    weight_dtype: WeightDtype
    block_size: BlockSize = DEFAULT_BLOCK_SIZE
    per_channel: bool = False
    head_dtype: WeightDtype | None = None
    cache_dtype: CacheDtype = "fp32"
    context: Positive
    opset: Literal[24]
    spin: bool = True
    runtime: dict[str, str]
    packaging: list[Text]
    packs: Packs | None = None
    limits: Limits = Limits()
    backends: dict[Backend, Overrides] = {}

    def __post_init__(self) -> None:
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"`page_size` is {self.page_size}; expected a power of two")
        for name, version in self.runtime.items():
            if _ONNX_RUNTIME in name and not _is_at_least(version, _OLDEST_ONNX_RUNTIME):
                raise ValueError(
                    f"`{name}` is {version}; graphs of opset {self.opset} need "
                    f"{'.'.join(map(str, _OLDEST_ONNX_RUNTIME))} or newer"
                )

    def with_backend(self, backend: str) -> Target:
        """The target as it is with one backend, its overrides in place."""
        own = next((o for name, o in self.backends.items() if name == backend), Overrides())
        wanted = {n: v for n, v in msgspec.structs.asdict(own).items() if v is not None}
        return msgspec.structs.replace(self, backend=cast(Backend, backend), **wanted)


def _is_at_least(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a version is no older; what is no version is not."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    return found is not None and (int(found[1]), int(found[2])) >= oldest


def load(name_or_path: str) -> Target:
    """The target of that name, or the one in a user's own `.toml` file.

    Raises:
        TargetError: the name is unknown, or the file is missing or malformed.
    """
    if name_or_path.endswith(".toml"):
        return _read(Path(name_or_path))
    known = names()
    if name_or_path not in known:
        near = difflib.get_close_matches(name_or_path, known, n=1, cutoff=0.4)
        raise TargetError(
            f"target `{name_or_path}` is not known; known: {', '.join(known)}"
            + (f" (the nearest name is `{near[0]}`)" if near else ""),
            hint="choose one of them, or pass the path of a target file of your own (.toml)",
        )
    return _read(_folder() / f"{name_or_path}.toml")


def names() -> list[str]:
    """The targets that come with the package, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def exceeded(target: Target, *, resident_bytes: int, sizes: Mapping[str, int]) -> list[str]:
    """Why a bundle cannot work on a target: one phrase a limit, with the numbers.

    Args:
        resident_bytes: dense weights and cache.
        sizes: bytes by file name.
    """
    limits, problems = target.limits, []
    for name, size in sizes.items():
        if limits.largest_file_bytes is not None and size > limits.largest_file_bytes:
            problems.append(
                f"`{name}` has {size_text(size)}, and the largest file is "
                f"{size_text(limits.largest_file_bytes)}"
            )
    budget = limits.memory_budget_bytes
    if budget is not None and resident_bytes > budget:
        problems.append(
            f"{size_text(resident_bytes)} have to stay in memory, and the budget is "
            f"{size_text(budget)}"
        )
    return problems


def delivery_notes(target: Target, sizes: Mapping[str, int]) -> list[str]:
    """What the store of a target cannot deliver in one piece, with the numbers.

    Args:
        sizes: bytes by file name.
    """
    limits, notes = target.limits, []
    pack, delivery = limits.largest_pack_bytes, limits.largest_delivery_bytes
    for name, size in sizes.items():
        if pack is not None and size > pack:
            notes.append(
                f"`{name}` has {size_text(size)}: the store takes it in {-(-size // pack)} parts "
                f"of at most {size_text(pack)}"
            )
    total = sum(sizes.values())
    if delivery is not None and total > delivery:
        notes.append(
            f"the bundle has {size_text(total)}, and the store delivers at most "
            f"{size_text(delivery)}: choose smaller dtypes, or a server of your own"
        )
    return notes


def _folder() -> Path:
    """Where the target files are: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    packaged = package / "targets_data"
    return packaged if packaged.is_dir() else package.parent / "targets"


def _read(path: Path) -> Target:
    try:
        values = tomllib.loads(read_whole(path).decode())
    except FileNotFoundError as err:
        raise TargetError(f"target file `{path}` does not exist", hint=_OWN) from err
    except OSError as err:
        raise TargetError(
            f"target file `{path}` cannot be read: {err.strerror}",
            hint="check the file and its permissions",
        ) from err
    except (ValueError, RecursionError) as err:
        raise TargetError(f"target file `{path}` is not valid TOML: {err}", hint=_HINT) from err
    try:
        return msgspec.convert({"name": path.stem, **values}, Target)
    except msgspec.ValidationError as err:
        raise TargetError(f"target file `{path}`: {_located(str(err))}", hint=_HINT) from err


def _located(message: str) -> str:
    """msgspec's message with the field in front: "field `page_size`: expected ..."."""
    what, _, where = message.partition(" - at `$.")
    field = where.removesuffix("`")
    what = re.sub(r"^Object contains unknown", "unknown", what)
    what = re.sub(r"^Object missing required field (`\w+`)", r"field \1 is missing", what)
    what = re.sub(r"^Invalid enum value '?(.+?)'?$", r"got `\1`", what)
    choices = [f.type for f in msgspec.structs.fields(Target) if f.name == field]
    if choices and get_origin(choices[0]) is Literal:
        what += f", expected one of {', '.join(map(str, get_args(choices[0])))}"
    return f"field `{field}`: {what[0].lower()}{what[1:]}" if field else what
