"""Memory as the system tells it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from pleexport.process import Memory, memory, page_faults

STATUS = Path("/proc/self/status")


def from_proc(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="proc(5) is Linux's")
def test_memory_is_what_the_kernel_says() -> None:
    found = memory()
    assert found.anonymous == pytest.approx(from_proc("RssAnon"), rel=0.02)
    shared = from_proc("RssFile") + from_proc("RssShmem")
    assert found.file_backed == pytest.approx(shared, rel=0.02)


def test_memory_of_a_system_that_does_not_tell_the_kinds_apart_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Process:
        def memory_info(self) -> SimpleNamespace:
            return SimpleNamespace(rss=1 << 20, vms=1 << 30)  # as on macOS and Windows

    monkeypatch.setattr(psutil, "Process", Process)
    assert memory() == Memory(None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the kinds apart")
def test_what_is_mapped_is_file_backed(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(32 << 20))
    before = memory()
    mapped = np.memmap(tmp_path / "rows", mode="r")
    assert mapped[::4096].sum() == 0
    after = memory()
    assert before.file_backed is not None
    assert after.file_backed is not None
    assert after.file_backed - before.file_backed >= 0.9 * mapped.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the kinds apart")
def test_what_is_allocated_is_anonymous() -> None:
    before, faults = memory(), page_faults()
    block = np.ones(64 << 20, dtype=np.uint8)
    after = memory()
    assert before.anonymous is not None
    assert after.anonymous is not None
    assert after.anonymous - before.anonymous >= 0.9 * block.nbytes
    assert page_faults()[0] > faults[0]
