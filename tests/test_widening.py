"""Weights widened where they are used: the same results, and no table in float32."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gemma3n, gemma4, gemma4_multimodal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.parity import widening
from pleexport.parity.oracle import TransformersOracle

UNTIED = {"tie_word_embeddings": False, "attention_bias": True}
CHECKPOINTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "gemma4": (gemma4, {}),
    "gemma4 in float32": (gemma4, {"dtype": torch.float32}),
    "gemma4 in float16": (gemma4, {"dtype": torch.float16}),
    "gemma4 with biases and a head": (gemma4, UNTIED),
    "gemma4 that pads with a late id": (gemma4, {"pad_token_id": 119}),
    "gemma4 with fewer per-layer rows": (gemma4, {"vocab_size_per_layer_input": 90}),
    "gemma4 multimodal": (gemma4_multimodal, {}),
    "gemma3n": (gemma3n, {}),
    "gemma3n with biases and a head": (gemma3n, UNTIED),
}
IDS = [(37 * i) % 89 for i in range(40)]


def original(folder: Path) -> TransformersOracle:
    checkpoint = Checkpoint(folder)
    how = families.resolve(checkpoint).transformers
    assert how is not None
    return TransformersOracle(checkpoint, original=how)


def plain(folder: Path, ids: list[int]) -> tuple[Any, list[Any]]:
    """Logits, and what each layer hands on, of a model that is in float32 as a whole."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    found: list[Any] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return logits, [layer.movedim(0, 2)[0] if layer.ndim == 4 else layer[0] for layer in found]


@pytest.mark.parametrize(
    ("kept_bytes", "block_bytes", "tolerance"),
    [
        (1 << 30, widening.BLOCK_BYTES, 0.0),
        (0, widening.BLOCK_BYTES, 0.0),
        (0, 4 * 32 * 7, 1e-5),  # 7 rows, and fewer at the end: sums may go in another order
    ],
    ids=["all kept", "none kept", "none kept, in blocks"],
)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_original_computes_what_it_computes_when_widened_as_a_whole(
    name: str,
    kept_bytes: int,
    block_bytes: int,
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, changes = CHECKPOINTS[name]
    folder = make(tmp_path / "checkpoint", **changes)
    logits, layers = plain(folder, IDS)
    monkeypatch.setattr(widening, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(widening, "BLOCK_BYTES", block_bytes)
    oracle = original(folder)
    pairs = zip([logits, *layers], [oracle.logits(IDS), *oracle.hidden(IDS)], strict=True)
    for expected, got in pairs:
        spread = float(expected.max() - expected.min())
        assert float((expected - torch.from_numpy(got)).abs().max()) <= tolerance * spread
    # The control: the neighbouring ids differ.
    other = torch.from_numpy(oracle.logits([i + 1 for i in IDS]))
    assert float((logits - other).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gemma4", "gemma3n"])
def test_verification_passes_with_nothing_kept_in_float32(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "KEPT_BYTES", 0)
    report = pleexport.verify(
        request.getfixturevalue(f"{family}_bundle"),
        checkpoint=request.getfixturevalue(f"{family}_checkpoint"),
    )
    assert report is not None
    assert report.passed


@pytest.mark.parametrize("make", [gemma4, gemma3n])
def test_no_table_and_no_head_is_ever_in_float32(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, keep, width = 5000, 4, 32
    sizes = {"vocab_size": rows, "vocab_size_per_layer_input": rows, "hidden_size": width}
    folder = make(tmp_path / "checkpoint", **sizes)

    def largest(kept_bytes: int) -> int:
        monkeypatch.setattr(widening, "KEPT_BYTES", kept_bytes)
        with largest_float32() as sizes:
            oracle = original(folder)
            oracle.logits(IDS, keep=keep)
            oracle.hidden(IDS)
        return max(sizes)

    monkeypatch.setattr(widening, "BLOCK_BYTES", 4 * keep * rows)
    assert largest(1 << 19) == keep * rows, "nothing is larger than the logits"
    # The control: with room for all of it, whole tables are seen.
    assert largest(1 << 30) >= rows * 6 * 8


@contextmanager
def largest_float32() -> Iterator[list[int]]:
    """Collects the numbers of elements of all float32 tensors that are made."""
    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    sizes.append(0 if tensor.is_meta else tensor.untyped_storage().nbytes() // 4)
            return result

    with Recorder():
        yield sizes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_what_is_not_kept_stays_in_the_mapped_file(
    gemma4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "KEPT_BYTES", 0)
    model = original(gemma4_checkpoint)._model
    ranges = [
        [int(address, 16) for address in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(gemma4_checkpoint / "model.safetensors"))
    ]

    def is_mapped(tensor: torch.Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in ranges)

    parameters = list(model.parameters())
    assert all(is_mapped(p) and p.dtype == torch.bfloat16 for p in parameters if p.ndim == 2)
    assert not any(is_mapped(p) for p in parameters if p.ndim == 1), "norms are widened"


def test_weights_that_are_used_in_other_ways_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    monkeypatch.setattr(widening, "KEPT_BYTES", 0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4),
            "tied": Transposed(4, 5, bias=False),
            "linear": nn.Linear(4, 5),
        }
    ).bfloat16()
    model["tied"].weight = model["table"].weight
    widening.widen_where_used(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {
        "table.weight": torch.float32,
        "linear.weight": torch.bfloat16,
        "linear.bias": torch.float32,
    }
