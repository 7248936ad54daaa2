"""Open a bundle, the folder that ships: read its manifest, check its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from pleexport.backends.registry import NAMES, load
from pleexport.checksums import (
    CHECKSUMS,
    CHUNK_BYTES,
    Checksums,
    check_bytes,
    check_files,
    read_checksums,
    sha256_and_checksums,
)
from pleexport.contract import Artifact
from pleexport.dtypes import CacheDtype
from pleexport.errors import BundleError, CheckFailed
from pleexport.runtime.blob import Blob
from pleexport.runtime.chat_format import ChatFormat
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.tied import TiedRows
from pleexport.runtime.tokenizer import tokenizer_files
from pleexport.tied_layout import TIED
from pleexport.whole_file import read_whole

SCHEMA = 2
DECODER = "decoder"
MANIFEST = "manifest.json"
BLOB = "embeddings.safetensors"
PARITY = "parity.json"


# Some checkpoints have -1 for none.
TokenId = Annotated[int, msgspec.Meta(gt=-(1 << 31), lt=1 << 31)]


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


class AdapterRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter that was merged: its folder's name, how much of it, and what it held."""

    name: str
    weight: float
    digest: str


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the checkpoint; size in bytes."""

    name: str
    size: int
    digest: str


class Source(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What a bundle was built from.

    Attributes:
        repository: its name on the Hugging Face hub; None where it was not fetched from there.
        commit: of the repository.
        files: the config and the weights; those of the base where adapters were merged.
    """

    repository: str | None = None
    commit: str | None = None
    files: list[SourceFile]


