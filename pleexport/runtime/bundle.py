"""The bundle: the folder that ships, and its manifest."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec

from pleexport.contract import CONTRACT, GraphContract
from pleexport.errors import BundleError, CheckFailed
from pleexport.model import CacheDtype
from pleexport.parallel import map_in_order

SCHEMA = 1
MANIFEST = "manifest.json"
GRAPH = "model.onnx"
GRAPH_DATA = "model.onnx.data"
BLOB = "embeddings.safetensors"
PARITY = "parity.json"
_READ_BYTES = 1 << 20


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle; size in bytes."""

    name: str
    size: int
    sha256: str


class ParitySummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outcome of the parity check that the build ran; details are in parity.json.

    Attributes:
        checked: False when the build was told to skip it.
        passed: the verdict, None when it was not checked.
        max_logit_error: largest absolute difference, divided by the range of the logits.
    """

    checked: bool
    passed: bool | None = None
    max_logit_error: float | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`manifest.json`. A reader that meets an unknown schema or field stops.

    Attributes:
        context: largest number of positions the bundle was built for.
        weight_dtype, head_dtype, block_size, symmetric: how dense weights are stored; see
            `WeightFormat`.
        cache_dtype: of keys and values in layers that see the whole context.
        calibration_tokens: length of the text that weights were rounded for; 0 for none.
        source_digest: digests of the source tables and of the stored weights.
        versions: of the tools that wrote the bundle.
    """

    schema: int
    family: str
    backend: str
    contract: GraphContract
    context: Annotated[int, msgspec.Meta(ge=1)]
    eos_token_ids: list[int]
    table_dtype: str
    weight_dtype: str
    head_dtype: str
    block_size: int
    symmetric: bool
    cache_dtype: CacheDtype
    calibration_tokens: int
    target: str
    source_digest: dict[str, str]
    versions: dict[str, str]
    parity: ParitySummary
    files: list[FileRecord]


class Bundle:
    """A bundle on disk; opening reads the manifest and checks that the files have their sizes.

    Raises:
        BundleError: no bundle, a newer schema, a malformed manifest, or a missing file.
        CheckFailed: a file has another size than the manifest says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        for record in self.manifest.files:
            file = self.path / record.name
            if not file.is_file():
                raise BundleError(f"`{self.path}` lacks `{record.name}`, which its manifest lists")
            if file.stat().st_size != record.size:
                raise CheckFailed(
                    f"`{file}` has {file.stat().st_size} bytes; the manifest says {record.size}",
                    hint="the copy is incomplete; copy the bundle again, or rebuild it",
                )

    @property
    def graph_path(self) -> Path:
        """The dense graph."""
        return self.path / GRAPH

    @property
    def blob_path(self) -> Path:
        """The blob."""
        return self.path / BLOB

    @property
    def nbytes(self) -> int:
        """Size of all files, the manifest left out."""
        return sum(record.size for record in self.manifest.files)

    def verify_files(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Compare every file with its digest.

        Raises:
            CheckFailed: names the first file that differs.
        """
        for record in self.manifest.files:
            if _sha256(self.path / record.name, progress) != record.sha256:
                raise CheckFailed(
                    f"`{self.path / record.name}` does not match its digest in the manifest",
                    hint="copy the bundle again, or rebuild it",
                )


def _read_manifest(path: Path) -> Manifest:
    manifest_path = path / MANIFEST
    try:
        raw = manifest_path.read_bytes()
    except OSError as err:
        raise BundleError(
            f"`{path}` is not a bundle: `{MANIFEST}` cannot be read ({err.strerror})",
            hint="`pleexport build CHECKPOINT --target NAME` writes a bundle",
        ) from err
    try:
        schema = msgspec.json.decode(raw, type=dict[str, object]).get("schema")
        if schema != SCHEMA:
            raise BundleError(
                f"`{manifest_path}` has schema {schema!r}; this version reads {SCHEMA}",
                hint="install the version of pleexport that wrote the bundle, or rebuild it",
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise BundleError(f"`{manifest_path}` is malformed: {err}") from err
    if manifest.contract.id != CONTRACT:
        raise BundleError(
            f"`{manifest_path}` follows the graph contract `{manifest.contract.id}`; "
            f"this version knows `{CONTRACT}`"
        )
    for record in manifest.files:
        if Path(record.name).name != record.name:
            raise BundleError(f"`{manifest_path}` points outside the bundle: `{record.name}`")
    for name in (GRAPH, GRAPH_DATA, BLOB):
        if all(record.name != name for record in manifest.files):
            raise BundleError(f"`{manifest_path}` does not list `{name}`")
    return manifest


@contextmanager
def staging_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A sibling of `out` that is renamed to it on success and removed on any failure.

    Raises:
        BundleError: `out` exists and may not be replaced.
    """
    out = out.resolve()  # a link to a bundle stays a link, and `.` has a name
    if out == Path.cwd():
        raise BundleError(
            "the current folder cannot be replaced by a bundle",
            hint="go one up, or choose another folder with `--out`",
        )
    _check_replaceable(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as err:
        raise BundleError(
            f"`{out.parent}` is no folder that can be written to: {err.strerror}",
            hint="choose another folder with `--out`",
        ) from err
    try:
        yield staging
        staging.chmod(0o755)
        _check_replaceable(out, overwrite)  # again: a build takes its time
        if out.exists():
            retired = staging.with_name(staging.name + "-old")
            out.rename(retired)
            try:
                staging.rename(out)
            except BaseException:
                retired.rename(out)
                raise
            shutil.rmtree(retired)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with the record of every file of the folder, as the last file."""
    paths = sorted(folder.iterdir())
    digests = map_in_order(lambda path: _sha256(path, lambda _: None), paths)
    records = [
        FileRecord(path.name, path.stat().st_size, digest)
        for path, digest in zip(paths, digests, strict=True)
    ]
    encoded = msgspec.json.encode(msgspec.structs.replace(manifest, files=records))
    (folder / MANIFEST).write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an empty folder or, when told to, a bundle."""
    if not out.exists() or (out.is_dir() and not os.listdir(out)):
        return
    try:
        manifest = _read_manifest(out)
    except BundleError as err:
        raise BundleError(
            f"`{out}` exists and is not a bundle",
            hint="choose another folder with `--out`; nothing was changed",
        ) from err
    if not overwrite:
        raise BundleError(
            f"`{out}` holds a bundle already",
            hint="pass `--overwrite` to replace it, or choose another folder with `--out`",
        )
    foreign = sorted(set(os.listdir(out)) - {record.name for record in manifest.files} - {MANIFEST})
    if foreign:
        raise BundleError(
            f"`{out}` holds a bundle and other things, `{foreign[0]}` first",
            hint="move them away, or choose another folder with `--out`; nothing was changed",
        )


def _sha256(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
            progress(len(part))
    return digest.hexdigest()
