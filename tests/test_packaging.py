"""Packages: packs that together are the bundle, their index, and its signature."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_blob_format_doc import documents_decoder

import pleexport
from pleexport import targets
from pleexport.errors import BundleError, CheckFailed, InputError, TargetError
from pleexport.export import packaging
from pleexport.export.packaging import Package, PackageIndex, package
from pleexport.show.package import describe_package, package_fields

EMBFORMER = Path(__file__).parents[1] / "conformance" / "embformer-bf16"
# Bytes of a pack: its blob is cut in four, and its weights lie in others.
MOST = 80_000
IDS = [1, 5, 9, 2, 250, 0, 199, 200, 7]


def target_file(folder: Path, **limits: int) -> str:
    """Android with other limits."""
    text = (Path(__file__).parents[1] / "targets" / "android.toml").read_text()
    begin, end = text.index("[limits]"), text.index("[backends")
    lines = "".join(f"{name} = {value}\n" for name, value in limits.items())
    comment = text.rindex("\n\n", begin, end)
    path = folder / "phone.toml"
    path.write_text(text[:begin] + "[limits]\n" + lines + text[comment:])
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> str:
    return target_file(tmp_path, largest_pack_bytes=MOST)


def join(made: Package, folder: Path) -> Path:
    """All files of all packs in one folder, as docs/packaging.md says."""
    folder.mkdir()
    for file in made.index.files:
        os.link(made.path / file.path, folder / file.name)
    return folder


def logits(bundle: Path) -> bytes:
    return pleexport.Runner(bundle, threads=1).logits(IDS).tobytes()


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_packs_together_are_the_bundle_with_its_rows_in_shards(
    small: str, tmp_path: Path
) -> None:
    made = package(EMBFORMER, tmp_path / "package", target=small)
    bundle = pleexport.Bundle(join(made, tmp_path / "joined"))
    names = bundle.manifest.blob_shards
    assert names == [f"embeddings-{i}-of-3.safetensors" for i in (1, 2, 3)]
    assert pleexport.verify(bundle.path) is None
    assert logits(bundle.path) == logits(EMBFORMER)
    # Nothing else has changed.
    whole = pleexport.Bundle(EMBFORMER).manifest
    same = msgspec.structs.replace(bundle.manifest, blob_shards=[], files=whole.files)
    assert same == whole
    for record in whole.files:
        if record.name != "embeddings.safetensors":
            assert record in bundle.manifest.files
    # Rows are those of the one file, and for a reader that is not ours too.
    decode, blob = documents_decoder(), pleexport.Bundle(EMBFORMER).open_blob()
    expected = blob.lookup(blob.row_ids(IDS))
    for i, token_id in enumerate(IDS):
        found = decode(bundle.blob_paths, token_id)
        for table, vectors in expected.items():
            own = [v for name, v in found.items() if name.split(".")[0] == table]
            assert np.stack(own).tobytes() == vectors[i].tobytes()
    with pytest.raises(IndexError):
        decode(bundle.blob_paths, blob.num_rows)


def test_weights_lie_in_packs_as_they_are(many_files_bundle: Path, tmp_path: Path) -> None:
    target = target_file(tmp_path, largest_pack_bytes=100_000)
    made = package(many_files_bundle, tmp_path / "package", target=target)
    assert len({file.pack for file in made.index.files}) == 3
    joined = join(made, tmp_path / "joined")
    assert pleexport.Bundle(joined).manifest == pleexport.Bundle(many_files_bundle).manifest
    ids = list(range(30))
    found = pleexport.Runner(joined, threads=1).logits(ids)
    assert np.array_equal(found, pleexport.Runner(many_files_bundle, threads=1).logits(ids))
    for file in made.index.files:
        if file.name not in ("manifest.json", "checksums.json"):
            assert (many_files_bundle / file.name).samefile(made.path / file.path)


def test_packs_are_modules_within_the_limit(small: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(EMBFORMER, tmp_path / "1st-Bundle é"))
    made = package(source, tmp_path / "package", target=small)
    packs = sorted((tmp_path / "package" / "packs").iterdir())
    assert [pack.name for pack in packs] == [f"bundle_1st_Bundle_{i}" for i in range(1, 5)]
    held = [0] * len(packs)
    for i, pack in enumerate(packs):
        files = files_below(pack)
        gradle = files.pop("build.gradle.kts").decode()
        assert f'packName.set("{pack.name}")' in gradle
        assert 'deliveryType.set("on-demand")' in gradle
        assert all(Path(name).parent.as_posix() == "src/main/assets" for name in files)
        held[i] = sum(map(len, files.values()))
    assert max(held) <= MOST
    assert sum(held) == made.index.bytes
    # Two packs that could be one are none.
    assert min(a + b for i, a in enumerate(held) for b in held[:i]) > MOST


def test_the_index_names_every_file_and_is_the_same_again(small: str, tmp_path: Path) -> None:
    out = tmp_path / "package"
    made = package(EMBFORMER, out, target=small)
    raw = (out / "index.json").read_bytes()
    index = json.loads(raw)
    assert list(index) == ["format", "version", "target", "bundle", "bytes", "files"]
    assert (index["format"], index["version"]) == ("pleexport-package", 1)
    assert (index["target"], index["bundle"]) == ("phone", "embformer-bf16")
    names = [file["name"] for file in index["files"]]
    assert names == sorted(set(names))
    assert {"manifest.json", "checksums.json", "embeddings-2-of-3.safetensors"} <= set(names)
    assert index["bytes"] == sum(file["bytes"] for file in index["files"])
    for file in index["files"]:
        assert list(file) == ["path", "name", "bytes", "sha256", "pack"]
        assert file["path"] == f"packs/{file['pack']}/src/main/assets/{file['name']}"
        content = (out / file["path"]).read_bytes()
        assert len(content) == file["bytes"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    others = set(files_below(out)) - {file["path"] for file in index["files"]}
    gradle = {f"packs/{file['pack']}/build.gradle.kts" for file in index["files"]}
    assert others == {"index.json", *gradle}

    again = package(EMBFORMER, tmp_path / "again", target=small)
    assert files_below(tmp_path / "again") == files_below(out)
    assert again.index == made.index
    assert msgspec.json.decode(raw, type=PackageIndex) == made.index


def test_a_package_of_a_package_is_the_same_bundle(small: str, tmp_path: Path) -> None:
    first = join(package(EMBFORMER, tmp_path / "a", target=small), tmp_path / "first")
    larger = target_file(tmp_path, largest_pack_bytes=10 * MOST)
    second = join(package(first, tmp_path / "b", target=larger), tmp_path / "second")
    assert files_below(second) == files_below(first)  # shards that fit stay
    smaller = target_file(tmp_path, largest_pack_bytes=54_000)
    third = join(package(first, tmp_path / "c", target=smaller), tmp_path / "third")
    assert len(pleexport.Bundle(third).manifest.blob_shards) > 3
    assert logits(third) == logits(EMBFORMER)


def test_where_files_cannot_have_two_names_they_are_copied(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = package(EMBFORMER, tmp_path / "linked", target=small)
    graph = next(file.path for file in linked.index.files if file.name == "model.onnx")
    assert (tmp_path / "linked" / graph).samefile(EMBFORMER / "model.onnx")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(packaging.os, "link", refuse)
    package(EMBFORMER, tmp_path / "copied", target=small)
    assert not (tmp_path / "copied" / graph).samefile(EMBFORMER / "model.onnx")
    assert files_below(tmp_path / "copied") == files_below(tmp_path / "linked")


@pytest.mark.parametrize(
    ("name", "place"),
    [("embeddings.safetensors", 70_000), ("model.onnx.data", 999), ("manifest.json", 99)],
)
def test_a_damaged_bundle_is_refused_and_nothing_is_left(
    name: str, place: int, small: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(EMBFORMER, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[place] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CheckFailed, match=rf"{name}` (is damaged|does not match its digest)"):
        package(copy, tmp_path / "package", target=small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "phone.toml"]


def test_what_no_pack_can_hold_is_refused(tmp_path: Path) -> None:
    for most, told in (
        (50_000, "`model.onnx.data` has 50.32 kB, and a pack holds 50.00 kB"),
        (10_000, "`model.onnx` has 17.92 kB, and a pack holds 10.00 kB"),
    ):
        with pytest.raises(TargetError) as caught:
            package(
                EMBFORMER,
                tmp_path / "package",
                target=target_file(tmp_path, largest_pack_bytes=most),
            )
        assert told in caught.value.message
    assert not (tmp_path / "package").exists()


def test_more_than_the_store_delivers_is_for_a_server_of_ones_own(tmp_path: Path) -> None:
    limits = {"largest_pack_bytes": MOST, "largest_delivery_bytes": 100_000}
    made = package(EMBFORMER, tmp_path / "package", target=target_file(tmp_path, **limits))
    built_for, too_large = made.notes
    assert built_for == "note: the bundle was built for `laptop`"
    size = f"{made.index.bytes / 1000:.2f} kB"
    assert too_large == (
        f"warning: the package has {size}, and the store delivers at most 100.00 kB: deliver it "
        "from a server of your own, by `index.json`"
    )
    told = describe_package(made)
    assert too_large in told
    assert "Nothing is signed" in told


def test_a_target_without_packs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        package(EMBFORMER, tmp_path / "package", target="laptop")
    having = [name for name in targets.names() if targets.load(name).packs]
    assert "android" in having
    assert caught.value.message == (
        f"target `laptop` has no packages; those that have: {', '.join(having)}"
    )


def test_only_packages_are_replaced(small: str, tmp_path: Path) -> None:
    out = tmp_path / "package"
    first = package(EMBFORMER, out, target=small)
    with pytest.raises(BundleError, match="holds a package already"):
        package(EMBFORMER, out, target=small)
    again = package(EMBFORMER, out, target=small, overwrite=True)
    assert again.index == first.index
    (out / "packs" / "mine").mkdir()
    with pytest.raises(BundleError, match="a package and other things, `packs/mine` first"):
        package(EMBFORMER, out, target=small, overwrite=True)
    bundle = Path(shutil.copytree(EMBFORMER, tmp_path / "bundle"))
    with pytest.raises(BundleError, match="exists and is not a package that this version reads"):
        package(EMBFORMER, bundle, target=small, overwrite=True)
    assert files_below(bundle) == files_below(EMBFORMER)


# The signature. OpenSSL's command line is the witness.


def openssl(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def new_key(path: Path, *arguments: str) -> Path:
    made = openssl("genpkey", "-out", path, *arguments)
    assert made.returncode == 0, made.stderr
    return path


P256 = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def test_openssl_confirms_the_signature_of_the_index(small: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    # As docs/packaging.md makes it.
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    made = openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    assert made.returncode == 0, made.stderr
    assert openssl("ec", "-in", key, "-pubout", "-out", public).returncode == 0
    out = tmp_path / "package"
    assert package(EMBFORMER, out, target=small, sign=key).signed
    index, signature = out / "index.json", out / "index.json.sig"
    check = ("dgst", "-sha256", "-verify", public, "-signature", signature, index)
    assert openssl(*check).stdout == "Verified OK\n"
    index.write_bytes(index.read_bytes().replace(b"model.onnx", b"model.onny", 1))
    assert openssl(*check).returncode == 1


def test_other_keys_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    locked = new_key(tmp_path / "locked.pem", *P256, "-aes256", "-pass", "pass:secret")
    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")
    public = tmp_path / "public.pem"
    openssl("pkey", "-in", new_key(tmp_path / "k.pem", *P256), "-pubout", "-out", public)
    for key, told in (
        (tmp_path / "none.pem", "none.pem` cannot be read: No such file or directory"),
        (locked, "locked.pem` is locked with a password, which is not asked for"),
        (new_key(tmp_path / "p384.pem", *curve), "is not one of the curve P-256 for ECDSA"),
        (new_key(tmp_path / "ed.pem", "-algorithm", "ED25519"), "is not one of the curve P-256"),
        (public, "public.pem` is no private key in PEM"),
        (EMBFORMER / "manifest.json", "manifest.json` is no private key in PEM"),
    ):
        with pytest.raises(InputError) as caught:
            package(EMBFORMER, tmp_path / "package", target="android", sign=key)
        assert told in caught.value.message
    assert not (tmp_path / "package").exists()


def test_without_the_extra_signing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(pleexport.PleexportError, match="signing needs cryptography") as caught:
        package(EMBFORMER, tmp_path / "package", target="android", sign=tmp_path / "key.pem")
    assert caught.value.hint == "pip install 'pleexport[sign]'"


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pleexport", "package", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_line_packages(small: str, tmp_path: Path) -> None:
    done = command(EMBFORMER, "--target", small, "--out", tmp_path / "package", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    index = json.loads((tmp_path / "package" / "index.json").read_bytes())
    assert told["files"] == index["files"]
    assert (told["signed"], told["package"]) == (False, str(tmp_path / "package"))

    copy = Path(shutil.copytree(EMBFORMER, tmp_path / "copy"))
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    done = command(copy, "--target", small, "--out", tmp_path / "other")
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not match its digest" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_fields_of_the_index_are_those_of_the_page(small: str, tmp_path: Path) -> None:
    made = package(EMBFORMER, tmp_path / "package", target=small)
    page = (Path(__file__).parents[1] / "docs" / "packaging.md").read_text(encoding="utf-8")
    section = page[page.index("## The index") : page.index("## The signature")]
    for name in (*PackageIndex.__struct_fields__, *packaging.IndexFile.__struct_fields__):
        assert f"| `{name}` |" in section
    assert package_fields(made).keys() - {"package", "signed", "notes"} == {
        *PackageIndex.__struct_fields__
    }
