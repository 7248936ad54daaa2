"""A tied head and the input embedding are stored once: `tied.safetensors`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from blob_sources import TIED_SOURCES, TiedSource, tied_source, write_tied
from checkpoints import gemma4
from family_checkpoints import llama_value_embeddings
from numpy.typing import NDArray
from quantized_checkpoints import mobile_gemma4
from resealed import change_header, fit_manifest
from safetensors.numpy import load_file, save_file

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import BlobError, BundleError, CheckFailed
from pleexport.export.options import BuildOptions, resolve
from pleexport.export.plan import Plan, make_plan
from pleexport.parity.compare import compare
from pleexport.parity.oracle import open_oracle
from pleexport.runtime.pages import page_runs
from pleexport.runtime.tied import TiedRows
from pleexport.tied_layout import TIED, TiedLayout

INT8 = {"weight_dtype": "int8", "table_dtype": "int8", "context": 64}


def matched_model(folder: Path) -> MatchedModel:
    checkpoint = Checkpoint(folder)
    return MatchedModel(families.resolve(checkpoint), checkpoint)


def planned(folder: Path, **options: Any) -> Plan:
    matched = matched_model(folder)
    settings = resolve(BuildOptions(**options), quantized=matched.model.is_quantized)
    return make_plan(
        matched.model,
        settings,
        source=matched.dtype,
        equal_codes=matched.head_has_codes_of_its_table(),
    )


@pytest.fixture(scope="module")
def tied_bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `gemma4_checkpoint` whose head is looked up in, verified; read only."""
    out = tmp_path_factory.mktemp("tied") / "bundle"
    return pleexport.build(gemma4_checkpoint, out, **INT8).path


def initializers(bundle: Path) -> dict[str, ir.ExternalTensor]:
    """What the graph's products with the head take, by the end of its name."""
    values = ir.load(bundle / "model.onnx").graph.initializers.values()
    found = {}
    for value in values:
        if value.name.startswith("lm_head"):
            assert isinstance(value.const_value, ir.ExternalTensor)
            found[value.name.split(".")[-1]] = value.const_value
    return found


def test_head_and_input_embedding_are_stored_once(
    tied_bundle: Path, gemma4_checkpoint: Path
) -> None:
    bundle = pleexport.Bundle(tied_bundle)
    assert bundle.decoder.files == ["model.onnx", "model.onnx.data", TIED]
    runner = pleexport.Runner(bundle)
    assert {s.table for s in runner.blob.segments} == {"embed_tokens", "embed_tokens_per_layer"}
    inside = json.loads(load_metadata(bundle.blob_paths[0])["segments"])
    assert {segment["table"] for segment in inside} == {"embed_tokens_per_layer"}
    assert bundle.manifest.parity.passed

    # Sizes are those of the plan, and smaller than two copies.
    plan, sizes = (
        planned(gemma4_checkpoint, **INT8),
        {r.name: r.size for r in bundle.manifest.files},
    )
    assert plan.tied is not None
    assert sizes[TIED] == plan.sizes[TIED] == plan.tied.nbytes
    assert sizes["embeddings.safetensors"] == plan.sizes["embeddings.safetensors"]
    assert 0 <= sizes["model.onnx.data"] - plan.sizes["model.onnx.data"] < 64 * 1000  # alignment


