"""Run every benchmark and put the results on one page.

    pip install -r benchmarks/requirements.txt
    python benchmarks/all.py --quick     # small shapes, few repetitions
    python benchmarks/all.py             # two hours, 30 GB of disk

Each benchmark makes its inputs once, runs in a process of its own and leaves its result as JSON in
`build/benchmarks`; `report.html` and `report.json` beside them have all of them. Run nothing else
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import browser
import budget
import builds
import compare
import fidelity
import long_context
import lookups
from page import Section, machine_section, write_page
from tqdm import tqdm

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """One script, and what makes parts of a page of its result.

    Attributes:
        folder: below the output folder, where the script leaves its JSON.
        quick: whether it is part of a quick run.
        has_quick: whether the script has a shorter form.
    """

    script: str
    arguments: tuple[str, ...]
    folder: str
    sections: Callable[[dict[str, Any]], list[Section]]
    quick: bool
    has_quick: bool = True

    def run(self, out: Path, *, quick: bool) -> dict[str, Any]:
        """Run the script; its result."""
        folder = out / self.folder
        command = [sys.executable, HERE / f"{self.script}.py", *self.arguments, "--out", folder]
        options = ["--quick"] * (quick and self.has_quick)
        done = subprocess.run([*command, *options], check=False)
        if done.returncode:
            raise SystemExit(f"error: {self.script}.py failed, and nothing after it was run")
        result: dict[str, Any] = json.loads((folder / f"{self.script}.json").read_text())
        return result


BENCHMARKS = (
    Benchmark("compare", ("gemma4-small",), "gemma4-small", compare.sections, True),
    Benchmark("compare", ("gemma4-e2b",), "gemma4-e2b", compare.sections, False),
    Benchmark("builds", ("gemma4-small",), "gemma4-small", builds.sections, True, False),
    Benchmark("builds", ("gemma4-e2b",), "gemma4-e2b", builds.sections, False, False),
    Benchmark("lookups", ("gemma4-small",), "gemma4-small", lookups.sections, True),
    Benchmark("long_context", ("gemma4-narrow",), "gemma4-narrow", long_context.sections, True),
    Benchmark(
        "long_context",
        ("embformer", "--context", "4096"),
        "embformer",
        long_context.sections,
        False,
    ),
    Benchmark("fidelity", (), "fidelity", fidelity.sections, True),
    Benchmark("budget", (), "budget", budget.sections, False, False),
    Benchmark("browser", (), "gemma4-small", browser.sections, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    arguments = parser.parse_args()
    chosen = [b for b in BENCHMARKS if b.quick or not arguments.quick]
    results = [b.run(arguments.out, quick=arguments.quick) for b in tqdm(chosen, unit=" scripts")]
    report = [{"script": b.script} | result for b, result in zip(chosen, results, strict=True)]
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2))
    found = zip(chosen, results, strict=True)
    sections = [section for b, result in found for section in b.sections(result)]
    page = arguments.out / "report.html"
    machine = next(result["machine"] for result in results if "machine" in result)
    write_page(page, "pleexport: benchmarks", [*sections, machine_section(machine)])
    print(f"written: {page}")


if __name__ == "__main__":
    main()
