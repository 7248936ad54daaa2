"""Each operator of the ExecuTorch backend against torch, lowered alone and run."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations import gemma_quant

from pleexport import operators as ours
from pleexport.errors import CheckFailed

pytest.importorskip("executorch", reason="pip install 'pleexport[executorch]'")

from pleexport.backends.executorch.surroundings import undisturbed

with undisturbed():
    from executorch.exir._serialize._cord import FileBackedData

    from pleexport.backends.executorch.lower import write_program
    from pleexport.backends.executorch.operators import operator
    from pleexport.backends.executorch.program import check_loads, load
    from pleexport.backends.executorch.rounding import round_matrix
    from pleexport.backends.executorch.store import StoredMatrix
    from pleexport.codes import pack_codes


class Weights:
    """A source of weights: vectors as they are, matrices rounded."""

    def __init__(self, folder: Path, weights: dict[str, NDArray[np.float32]]) -> None:
        self._folder = folder
        self._weights = weights
        self.dtype, self.group, self.sign = "fp32", 32, 1.0
        # What the matrices are once rounded.
        self.rounded: dict[str, NDArray[np.float32]] = {}

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._weights[name]

    def matrix(self, name: str) -> StoredMatrix:
        values, scales = self._weights[name], b""
        group = values.shape[1] if self.dtype == "int8" else self.group or values.shape[1]
        scale_dtype = "bf16" if self.dtype == "int4" and self.group else "fp32"
        data: NDArray[Any] = values
        self.rounded[name] = values
        if self.dtype != "fp32":
            rounded = round_matrix(values, bits=int(self.dtype[3:]), group=group)
            data = rounded.codes
            grouped = rounded.codes.reshape(len(values), -1, group) * rounded.scales[..., None]
            self.rounded[name] = grouped.reshape(values.shape).astype(np.float32)
            stored: NDArray[Any] = rounded.scales * np.float32(self.sign)
            if self.dtype == "int4":
                data = pack_codes(rounded.codes, bits=4)
            if scale_dtype == "bf16":
                stored = stored.astype(ml_dtypes.bfloat16)
            scales = stored.tobytes()
        path = self._folder / f"{name}.bin"
        path.write_bytes(data.tobytes())
        backed = FileBackedData(str(path), sha256=hashlib.sha256(data.tobytes()).digest())
        return StoredMatrix(values.shape, self.dtype, group, backed, scales, scale_dtype)


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self._function(*args)


def write(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], path: Path, store: Any
) -> None:
    """Lower a function of tensors whose second axis counts up to 9 tokens."""
    tokens = torch.export.Dim("tokens", min=1, max=9)
    with undisturbed():
        exported = torch.export.export(
            Calls(function), args, dynamic_shapes=((*({1: tokens} for _ in args),),), strict=False
        )
    write_program(exported, store, path)


def run(path: Path, *args: Tensor) -> Tensor:
    _program, method = load(path)
    method.set_inputs(args)
    method.execute()
    (result,) = method.get_outputs(True)
    return result


@pytest.fixture
def compare(tmp_path: Path) -> Iterator[Callable[..., float]]:
    """Lowers a function, and gives its largest error for 9, 1 and 4 tokens."""

    def largest_error(
        function: Callable[..., Tensor],
        expected: Callable[..., Tensor],
        *shapes: tuple[int, ...],
        weights: dict[str, NDArray[np.float32]] | None = None,
    ) -> float:
        torch.manual_seed(0)
        store, errors = Weights(tmp_path, weights or {}), []
        example = tuple(torch.randn(1, 5, *shape) for shape in shapes)
        write(function, example, tmp_path / "model.pte", store)
        for count in (9, 1, 4):
            args = [torch.randn(1, count, *shape) for shape in shapes]
            got, want = run(tmp_path / "model.pte", *args), expected(*args)
            assert got.shape == want.shape
            errors.append(float((got - want).abs().max()))
        return max(errors)

    return largest_error


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu_tanh", tanh_gelu),
        ("gelu", F.gelu),
        ("silu", F.silu),
        ("relu", F.relu),
        ("sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
        ("square", torch.square),
    ],
)
def test_activations(name: str, expected: Callable[..., Tensor], compare: Any) -> None:
    activate = operator("activate")
    assert compare(lambda x: activate(x, name), expected, (33,)) < 2e-6


def test_the_two_gelus_are_told_apart(compare: Any) -> None:
    activate = operator("activate")
    # XNNPACK's own is that of the error function; ExecuTorch 1.5.1 takes it for both.
    assert compare(lambda x: activate(x, "gelu"), tanh_gelu, (33,)) > 1e-4


def test_square_root(compare: Any) -> None:
    activate = operator("activate")
    error = compare(
        lambda x: activate(activate(x, "square"), "sqrt"), lambda x: x.square().sqrt(), (7,)
    )
    assert error < 1e-6


@pytest.mark.parametrize("shape", [(33,), (3, 10), (1, 1)])
def test_norms_and_means(shape: tuple[int, ...], compare: Any) -> None:
    weight = np.linspace(0.5, 2, shape[-1], dtype=np.float32)
    norm, mean = operator("rms_norm"), operator("mean")
    size = (shape[-1],)
    assert (
        compare(lambda x: norm(x, "", 1e-6), lambda x: F.rms_norm(x, size, None, 1e-6), shape)
        < 2e-6
    )
    error = compare(
        lambda x: norm(x, "weight", 1e-6),
        lambda x: F.rms_norm(x, size, torch.tensor(weight), 1e-6),
        shape,
        weights={"weight": weight},
    )
    assert error < 2e-6
    assert compare(mean, lambda x: x.mean(-1, keepdim=True), shape) < 1e-6


def test_arithmetic_with_numbers_and_weights(compare: Any) -> None:
    weight = np.linspace(-1, 2, 7, dtype=np.float32)
    scale, shift, multiply = map(operator, ("scale", "shift", "multiply_weight"))
    assert (
        compare(
            lambda x: shift(scale(multiply(x, "weight"), 0.3), -2.0),
            lambda x: x * torch.tensor(weight) * 0.3 - 2.0,
            (3, 7),
            weights={"weight": weight},
        )
        < 1e-6
    )


def test_shapes(compare: Any) -> None:
    split, merge, pick = map(operator, ("split", "merge", "pick"))
    assert compare(lambda x: split(x, 3, 5), lambda x: x.unflatten(2, (3, 5)), (15,)) == 0
    assert compare(merge, lambda x: x.flatten(2), (3, 5)) == 0
    assert compare(lambda x: pick(x, 2), lambda x: x[:, :, 2], (4, 3)) == 0
    assert compare(lambda x: pick(x, 2), lambda x: x[:, :, 1], (4, 3)) > 0.1


@pytest.mark.parametrize("heads", [1, 3])
def test_rotation(heads: int, compare: Any) -> None:
    shapes = ((heads, 10), (5,), (5,))
    assert compare(operator("rotate"), ours.rotate, *shapes) < 1e-6
    assert compare(operator("rotate"), lambda x, c, s: ours.rotate(x, s, c), *shapes) > 0.1


@pytest.mark.parametrize(
    ("dtype", "group", "inputs"),
    [("fp32", 0, 33), ("int8", 0, 33), ("int4", 32, 96), ("int4", 96, 96), ("int4", 0, 34)],
)
def test_linear(dtype: str, group: int, inputs: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "weight": rng.normal(size=(7, inputs)).astype(np.float32),
        "bias": rng.normal(size=7).astype(np.float32),
    }
    store = Weights(tmp_path, weights)
    store.dtype, store.group = dtype, group
    linear = operator("linear")
    write(
        lambda x: linear(x, "weight", "bias", 7),
        (torch.zeros(1, 5, inputs),),
        tmp_path / "model.pte",
        store,
    )
    for count in (9, 1):
        x = torch.tensor(rng.normal(size=(1, count, inputs)).astype(np.float32))
        got = run(tmp_path / "model.pte", x)
        want = F.linear(x, torch.tensor(store.rounded["weight"]), torch.tensor(weights["bias"]))
        # With rounded weights, inputs are rounded to 8 bits too. Else sums may go in any order:
        # each of their terms is off by a part in 2**23 at most.
        terms = F.linear(x.abs(), torch.tensor(store.rounded["weight"]).abs())
        most = terms * 2.0**-22 if dtype == "fp32" else 0.4
        assert ((got - want).abs() < most).all()
        if dtype == "int4":
            exact = F.linear(x, torch.tensor(weights["weight"]), torch.tensor(weights["bias"]))
            assert (got - want).abs().mean() < 0.5 * (got - exact).abs().mean()


@pytest.mark.parametrize("scale", [0.5, 2.0**-6, 0.03, 1e-4])
def test_activations_are_rounded_half_to_even(scale: float, tmp_path: Path) -> None:
    rounded = operator("round_activation")
    store = Weights(tmp_path, {"scale": np.float32([scale])})
    path = tmp_path / "model.pte"
    write(lambda x: rounded(x, "scale"), (torch.zeros(1, 5, 303),), path, store)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 303, generator=generator) * scale * 60
    halves = torch.arange(-151, 152) + 0.5
    x[0, 0] = halves * scale
    got = run(path, x)
    want = gemma_quant.apply_srq(x, torch.tensor(scale))
    # A conversion multiplies by 1 / scale: where that is not exact, a half is no half any more.
    exact = slice(0 if scale in (0.5, 2.0**-6) else 1, None)
    assert torch.equal(got[:, exact], want[:, exact])
    assert not torch.equal(x[:, exact], want[:, exact])
    assert (got - want).abs().max() <= 1.01 * scale


@pytest.mark.parametrize(("dtype", "inputs"), [("int8", 33), ("int4", 34), ("int4", 256)])
def test_products_of_rounded_activations_are_exact(dtype: str, inputs: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("before", "after")
    weights = {"weight": rng.normal(size=(40, inputs)).astype(np.float32)}
    weights |= {name: np.float32([scale]) for name, scale in zip(names, (0.03, 0.2), strict=True)}
    linear, rounded = operator("linear"), operator("round_activation")
    x = torch.tensor(rng.normal(size=(1, 9, inputs)).astype(np.float32))

    def run_with(group: int, output: str) -> Tensor:
        store = Weights(tmp_path, weights)
        store.dtype, store.group = dtype, group

        def function(x: Tensor) -> Tensor:
            outputs = linear(rounded(x, "before"), "weight", "", 40)
            return rounded(outputs, output) if output else outputs

        write(function, (torch.zeros(1, 5, inputs),), tmp_path / "model.pte", store)
        before, after = (torch.tensor(weights[name]) for name in names)
        outputs = F.linear(gemma_quant.apply_srq(x, before), torch.tensor(store.rounded["weight"]))
        want = gemma_quant.apply_srq(outputs, after) if output else outputs
        return (run(tmp_path / "model.pte", x) - want).abs()

    assert run_with(0, "after").max() < 1e-5
    # The control: where the output has no scale, the input is rounded once more.
    assert run_with(0, "").max() > 1e-3


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_negative_scales_are_found_before_a_bundle_is_sealed(dtype: str, tmp_path: Path) -> None:
    weights = {"weight": np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)}
    linear, path = operator("linear"), tmp_path / "model.pte"
    for sign in (1.0, -1.0):
        store = Weights(tmp_path, weights)
        store.dtype, store.sign = dtype, sign
        write(lambda x: linear(x, "weight", "", 4), (torch.zeros(1, 5, 32),), path, store)
        if sign > 0:
            check_loads(path)
            continue
        with pytest.raises(CheckFailed, match=r"model\.pte` was written and cannot be loaded"):
            check_loads(path)


def test_nothing_stays_from_one_program_to_the_next(tmp_path: Path) -> None:
    """Values of a graph that is gone must not be taken for those of one at the same address."""
    linear, x = operator("linear"), torch.ones(1, 2, 3)
    for factor in (1.0, 2.0, 3.0):
        weights = {"weight": np.full((2, 3), factor, np.float32)}
        path = tmp_path / f"{factor}.pte"
        write(
            lambda x: linear(x, "weight", "", 2),
            (torch.zeros(1, 5, 3),),
            path,
            Weights(tmp_path, weights),
        )
        gc.collect()
        assert (run(path, x) == 3 * factor).all()


def test_a_lowering_without_weights_is_our_own_bug(tmp_path: Path) -> None:
    from pleexport.backends.executorch.store import active_store

    with pytest.raises(LookupError):
        active_store()