def load_metadata(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    metadata: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[
        "__metadata__"
    ]
    return metadata


def test_the_graph_multiplies_by_what_is_looked_up(tied_bundle: Path) -> None:
    tensors, taken = load_file(tied_bundle / TIED), initializers(tied_bundle)
    assert {tensor.location for tensor in taken.values()} == {TIED}
    codes, scales = (taken[name].numpy() for name in ("codes", "scales"))
    np.testing.assert_array_equal(tensors["codes"], codes.reshape(len(codes), -1))
    np.testing.assert_array_equal(tensors["scales"], scales)
    assert taken["codes"].offset % 16_384 == 0

    # value = (code - zero point) * scale in float32, then the multiplier.
    blob = pleexport.Runner(tied_bundle).blob
    ids = np.arange(blob.num_rows)
    signed = codes.astype(np.float32) - np.float32(128)  # [V, blocks, block]
    values = (signed * scales[..., None]).reshape(len(codes), -1)[:, :32]
    multiplier = np.float32(float(load_metadata(tied_bundle / TIED)["multiplier"]))
    assert multiplier > 5
    np.testing.assert_array_equal(blob.lookup(ids)["embed_tokens"], values * multiplier)


def test_tables_can_be_looked_up_apart(tied_bundle: Path) -> None:
    blob = pleexport.Runner(tied_bundle).blob
    ids = np.array([3, 3, 119])
    whole = blob.lookup(ids)
    for name in blob.shapes:
        assert list(blob.lookup(ids, [name])) == [name]
        np.testing.assert_array_equal(blob.lookup(ids, [name])[name], whole[name])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"weight_dtype": "int8", "table_dtype": "int8"}, "int8"),
        ({"weight_dtype": "int4", "table_dtype": "int8"}, "int8"),  # the head keeps 8 bits
        ({"weight_dtype": "int4", "table_dtype": "int4"}, "int8"),
        ({"weight_dtype": "int4", "table_dtype": "int4", "head_dtype": "int4"}, "int4"),
        # What is stored otherwise: in numbers, with fewer bits than the table is to have, with zero
        # points, or in a program.
        ({"weight_dtype": "fp32", "table_dtype": "source"}, None),
        ({"weight_dtype": "fp16", "table_dtype": "fp16"}, None),
        ({"weight_dtype": "int8", "table_dtype": "source"}, None),
        ({"weight_dtype": "int4", "table_dtype": "int8", "head_dtype": "int4"}, None),
        ({"weight_dtype": "int8", "table_dtype": "int8", "symmetric": False}, None),
        ({"weight_dtype": "int8", "table_dtype": "int8", "backend": "executorch"}, None),
    ],
)
def test_rows_are_shared_where_the_head_holds_what_the_table_is_to_hold(
    options: dict[str, Any], dtype: str | None, gemma4_checkpoint: Path
) -> None:
    plan = planned(gemma4_checkpoint, **options)
    assert (plan.tied and plan.tied.dtype) == dtype
    tables = {segment.table for segment in plan.segments}
    assert ("embed_tokens" in tables) == (dtype is None)
    assert (TIED in plan.sizes) == (dtype is not None)


def test_a_head_of_its_own_shares_nothing(tmp_path: Path) -> None:
    assert planned(gemma4(tmp_path / "checkpoint", tie_word_embeddings=False), **INT8).tied is None


