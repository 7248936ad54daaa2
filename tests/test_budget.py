"""Budgets: what is chosen fits, costs least, and is what the bundle has."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import gemma4
from hypothesis import given
from hypothesis import strategies as st
from quantized_checkpoints import mobile_gemma4
from test_inspection import E4B, gemma4_text, write_config

import pleexport
from pleexport import families, targets
from pleexport.backends import registry
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import QUANTIZED
from pleexport.errors import TargetError
from pleexport.export import budget
from pleexport.export.options import BuildOptions, resolve
from pleexport.export.plan import Plan, make_plan
from pleexport.export.sensitivity import SampledSensitivity, TypicalSensitivity
from pleexport.inspection.inspect import inspect
from pleexport.model import Model, Table, Weight
from pleexport.parity import layers
from pleexport.show.bundle import describe_bundle
from pleexport.show.inspection import describe_model
from pleexport.sizes import parse_size

DELIVERED = 4_000_000_000


@pytest.fixture(scope="module")
def e2b() -> Model:
    """The published Gemma 4 E2B, without weights."""
    return families.from_config({"model_type": "gemma4", **gemma4_text()}, dtype="bf16")


def planned(model: Model, options: BuildOptions, **more: Any) -> Plan:
    settings = resolve({"target": "android"} | options, quantized=model.is_quantized)
    return make_plan(model, settings, source="bf16", **more)


def dtypes_of(plan: Plan) -> dict[str, set[str]]:
    """By kind of matrix and table, its dtypes."""
    found: dict[str, set[str]] = {}
    for part in plan.parts:
        found.setdefault(part.name, set()).add(part.dtype)
    return found


# What a target delivers.


def test_the_default_bundle_of_e2b_is_one_that_the_store_delivers(e2b: Model) -> None:
    plan = planned(e2b, {})
    assert plan.nbytes < DELIVERED
    assert not any("delivers" in note for note in plan.delivery)
    # The control: a store that delivers anything gets what the target wants.
    free = msgspec.structs.replace(targets.load("android"), limits=targets.Limits())
    settings = resolve({"target": "android"})
    unlimited = make_plan(e2b, budget.replace(settings, target=free), source="bf16")
    assert unlimited.costs == {}
    assert dtypes_of(unlimited)["embed_tokens_per_layer"] == {"int8"}


@pytest.mark.parametrize("delivered", [3_700_000_000, 2_900_000_000, 2_800_000_000])
def test_what_a_store_delivers_is_kept_and_nothing_becomes_wider(
    e2b: Model, delivered: int
) -> None:
    limits = targets.Limits(largest_delivery_bytes=delivered)
    target = msgspec.structs.replace(targets.load("android"), limits=limits)
    settings = budget.replace(resolve({"target": "android"}), target=target)
    plan = make_plan(e2b, settings, source="bf16")
    assert plan.nbytes < delivered
    found = dtypes_of(plan)
    assert found["embed_tokens_per_layer"] == {"int4"}
    assert found["mlp.up_proj"] == {"int4"}
    assert found["per_layer_input_gate"] == {"int8"}
    assert plan.delivery[1:] == planned(e2b, {}).delivery[1:]


def test_what_cannot_be_delivered_stays_as_the_target_wants_it_and_is_told() -> None:
    config = {"model_type": "gemma4", **gemma4_text(**E4B)}
    plan = planned(families.from_config(config, dtype="bf16"), {})
    assert plan.costs == {}
    assert dtypes_of(plan)["embed_tokens_per_layer"] == {"int8"}
    assert "the store delivers at most 4.00 GB" in plan.delivery[-2]
    assert re.fullmatch(r"the least that can be written has 4\.\d\d GB", plan.delivery[-1])


def test_a_bundle_that_fits_is_planned_without_a_prediction(e2b: Model) -> None:
    class Unasked:
        def matrix(self, weight: Weight, dtype: str, *, block_size: int) -> float:
            raise AssertionError

        def table(self, table: Table, dtype: str) -> float:
            raise AssertionError

    plan = planned(e2b, {"target": "ios"}, sensitivity=Unasked())
    assert plan.costs == {}
    with pytest.raises(AssertionError):
        planned(e2b, {"max_bytes": "3GB"}, sensitivity=Unasked())


# What is asked for.


@pytest.mark.parametrize("backend", registry.NAMES)
@pytest.mark.parametrize("gigabytes", [2.85, 3.0, 3.3, 3.6, 4.6])
def test_budgets_are_kept_and_used(e2b: Model, backend: str, gigabytes: float) -> None:
    plan = planned(e2b, {"max_bytes": f"{gigabytes}GB", "backend": backend})
    assert 0.97 * gigabytes < plan.nbytes / 1e9 < gigabytes
    assert plan.predicted_divergence is not None


def test_more_bytes_never_cost_more(e2b: Model) -> None:
    costs = [
        planned(e2b, {"max_bytes": n}).predicted_divergence
        for n in range(2_900_000_000, 5_400_000_000, 250_000_000)
    ]
    assert costs == sorted(costs, key=lambda cost: -(cost or 0))
    assert (costs[0] or 0) > 10 * (costs[-1] or 1)
    whole = dtypes_of(planned(e2b, {"max_bytes": "9GB"}))
    assert {d for name, own in whole.items() for d in own if "norms" not in name} == {"int8"}


def test_gates_of_per_layer_vectors_keep_8_bits(e2b: Model) -> None:
    found = dtypes_of(planned(e2b, {"max_bytes": "2.6GB"}))
    for name in ("per_layer_input_gate", "per_layer_projection", "self_attn.k_proj"):
        assert found[name] == {"int8"}
    assert found["lm_head"] == {"int4"}


def test_dtypes_that_are_asked_for_are_kept(e2b: Model) -> None:
    options: BuildOptions = {"max_bytes": "4.2GB", "table_dtype": "int8"}
    plan = planned(e2b, options | {"target": "laptop"})
    assert dtypes_of(plan)["embed_tokens_per_layer"] == {"int8"}
    assert "int4" in dtypes_of(plan)["mlp.up_proj"]
    plan = planned(e2b, {"max_bytes": "4GB", "weight_dtype": "int8"})
    assert dtypes_of(plan)["mlp.up_proj"] == {"int8"}
    assert dtypes_of(plan)["lm_head"] == {"int8"}
    plan = planned(e2b, {"max_bytes": "4GB", "head_dtype": "int4"})
    assert dtypes_of(plan)["lm_head"] == {"int4"}


def test_a_budget_that_cannot_be_kept_says_the_least_that_can(e2b: Model) -> None:
    with pytest.raises(TargetError) as raised:
        planned(e2b, {"max_bytes": "2.5GB"})
    found = re.fullmatch(
        r"a bundle of at most 2\.50 GB is asked for, and the least that can be written has "
        r"(\d\.\d\d) GB",
        raised.value.message,
    )
    assert found is not None
    assert raised.value.hint == "allow more bytes, or leave out dtypes that you asked for"
    least = float(found[1])
    planned(e2b, {"max_bytes": f"{least + 0.01:.2f}GB"})
    with pytest.raises(TargetError, match="the least"):
        planned(e2b, {"max_bytes": f"{least - 0.01:.2f}GB"})
    with pytest.raises(TargetError, match="the least"):
        planned(e2b, {"max_bytes": "3GB", "table_dtype": "int8"})


def test_own_codes_are_not_rounded_for_a_budget(tmp_path: Path) -> None:
    checkpoint = Checkpoint(mobile_gemma4(tmp_path / "checkpoint"))
    model = families.resolve(checkpoint)
    fits = planned(model, {"max_bytes": "2MB"})
    assert fits.settings.weights.dtypes == fits.settings.table_dtypes == {}
    with pytest.raises(TargetError, match=r"codes are not rounded again\)$"):
        planned(model, {"max_bytes": "1kB"})
    limits = targets.Limits(largest_delivery_bytes=1000)
    small = msgspec.structs.replace(targets.load("android"), limits=limits)
    settings = budget.replace(resolve({"target": "android"}, quantized=True), target=small)
    plan = make_plan(model, settings, source="bf16")
    assert plan.settings == settings
    assert plan.delivery[-1].endswith("(the checkpoint's own codes are not rounded again)")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2.2GB", 2_200_000_000), ("900 kB", 900_000), ("7M", 7_000_000), ("512", 512), ("1B", 1)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("given", ["", "two", "-1GB", "1e9", "2.2TB", "GB", "0", 0, -5, "1 2"])
def test_what_is_no_size_is_refused(given: Any) -> None:
    with pytest.raises(TargetError) as raised:
        resolve({"max_bytes": given})
    expected = f"max bytes `{given}` is no size; expected a number of bytes, kB, MB or GB"
    assert raised.value.message == expected
    assert raised.value.hint == "write it like `--max-bytes 2.2GB`"


# The choice itself.


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 9.0)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.floats(0.1, 5.0),
)
def test_no_choice_that_has_room_costs_much_less(
    small: list[tuple[int, float]], share: float, table_cost: float
) -> None:
    table = budget._Item("t", "t", (_option("int8", 40, 0), _option("int4", 20, table_cost)))
    items = [
        budget._Item(f"{i}", f"{i}", (_option("int8", 2 * n, 0.0), _option("int4", n, cost)))
        for i, (n, cost) in enumerate(small)
    ]
    by_name = {item.name: {o.dtype: o for o in item.options} for item in (table, *items)}

    def nbytes(picked: Any) -> int:
        whole = {item.name: "int8" for item in items} | dict(picked)
        return sum(by_name[name][dtype].nbytes for name, dtype in whole.items())

    least = 20 + sum(n for n, _ in small)
    room = int(least + share * least)
    picked = budget._cheapest([table], items, room, nbytes)
    assert nbytes(picked) <= room
    cost = sum(by_name[name][dtype].cost for name, dtype in picked.items())
    # Nothing that was narrowed could have stayed.
    for name in (item.name for item in items if picked[item.name] == "int4"):
        assert nbytes(picked | {name: "int8"}) > room
    fitting = [
        sum(by_name[name][dtype].cost for name, dtype in zip(by_name, dtypes, strict=True))
        for dtypes in itertools.product(QUANTIZED, repeat=len(by_name))
        if nbytes(dict(zip(by_name, dtypes, strict=True))) <= room
    ]
    # One matrix at most stands between the order of prices and the best choice.
    assert min(fitting) <= cost <= min(fitting) + max(o["int4"].cost for o in by_name.values())


def _option(dtype: str, nbytes: int, cost: float) -> budget._Option:
    return budget._Option(dtype, nbytes, cost)


def test_weights_with_outliers_keep_8_bits_longer(tmp_path: Path) -> None:
    checkpoint = Checkpoint(gemma4(tmp_path / "checkpoint"))
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    weight = next(w for w in matched.model.weights if w.name == "layers.2.mlp.up_proj.weight")
    own, typical = SampledSensitivity(matched), TypicalSensitivity(matched.model)
    expected = typical.matrix(weight, "int4", block_size=32)
    assert own.matrix(weight, "int4", block_size=32) == pytest.approx(expected, rel=0.3)
    assert own.matrix(weight, "int8", block_size=32) < 0.01 * expected
    values = matched.read(weight)
    values[:, ::16] *= 30
    matched.read = lambda _, rows: values[rows]  # type: ignore[method-assign]
    assert own.matrix(weight, "int4", block_size=32) > 1.2 * expected
    for table in matched.model.tables:
        assert own.table(table, "int4") == pytest.approx(typical.table(table, "int4"), rel=0.3)
        assert own.table(table, "int8") < 0.01 * own.table(table, "int4")


def test_values_that_cannot_be_stored_do_not_stop_a_plan(tmp_path: Path) -> None:
    checkpoint = Checkpoint(gemma4(tmp_path / "checkpoint"))
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    broken = np.full((120, 48), np.nan, dtype=np.float32)
    broken[0, 0] = np.inf
    matched.row_values = lambda _, rows: broken[: len(rows)]  # type: ignore[method-assign]
    own = SampledSensitivity(matched)
    assert all(np.isfinite(own.table(table, "int4")) for table in matched.model.tables)


# Bundles.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 4 whose weights are more than what a bundle has beside them."""
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    return gemma4(folder, hidden_size=128, intermediate_size=512, num_hidden_layers=6)


