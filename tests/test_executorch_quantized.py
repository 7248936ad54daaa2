"""Quantized checkpoints as ExecuTorch programs: their own codes, and nothing rounded again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOLERANCE, original_of, relative_error
from numpy.typing import NDArray
from quantized_checkpoints import mobile_gemma4
from safetensors.numpy import load_file

import pleexport
from pleexport import families
from pleexport.backends import registry
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.codes import QuantizedRows, unpack_codes
from pleexport.errors import TargetError
from pleexport.export.options import resolve
from pleexport.export.plan import Plan, make_plan
from pleexport.model import Codes, Weight
from pleexport.parity.metrics import mean_kl
from pleexport.weights import WeightRequest

pytest.importorskip("executorch", reason="pip install 'pleexport[executorch]'")

from pleexport.backends.executorch.surroundings import undisturbed

with undisturbed():
    from executorch.exir._serialize._program import deserialize_pte_binary

    from pleexport.backends.executorch.rounding import own_codes

# An odd number of inputs of `down_proj`, which has 2 or 4 bits.
ODD = {"hidden_size": 36, "intermediate_size": 51, "hidden_size_per_layer_input": 12}
IDS = np.random.default_rng(1).integers(0, 120, 100).tolist()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other slow small models down tenfold where tests run abreast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        yield


def build(folder: Path, out: Path, **options: Any) -> pleexport.Bundle:
    """A bundle with the checkpoint's own numbers unless told otherwise, not verified."""
    return pleexport.build(folder, out, backend="executorch", **({"verify": False} | options))


def planned(folder: Path, **options: Any) -> Plan:
    source = Checkpoint(folder)
    settings = resolve({"backend": "executorch", **options}, quantized=True)
    return make_plan(families.resolve(source), settings, source=source.dtype)