class Manifest(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """`manifest.json`. A reader that meets an unknown schema or field stops.

    Attributes:
        context: largest number of positions the bundle was built for.
        graphs: by role; `decoder` computes logits.
        weight_dtype, head_dtype, block_size, symmetric, trained_grid, per_channel: how dense
            weights are stored; see `WeightRequest`.
        weight_dtypes, table_dtypes: of matrices and tables that a budget stored otherwise, by name.
        max_bytes: how large the bundle was allowed to be; None where that was not said.
        cache_dtype: of keys and values in layers that see the whole context.
        activation_rounding: whether inputs and outputs of matrices are rounded where the original
            rounds them; true where it rounds none.
        calibration_tokens: length of the text that weights were rounded for; 0 for none.
        generation: how the checkpoint wants texts generated; None where it says nothing.
        chat_format: the chat template as data; None where there is no template, or it cannot be
            told so.
        no_chat_format: why it cannot, as a clause.
        spin: whether threads spin while they wait, unless a runner is told otherwise.
        source: the checkpoint that it was built from.
        adapters: in the order in which they were merged.
        tables_digest: of the checkpoint's tables; the blob has it too.
        blob_shards: names of the blob's files where it lies in several.
        versions: of the tools that wrote the bundle.
    """

    schema: int
    family: str
    graphs: dict[str, Artifact]
    context: Annotated[int, msgspec.Meta(ge=1)]
    eos_token_ids: list[TokenId]
    generation: GenerationConfig | None = None
    chat_format: ChatFormat | None = None
    no_chat_format: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    table_dtype: str
    weight_dtype: str
    table_dtypes: dict[str, str] = {}
    weight_dtypes: dict[str, str] = {}
    max_bytes: int | None = None
    head_dtype: str
    block_size: int
    symmetric: bool
    trained_grid: bool = False
    per_channel: bool = False
    cache_dtype: CacheDtype
    activation_rounding: bool = True
    calibration_tokens: int
    target: str
    spin: bool = True
    source: Source | None = None
    adapters: list[AdapterRecord] = []
    tables_digest: str
    blob_shards: list[str] = []
    versions: dict[str, str]
    parity: ParitySummary
    files: list[FileRecord]

    @property
    def blob_files(self) -> list[str]:
        """Names of the blob's files."""
        return self.blob_shards or [BLOB]

    @property
    def model_files(self) -> list[str]:
        """Names of the files of blob and graphs, without which there is no model."""
        return [*self.blob_files, *(n for graph in self.graphs.values() for n in graph.files)]


class Bundle:
    """A bundle on disk; opening reads the manifest and checks that the files have their sizes.

    Args:
        path: its folder.
        unsealed: the manifest of a bundle that is being built and has none in its folder yet.
        verify: compare with its checksums what is read, now and when weights are loaded.
    Attributes:
        checksums: of its files; None where nothing is compared.
    Raises:
        BundleError: no bundle, another schema, a malformed manifest, or a missing file.
        CheckFailed: the manifest is damaged, a file has another size than it says, or a small one
            does not match its checksum.
    """

    def __init__(
        self, path: str | Path, *, unsealed: Manifest | None = None, verify: bool = True
    ) -> None:
        self.path = Path(path)
        self.checksums: Checksums | None = None
        if unsealed:
            self.manifest = unsealed
        elif verify and (self.path / CHECKSUMS).exists():
            self.checksums = read_checksums(self.path)
            self.manifest = read_manifest(self.path, self.checksums)
            _check_names(self.path, self.manifest, self.checksums)
        else:
            self.manifest = read_manifest(self.path)
            if verify:
                self.checksums = read_checksums(self.path)  # says that there are none
        for record in self.manifest.files:
            file = self.path / record.name
            if not file.is_file():
                raise BundleError(
                    f"`{self.path}` lacks `{record.name}`, which its manifest lists",
                    hint="the copy is incomplete; copy the bundle again, or rebuild it",
                )
            if file.stat().st_size != record.size:
                raise CheckFailed(
                    f"`{file}` has {file.stat().st_size} bytes; the manifest says {record.size}",
                    hint="copy the bundle again, or rebuild it",
                )
        if self.checksums:
            check_files(self._small_files(), self.checksums)

    def _small_files(self) -> list[Path]:
        """What is small and no part of the model; nothing else would compare most of it."""
        own = set(self.manifest.model_files)
        return [
            self.path / record.name
            for record in self.manifest.files
            if record.name not in own and record.size <= CHUNK_BYTES
        ]

    @property
    def decoder(self) -> Artifact:
        """The graph that computes logits."""
        return self.manifest.graphs[DECODER]

    @property
    def blob_paths(self) -> list[Path]:
        """The blob's files."""
        return [self.path / name for name in self.manifest.blob_files]

    def open_blob(self) -> Blob:
        """The blob, with the table that the decoder's files hold where they hold one.

        Raises:
            BlobError, CheckFailed: a file breaks a rule of docs/blob-format.md.
            BundleError: files of two bundles are mixed.
        """
        if TIED not in self.decoder.files:
            return Blob(self.blob_paths)
        tied = TiedRows(self.path / TIED)
        if tied.weights_digest != self.decoder.weights_digest:
            raise BundleError(
                f"`{tied.path}` is of another bundle: its graph is not that of the manifest",
                hint="files of two bundles may be mixed; copy the bundle again, or rebuild it",
            )
        return Blob(self.blob_paths, tied=tied)

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer's files; what the manifest does not list is none of them."""
        found = tokenizer_files(self.path)
        listed = {record.name for record in self.manifest.files}
        # The manifest of a bundle that is being built lists nothing yet.
        return {name: path for name, path in found.items() if name in listed or not listed}

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
            self.compare(record, *sha256_and_checksums(self.path / record.name, progress))

    def compare(self, record: FileRecord, digest: str, found: list[str]) -> None:
        """Compare what was computed of a file's content with what the bundle says of it.

        Args:
            digest: its SHA-256.
            found: its checksums.
        Raises:
            CheckFailed: they differ.
        """
        checksums = self.checksums or read_checksums(self.path)
        if digest != record.sha256 or found != checksums.files.get(record.name):
            where = "the manifest" if digest != record.sha256 else f"`{CHECKSUMS}`"
            raise CheckFailed(
                f"`{self.path / record.name}` does not match its digest in {where}",
                hint="copy the bundle again, or rebuild it",
            )


def read_manifest(path: Path, checksums: Checksums | None = None) -> Manifest:
    """The manifest of a bundle's folder, checked.

    Raises:
        BundleError: there is none, or not one that this version reads.
        CheckFailed: it does not match its checksum.
    """
    manifest_path = path / MANIFEST
    try:
        raw = read_whole(manifest_path)
    except OSError as err:
        raise BundleError(
            f"`{path}` is not a bundle: `{MANIFEST}` cannot be read ({err.strerror})",
            hint="`pleexport build CHECKPOINT --target NAME` writes a bundle",
        ) from err
    if checksums:
        check_bytes(raw, manifest_path, checksums)
    try:
        schema = msgspec.json.decode(raw, type=dict[str, object]).get("schema")
        if schema != SCHEMA:
            raise BundleError(
                f"`{manifest_path}` has schema {schema!r}; this version reads {SCHEMA}",
                hint="install the version of pleexport that wrote the bundle, or rebuild it",
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise BundleError(
            f"`{manifest_path}` is malformed: {err}",
            hint="copy the bundle again, or rebuild it",
        ) from err
    _check_manifest(manifest, manifest_path)
    return manifest


def _check_manifest(manifest: Manifest, path: Path) -> None:
    listed = {record.name for record in manifest.files}
    for name in listed:
        if Path(name).name != name:
            raise BundleError(
                f"`{path}` points outside the bundle: `{name}`", hint="do not use this bundle"
            )
    if DECODER not in manifest.graphs:
        raise BundleError(
            f"`{path}` has no graph `{DECODER}`", hint="rebuild the bundle; nothing else runs it"
        )
    for role, graph in manifest.graphs.items():
        if graph.backend not in NAMES:
            raise BundleError(
                f"`{path}` has graph `{role}` of backend `{graph.backend}`; this version knows "
                f"{', '.join(NAMES)}",
                hint="install the version of pleexport that wrote the bundle",
            )
        known = load(graph.backend).conventions.contract_id
        if graph.contract.id != known:
            raise BundleError(
                f"`{path}` follows the graph contract `{graph.contract.id}`; this version knows "
                f"`{known}`",
                hint="install the version of pleexport that wrote the bundle, or rebuild it",
            )
    if manifest.generation and (problem := manifest.generation.out_of_range()):
        raise BundleError(
            f"`{path}` has impossible defaults for generation: {problem}",
            hint="copy the bundle again, or rebuild it",
        )
    if manifest.chat_format and (problem := manifest.chat_format.contradiction()):
        raise BundleError(
            f"`{path}` has an impossible chat format: {problem}",
            hint="copy the bundle again, or rebuild it",
        )
    for name in manifest.model_files:
        if name not in listed:
            raise BundleError(
                f"`{path}` does not list `{name}` among its files", hint="rebuild the bundle"
            )


def _check_names(path: Path, manifest: Manifest, checksums: Checksums) -> None:
    """Refuse checksums of other files than those of the bundle."""
    names = {MANIFEST, *(record.name for record in manifest.files)}
    if other := sorted(names ^ checksums.files.keys()):
        raise CheckFailed(
            f"`{path / CHECKSUMS}` is damaged: it and the manifest disagree about `{other[0]}`",
            hint="copy the bundle again, or rebuild it",
        )
