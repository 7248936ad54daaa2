"""The ExecuTorch backend: what it computes, stores and refuses, against the original and ONNX."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import gemma4
from conftest import (
    SAMPLES,
    TOLERANCE,
    check_every_way_to_feed,
    original_of,
    relative_error,
)
from family_checkpoints import embformer, lckv, llama_value_embeddings
from rwkv_checkpoints import rwkv
from test_parity import VARIATIONS
from test_verification import break_blob, swap_layers

import pleexport
from pleexport import families
from pleexport.backends import registry
from pleexport.backends.executorch import session as executorch_session
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.errors import (
    BundleError,
    CheckpointError,
    InputError,
    MissingDependencyError,
    TargetError,
    UnsupportedError,
)
from pleexport.export.options import resolve
from pleexport.export.plan import make_plan
from pleexport.parity import layers
from pleexport.show.html import write_html

pytest.importorskip("executorch", reason="pip install 'pleexport[executorch]'")

FAMILIES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "gemma4": (gemma4, {}),
    "gemma4, windows of 1, biases, no sharing": VARIATIONS[
        "gemma4 without sharing, softcap or tie"
    ],
    "gemma4, odd widths, windows beyond the text, silu": VARIATIONS["gemma4 with keys as values"],
    "gemma3n, odd widths": VARIATIONS["gemma3n uneven widths"],
    "embformer": (
        embformer,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "lckv, a token at a time": (lckv, {"layer_types": "0_3s_3_3s_4", "sliding_window": 5}),
    "llama_value_embeddings": (llama_value_embeddings, {}),
}


def build(checkpoint: Path, out: Path, **options: Any) -> pleexport.Bundle:
    """An ExecuTorch bundle; exact unless told otherwise, not verified."""
    exact = {"table_dtype": "source", "weight_dtype": "fp32", "verify": False}
    return pleexport.build(checkpoint, out, backend="executorch", **(exact | options))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other slow small models down tenfold where tests run abreast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle of `gemma4_checkpoint`; read only."""
    return build(gemma4_checkpoint, tmp_path_factory.mktemp("executorch") / "gemma4").path


