"""Opening a bundle: what a manifest may say, and what belongs together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resealed import change_manifest, fit_manifest

import pleexport
from pleexport.errors import BundleError

SAMPLE = Path(__file__).parents[1] / "samples" / "gemma4-kjv"


def changed(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle with another manifest."""
    copy = Path(shutil.copytree(bundle, folder / "copy"))
    change_manifest(copy, change)
    return copy


def decoder(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["graphs"]["decoder"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=1), "has schema 1; this version reads 2"),
        (lambda m: m.update(schema=3), "has schema 3; this version reads 2"),
        (lambda m: m.pop("schema"), "has schema None; this version reads 2"),
        (lambda m: m.update(more=1), "unknown field `more`"),
        (lambda m: m.pop("context"), "missing required field `context`"),
        (lambda m: m.update(context=0), "is malformed"),
        (lambda m: m["graphs"].pop("decoder"), "has no graph `decoder`"),
        (lambda m: decoder(m).update(backend="tflite"), "of backend `tflite`; this version knows"),
        (
            lambda m: decoder(m)["contract"].update(id="pleexport.decoder/9"),
            "follows the graph contract `pleexport.decoder/9`",
        ),
        (lambda m: decoder(m).update(files=["other.onnx"]), "does not list `other.onnx`"),
        (lambda m: m["files"][0].update(name="../x"), "points outside the bundle"),
        (lambda m: m.update(eos_token_ids=[1 << 62]), "`$.eos_token_ids[0]`"),
        (
            lambda m: m.update(files=[f for f in m["files"] if f["name"] != "model.onnx"]),
            "does not list `model.onnx`",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_in_one_sentence(
    change: Callable[[dict[str, Any]], object],
    message: str,
    gemma4_bundle: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(BundleError) as caught:
        pleexport.Bundle(changed(gemma4_bundle, tmp_path, change))
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_manifest_that_is_only_written_anew_is_read(gemma4_bundle: Path, tmp_path: Path) -> None:
    copy = changed(gemma4_bundle, tmp_path, lambda manifest: None)
    assert pleexport.Runner(copy).logits([1]).shape == (1, 120)


def test_the_blob_of_another_bundle_is_refused(gemma4_bundle: Path, tmp_path: Path) -> None:
    other = changed(gemma4_bundle, tmp_path, lambda m: m.update(tables_digest="xxh3-128:0"))
    with pytest.raises(BundleError, match="is the blob of another bundle"):
        pleexport.Runner(other)


def test_a_graph_of_another_bundle_is_refused(
    gemma4_bundle: Path, gemma3n_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(gemma4_bundle, tmp_path / "copy"))
    shutil.copy(gemma3n_bundle / "model.onnx", copy / "model.onnx")
    shutil.copy(gemma3n_bundle / "model.onnx.data", copy / "model.onnx.data")
    fit_manifest(copy)
    with pytest.raises(BundleError, match="and the manifest disagree about"):
        pleexport.Runner(copy)


def test_a_tokenizer_that_the_manifest_does_not_list_is_not_used(
    gemma4_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(gemma4_bundle, tmp_path / "copy"))
    shutil.copy(SAMPLE / "tokenizer.json", copy / "tokenizer.json")
    assert pleexport.Runner(copy).tokenizer is None
    listed = {"name": "tokenizer.json", "size": (copy / "tokenizer.json").stat().st_size}
    (tmp_path / "more").mkdir()
    other = changed(
        copy, tmp_path / "more", lambda m: m["files"].append(listed | {"sha256": "0" * 64})
    )
    assert pleexport.Runner(other).tokenizer is not None


def test_a_graph_with_a_name_that_is_no_text_is_refused(
    gemma4_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(gemma4_bundle, tmp_path / "bundle"))
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"sequence_length", b"\xffequence_length"))
    with pytest.raises(BundleError, match=r"model\.onnx` has a name that is no text: "):
        pleexport.Runner(folder, verify=False)
