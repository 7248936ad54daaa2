"""The names that others build on, and what comes along when they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pleexport
from pleexport.backends.registry import NAMES as NAMES_OF_BACKENDS

PACKAGE = Path(pleexport.__path__[0])
NAMES = [
    "BuildOptions",
    "Bundle",
    "ModelInfo",
    "ParityReport",
    "PleexportError",
    "Runner",
    "Stats",
    "Token",
    "build",
    "inspect",
    "package",
    "verify",
]
# What a process that only runs a bundle has no business with.
BUILDS = ("checkpoint", "export", "families", "inspection", "parity", "references", "show")
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "safetensors", "matplotlib", "rich", "typer"}
FORMATS = {
    "onnx": {"onnx", "onnx_ir", "onnxruntime", "onnxscript"},
    "executorch": {"executorch", "torchao"},
}
GROUND = ("codes", "contract", "dtypes", "errors", "process", "safetensors_file", "sizes")


def test_the_package_exports_these_names_and_no_others() -> None:
    assert pleexport.__all__ == NAMES
    for name in NAMES:
        assert getattr(pleexport, name).__name__ == name
    assert set(NAMES) <= set(dir(pleexport))
    with pytest.raises(AttributeError, match="has no attribute `nothing`"):
        _ = pleexport.nothing


def loaded_by(code: str) -> set[str]:
    """Modules that a fresh process has loaded after some code."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def unwanted(modules: set[str]) -> list[str]:
    """Modules that build, or that cost a runner memory and time."""
    names = tuple(f"pleexport.{name}" for name in BUILDS)
    return sorted(m for m in modules if m.startswith(names) or m.split(".")[0] in HEAVY)


def test_a_process_that_only_runs_a_bundle_loads_nothing_that_builds(gemma4_bundle: Path) -> None:
    code = (
        "import pleexport\n"
        f"runner = pleexport.Runner({str(gemma4_bundle)!r})\n"
        "print([t.id for t in runner.generate([1, 2], max_new_tokens=3, ignore_eos=True)])"
    )
    assert unwanted(loaded_by(code)) == []


def test_importing_the_package_loads_hardly_anything() -> None:
    modules = {m for m in loaded_by("import pleexport") if m.startswith("pleexport")}
    assert modules == {"pleexport"}


def test_what_builds_is_seen_when_it_is_loaded() -> None:
    assert "pleexport.families" in unwanted(loaded_by("from pleexport import build"))


def imports_of(source: str) -> set[str]:
    """Modules that a source imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides what it names"
            module = node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_the_packages_of_every_backend_are_watched() -> None:
    assert tuple(FORMATS) == NAMES_OF_BACKENDS


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_a_runtime_format_is_known_to_its_backend_alone(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path.read_text(encoding="utf-8"))}
    for backend, packages in FORMATS.items():
        if not path.is_relative_to(PACKAGE / "backends" / backend):
            assert roots.isdisjoint(packages)


@pytest.mark.parametrize(
    "path",
    [*sorted((PACKAGE / "runtime").glob("*.py")), *(PACKAGE / f"{name}.py" for name in GROUND)],
    ids=lambda p: p.stem,
)
def test_what_ships_knows_nothing_that_builds(path: Path) -> None:
    names = tuple(f"pleexport.{name}" for name in BUILDS)
    found = imports_of(path.read_text(encoding="utf-8"))
    assert not [name for name in found if name.startswith(names)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_only_the_command_line_shows(path: Path) -> None:
    if path.name == "cli.py" or path.is_relative_to(PACKAGE / "show"):
        return
    found = imports_of(path.read_text(encoding="utf-8"))
    assert not [name for name in found if name.startswith(("pleexport.show", "rich"))]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f():\n    from torch import nn", "torch.nn"),
        ("import onnx.helper as h", "onnx.helper"),
        ("from pleexport import families", "pleexport.families"),
        (
            "if TYPE_CHECKING:\n    from pleexport.show.html import write_html",
            "pleexport.show.html",
        ),
    ],
)
def test_an_import_is_found_wherever_it_stands(source: str, name: str) -> None:
    assert name in imports_of(source)
