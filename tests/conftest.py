"""Checkpoints and bundles that several test files share, built once."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import gemma3n, gemma4
from hypothesis import settings
from numpy.typing import NDArray

import pleexport
from pleexport import families
from pleexport.backends.onnx import files, lower, storage
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.parity.oracle import Oracle, open_oracle
from pleexport.program import Program

# Tests run side by side, and threads that wait for each other slow small models down tenfold.
torch.set_num_threads(1)

# Where tools of other languages are missing, tests that need them fail instead of being skipped.
TOOLS_ARE_REQUIRED = bool(os.environ.get("CI") or os.environ.get("PLEEXPORT_REQUIRE_TOOLS"))
SAMPLES = Path(__file__).parents[1] / "samples"
TOLERANCE = 1e-4  # of the range of the logits

# The same examples in every run: a failure is one that anybody can repeat.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def need(*tools: str, why: str) -> None:
    """Skip a test where one of the tools is missing, and say so; fail where tools are required."""
    if not all(map(shutil.which, tools)):
        assert not TOOLS_ARE_REQUIRED, why
        pytest.skip(why)


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_session() -> Iterator[None]:
    """Let ONNX Runtime take one thread where a test asks for no number of them."""
    of_threads = files.session_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "session_options", lambda threads, **o: of_threads(threads or 1, **o))
        yield


@pytest.fixture(scope="session", autouse=True)
def each_program_translated_once() -> Iterator[None]:
    """Keep what traced programs become in ONNX: most of a small build is spent on that.

    Programs that are alike to the letter, the values of their constants included, become the same.
    Nodes that weights add to a copy are numbered otherwise, which is all that differs.
    """
    translate, kept = lower.translate, {}

    @wraps(translate)
    def once(program: Program) -> ir.Model:
        exported = program.exported
        values = [(name, repr(value)) for name, value in exported.constants.items()]
        rest = (program.contract, program.arguments, program.results, program.hidden)
        alike = repr((str(exported), values, rest))
        if alike not in kept:
            kept[alike] = translate(program)
        return kept[alike].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "translate", once)
        yield


@pytest.fixture(scope="session")
def gemma4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 4 checkpoint, bf16, without a tokenizer."""
    return gemma4(tmp_path_factory.mktemp("gemma4") / "checkpoint")


@pytest.fixture(scope="session")
def gemma3n_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3n checkpoint, bf16, without a tokenizer."""
    return gemma3n(tmp_path_factory.mktemp("gemma3n") / "checkpoint")


def exact_bundle(
    checkpoint: Path, out: Path, *, cache_dtype: str | None = None
) -> pleexport.Bundle:
    """A bundle with fp32 weights and source tables, not verified."""
    return pleexport.build(
        checkpoint,
        out,
        table_dtype="source",
        weight_dtype="fp32",
        cache_dtype=cache_dtype,
        verify=False,
    )


def gpu_bundle_of(checkpoint: Path, out: Path) -> pleexport.Bundle:
    """The same with a graph for a GPU."""
    exact = {"table_dtype": "source", "weight_dtype": "fp32", "verify": False}
    return pleexport.build(checkpoint, out, target="web-gpu", **exact)


def original_of(folder: Path) -> Oracle:
    """The PyTorch original of a checkpoint."""
    checkpoint = Checkpoint(folder)
    return open_oracle(MatchedModel(families.resolve(checkpoint), checkpoint))


@pytest.fixture(scope="session")
def gemma4_bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle of `gemma4_checkpoint`; read only."""
    return exact_bundle(gemma4_checkpoint, tmp_path_factory.mktemp("bundles") / "gemma4").path


@pytest.fixture(scope="session")
def gpu_bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle of `gemma4_checkpoint` with a graph for a GPU; read only."""
    return gpu_bundle_of(gemma4_checkpoint, tmp_path_factory.mktemp("bundles") / "gpu").path


# Bytes of a file of weights in `many_files_bundle`.
MANY_FILES_LIMIT = 8192


@pytest.fixture(scope="session")
def many_files_bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in int8 whose head is tied and whose weights lie in many files; read only."""
    out = tmp_path_factory.mktemp("bundles") / "many-files"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LARGEST_DATA_FILE", MANY_FILES_LIMIT)
        int8 = {"table_dtype": "int8", "weight_dtype": "int8", "head_dtype": "int8"}
        return pleexport.build(gemma4_checkpoint, out, **int8, verify=False).path


@pytest.fixture(scope="session")
def gemma3n_bundle(gemma3n_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle of `gemma3n_checkpoint`; read only."""
    return exact_bundle(gemma3n_checkpoint, tmp_path_factory.mktemp("bundles") / "gemma3n").path


def check_every_way_to_feed(
    bundle: pleexport.Bundle, original: Callable[[list[int]], NDArray[np.float32]]
) -> None:
    """An exact bundle gives the original's logits at once, in pieces and token by token.

    Args:
        original: logits `[T, vocab]` of T ids.
    """
    runner = pleexport.Runner(bundle)
    ids = np.random.default_rng(1).integers(0, runner.blob.num_rows, 300).tolist()
    ids[180:250] = [ids[180]] * 70  # rounding errors add up where tokens are alike
    expected = original(ids)

    assert relative_error(expected, runner.logits(ids)) < TOLERANCE  # chunks of 256 and 44
    for cuts in (range(301), [0, 1, 8, 9, 40, 41, 150, 300]):
        runner.reset()
        pieces = []
        for begin, end in itertools.pairwise(cuts):
            for piece in np.split(np.arange(begin, end), range(0, end - begin, runner.chunk))[1:]:
                pieces.append(runner.feed([ids[i] for i in piece], keep=0).copy())
        assert relative_error(expected, np.concatenate(pieces)) < TOLERANCE
    # Logits of some positions only must not change what the next ones see.
    runner.reset()
    runner.feed(ids[: runner.chunk], keep=1)
    after = slice(min(runner.chunk, 256), min(runner.chunk, 256) + min(runner.chunk, 40))
    assert relative_error(expected[after], runner.feed(ids[after], keep=0)) < TOLERANCE
    check_going_back(runner, ids, expected)
    # The control: rows of the neighbouring token must not pass.
    shifted = [(i + 1) % runner.blob.num_rows for i in ids]
    assert relative_error(expected, runner.logits(shifted)) > 100 * TOLERANCE


def check_going_back(
    runner: pleexport.Runner, ids: list[int], expected: NDArray[np.float32]
) -> None:
    """Guesses that are read and taken back, any number of times, leave no trace."""
    reader, chosen, done = runner._reader, np.random.default_rng(2), 0
    runner.reset()
    while done < len(ids):
        reader.forget_guesses()
        unread = done - len(reader.ids)
        new = min(int(chosen.integers(1, 30)), len(ids) - done, runner.chunk)
        room = min(runner.chunk - unread, runner.context - done) - new
        guessed = int(chosen.integers(0, room + 1)) if room > 0 and unread < 100 else 0
        guesses = chosen.integers(0, runner.blob.num_rows, guessed).tolist()
        fed = [*ids[len(reader.ids) : done + new], *guesses]
        last_call = len(fed) % runner.chunk or runner.chunk
        keep = min(last_call, guessed + new)
        logits = reader.read(fed, keep=keep, guessed=guessed)
        got = logits[: len(logits) - guessed]
        done += new
        assert relative_error(expected[done - len(got) : done], got) < TOLERANCE


def relative_error(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Largest difference, as a share of the range of the logits."""
    return float(np.abs(expected - got).max() / (expected.max() - expected.min()))
