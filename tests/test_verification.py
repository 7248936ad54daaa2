"""Verification passes sound bundles and catches broken ones, naming the layer."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from checkpoints import gemma4
from conftest import original_of
from resealed import change_header, change_rows, fit_manifest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import pleexport
from pleexport.errors import CheckFailed
from pleexport.families import gemma
from pleexport.parity.greedy import check_greedy
from pleexport.parity.metrics import logit_range
from pleexport.runtime.blob import Blob
from pleexport.runtime.generation_config import GenerationConfig as GenerationDefaults
from pleexport.show.html import write_html
from pleexport.show.parity import describe_parity


@pytest.mark.parametrize("family", ["gemma4", "gemma3n"])
def test_an_exact_bundle_passes_every_level(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = request.getfixturevalue(f"{family}_bundle")
    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    report = pleexport.verify(bundle, checkpoint=checkpoint)
    assert report is not None
    assert report.passed
    assert report.exact
    assert [check.mode for check in report.logits] == ["prefill", "chunked", "step"]
    assert report.max_logit_error < 1e-4
    assert all(check.lossless and check.max_error == 0 for check in report.tables)
    assert report.text is not None
    assert report.text.equal_tokens == report.text.tokens == 32
    assert report.first_diverging_layer is None
    assert "PASSED" in describe_parity(report)
    write_html(report, bundle, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "PASSED" in page
    assert page.count("<svg") == 2
    write_html(report, bundle, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
    assert mpl.rcParams["svg.hashsalt"] is None, "other people's plots are theirs"


def break_blob(bundle: Path, change: Callable[[Any], None]) -> None:
    """Change the rows of a blob, and make its checksums and the manifest fit again."""
    change_rows(bundle / "embeddings.safetensors", change)
    fit_manifest(bundle)


def swap_layers(rows: Any, bundle: Path, first: int, second: int) -> None:
    segments = {s.name: s for s in Blob(bundle / "embeddings.safetensors").segments}
    a, b = (segments[f"embed_tokens_per_layer.{i}"] for i in (first, second))
    left = rows[:, a.offset : a.end].copy()
    rows[:, a.offset : a.end] = rows[:, b.offset : b.end]
    rows[:, b.offset : b.end] = left


@pytest.fixture
def broken(gemma4_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to break."""
    return Path(shutil.copytree(gemma4_bundle, tmp_path / "broken"))


def test_rows_shifted_by_one_token_fail_at_the_first_layer(
    broken: Path, gemma4_checkpoint: Path
) -> None:
    def shift(rows: Any) -> None:
        rows[:] = np.roll(rows, 1, axis=0)

    break_blob(broken, shift)
    report = pleexport.verify(broken, checkpoint=gemma4_checkpoint)
    assert report is not None
    assert not report.passed
    assert report.first_diverging_layer == 0
    assert "token id 0" in report.failures[0]
    lines = describe_parity(report).splitlines()
    assert "layer 0 is the first that diverges" in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100


def test_a_swapped_segment_fails_at_its_layer(broken: Path, gemma4_checkpoint: Path) -> None:
    break_blob(broken, lambda rows: swap_layers(rows, broken, 2, 4))
    report = pleexport.verify(broken, checkpoint=gemma4_checkpoint)
    assert report is not None
    assert not report.passed
    assert report.first_diverging_layer == 2
    assert "layer 2 is not the source" in report.failures[0]


def test_a_scale_applied_twice_fails(broken: Path, gemma4_checkpoint: Path) -> None:
    path = broken / "embeddings.safetensors"

    def square(header: dict[str, Any]) -> None:
        listed = json.loads(header["__metadata__"]["segments"])
        for segment in listed:
            if segment["table"] == "embed_tokens_per_layer":
                segment["multiplier"] **= 2
        header["__metadata__"]["segments"] = json.dumps(listed)

    change_header(path, square)
    break_blob(broken, lambda rows: None)
    report = pleexport.verify(broken, checkpoint=gemma4_checkpoint)
    assert report is not None
    assert not report.passed
    assert report.first_diverging_layer == 0


