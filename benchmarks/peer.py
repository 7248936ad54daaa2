"""What the scripts that time other engines share: arguments, memory, output.

The standard library alone: the memory that they report is the whole process's, and some of them run
in environments that hold nothing else of ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all engines take."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("model", type=Path)
    result.add_argument(
        "--prompt-tokens",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[128, 512],
    )
    result.add_argument("--decode-tokens", type=int, default=64)
    result.add_argument("--context", type=int, default=128, help="tokens before the decoded ones")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--repeat", type=int, default=3)
    result.add_argument("--json", action="store_true", help="on one line")
    return result


def run(
    arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Measure, and print the result."""
    result = measure(arguments)
    json.dump(result, sys.stdout, indent=None if arguments.json else 2)
    print()


def resident_bytes(pid: int | str = "self") -> dict[str, int]:
    """Anonymous and file-backed memory of a process; empty after its end. Source: proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = {line.split(":")[0]: line.split() for line in lines}
    return {n: int(fields[n][1]) * 1024 for n in ("RssAnon", "RssFile") if n in fields}
