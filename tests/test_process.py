"""Memory as the system tells it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pleexport.process import memory, page_faults

STATUS = Path("/proc/self/status")


def from_proc(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="proc(5) is Linux's")
def test_memory_is_what_the_kernel_says() -> None:
    found = memory()
    assert found.anonymous == pytest.approx(from_proc("RssAnon"), rel=0.02)
    assert found.file_backed == pytest.approx(from_proc("RssFile"), rel=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the kinds apart")
def test_what_is_allocated_is_anonymous() -> None:
    before, faults = memory(), page_faults()
    block = np.ones(64 << 20, dtype=np.uint8)
    after = memory()
    assert before.anonymous is not None
    assert after.anonymous is not None
    assert after.anonymous - before.anonymous >= 0.9 * block.nbytes
    assert page_faults()[0] > faults[0]
