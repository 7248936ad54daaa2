"""A fixed part of the fuzzing, and faults that it has to find; `make fuzz` does more of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
FAULTS = {
    "a key error": "KeyError at fixed.py",
    "a hang": "a hang: ",
    "a crash": "the process ended with SIGSEGV",
    "litter": "left.txt",
    "a write elsewhere": "elsewhere.txt",
    "output": "output that nobody asked for: 'EP Error'",
    "a log of what is taken": r"nobody asked for: '\x1b[1;31m2026 [E:onnxruntime:Default",
    "a log of what is refused": None,
    "memory": "MB; an honest input takes",
    "other logits": "another result than that of the unchanged bundle",
    "no fault": None,
    "no fault in a bundle": None,
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the fixed seeds and the planted faults came to."""
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.fuzz.fixed", str(folder)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_fixed_inputs_give_a_result_or_a_sentence(fuzzed: dict[str, Any]) -> None:
    assert fuzzed["problems"] == []
    tried = [result for result in fuzzed["results"] if result["outcome"] != "skipped"]
    assert len(tried) > 150
    assert [result for result in tried if result["problem"]] == []
    outcomes = {result["outcome"] for result in tried}
    assert {"success", "CheckFailed", "CheckpointError", "TokenizerError"} <= outcomes


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, fuzzed: dict[str, Any]) -> None:
    (problem,) = fuzzed["found"][fault]
    expected = FAULTS[fault]
    assert expected in problem if expected else problem is None