def divergence(bundle: pleexport.Bundle, want: NDArray[np.float32]) -> float:
    """The mean KL divergence of a bundle's logits."""
    return mean_kl(want, got=pleexport.Runner(bundle).logits(IDS))


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose activations are not rounded, with odd widths."""
    return mobile_gemma4(tmp_path_factory.mktemp("mobile") / "checkpoint", **ODD)


@pytest.fixture(scope="module")
def bundle(mobile: Path, tmp_path_factory: pytest.TempPathFactory) -> pleexport.Bundle:
    """A bundle of `mobile` with its own codes."""
    return build(mobile, tmp_path_factory.mktemp("bundles") / "mobile")


def test_values_of_codes_agree_with_transformers(mobile: Path, tmp_path: Path) -> None:
    exact = build(mobile, tmp_path / "bundle", weight_dtype="fp32")
    want, runner = original_of(mobile).logits(IDS), pleexport.Runner(exact)
    assert relative_error(want, runner.logits(IDS)) < TOLERANCE
    # The control: rows of the neighbouring token must not pass.
    assert relative_error(want, runner.logits([(i + 1) % 120 for i in IDS])) > 100 * TOLERANCE


def test_codes_go_into_the_program_as_they_are(mobile: Path, bundle: pleexport.Bundle) -> None:
    tensors = load_file(mobile / "model.safetensors")
    with undisturbed():
        named = deserialize_pte_binary((bundle.path / "model.pte").read_bytes()).named_data
    assert named is not None
    stored = {
        name: bytes(named.buffers[entry.buffer_index]) for name, entry in named.pte_data.items()
    }
    seen = set()
    for weight in families.resolve(Checkpoint(mobile)).weights:
        if weight.codes is None:
            continue
        module = weight.name.removesuffix(".weight")
        module = module if module == "lm_head" else f"model.{module}"
        own, bits = tensors[f"{module}.weight"], int(weight.codes.dtype[3:])
        width = weight.shape[1]
        expected = own if bits == 8 else unpack_codes(own, bits=bits, width=width)
        stored_bits = 8 if bits == 8 or width % 2 else 4
        packed = np.frombuffer(stored[weight.name], np.uint8).reshape(len(own), -1)
        codes = unpack_codes(packed, bits=stored_bits, width=width)
        np.testing.assert_array_equal(codes, expected)
        scales = np.frombuffer(stored[f"{weight.name}.scales"], "<f4")
        np.testing.assert_array_equal(scales, tensors[f"{module}.weight_scale"][:, 0])
        seen.add((bits, stored_bits))
    assert seen == {(2, 4), (4, 4), (4, 8), (8, 8)}


def test_own_codes_stay_close_to_the_original(mobile: Path, bundle: pleexport.Bundle) -> None:
    want = original_of(mobile).logits(IDS)
    assert 1e-9 < divergence(bundle, want) < 1e-3  # inputs are rounded to 8 bits a token


def test_the_plan_counts_what_is_stored_and_says_why(
    mobile: Path, bundle: pleexport.Bundle
) -> None:
    plan = planned(mobile)
    assert 0 < (bundle.path / "model.pte").stat().st_size - plan.sizes["model.pte"] < 500_000
    first, second = plan.storage.notes(plan.model)
    assert "matrices of int2 codes are stored in more bits, `layers.3.mlp.gate_proj" in first
    assert "matrices of int4 codes are stored in more bits, `layers.0.mlp.down_proj" in second
    exact = planned(mobile, weight_dtype="fp32")
    assert exact.storage.notes(exact.model) == []


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(
    mobile: Path, bundle: pleexport.Bundle, tmp_path: Path
) -> None:
    again = build(mobile, tmp_path / "again")
    other = build(mobile, tmp_path / "other", weight_dtype="int8")
    programs = [(made.path / "model.pte").read_bytes() for made in (bundle, again, other)]
    assert programs[0] == programs[1]
    assert programs[0] != programs[2]


@pytest.mark.slow
def test_activations_are_rounded_as_the_original_rounds_them(tmp_path: Path) -> None:
    folder = mobile_gemma4(tmp_path / "checkpoint", activations=True, **ODD)
    want = original_of(folder).logits(IDS)
    rounded = build(folder, tmp_path / "rounded")
    plain = build(folder, tmp_path / "plain", activation_rounding=False)
    # Noise turns values over to the next step, on any runtime; on random weights that adds up.
    assert divergence(rounded, want) < divergence(plain, want) / 3


# What XNNPACK does not take.


def test_groups_that_xnnpack_does_not_take_are_refused(mobile: Path) -> None:
    backend = registry.load("executorch")
    model = families.resolve(Checkpoint(mobile))
    matrix = next(w for w in model.weights if w.codes and w.shape[1] == 36)

    def check(dtype: str, inputs: int, group: int, asked: Any = "source") -> None:
        grouped = Weight(
            "grouped", (4, inputs), "quantizable", codes=Codes(dtype, group, "fp32", ("a", "b"))
        )
        weights = tuple(grouped if w is matrix else w for w in model.weights)
        backend.check(replace(model, weights=weights), WeightRequest(asked))

    for dtype, inputs, group in [("int4", 128, 32), ("int2", 128, 64), ("int8", 128, 128)]:
        check(dtype, inputs, group)
    for dtype, inputs, group in [("int8", 128, 32), ("int4", 128, 16), ("int4", 80, 32)]:
        with pytest.raises(TargetError, match=f"has {dtype} codes with a scale for every {group}"):
            check(dtype, inputs, group)
        check(dtype, inputs, group, "fp32")


def test_scales_that_xnnpack_does_not_take_are_refused() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 1, 8)

    def taken(scales: list[list[float]], scale_dtype: str = "fp32") -> Any:
        return own_codes(QuantizedRows(codes, np.float32(scales)[:, None]), scale_dtype=scale_dtype)

    made = taken([[0.1], [0.3]])
    np.testing.assert_array_equal(made.codes, codes[:, 0])
    np.testing.assert_array_equal(made.scales, np.float32([[0.1], [0.3]]))
    zeros = taken([[0.0], [0.3]])
    np.testing.assert_array_equal(
        zeros.codes * zeros.scales, codes[:, 0] * np.float32([[0], [0.3]])
    )
    assert (zeros.scales > 0).all()
    for scale in (-0.1, np.nan, np.inf, 1e-40):
        with pytest.raises(ValueError, match="a scale is negative, or no normal number"):
            taken([[0.1], [scale]])
    groups = [[0.5, 0.25], [1.0, 0.125]]
    np.testing.assert_array_equal(taken(groups, "bf16").scales, np.float32(groups))
    with pytest.raises(ValueError, match="bfloat16 scales for groups"):
        taken([[0.5, 0.1], [1.0, 0.125]], "bf16")