def test_a_bundle_has_what_was_chosen(wide: Path, tmp_path: Path) -> None:
    most = 2_000_000
    options: dict[str, Any] = {"target": "android", "max_bytes": most}
    bundle = pleexport.build(wide, tmp_path / "bundle", **options)
    manifest = bundle.manifest
    assert manifest.parity.passed
    assert manifest.max_bytes == most
    assert bundle.nbytes + (bundle.path / "manifest.json").stat().st_size <= most
    assert manifest.weight_dtypes
    assert set(manifest.weight_dtypes.values()) == {"int8"}  # android's are int4 by themselves
    stored = {s.table: s.dtype for s in pleexport.Runner(bundle).blob.segments}
    assert stored == {name: manifest.table_dtypes.get(name, "int8") for name in stored}
    graph = ir.load(bundle.path / "model.onnx").graph
    found = {}
    for node in graph:
        if node.op_type == "MatMulNBits":
            name = node.inputs[1].name.removesuffix(".codes")
            found[name] = node.attributes["bits"].as_int()
    wide_ones = {name for name in found if "mlp" in name and found[name] == 8}
    assert wide_ones == {name for name in manifest.weight_dtypes if "mlp" in name}
    assert {found[name] for name in found if "mlp" in name} == {4, 8}
    assert "matrices have another dtype" in describe_bundle(bundle)
    assert layers._weight_request(manifest).dtypes == manifest.weight_dtypes
    # The same bytes, again.
    again = pleexport.build(wide, tmp_path / "again", verify=False, **options)
    for name in ("model.onnx", "model.onnx.data", "embeddings.safetensors"):
        assert _digest(bundle.path / name) == _digest(again.path / name)