@pytest.fixture
def broken(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to break."""
    return Path(shutil.copytree(bundle, tmp_path / "broken"))


# One of each kind belongs to `make test`; the whole build that passes parity there is a gemma4.
SLOW = {
    "gemma4",
    "gemma4, windows of 1, biases, no sharing",
    "gemma4, odd widths, windows beyond the text, silu",
    "gemma3n, odd widths",
    "llama_value_embeddings",
    "lckv, a token at a time",
}
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES]


@pytest.mark.parametrize("name", EACH)
def test_logits_agree_with_the_original(name: str, tmp_path: Path) -> None:
    make, changes = FAMILIES[name]
    folder = make(tmp_path / "checkpoint", **changes)
    check_every_way_to_feed(build(folder, tmp_path / "bundle"), original_of(folder).logits)


def test_a_build_passes_parity_layer_by_layer(
    gemma3n_checkpoint: Path, gemma3n_bundle: Path, tmp_path: Path
) -> None:
    made = build(gemma3n_checkpoint, tmp_path / "bundle", verify=True)
    report = json.loads((made.path / "parity.json").read_text())
    assert made.manifest.parity.passed
    assert max(check["max_error"] / check["logit_range"] for check in report["logits"]) < TOLERANCE
    assert len(report["layer_errors"]) == 6
    assert max(report["layer_errors"]) < TOLERANCE
    blob = "embeddings.safetensors"
    assert (made.path / blob).read_bytes() == (gemma3n_bundle / blob).read_bytes()


@pytest.mark.slow
def test_hidden_values_of_large_bundles_are_looked_at_where_logits_differ(
    broken: Path, gemma4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_LARGE_GRAPH_BYTES", 0)
    report = pleexport.verify(broken, checkpoint=gemma4_checkpoint)
    assert report is not None
    assert report.passed
    assert report.layer_errors == ()
    write_html(report, broken, tmp_path / "report.html")
    assert "<h2>Layers</h2>" not in (tmp_path / "report.html").read_text()

    break_blob(broken, lambda rows: swap_layers(rows, broken, 2, 4))
    report = pleexport.verify(broken, checkpoint=gemma4_checkpoint)
    assert report is not None
    assert report.first_diverging_layer == 2
    write_html(report, broken, tmp_path / "report.html")
    assert "<h2>Layers</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("weight_dtype", "most"), [("int8", 4e-4), ("int4", 4e-3)])
def test_rounded_weights_cost_little_and_have_the_planned_size(
    weight_dtype: str, most: float, tmp_path: Path
) -> None:
    options = {"table_dtype": "source", "weight_dtype": weight_dtype, "block_size": 64}
    made = build(SAMPLES / "gemma4-kjv", tmp_path / "bundle", verify=True, **options)
    report = json.loads((made.path / "parity.json").read_text())
    divergence = next(f["kl"] for f in report["fidelity"] if f["what"] == "dense")
    # The control: something was rounded.
    assert most / 100 < divergence < most
    source = Checkpoint(SAMPLES / "gemma4-kjv")
    settings = resolve({"backend": "executorch", **options})
    planned = make_plan(families.resolve(source), settings, source="bf16").sizes["model.pte"]
    # The program's structure comes on top, and constants in steps of 16 bytes.
    assert 0 < (made.path / "model.pte").stat().st_size - planned < 500_000


def test_logits_and_text_are_those_of_onnx(bundle: Path, gemma4_bundle: Path) -> None:
    blob = "embeddings.safetensors"
    assert (bundle / blob).read_bytes() == (gemma4_bundle / blob).read_bytes()
    texts, logits, prompt = [], [], [5, 17, 40, 3]
    for path in (bundle, gemma4_bundle):
        runner = pleexport.Runner(path)
        logits.append(runner.logits([(7 * i) % 120 for i in range(80)]))
        texts.append([t.id for t in runner.generate(prompt, max_new_tokens=40, ignore_eos=True)])
        again = [t.id for t in runner.generate(prompt, max_new_tokens=40, ignore_eos=True)]
        assert again == texts[-1]
    assert texts[0] == texts[1]
    assert 0 < relative_error(*logits) < TOLERANCE


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(
    bundle: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    again = build(gemma4_checkpoint, tmp_path / "again").path
    other = build(gemma4_checkpoint, tmp_path / "other", context=512).path
    digests = [
        hashlib.sha256((path / "model.pte").read_bytes()).hexdigest()
        for path in (bundle, again, other)
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_the_contract_says_what_the_program_takes(bundle: Path) -> None:
    contract = pleexport.Bundle(bundle).decoder.contract
    assert contract.id == "pleexport.executorch/1"
    assert contract.bounds == {
        "sequence_length": 256,
        "num_logits": 16,
        "context_capacity": 2048,
        "window_capacity": 8 - 1 + 256,
    }
    assert [cache.shape[1] for cache in contract.caches[:2]] == ["window_capacity"] * 2


# What is refused, before anything is written.


def refusal(checkpoint: Path, **options: Any) -> str:
    source = Checkpoint(checkpoint)
    settings = resolve({"backend": "executorch", "weight_dtype": "fp32", **options})
    model = families.resolve(source).with_cache(settings.cache_dtype)
    with pytest.raises((TargetError, UnsupportedError)) as raised:
        make_plan(model, settings, source=source.dtype)
    assert raised.value.hint is not None
    return raised.value.message


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_narrow_caches_are_refused(dtype: str, gemma4_checkpoint: Path) -> None:
    assert refusal(gemma4_checkpoint, cache_dtype=dtype) == (
        f"ExecuTorch's attention takes keys and values in fp32 only, not {dtype}"
    )


def test_no_cache_is_refused(tmp_path: Path) -> None:
    folder = embformer(tmp_path / "checkpoint")
    assert "keys and values have to be kept" in refusal(folder, cache_dtype="none")


def test_half_precision_weights_are_refused(gemma4_checkpoint: Path) -> None:
    assert "not fp16" in refusal(gemma4_checkpoint, weight_dtype="fp16")
    assert "not fp16" in refusal(gemma4_checkpoint, head_dtype="fp16")


def test_zero_points_are_refused(gemma4_checkpoint: Path) -> None:
    assert "`--no-symmetric` asks for zero points" in refusal(
        gemma4_checkpoint, weight_dtype="int4", symmetric=False
    )


def test_a_recurrence_is_refused(tmp_path: Path) -> None:
    path = rwkv(tmp_path / "checkpoint.pth", "7a")
    assert refusal(path).startswith("ExecuTorch has no operator for the recurrence of `rwkv")


def test_a_folder_for_packed_weights_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keeps no packed weights"):
        pleexport.Runner(bundle, packed_weights=tmp_path)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = llama_value_embeddings(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("fp32", "int8"):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight` has nan at \[3, 2\]"):
            build(folder, tmp_path / "bundle", weight_dtype=dtype)
    assert not (tmp_path / "bundle").exists()


# What is missing or damaged.


def test_a_missing_extra_names_its_command(
    bundle: Path, gemma4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "executorch":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for use in (
        lambda: build(gemma4_checkpoint, tmp_path / "bundle"),
        lambda: pleexport.Runner(bundle),
    ):
        with pytest.raises(MissingDependencyError) as raised:
            use()
        assert (
            raised.value.message
            == "the backend `executorch` needs executorch 1.5.1, which is not installed"
        )
        assert raised.value.hint == "pip install 'pleexport[executorch]'"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.0")
    with pytest.raises(MissingDependencyError, match=r"1\.5\.1, and 1\.4\.0 is installed"):
        pleexport.Runner(bundle)


def session(folder: Path, **options: Any) -> Any:
    graph = pleexport.Bundle(folder).decoder
    arguments = {"context": 64, "threads": 0, "packed_weights": None, "checksums": None} | options
    return registry.load("executorch").open_session(folder, graph, **arguments)


def test_a_missing_or_damaged_program_is_an_error(broken: Path) -> None:
    session(broken)
    opened = pleexport.Bundle(broken)
    path = broken / "model.pte"
    whole = path.read_bytes()
    for damaged in (None, b"", whole[:100], whole[: len(whole) // 2], b"\0" * len(whole)):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"model\.pte` cannot be loaded"):
            registry.load("executorch").open_session(
                broken, opened.decoder, context=64, threads=0, packed_weights=None, checksums=None
            )


OPEN = """
import sys
from pathlib import Path
from flatbuffers.table import Table
import pleexport
from pleexport.errors import BundleError

folder, damage = Path(sys.argv[1]), sys.argv[2]
path = folder / "model.pte"
data = bytearray(path.read_bytes())
root = int.from_bytes(data[:4], "little")
places = {"none": root, "identifier": 4, "offset": root + 4}
program = Table(data, root)
plan = Table(data, program.Indirect(program.Vector(program.Offset(6))))
# Fields of executorch/exir/_serialize/program.fbs, the first of each list.
places |= {"input": plan.Vector(plan.Offset(10)), "output": plan.Vector(plan.Offset(12))}
if damage != "none":
    data[places[damage] : places[damage] + 4] = bytes([255, 255, 255, 127])
path.write_bytes(data)
try:
    pleexport.Runner(folder, threads=1, verify=False).logits([1, 2, 3])
except BundleError as err:
    print(err.message)
"""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("none", ""),
        ("identifier", "is no program"),
        ("offset", "cannot be loaded"),
        ("input", "cannot be loaded: Cannot get input tensor meta at 0"),
        ("output", "cannot be loaded: Cannot get output tensor meta at 0"),
    ],
)
def test_a_crafted_program_ends_no_process_and_nothing_is_logged(
    damage: str, said: str, broken: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(broken), damage],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in done.stdout
    assert done.stderr == ""


def test_a_program_that_fails_while_it_runs_is_an_error_and_nothing_is_logged(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vectors = {
        lookup.name: np.ones((3, *(n + 1 for n in lookup.shape[2:])), np.float32)  # type: ignore[operator]
        for lookup in pleexport.Bundle(bundle).decoder.contract.lookup_inputs
    }
    with pytest.raises(BundleError, match=r"model\.pte` cannot be run: "):
        session(bundle).feed(vectors, 3, keep=1)
    assert capfd.readouterr().err == ""


def test_temporary_folders_lie_where_the_next_build_cleans_up(
    gemma4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def recorded(*arguments: Any, **options: Any) -> str:
        made.append(Path(make(*arguments, **options)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", recorded)
    build(gemma4_checkpoint, tmp_path / "bundle")
    ours = (".bundle.partial-", "pleexport-scratch-")
    elsewhere = [path for path in made if not any(own in str(path) for own in ours)]
    assert elsewhere == []
    assert len(made) > 10  # a folder for each delegate among them


@pytest.mark.parametrize("meta", [((1, 16, 99), 6), ((16, 100), 6), ((1, 16, 100), 15)])
def test_what_a_program_gives_are_logits(
    meta: tuple[tuple[int, ...], int], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, dtype = meta
    vocab = pleexport.Bundle(bundle).decoder.contract.vocab_size
    sizes = tuple(vocab if n == 100 else n for n in sizes)
    other = SimpleNamespace(sizes=lambda: sizes, dtype=lambda: dtype)
    real = executorch_session._are_logits
    monkeypatch.setattr(executorch_session, "_are_logits", lambda _, vocab: real(other, vocab))
    with pytest.raises(BundleError, match="the manifest disagree about `logits`"):
        session(bundle)


def test_the_program_of_another_bundle_is_refused(broken: Path, tmp_path: Path) -> None:
    other = build(llama_value_embeddings(tmp_path / "checkpoint"), tmp_path / "other").path
    contract = pleexport.Bundle(broken).decoder
    shutil.copyfile(other / "model.pte", broken / "model.pte")
    with pytest.raises(BundleError, match="disagree about the number of inputs"):
        registry.load("executorch").open_session(
            broken, contract, context=64, threads=0, packed_weights=None, checksums=None
        )


def test_threads_are_the_same_for_all_open_bundles(bundle: Path) -> None:
    gc.collect()
    first = session(bundle, threads=1)
    vectors = {
        lookup.name: np.ones((3, *lookup.shape[2:]), np.float32)  # type: ignore[misc]
        for lookup in pleexport.Bundle(bundle).decoder.contract.lookup_inputs
    }
    before = first.feed(vectors, 3, keep=1)
    with pytest.raises(InputError, match="has 1 threads, and this one asks for 2"):
        session(bundle, threads=2)
    session(bundle, threads=0)  # takes what there is
    first.reset()
    assert np.array_equal(first.feed(vectors, 3, keep=1), before)
    del first
    gc.collect()
    assert relative_error(before, session(bundle, threads=2).feed(vectors, 3, keep=1)) < TOLERANCE
    for impossible in (-1, 257):
        with pytest.raises(InputError, match="must be 0 to 256"):
            session(bundle, threads=impossible)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pleexport.backends.executorch.backend", ("torch", "executorch")),
        ("pleexport.backends.executorch.storage", ("torch", "executorch")),
        ("pleexport.backends.executorch.session", ("pleexport.families", "onnxruntime")),
    ],
)
def test_what_runs_imports_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_text_is_cut_into_calls_of_few_logits() -> None:
    from pleexport.backends.executorch.session import _calls

    for count, wanted in [(1, 1), (256, 1), (256, 16), (256, 17), (17, 17), (40, 33), (5, 5)]:
        calls = list(_calls(count, wanted))
        covered = [i for piece, _ in calls for i in range(piece.start, piece.stop)]
        assert covered == list(range(count))
        kept = [i for piece, n in calls for i in range(piece.stop - n, piece.stop)]
        assert kept[-wanted:] == list(range(count - wanted, count))
        assert all(1 <= n <= 16 for _, n in calls)
    assert len(list(_calls(256, 16))) == 1
