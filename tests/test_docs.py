"""Code in the documentation does what it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import gemma4
from family_checkpoints import embformer, lckv
from rwkv_checkpoints import rwkv

import pleexport
from pleexport import contract, targets
from pleexport.backends.base import Backend
from pleexport.runtime import bundle

DEFAULTS = {"table_dtype": "int8", "weight_dtype": "fp32", "context": 512, "verify": False}
RWKV_SIZES = {"vocab": 61, "width": 48, "head_size": 12, "de_rank": 6, "dea_width": 20}
DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = DOCS.parent / "pleexport"


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (gemma4, {"table_dtype": "source"}),
        (gemma4, {"table_dtype": "int8"}),
        (lambda folder: rwkv(folder / "model.pth", "7b", **RWKV_SIZES), {}),
        (lckv, {}),
        (embformer, {"cache_dtype": "none"}),
    ],
    ids=["gemma4", "gemma4 int8", "rwkv7b", "lckv", "embformer without a cache"],
)
def test_the_minimal_runner_of_the_graph_contract_writes_the_same_text(
    make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    page = (DOCS / "graph-contract.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "pleexport" not in code.replace("pleexport.decoder/1", "").replace("pleexport-blob", "")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    bundle = pleexport.build(
        make(tmp_path / "checkpoint"),
        tmp_path / "bundle",
        **{"table_dtype": "int8", "weight_dtype": "fp32", "context": 512, "verify": False}
        | options,
    )
    prompt = [(7 * i) % 60 for i in range(100)]
    runner = pleexport.Runner(bundle)
    expected = [t.id for t in runner.generate(prompt, max_new_tokens=12, ignore_eos=True)]
    assert namespace["generate"](bundle.path, prompt, 12, piece=33) == expected


def test_the_page_on_adding_a_family_shows_the_real_one() -> None:
    page = (DOCS / "adding-a-family.md").read_text(encoding="utf-8")
    package = DOCS.parent / "pleexport"
    source = (package / "families" / "llama_value_embeddings.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 4
    assert all(block in source for block in blocks)
    assert f"| {len(source.splitlines())} |" in page


@pytest.mark.parametrize("page", sorted(DOCS.parent.glob("*.md")) + sorted(DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def picture() -> dict[str, set[str]]:
    """By floor of the house, what it may import, as docs/design.md draws it."""
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    (drawn,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    lines = (line.split("->") for line in drawn.strip().splitlines())
    return {floor.strip(): set(below.replace("|", " ").split()) for floor, below in lines}


def room_of(module: str) -> str:
    """The package or module of the top level that a module lies in."""
    return module.split(".")[1]


def imports_of(source: str) -> Iterator[str]:
    """Modules of this package that a source imports; those for type checkers only are left out."""
    tree = ast.parse(source)
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("pleexport."))
        elif isinstance(node, ast.ImportFrom) and node.module == "pleexport":
            yield from (f"pleexport.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pleexport."):
            yield str(node.module)


def against_the_floors(sources: dict[str, str], floors: dict[str, set[str]]) -> list[str]:
    """Imports that the picture does not allow, as "room -> room"."""
    found = set()
    for module, source in sources.items():
        room = room_of(module)
        allowed = floors.get(room)
        for imported in map(room_of, imports_of(source)):
            if imported != room and imported not in (allowed if allowed is not None else GROUND):
                found.add(f"{room} -> {imported}")
    return sorted(found)


FLOORS = picture()
SOURCES = {
    ".".join(("pleexport", *path.relative_to(PACKAGE).with_suffix("").parts)): path.read_text()
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
}
GROUND = {room_of(module) for module in SOURCES} - FLOORS.keys()


def test_the_picture_of_the_house_is_true() -> None:
    assert against_the_floors(SOURCES, FLOORS) == []
    used = {room: set[str]() for room in FLOORS}
    for module, source in SOURCES.items():
        used.setdefault(room_of(module), set()).update(map(room_of, imports_of(source)))
    for room, below in FLOORS.items():
        assert below <= used[room], f"`{room}` does not import {below - used[room]}"


def test_no_floor_of_the_picture_imports_one_above() -> None:
    order = list(FLOORS)
    for i, room in enumerate(order):
        assert not FLOORS[room] & set(order[: i + 1])


def test_an_import_against_the_floors_is_found() -> None:
    up = {"pleexport.runtime.runner": "def f():\n    from pleexport.families import gemma4"}
    assert against_the_floors(SOURCES | up, FLOORS) == ["runtime -> families"]
    ground = {"pleexport.sizes": "import pleexport.runtime.blob"}
    assert against_the_floors(SOURCES | ground, FLOORS) == ["sizes -> runtime"]
    hints = "if TYPE_CHECKING:\n    from pleexport.families import gemma4"
    assert against_the_floors(SOURCES | {"pleexport.runtime.runner": hints}, FLOORS) == []


def test_the_page_on_design_names_every_room() -> None:
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    for room in {room_of(module) for module in SOURCES}:
        assert f"| `{room}` |" in page, room


def fields_on(page: str, heading: str) -> list[str]:
    """Names in the first column of the first table behind a text."""
    text = (DOCS / page).read_text(encoding="utf-8").split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert table
    return re.findall(r"^\| `\[?(\w+)\]?` \|", table[0], flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "struct"),
    [
        ("## The manifest", bundle.Manifest),
        ("A graph in `graphs`:", contract.Artifact),
        ("`contract`:\n", contract.GraphContract),
        ("`parity`:\n", bundle.ParitySummary),
        ("`files`:\n", bundle.FileRecord),
    ],
)
def test_the_page_on_bundles_lists_the_fields_of_the_manifest(heading: str, struct: Any) -> None:
    assert fields_on("bundle-format.md", heading) == list(struct.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("lookup_inputs", contract.LookupInput),
        ("caches", contract.CacheInput),
        ("states", contract.StateInput),
    ],
)
def test_the_page_on_bundles_lists_the_fields_of_inputs(name: str, struct: Any) -> None:
    page = (DOCS / "bundle-format.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}` \|.*", page, flags=re.MULTILINE)
    assert set(struct.__struct_fields__) <= set(re.findall(r"`(\w+)`", row))


def test_the_page_on_targets_says_which_fields_are_required() -> None:
    page = (DOCS / "adding-a-target.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\[?(\w+)\]?` \| (required|optional) \|", page, flags=re.MULTILINE)
    fields = msgspec.structs.fields(targets.Target)
    # A file without a name is called after itself.
    expected = {
        f.name: "required" if f.required and f.name != "name" else "optional" for f in fields
    }
    assert dict(rows) == expected


def test_the_page_on_backends_names_all_that_a_backend_answers() -> None:
    names = {n for n in vars(Backend) if not n.startswith("_")} | set(Backend.__annotations__)
    assert set(fields_on("adding-a-backend.md", "## 2.")) == names


def test_the_glossary_has_each_word_once_and_in_order() -> None:
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([a-z ]+) \| ", page, flags=re.MULTILINE)[1:]
    assert words == sorted(set(words))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.stem)
def test_every_page_leads_to_the_glossary(page: Path) -> None:
    assert page.stem == "glossary" or "](glossary.md)" in page.read_text(encoding="utf-8")