def test_a_bundle_without_a_budget_says_nothing_of_one(gemma4_bundle: Path) -> None:
    manifest = json.loads((gemma4_bundle / "manifest.json").read_text())
    assert not {"max_bytes", "weight_dtypes", "table_dtypes"} & set(manifest)


def test_inspection_shows_bits_and_bytes_read(tmp_path: Path) -> None:
    info = inspect(write_config(tmp_path / "m", gemma4_text()))
    android = next(e for e in info.targets if e.target == "android")
    assert android.fits
    assert android.bundle_bytes < DELIVERED
    assert 1.40e9 < android.read_bytes < 1.42e9  # as measured: docs/design.md
    by_name = {part.name: part for part in android.parts}
    row = by_name["embed_tokens_per_layer"]
    assert (row.kind, row.count, row.parameters) == ("table", 35, 2_348_810_240)
    assert row.read_bytes * 262_144 == row.nbytes
    assert by_name["lm_head"].dtype == "int8"
    assert by_name["mlp.up_proj"].dtype == "int4"
    # The head has the rows of the input embedding; beside it lie a page and their checksums.
    beside = by_name["embed_tokens"].nbytes
    assert beside == 16_384 + 8 * 262_144
    matrices = sum(part.nbytes for part in android.parts if part.kind != "table")
    assert matrices + beside == android.graph_bytes
    text = " ".join(describe_model(info).split())
    assert "Bits of tables and matrices, by target" in text
    assert "mlp.up_proj 35 int4 267.63 MB" in text
    assert "a token reads 1.41 GB" in text


def test_inspection_and_build_plan_alike(wide: Path, tmp_path: Path) -> None:
    android = next(e for e in inspect(wide).targets if e.target == "android")
    bundle = pleexport.build(wide, tmp_path / "bundle", target="android", verify=False)
    sizes = {record.name: record.size for record in bundle.manifest.files}
    assert sizes["embeddings.safetensors"] == android.blob_bytes
    assert bundle.manifest.weight_dtypes == {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