@pytest.mark.parametrize("weight_dtype", ["fp32", "int8"])
def test_keys_shared_from_the_wrong_layer_fail_at_the_sharing_layer(
    weight_dtype: str, gemma4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gemma.kv_layers

    def wrong(layer_types: list[str], shared: int) -> list[int]:
        # Layer 3, the first that shares, reads layer 0 instead of layer 1.
        return [0 if i == 3 else source for i, source in enumerate(real(layer_types, shared))]

    monkeypatch.setattr(gemma, "kv_layers", wrong)
    with pytest.raises(CheckFailed, match="layer 3 is the first that diverges"):
        pleexport.build(
            gemma4_checkpoint, tmp_path / "out", table_dtype="source", weight_dtype=weight_dtype
        )
    assert not list(tmp_path.glob("*out*")), "a bundle that fails is not kept"


def test_rows_that_are_no_numbers_fail(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(gemma4_checkpoint, tmp_path / "out", table_dtype="int8", verify=False)
    segment = Blob(bundle.blob_paths).segments[0]
    assert segment.scale_offset is not None

    def poison(rows: Any) -> None:
        rows[:2, segment.scale_offset : segment.end].view(np.uint16)[:] = 0x7E00

    break_blob(bundle.path, poison)
    report = pleexport.verify(bundle.path, checkpoint=gemma4_checkpoint)
    assert report is not None
    (check,) = [check for check in report.tables if check.table == segment.table]
    assert check.first_bad_row == 0


def test_a_window_that_is_ignored_fails_also_where_it_is_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pleexport import operators

    folder = gemma4(tmp_path / "checkpoint", sliding_window=400)
    real = operators.attention_bias
    monkeypatch.setattr(
        operators,
        "attention_bias",
        lambda *args, **options: real(*args, **options | {"window": None}),
    )
    with pytest.raises(CheckFailed, match="logits"):
        pleexport.build(folder, tmp_path / "out", table_dtype="source", weight_dtype="fp32")


def test_greedy_text_is_what_the_original_generates(
    gemma4_checkpoint: Path, gemma4_bundle: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(gemma4_checkpoint, dtype="auto").float().eval()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=32, pad_token_id=0)
    model.generation_config = greedy
    with torch.no_grad():
        generated = model.generate(torch.tensor([[3, 4, 5]]), generation_config=greedy)
    runner = pleexport.Runner(gemma4_bundle)
    got = [t.id for t in runner.generate([3, 4, 5], max_new_tokens=32, ignore_eos=True)]
    assert got == generated[0, 3:].tolist()


@pytest.mark.parametrize(
    ("lowered", "equal", "near_tie"), [(0.0, 32, False), (0.5, 7, False), (5e-6, 7, True)]
)
def test_the_first_token_that_the_original_would_not_write_is_found(
    lowered: float, equal: int, near_tie: bool, gemma4_checkpoint: Path, gemma4_bundle: Path
) -> None:
    oracle = original_of(gemma4_checkpoint)

    class Changed:
        """The original, which likes another token better in place of the one at place 7."""

        name = "changed"
        hidden = oracle.hidden

        def logits(self, token_ids: Any, vectors: Any = None, *, keep: int = 0) -> Any:
            logits = oracle.logits(token_ids, vectors, keep=keep)
            if lowered:
                best, second = np.argsort(logits[7])[[-1, -2]]
                logits[7, best] = logits[7, second] - lowered * np.ptp(logits)
            return logits

    prompt = [3, 4, 5]
    check = check_greedy(
        pleexport.Runner(gemma4_bundle),
        oracle=Changed(),
        prompt=prompt,
        logit_range=logit_range(oracle.logits(prompt)),
    )
    assert check is not None
    assert (check.tokens, check.equal_tokens, check.near_tie) == (32, equal, near_tie)


def test_greedy_parity_does_not_sample_as_the_checkpoint_would(
    gemma4_checkpoint: Path, gemma4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = original_of(gemma4_checkpoint)
    runner = pleexport.Runner(gemma4_bundle)
    sampling = GenerationDefaults(do_sample=True, temperature=5.0)
    manifest = msgspec.structs.replace(runner.bundle.manifest, generation=sampling)
    monkeypatch.setattr(runner.bundle, "manifest", manifest)
    check = check_greedy(runner, oracle=oracle, prompt=[3, 4, 5], logit_range=60.0)
    assert check is not None
    assert check.equal_tokens == 32
    # The control: left alone, it samples.
    sampled = [t.id for t in runner.generate([3, 4, 5], max_new_tokens=32, seed=0)]
    assert sampled != [t.id for t in runner.generate([3, 4, 5], max_new_tokens=32, greedy=True)]


def test_a_text_ends_with_an_id_that_has_no_row(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "checkpoint", vocab_size_per_layer_input=90)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    head[100] *= 20  # one of the two is always the best
    head[101] = -head[100]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bundle = pleexport.build(
        folder, tmp_path / "out", table_dtype="source", weight_dtype="fp32", context=64
    )
    text = json.loads((bundle.path / "parity.json").read_text())["text"]
    assert text == {"tokens": 1, "equal_tokens": 1, "near_tie": False}
    runner = pleexport.Runner(bundle)
    assert [t.id for t in runner.generate([3, 4, 5])] in ([100], [101])
    assert runner.stats.finish_reason == "no row"
    # The control: another id than the original's is a difference still, with a row or without.
    oracle = original_of(folder)

    class Swapped:
        name = "swapped"
        hidden = oracle.hidden

        def logits(self, token_ids: Any, vectors: Any = None, *, keep: int = 0) -> Any:
            logits = oracle.logits(token_ids, vectors, keep=keep)
            logits[:, [100, 101]] = logits[:, [101, 100]]
            return logits

    check = check_greedy(
        pleexport.Runner(bundle), oracle=Swapped(), prompt=[3, 4, 5], logit_range=60.0
    )
    assert check is not None
    assert (check.tokens, check.equal_tokens, check.near_tie) == (1, 0, False)


def test_dense_weights_are_in_memory_once(
    gemma4_checkpoint: Path, gemma4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    opened = []

    class Session(ort.InferenceSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            alive.add(self)
            opened.append((len(alive), [output.name for output in self.get_outputs()]))

    monkeypatch.setattr(ort, "InferenceSession", Session)
    pleexport.verify(gemma4_bundle, checkpoint=gemma4_checkpoint)
    # One session for logits, and then one for the layers, which needs no head.
    assert [(count, "logits" in outputs) for count, outputs in opened] == [(1, True), (1, False)]


def test_damaged_rows_are_found_without_the_checkpoint(broken: Path) -> None:
    path = broken / "embeddings.safetensors"
    raw = bytearray(path.read_bytes())
    raw[Blob(path).rows_offset + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckFailed, match="does not match its digest"):
        pleexport.verify(broken)