def test_a_table_with_fewer_rows_per_layer_is_shared(
    gemma3n_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = pleexport.build(gemma3n_checkpoint, tmp_path / "bundle", **INT8)
    assert bundle.manifest.parity.passed
    assert TIED in bundle.decoder.files


def test_the_only_table_stays_in_the_blob(tmp_path: Path) -> None:
    folder = llama_value_embeddings(tmp_path / "checkpoint", tie_word_embeddings=True)
    plan = planned(folder, **INT8)
    assert (plan.tied is not None) == (len(plan.model.tables) > 1)
    alone = replace(plan.model, tables=plan.model.tables[:1])
    assert make_plan(alone, plan.settings, source="bf16").tied is None


# Quantized checkpoints whose head is the embedding once more.


def equal_codes(folder: Path, *, differ: bool = False) -> Path:
    """A random mobile checkpoint with the codes of its embedding in its head."""
    mobile_gemma4(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.embedding_quantized"].copy()
    tensors["lm_head.weight_scale"] = tensors["model.embed_tokens.embedding_scale"].copy()
    if differ:
        tensors["lm_head.weight"][-1, -1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_equal_codes_are_stored_once_and_kept(tmp_path: Path) -> None:
    folder = equal_codes(tmp_path / "checkpoint")
    bundle = pleexport.build(folder, tmp_path / "bundle", target="android")
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["passed"]
    assert all(check["lossless"] and check["max_error"] == 0 for check in report["tables"])
    own, stored = load_file(folder / "model.safetensors"), load_file(bundle.path / TIED)
    packed = own["model.embed_tokens.embedding_quantized"]
    np.testing.assert_array_equal(stored["codes"][:, : packed.shape[1]], packed)
    scales = own["model.embed_tokens.embedding_scale"]
    np.testing.assert_array_equal(stored["scales"], np.broadcast_to(scales, stored["scales"].shape))
    apart = planned(equal_codes(tmp_path / "other", differ=True), target="android")
    assert apart.tied is None
    together = planned(folder, target="android")
    for name in ("embeddings.safetensors", "model.onnx.data"):
        assert apart.sizes[name] > together.sizes[name]


def test_a_head_that_is_rounded_anew_does_not_stand_for_own_codes(tmp_path: Path) -> None:
    folder = equal_codes(tmp_path / "checkpoint")
    assert planned(folder, weight_dtype="int8").tied is None
    assert planned(folder, weight_dtype="int8", table_dtype="int8").tied is None
    assert planned(folder).tied is not None


# Checks of rows and of the file.


@pytest.mark.parametrize("options", [INT8, INT8 | {"head_dtype": "int4", "table_dtype": "int4"}])
def test_parity_finds_rows_that_are_not_the_tables(
    options: dict[str, Any], gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = pleexport.build(gemma4_checkpoint, tmp_path / "bundle", **options, verify=False)
    matched = matched_model(gemma4_checkpoint)
    oracle = open_oracle(matched)
    sound = compare(bundle, matched=matched, oracle=oracle)
    assert [check.first_bad_row for check in sound.tables] == [None, None]

    path = bundle.path / TIED
    rows = TiedRows(path)
    made = read_tied(rows)
    made.scales[7] *= np.float32(1.03)
    write_again(path, made, rows.weights_digest)
    fit_manifest(bundle.path)
    report = compare(pleexport.Bundle(bundle.path), matched=matched, oracle=oracle)
    (bad,) = [check for check in report.tables if check.first_bad_row is not None]
    assert (bad.table, bad.first_bad_row) == ("embed_tokens", 7)
    assert not report.passed


def read_tied(rows: TiedRows) -> TiedSource:
    tensors, segment = load_file(rows.path), rows.segment
    assert segment.group_size is not None
    layout = TiedLayout(
        "",
        segment.table,
        rows.num_rows,
        segment.width,
        segment.dtype,
        segment.group_size,
        segment.multiplier,
    )
    return TiedSource(layout, tensors["codes"], tensors["scales"])


def write_again(path: Path, made: TiedSource, digest: str) -> None:
    write_tied(made, path)
    raw, head = path.read_bytes(), made.layout.head(digest)
    path.write_bytes(head + raw[len(head) :])


@pytest.fixture
def tied_path(tmp_path: Path) -> Path:
    path = tmp_path / TIED
    write_tied(TIED_SOURCES["int4"](), path)
    return path


@pytest.mark.parametrize("part", ["codes_offset", "scales_offset", "checksums_offset"])
def test_a_damaged_row_is_found_by_its_lookup(part: str, tied_path: Path) -> None:
    layout = TIED_SOURCES["int4"]().layout
    row_bytes = {
        "codes_offset": layout.code_bytes,
        "scales_offset": 4 * layout.num_groups,
        "checksums_offset": 8,
    }
    raw = bytearray(tied_path.read_bytes())
    raw[getattr(layout, part) + 7 * row_bytes[part] + 1] ^= 4
    tied_path.write_bytes(raw)
    rows = TiedRows(tied_path)
    rows.lookup(np.array([6, 8]))
    for read in (lambda: rows.lookup(np.array([6, 7, 8])), rows.verify):
        with pytest.raises(CheckFailed, match=r"the row of token id 7 does not match .* \(T-09\)"):
            read()


def test_rows_in_wrong_places_are_found_by_their_lookup(tied_path: Path) -> None:
    made = TIED_SOURCES["int4"]()
    raw = bytearray(tied_path.read_bytes())
    for begin, size in (
        (made.layout.codes_offset, made.layout.code_bytes),
        (made.layout.scales_offset, 4 * made.layout.num_groups),
        (made.layout.checksums_offset, 8),
    ):
        middle = begin + size
        raw[begin : middle + size] = raw[middle : middle + size] + raw[begin:middle]
    tied_path.write_bytes(raw)
    with pytest.raises(CheckFailed, match="token id 0"):
        TiedRows(tied_path).lookup(np.array([0]))


def metadata(**values: str | None) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        for name, value in values.items():
            header["__metadata__"][name] = value
            if value is None:
                del header["__metadata__"][name]

    return apply


def exchange_names(header: dict[str, Any]) -> None:
    header["codes"], header["scales"] = header["scales"], header["codes"]


def cut_codes(header: dict[str, Any]) -> None:
    rows, code_bytes = header["codes"]["shape"]
    header["codes"]["shape"] = [rows * 2, code_bytes // 2]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "codes of another dtype": (lambda h: h["codes"].update(dtype="I8"), "T-01"),
    "codes of three dimensions": (lambda h: h["codes"]["shape"].append(1), "T-01"),
    "another order": (exchange_names, "T-01"),
    "another tensor": (lambda h: h.update(other=h.pop("checksums")), "T-01"),
    "another format": (metadata(format="pleexport-blob"), "T-02"),
    "no format": (metadata(format=None), "T-02"),
    "a newer version": (metadata(version="2"), "T-03"),
    "no version": (metadata(version=None), "T-03"),
    "an unknown key": (metadata(shard="0"), "T-04"),
    "no table": (metadata(table=None), "T-04"),
    "no width": (metadata(width="0"), "T-04"),
    "a group of nothing": (metadata(group_size="0"), "T-04"),
    "a width that is no number": (metadata(width="wide"), "T-04"),
    "an unknown dtype": (metadata(dtype="fp8"), "T-04"),
    "a multiplier that is no number": (metadata(multiplier="nan"), "T-04"),
    "a multiplier beyond binary32": (metadata(multiplier="1e39"), "T-04"),
    "another width": (metadata(width="49"), "T-05"),
    "another group size": (metadata(group_size="32"), "T-05"),
    "a huge group": (metadata(group_size=str(2**50)), "T-05"),
    "codes of another dtype's width": (metadata(dtype="int8"), "T-05"),
    "rows of another number": (cut_codes, "T-05"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_breaks_a_rule_is_refused_by_its_number(name: str, tied_path: Path) -> None:
    change_header(tied_path, lambda header: None)
    TiedRows(tied_path).verify()
    change, rule = BROKEN[name]
    change_header(tied_path, change)
    with pytest.raises(BlobError, match=rf"\({rule}\)") as caught:
        TiedRows(tied_path)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / TIED
    path.write_bytes(TiedLayout("head", "table", 0, 5, "int8", 16, 1.0).head("none"))
    with pytest.raises(BlobError, match=r"has no rows \(T-05\)"):
        TiedRows(path)


def test_a_damaged_header_is_found(tied_path: Path) -> None:
    raw = tied_path.read_bytes()
    tied_path.write_bytes(raw.replace(b'"39.25"', b'"39.35"'))
    with pytest.raises(CheckFailed, match=r"its header does not match its checksum \(T-06\)"):
        TiedRows(tied_path)


def test_the_file_of_another_bundle_is_refused(
    tied_bundle: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    other = pleexport.build(
        gemma4_checkpoint, tmp_path / "other", **INT8 | {"block_size": 16}, verify=False
    )
    copy = Path(shutil.copytree(tied_bundle, tmp_path / "copy"))
    shutil.copy(other.path / TIED, copy / TIED)
    fit_manifest(copy)
    with pytest.raises(BundleError, match=r"tied.safetensors` is of another bundle"):
        pleexport.Runner(copy)


@pytest.mark.parametrize(("rows", "table", "problem"), [(119, "embed_tokens", "it has 119 rows"),
    (120, "embed_tokens_per_layer", "both have table")])  # fmt: skip
def test_a_file_that_does_not_go_with_the_blob_is_refused(
    rows: int, table: str, problem: str, tied_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tied_bundle, tmp_path / "copy"))
    made = tied_source("int8", rows=rows, width=32, group_size=32, multiplier=1.0)
    made = made._replace(layout=replace(made.layout, table=table))
    write_again(copy / TIED, made, TiedRows(tied_bundle / TIED).weights_digest)
    fit_manifest(copy)
    with pytest.raises(BlobError, match=rf"{problem}.* \(T-07\)"):
        pleexport.Runner(copy)


def test_packed_weights_give_the_same_logits(tied_bundle: Path, tmp_path: Path) -> None:
    ids = [5, 9, 2, 77, 31]
    expected = pleexport.Runner(tied_bundle).logits(ids)
    for _ in range(2):  # written, and then read
        packed = pleexport.Runner(tied_bundle, packed_weights=tmp_path / "packed").logits(ids)
        np.testing.assert_allclose(packed, expected, atol=1e-5)


def test_a_bundle_is_built_the_same_twice(
    tied_bundle: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    again = pleexport.build(gemma4_checkpoint, tmp_path / "again", **INT8, verify=False)
    for name in (TIED, "model.onnx", "model.onnx.data", "embeddings.safetensors"):
        assert (again.path / name).read_bytes() == (tied_bundle / name).read_bytes()


def test_a_cold_row_of_e2b_costs_few_pages() -> None:
    """On pages of 16 KiB, of all rows: its part of the blob, its codes, scales and checksum."""
    layout = TiedLayout("head", "embed_tokens", 262_144, 1536, "int8", 256, 39.25)
    sample = np.arange(0, layout.rows, 7)

    def pages(begin: int, row_bytes: int) -> NDArray[np.int64]:
        runs = [
            page_runs(np.array([row]), begin=begin, row_bytes=row_bytes, page_size=16_384)
            for row in sample
        ]
        return np.array([sum(end - first for first, end in run) for run in runs])

    codes = pages(layout.codes_offset, layout.code_bytes)
    scales = pages(layout.scales_offset, 4 * layout.num_groups)
    checksums = pages(layout.checksums_offset, 8)
    assert (codes.max(), scales.max(), checksums.max()) == (2, 2, 1)
    assert (round(codes.mean(), 2), round(scales.mean(), 3)) == (1.06, 1.001)
    assert 8_000_000 < layout.nbytes - layout.scales_offset < 8_400_000  # scales and checksums


def test_stats_count_rows_and_pages_of_both_files(tied_bundle: Path) -> None:
    runner = pleexport.Runner(tied_bundle)
    list(runner.generate([1, 2, 3], max_new_tokens=1, ignore_eos=True))
    # 32 codes, a scale and a checksum beside a row of the blob.
    assert runner.blob.row_bytes == runner.blob.row_stride + 32 + 4 + 8
    assert runner.stats.row_bytes == 3 * runner.blob.row_bytes
    assert runner.stats.pages == runner.blob.pages(np.array([1, 2, 3])) >= 3
