"""Checkpoints and bundles that several test files share, built once."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import gemma3n, gemma4
from hypothesis import settings

import pleexport

# The same examples in every run: a failure is one that anybody can repeat.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def gemma4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 4 checkpoint, bf16, without a tokenizer."""
    return gemma4(tmp_path_factory.mktemp("gemma4") / "checkpoint")


@pytest.fixture(scope="session")
def gemma3n_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3n checkpoint, bf16, without a tokenizer."""
    return gemma3n(tmp_path_factory.mktemp("gemma3n") / "checkpoint")


def exact_bundle(checkpoint: Path, out: Path) -> pleexport.Bundle:
    """A bundle with fp32 weights and source tables, not verified."""
    return pleexport.build(checkpoint, out, table_dtype="source", weight_dtype="fp32", verify=False)


@pytest.fixture(scope="session")
def gemma4_bundle(gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle of `gemma4_checkpoint`; read only."""
    return exact_bundle(gemma4_checkpoint, tmp_path_factory.mktemp("bundles") / "gemma4").path


@pytest.fixture(scope="session")
def gemma3n_bundle(gemma3n_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact bundle of `gemma3n_checkpoint`; read only."""
    return exact_bundle(gemma3n_checkpoint, tmp_path_factory.mktemp("bundles") / "gemma3n").path
