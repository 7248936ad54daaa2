"""What was tried so far, over all runs, in a file outside the repository."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .judge import signature


def default_folder() -> Path:
    """Where programs keep what they know. Source: the XDG Base Directory Specification."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "pleexport-fuzz"


class Ledger:
    """Counts of inputs by what was done and what came of it, and findings.

    Args:
        folder: holds `total.json` and `findings/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "total.json"
        self._total: dict[str, Any] = {"inputs": 0, "next_seed": 1, "findings": 0, "seconds": 0.0}
        if self._file.is_file():
            self._total |= json.loads(self._file.read_text())
        self._counts = {
            name: Counter(self._total.get(name, {})) for name in ("operations", "outcomes", "bases")
        }
        self.here: Counter[str] = Counter()
        self.signatures: Counter[str] = Counter()

    @property
    def next_seed(self) -> int:
        """The first that nobody has tried."""
        return int(self._total["next_seed"])

    @property
    def inputs(self) -> int:
        """Over all runs."""
        return int(self._total["inputs"])

    def add(self, result: dict[str, Any]) -> bool:
        """Count a result; whether it is a finding of a new kind."""
        seed = result["seed"]
        self._total["next_seed"] = max(self.next_seed, seed + 1)
        if result["outcome"] == "skipped":
            self.here["skipped"] += 1
            return False
        self._total["inputs"] += 1
        self.here["inputs"] += 1
        operation = result.get("operation", "unknown")
        if result.get("sealed"):
            operation += ", sealed"
        self._counts["operations"][operation] += 1
        self._counts["outcomes"][result["outcome"]] += 1
        self._counts["bases"][result.get("base", "unknown")] += 1
        if not result.get("problem"):
            return False
        self._total["findings"] += 1
        self.here["findings"] += 1
        own = signature(result["problem"])
        self.signatures[own] += 1
        if self.signatures[own] > 1:
            return False
        place = self.folder / "findings"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
        return True

    def save(self, seconds: float) -> None:
        """Write the totals.

        Args:
            seconds: since the last time.
        """
        self._total["seconds"] = round(self._total["seconds"] + seconds, 1)
        self._total |= {name: dict(counts) for name, counts in self._counts.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self._file.with_suffix(".new")
        staging.write_text(json.dumps(self._total, indent=1, sort_keys=True) + "\n")
        staging.replace(self._file)

    def summary(self) -> str:
        """The totals for a person."""
        lines = [f"in all: {self.inputs:,} inputs, {self._total['findings']} findings"]
        for name, counts in self._counts.items():
            said = ", ".join(f"{key} {count:,}" for key, count in counts.most_common())
            lines.append(f"  {name}: {said}")
        return "\n".join(lines)
