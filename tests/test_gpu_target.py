"""Graphs for a GPU: attention in one node, whole caches, no loops. Here a CPU computes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import gemma3n
from conftest import (
    TOLERANCE,
    check_every_way_to_feed,
    gpu_bundle_of,
    original_of,
    relative_error,
)
from family_checkpoints import embformer, lckv, llama_value_embeddings
from resealed import change_checksums, change_manifest, fit_manifest
from rwkv_checkpoints import rwkv

import pleexport
from pleexport.backends.onnx.files import open_graph, session_options
from pleexport.backends.onnx.session import OnnxSession
from pleexport.errors import BundleError, TargetError, UnsupportedError
from pleexport.targets import load

CONFORMANCE = Path(__file__).parents[1] / "conformance"
IDS = [2, *range(40, 80)]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "gemma3n": gemma3n,
    "rwkv7a": lambda folder: rwkv(folder.with_suffix(".pth"), "7a"),
    "rwkv8": lambda folder: rwkv(folder.with_suffix(".pth"), "8"),
    "embformer with windows": lambda folder: embformer(
        folder, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "lckv below only": lambda folder: lckv(
        folder, layer_types="0_0s_2_2s_2", sliding_window=7, num_key_value_heads=6
    ),
    "llama value embeddings": llama_value_embeddings,
}


def nodes_of(bundle: Path) -> list[ir.Node]:
    return list(ir.load(bundle / "model.onnx").graph.all_nodes())


def edited(bundle: Path, copy: Path, edit: Callable[[ir.Model], None]) -> Path:
    """A copy of a bundle with another graph."""
    shutil.copytree(bundle, copy)
    model = ir.load(copy / "model.onnx")
    edit(model)
    ir.save(model, copy / "model.onnx")
    fit_manifest(copy)
    change_checksums(copy)
    return copy


def test_logits_are_the_originals_however_a_text_is_fed(
    gpu_bundle: Path, gemma4_checkpoint: Path
) -> None:
    check_every_way_to_feed(pleexport.Bundle(gpu_bundle), original_of(gemma4_checkpoint).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_so_they_are_of_other_families(name: str, tmp_path: Path) -> None:
    checkpoint = FAMILIES[name](tmp_path / "checkpoint")
    bundle = gpu_bundle_of(checkpoint, tmp_path / "bundle")
    check_every_way_to_feed(bundle, original_of(checkpoint).logits)


def test_a_window_that_is_left_out_is_noticed(
    gpu_bundle: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    """The control of the windows: layers that share keys and values have some, too."""
    want = original_of(gemma4_checkpoint).logits(IDS)

    def widen(model: ir.Model, layers: slice) -> None:
        grouped = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        sliding = [n for n in grouped if n.attributes["local_window_size"].as_int() > 0]
        assert len(sliding) > 2
        for node in sliding[layers]:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1)

    for i, layers in enumerate((slice(0, 1), slice(-1, None))):
        copy = edited(gpu_bundle, tmp_path / str(i), lambda m, at=layers: widen(m, at))
        assert relative_error(want, pleexport.Runner(copy).logits(IDS)) > 10 * TOLERANCE


def test_operators_are_those_that_a_gpu_has(gpu_bundle: Path) -> None:
    kinds = {node.op_type for node in nodes_of(gpu_bundle)}
    assert not kinds & {"TensorScatter", "Scan", "If", "Loop", "CastLike", "Softmax"}
    contract = pleexport.Bundle(gpu_bundle).decoder.contract
    grouped = [n for n in nodes_of(gpu_bundle) if n.op_type == "GroupQueryAttention"]
    assert len(grouped) == contract.num_layers
    # Keys are new rows always, and what is written goes out.
    assert all(node.inputs[1] and node.inputs[2] for node in grouped)
    assert all(value.is_graph_output() for node in grouped for value in node.outputs[1:])
    angles = [n.inputs[0].producer().op_type for n in nodes_of(gpu_bundle) if n.op_type == "Cos"]
    assert set(angles) == {"FusedMatMul"}


def test_the_manifest_tells_the_form(gpu_bundle: Path) -> None:
    paths = gpu_bundle, CONFORMANCE / "gemma4-fp32"
    own, other = (pleexport.Bundle(path).decoder.contract for path in paths)
    assert (own.processor, other.processor) == ("gpu", "cpu")
    assert {c.window for c in own.caches} == {None}
    assert {c.shape[2] for c in own.caches} == {"context_capacity"}
    shared = [name for cache in own.caches for name in cache.shared_outputs]
    sharing = own.num_layers - len({cache.layer for cache in own.caches})
    assert len(shared) == len(set(shared)) == 2 * sharing > 0
    assert not any(cache.shared_outputs for cache in other.caches)


def test_outputs_that_are_not_bound_change_nothing(gpu_bundle: Path) -> None:
    """A runner that knows them copies less, and computes the same."""
    runner = pleexport.Runner(gpu_bundle)
    expected, contract = runner.logits(IDS), runner.bundle.decoder.contract
    rows = runner.blob.lookup(runner.blob.row_ids(IDS))
    vectors = {lookup.name: rows[lookup.table] for lookup in contract.lookup_inputs}
    for cache in contract.caches:
        cache.shared_outputs.clear()
    path = gpu_bundle / "model.onnx"
    graph = open_graph(path, session_options(1, spin=True))
    session = OnnxSession(graph, contract, context=len(IDS), where=path)
    session.feed(contract.cut(vectors, slice(0, 20)), 20, keep=3)
    got = session.feed(contract.cut(vectors, slice(20, len(IDS))), len(IDS) - 20, keep=5)
    np.testing.assert_array_equal(got, expected[-5:])


@pytest.mark.slow
def test_inputs_of_matrices_are_not_rounded(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(gemma4_checkpoint, tmp_path / "bundle", target="web-gpu")
    products = [node for node in nodes_of(bundle.path) if node.op_type == "MatMulNBits"]
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {0}
    assert {node.attributes["bits"].as_int() for node in products} == {4, 8}
    assert bundle.manifest.parity.passed
    report = pleexport.verify(bundle.path, checkpoint=gemma4_checkpoint)
    assert report is not None
    assert report.passed


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], type[Exception], str]] = {
    "cache dtype": (
        llama_value_embeddings,
        {"cache_dtype": "int8"},
        TargetError,
        "a graph for a GPU keeps keys and values in fp32, and another cache dtype is asked for",
    ),
    "no cache": (
        embformer,
        {"cache_dtype": "none"},
        TargetError,
        "a graph for a GPU keeps keys and values in fp32, and another cache dtype is asked for",
    ),
    "ExecuTorch": (
        llama_value_embeddings,
        {"backend": "executorch"},
        TargetError,
        "this target is for a GPU, and XNNPACK computes on CPUs",
    ),
    "wide values": (
        lambda folder: rwkv(folder.with_suffix(".pth"), "7b"),
        {},
        UnsupportedError,
        "`rwkv7b` has values that are wider than keys, and a GPU's attention takes both in one "
        "width",
    ),
    "strict": (
        lckv,
        {},
        UnsupportedError,
        "`lckv` has layers in which a token does not see itself, and a GPU's attention always does",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_cannot_compute_is_refused(name: str, tmp_path: Path) -> None:
    make, options, kind, message = REFUSED[name]
    if name == "strict":
        checkpoint = lckv(tmp_path / "checkpoint", force_nodiag=True)
    else:
        checkpoint = make(tmp_path / "checkpoint")
    with pytest.raises(kind) as raised:
        pleexport.build(checkpoint, tmp_path / "bundle", target="web-gpu", **options)
    assert raised.value.message == message
    assert raised.value.hint
    assert not (tmp_path / "bundle").exists()


def test_a_contract_of_another_graph_is_refused(gpu_bundle: Path, tmp_path: Path) -> None:
    def contract(manifest: dict[str, Any]) -> dict[str, Any]:
        return manifest["graphs"]["decoder"]["contract"]

    def unknown_output(manifest: dict[str, Any]) -> None:
        shared = [c for c in contract(manifest)["caches"] if "shared_outputs" in c]
        shared[0]["shared_outputs"][0] = "present.99.key"

    def unknown_processor(manifest: dict[str, Any]) -> None:
        contract(manifest)["processor"] = "npu"

    for change, said in (
        (unknown_output, r"and the manifest disagree about present\.99\.key"),
        (unknown_processor, "npu"),
    ):
        copy = shutil.copytree(gpu_bundle, tmp_path / change.__name__)
        change_manifest(copy, change)
        with pytest.raises(BundleError, match=said):
            pleexport.Runner(copy)


def test_only_one_target_is_for_a_gpu() -> None:
    assert load("web-gpu").processor == "gpu"
    assert load("web").processor == "cpu"
