"""Write a bundle as what a target's store takes, with an index for any other server.

The form is in docs/packaging.md.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from pleexport import targets
from pleexport.checksums import sha256_and_checksums
from pleexport.errors import BundleError, TargetError
from pleexport.export.play_packs import asset_path, fill, module_files, pack_name
from pleexport.export.replacing import check_replaceable
from pleexport.export.sealing import seal
from pleexport.export.shards import shard_names, shard_ranges, write_shard
from pleexport.export.signing import signer
from pleexport.export.starter import (
    DEFAULT_LANGUAGES,
    STARTER,
    choose_rows,
    row_count,
    write_starter,
)
from pleexport.progress import Progress
from pleexport.runtime.bundle import Bundle, Manifest
from pleexport.sizes import size_text
from pleexport.staging import followed, staged_folder
from pleexport.targets import Target
from pleexport.whole_file import read_whole

INDEX, SIGNATURE = "index.json", "index.json.sig"
_ELSEWHERE = "choose another folder with `--out`"


class IndexFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of a package: where it lies below the index, and its name in the bundle's folder."""

    path: str
    name: str
    bytes: int
    sha256: str
    pack: str


class PackageIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`index.json`: what there is to deliver."""

    format: Literal["pleexport-package"] = "pleexport-package"
    version: Literal[1] = 1
    target: str
    bundle: str
    bytes: int
    files: list[IndexFile]


@dataclass(frozen=True)
class Package:
    """A package on disk.

    Attributes:
        path: its folder.
        signed: whether there is a signature of the index.
        notes: what whoever delivers it has to know.
    """

    path: Path
    index: PackageIndex
    signed: bool
    notes: list[str]


def package(
    bundle: str | Path,
    out: str | Path,
    *,
    target: str,
    texts: Sequence[str | Path] = (),
    languages: Sequence[str] = DEFAULT_LANGUAGES,
    sign: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Package:
    """Write a bundle as a package; files that stay as they are get a second name where they can.

    Args:
        bundle: its folder. Every file is compared with its digest.
        out: folder of the package.
        target: a name, or the path of a target file; it says how large a pack may be.
        texts: for the web, files in which tokens are counted: the rows that they use most are what
            a page fetches first.
        languages: for the web without texts, whose words are counted in their place: "en".
        sign: a private key in PEM; none to sign nothing.
        overwrite: replace a package at the same place.
    Raises:
        PleexportError: anything that a user can mend; nothing is left at `out`.
        CheckFailed: the bundle is damaged.
    """
    progress, out = progress or Progress(quiet=True), Path(out)
    profile = targets.load(target)
    if profile.packs is None:
        known = [name for name in targets.names() if targets.load(name).packs]
        raise TargetError(
            f"target `{profile.name}` has no packages; those that have: {', '.join(known)}",
            hint=f"`pleexport targets {target}` says how its bundles are delivered",
        )
    sign_bytes = signer(Path(sign)) if sign else None
    opened = Bundle(bundle)
    most = profile.limits.largest_pack_bytes or sys.maxsize
    _check_sizes(opened, most)
    check = partial(
        check_replaceable,
        followed(out),
        overwrite=overwrite,
        what="package",
        files_of=_files_of_package,
    )
    check()
    with staged_folder(out, error=BundleError, elsewhere=_ELSEWHERE, check=check) as staging:
        files = staging / "files"
        files.mkdir()
        manifest = _write_bundle(opened, files, most, progress)
        notes = _notes(opened, profile)
        if profile.packs.form == "web":
            notes += _write_starter(opened, files, profile, [*map(Path, texts)], languages)
        index = _write_packs(opened, manifest, files, staging, profile, most)
        encoded = msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"
        (staging / INDEX).write_bytes(encoded)
        if sign_bytes:
            (staging / SIGNATURE).write_bytes(sign_bytes(encoded))
    return Package(out, index, sign_bytes is not None, notes + _delivery_notes(index, profile))


def _check_sizes(bundle: Bundle, most: int) -> None:
    """Refuse a file that no pack holds: only rows can be cut."""
    rows = set(bundle.manifest.blob_files)
    _check_fit({r.name: r.size for r in bundle.manifest.files if r.name not in rows}, most)


def _check_fit(sizes: Mapping[str, int], most: int) -> None:
    for name, size in sizes.items():
        if size > most:
            raise TargetError(
                f"`{name}` has {size_text(size)}, and a pack holds {size_text(most)}",
                hint="only rows can be cut; build the bundle again, with smaller dtypes where "
                "that is not enough",
            )


def _write_bundle(bundle: Bundle, folder: Path, most: int, progress: Progress) -> Manifest:
    """Lay the files into a folder, with the blob in shards where it is larger than a pack.

    Returns:
        the manifest of what is there then.
    Raises:
        CheckFailed: a file does not match its digest.
    """
    records = {record.name: record for record in bundle.manifest.files}
    rows = [records[name] for name in bundle.manifest.blob_files]
    is_cut = any(record.size > most for record in rows)
    manifest, row_bytes = bundle.manifest, sum(record.size for record in rows)
    total = bundle.nbytes + (2 * row_bytes if is_cut else 0)
    with progress.bytes("Checking and writing files", total) as update:
        if is_cut:
            for record in rows:
                bundle.compare(record, *sha256_and_checksums(bundle.path / record.name, update))
                del records[record.name]
            names = _write_shards(bundle, folder, most, update)
            manifest = msgspec.structs.replace(manifest, blob_shards=names)
        for name in records:
            _link_or_copy(bundle.path / name, folder / name)
        sealed, checksums = seal(folder, manifest, progress=update)
        for record in sealed.files:
            if record.name in records:
                bundle.compare(records[record.name], record.sha256, checksums.files[record.name])
    return sealed


def _write_shards(
    bundle: Bundle, folder: Path, most: int, progress: Callable[[int], object]
) -> list[str]:
    """Write the blob in shards; their names."""
    blob = bundle.open_blob()
    ranges = shard_ranges(blob, most)
    names = shard_names(len(ranges))
    for name, rows in zip(names, ranges, strict=True):
        write_shard(blob, rows, folder / name, progress)
    return names


def _link_or_copy(file: Path, to: Path) -> None:
    """Give a file a second name, or copy it where the file system does not allow one."""
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)


def _write_packs(
    bundle: Bundle, manifest: Manifest, files: Path, staging: Path, target: Target, most: int
) -> PackageIndex:
    """Move files into the folders of packs; what there is to deliver then."""
    assert target.packs is not None
    digests = {record.name: record.sha256 for record in manifest.files}
    for name in sorted({path.name for path in files.iterdir()} - set(digests)):
        digests[name] = sha256_and_checksums(files / name)[0]
    sizes = {name: (files / name).stat().st_size for name in digests}
    _check_fit(sizes, most)
    name_of_bundle, listed = bundle.path.resolve().name, []
    play = target.packs.form == "play"
    for number, names in enumerate(fill(sizes, most), 1):
        pack = pack_name(name_of_bundle, number)
        for name in names:
            # A page opens the package's folder as it opens a bundle's.
            path = asset_path(pack, name) if play else name
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            (files / name).rename(staging / path)
            listed.append(
                IndexFile(path=path, name=name, bytes=sizes[name], sha256=digests[name], pack=pack)
            )
        if play:
            for path, text in module_files(pack, target.packs.delivery).items():
                (staging / path).write_text(text, encoding="utf-8")
    files.rmdir()
    return PackageIndex(
        target=target.name,
        bundle=name_of_bundle,
        bytes=sum(sizes.values()),
        files=sorted(listed, key=lambda file: file.name),
    )


def _write_starter(
    bundle: Bundle, files: Path, target: Target, texts: Sequence[Path], languages: Sequence[str]
) -> list[str]:
    """Write the rows that texts use most; what whoever delivers them has to know."""
    assert target.packs is not None
    blob = bundle.open_blob()
    count = row_count(blob, share=target.packs.starter_share)
    ids, covered = choose_rows(bundle, blob, count=count, texts=texts, languages=languages)
    write_starter(blob, ids, files / STARTER)
    held = f"note: {STARTER} has {len(ids):,} rows, {len(ids) / blob.num_rows:.1%} of the table"
    if covered is None:
        return [f"{held}, chosen by the words of {', '.join(languages)}"]
    return [f"{held}: those of {covered:.1%} of the tokens of the text"]


def _notes(bundle: Bundle, target: Target) -> list[str]:
    if bundle.manifest.target == target.name:
        return []
    return [f"note: the bundle was built for `{bundle.manifest.target}`"]


def _delivery_notes(index: PackageIndex, target: Target) -> list[str]:
    most = target.limits.largest_delivery_bytes
    if most is None or index.bytes <= most:
        return []
    return [
        f"warning: the package has {size_text(index.bytes)}, and the store delivers at most "
        f"{size_text(most)}: deliver it from a server of your own, by `{INDEX}`"
    ]


def _files_of_package(out: Path) -> set[str]:
    """Paths of what a package consists of.

    Raises:
        BundleError: there is none that this version reads.
    """
    try:
        index = msgspec.json.decode(read_whole(out / INDEX), type=PackageIndex)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise BundleError(f"`{out}` is not a package", hint=_ELSEWHERE) from err
    modules = {path for file in index.files for path in module_files(file.pack, "")}
    return {INDEX, SIGNATURE, *modules, *(file.path for file in index.files)}
