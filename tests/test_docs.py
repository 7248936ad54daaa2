"""The documentation tells the truth: its code runs, and its tables and pictures are the code's."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import onnxruntime as ort
import pytest
import xxhash
from checkpoints import gemma4
from conftest import SAMPLES, check_every_way_to_feed
from family_checkpoints import embformer, lckv
from rwkv_checkpoints import rwkv

import pleexport
from pleexport import backends, contract, families, targets
from pleexport.backends import base, registry
from pleexport.backends.describe import describe
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.export.options import BuildOptions
from pleexport.parity.oracle import open_oracle
from pleexport.runtime import bundle as bundle_module
from pleexport.runtime import chat_format
from pleexport.runtime.generation_config import GenerationConfig

DEFAULTS: dict[str, Any] = {
    "table_dtype": "int8",
    "weight_dtype": "fp32",
    "context": 512,
    "verify": False,
}
RWKV_SIZES: dict[str, Any] = {
    "vocab": 61,
    "width": 48,
    "head_size": 12,
    "de_rank": 6,
    "dea_width": 20,
}
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(pleexport.__path__[0])
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = heading.index(" ")
    after = page.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """The rows of the first table of a text, without its head."""
    found = re.search(r"^\|.*(?:\n\|.*)*", text, flags=re.MULTILINE)
    assert found is not None
    lines = found.group().splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def first_column(text: str) -> list[str]:
    """The names in the first column of a table, which are in code font."""
    return [row[0].strip("`") for row in table(text)]


# Pages as such.


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text("utf-8")):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{link}#{anchor}"


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.name not in ("glossary.md", "CHANGELOG.md")],
    ids=lambda p: p.name,
)
def test_a_page_leads_to_the_glossary_at_its_top(page: Path) -> None:
    top = page.read_text(encoding="utf-8").split("\n## ", 1)[0]
    assert "glossary.md)" in top


def test_the_glossary_gives_every_word_once_in_order() -> None:
    words = [row[0] for row in table(read("glossary.md"))]
    assert len(words) == len(set(words))
    assert all(row[1] for row in table(read("glossary.md")))
    plain = [word.strip("`").lower() for word in words]
    assert plain == sorted(plain)


def test_the_readme_names_every_option_of_a_build() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"as keywords: (.*?)\. `pleexport", page, flags=re.DOTALL)
    assert listed is not None
    options = set(BuildOptions.__annotations__)
    assert set(re.findall(r"`(\w+)`", listed.group(1))) == options


# docs/design.md: the house.


def our_modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def unit_of(module: str) -> str:
    """What the picture calls the package or module that a module belongs to."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2]) if parts[:1] == ["backends"] else (parts or ["__init__"])[0]


def imports_of(source: str, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a source imports, also inside functions; not for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return {name for name in found if name.split(".")[0] == "pleexport"}


class House:
    """The picture of floors: who stands where, and what each floor may import."""

    def __init__(self, picture: str) -> None:
        self.floor_of: dict[str, str] = {}
        self.arrows: dict[str, list[str]] = {}
        for line in picture.splitlines():
            if floor := re.fullmatch(r"\s+(\w+)\s{2,}(\S.*?)(?:\s+→ (.+))?", line):
                name, units, arrows = floor.groups()
                self.arrows[name] = (arrows or "").split()
                for unit in units.split():
                    assert unit not in self.floor_of, unit
                    self.floor_of[unit] = name

    def below(self, floor: str) -> set[str]:
        """The floors that a floor may import."""
        found: set[str] = set()
        for arrow in self.arrows[floor]:
            found |= {arrow} | self.below(arrow)
        return found

    def may_import(self, unit: str, other: str) -> bool:
        floor, its = self.floor_of.get(unit), self.floor_of.get(other)
        if floor is None or its is None:
            return False
        if unit == other:
            return True
        # Names on one floor may import one another, but runtime formats know nothing of each other.
        neighbours = floor == its and floor != "formats"
        return neighbours or its in self.below(floor)


def violations(house: House, module: str, source: str) -> list[str]:
    """The imports of a module that the picture does not allow."""
    known = our_modules()
    return sorted(
        name
        for name in imports_of(source, known)
        if not house.may_import(unit_of(module), unit_of(name))
    )


def the_house() -> House:
    (picture,) = code_blocks(section(read("design.md"), "## The house"), "text")
    return House(picture)


def test_arrows_of_the_picture_lead_down() -> None:
    house = the_house()
    floors = list(house.arrows)
    for floor, arrows in house.arrows.items():
        for arrow in arrows:
            assert floors.index(arrow) > floors.index(floor), (floor, arrow)


def test_the_picture_and_its_table_name_every_package_and_top_level_module() -> None:
    units = {unit_of(module) for module in our_modules()} - {"backends"}
    assert set(the_house().floor_of) == units
    assert set(first_column(section(read("design.md"), "## The house"))) == units


@pytest.mark.parametrize("module", our_modules())
def test_a_module_imports_what_the_picture_allows(module: str) -> None:
    source = our_modules()[module].read_text(encoding="utf-8")
    assert violations(the_house(), module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("runtime.new", "from pleexport.families import gemma4", ["pleexport.families.gemma4"]),
        ("runtime.new", "from pleexport import families", ["pleexport.families"]),
        ("runtime.new", "def f():\n    import pleexport.model", ["pleexport.model"]),
        ("runtime.new", "try:\n    import pleexport.model\nexcept E: ...", ["pleexport.model"]),
        ("backends.base", "from pleexport.model import Model", ["pleexport.model"]),
        (
            "backends.registry",
            "from pleexport.backends.onnx import backend",
            ["pleexport.backends.onnx.backend"],
        ),
        (
            "backends.onnx.new",
            "from pleexport.families import layers",
            ["pleexport.families.layers"],
        ),
        (
            "families.new",
            "from pleexport.backends import registry",
            ["pleexport.backends.registry"],
        ),
        ("references.new", "from pleexport import operators", ["pleexport.operators"]),
        ("parity.new", "from pleexport.export.plan import Plan", ["pleexport.export.plan"]),
        ("inspection.new", "from pleexport.show import tables", ["pleexport.show.tables"]),
        ("brand_new", "from pleexport import errors", ["pleexport.errors"]),
        ("runtime.new", "from pleexport.contract import Artifact\nimport torch", []),
        ("runtime.new", "if TYPE_CHECKING:\n    from pleexport.model import Model", []),
        ("export.new", "from pleexport.runtime.blob import Blob", []),
    ],
)
def test_an_import_against_the_floors_is_found(module: str, source: str, found: list[str]) -> None:
    assert violations(the_house(), f"pleexport.{module}", source) == found


def test_backends_that_know_each_other_are_found() -> None:
    house = House("   formats   backends/onnx  backends/other  → seam\n   seam   backends/base")
    source = "from pleexport.backends.onnx.files import GRAPH\nfrom pleexport.backends import base"
    module = "pleexport.backends.other.lower"
    assert violations(house, module, source) == ["pleexport.backends.onnx.files"]


def loads_by_name(source: str) -> bool:
    """Whether a source loads modules that only its values tell, or ours by a string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            name = node.args[0] if node.args else None
            foreign = isinstance(name, ast.Constant) and not str(name.value).startswith("pleexport")
            if called in ("import_module", "__import__") and not foreign:
                return True
    return False


def test_two_modules_load_others_by_name() -> None:
    assert loads_by_name("import importlib as i\ni.import_module(name)")
    assert loads_by_name("__import__('pleexport.families')")
    assert not loads_by_name("import_module('executorch')")
    found = {m for m, path in our_modules().items() if loads_by_name(path.read_text("utf-8"))}
    assert found == {"pleexport", "pleexport.backends.registry"}


def test_the_steps_of_the_design_are_functions_that_exist() -> None:
    for row in table(section(read("design.md"), "## Data flow")):
        parts = ["pleexport", *row[1].strip("`").split(".")]
        length = max(n for n in range(1, len(parts)) if ".".join(parts[:n]) in our_modules())
        found: Any = importlib.import_module(".".join(parts[:length]))
        for name in parts[length:]:
            found = getattr(found, name)
        assert callable(found)


# docs/graph-contract.md and docs/bundle-format.md.


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(gemma4, {"table_dtype": "source"}, marks=pytest.mark.slow),
        (gemma4, {"table_dtype": "int8", "cache_dtype": "int8"}),
        (gemma4, {"table_dtype": "int8", "weight_dtype": "int8"}),
        (lambda folder: rwkv(folder / "model.pth", "7b", **RWKV_SIZES), {}),
        pytest.param(lckv, {}, marks=pytest.mark.slow),
        (embformer, {"cache_dtype": "none"}),
    ],
    ids=["gemma4", "gemma4 int8", "gemma4 tied", "rwkv7b", "lckv", "embformer without a cache"],
)
def test_the_minimal_runner_of_the_graph_contract_writes_the_same_text(
    make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    (code,) = code_blocks(read("graph-contract.md"), "python")
    assert "pleexport" not in re.sub(r"pleexport(\.decoder/1|-blob|-tied)", "", code)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    bundle = pleexport.build(
        make(tmp_path / "checkpoint"), tmp_path / "bundle", **(DEFAULTS | options)
    )
    prompt = [(7 * i) % 60 for i in range(100)]
    runner = pleexport.Runner(bundle)
    expected = [t.id for t in runner.generate(prompt, max_new_tokens=12, ignore_eos=True)]
    assert namespace["generate"](bundle.path, prompt, 12, piece=33) == expected

    graph = ort.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    assert undocumented([v.name for v in graph.get_inputs()], "## Inputs") == []
    assert undocumented([v.name for v in graph.get_outputs()], "## Outputs") == []


def undocumented(names: list[str], heading: str) -> list[str]:
    """Names of inputs or outputs that a section of the graph contract does not have."""
    told = re.findall(r"`([a-z_.{}]+)`", section(read("graph-contract.md"), heading))
    patterns = [re.escape(n).replace(r"\{i\}", r"\d+").replace(r"\{name\}", r"\w+") for n in told]
    return [name for name in names if not any(re.fullmatch(p, name) for p in patterns)]


def test_an_input_that_the_contract_does_not_have_is_found() -> None:
    names = ["inputs_embeds", "past_key_values.3.key", "past_state.0.att_x", "attention_mask"]
    assert undocumented(names, "## Inputs") == ["attention_mask"]


STRUCTS = (
    bundle_module.Manifest,
    contract.Artifact,
    contract.GraphContract,
    contract.LookupInput,
    contract.CacheInput,
    contract.StateInput,
    bundle_module.ParitySummary,
    bundle_module.FileRecord,
    bundle_module.AdapterRecord,
    chat_format.ChatFormat,
    chat_format.Joint,
    chat_format.Thoughts,
    bundle_module.Source,
    bundle_module.SourceFile,
)


@pytest.mark.parametrize("struct", [*STRUCTS, GenerationConfig], ids=lambda s: s.__name__)
def test_the_bundle_format_lists_the_fields_of_the_manifest(struct: Any) -> None:
    text = section(read("bundle-format.md"), f"### {struct.__name__}")
    assert first_column(text) == list(struct.__struct_fields__)


def test_the_bundle_format_says_which_fields_may_be_missing() -> None:
    page = read("bundle-format.md")
    told = re.search(r"All fields have to be there but (.*?)\.", page, flags=re.DOTALL)
    assert told is not None
    optional = {f.name for s in STRUCTS for f in msgspec.structs.fields(s) if not f.required}
    assert set(re.findall(r"`(\w+)`", told.group(1))) == optional


def test_the_manifest_of_the_bundle_format_is_that_of_the_sample() -> None:
    page = read("bundle-format.md")
    assert page.startswith(f"# The bundle format, schema {bundle_module.SCHEMA}\n")
    (block,) = code_blocks(page, "json")
    shown = msgspec.json.decode(block, type=bundle_module.Manifest)
    assert shown.schema == bundle_module.SCHEMA
    assert shown.target in targets.names()
    assert shown.source is not None
    for file in shown.source.files:
        content = (SAMPLES / "gemma4-kjv" / file.name).read_bytes()
        assert file.size == len(content)
        assert file.digest == f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}"
    graph = shown.graphs[bundle_module.DECODER]
    model = families.resolve(Checkpoint(SAMPLES / "gemma4-kjv")).with_cache(shown.cache_dtype)
    real = describe(model, registry.load(graph.backend), context=shown.context)
    assert [c for c in real.caches if c in graph.contract.caches] == graph.contract.caches != []
    assert msgspec.structs.replace(graph.contract, caches=real.caches) == real


# docs/adding-a-target.md.


def test_the_kiosk_of_the_page_on_targets_is_a_target(tmp_path: Path) -> None:
    (block,) = code_blocks(read("adding-a-target.md"), "toml")
    (tmp_path / "kiosk.toml").write_text(block, encoding="utf-8")
    kiosk = targets.load(str(tmp_path / "kiosk.toml"))
    assert kiosk.name == "kiosk"
    assert kiosk.limits.largest_file_bytes


def test_the_page_on_targets_lists_their_fields() -> None:
    page = read("adding-a-target.md")
    rows = table(section(page, "## Fields"))
    told = {row[0].strip("`"): row for row in rows}
    fields = {field.name: field for field in msgspec.structs.fields(targets.Target)}
    assert told.keys() == fields.keys()
    for name, field in fields.items():
        default, value = told[name][1], told[name][2]
        # The name is required by the type, and comes from the file's name.
        assert (default == "required") == (field.required and name != "name"), name
        if not field.required and isinstance(field.default, str | int):
            assert default.strip("`") == str(field.default).lower()  # as TOML has it
        if get_origin(field.type) is not None:
            choices = [c for c in get_args(field.type) if isinstance(c, str | int)]
            assert all(str(choice) in value for choice in choices), name
    assert first_column(section(page, "## Limits")) == list(targets.Limits.__struct_fields__)
    otherwise = section(page, "## What a backend wants otherwise")
    assert first_column(otherwise) == list(targets.Overrides.__struct_fields__)


# docs/adding-a-family.md.


def parts_named(source: str, *names: str) -> Iterator[str]:
    """The text of top-level definitions, and of a table's entries, that begin with a name."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and str(key.value).startswith(names):
                    yield "\n".join(lines[key.lineno - 1 : value.end_lineno])
        name = getattr(node, "name", None) or ast.unparse(getattr(node, "target", ast.Name("")))
        if name.lower() in names:
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])


def test_the_page_on_adding_a_family_shows_the_real_one() -> None:
    source = (PACKAGE / "families" / "llama_value_embeddings.py").read_text(encoding="utf-8")
    blocks = code_blocks(read("adding-a-family.md"), "python")
    assert len(blocks) == 4
    assert all(block in source for block in blocks)


def test_the_page_on_adding_a_family_counts_its_lines() -> None:
    rows = table(read("adding-a-family.md"))
    told = {row[1].strip("`"): int(row[2].split(",")[0]) for row in rows}
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in told}
    family, register, reference, checkpoints, variations = told
    named = ("llama_value_embeddings", "llama value embeddings")
    for name in (family, reference):
        assert told[name] == len(texts[name].splitlines())
    assert told[register] == sum(named[0] in line for line in texts[register].splitlines())
    for name in (checkpoints, variations):
        parts = [part.splitlines() for part in parts_named(texts[name], *named)]
        assert told[name] == sum(map(len, parts)) > 0


def families_named(source: str) -> set[str]:
    """Names of families in a source, comments and docstrings left out."""
    tree, texts = ast.parse(source), set()
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    for node in ast.walk(tree):
        texts |= {value for _, value in ast.iter_fields(node) if isinstance(value, str)}
    return set(re.findall("gemma|rwkv|embformer|lckv|llama_value", " ".join(texts).lower()))


@pytest.mark.parametrize("module", our_modules())
def test_nothing_asks_which_family_a_model_is_of(module: str) -> None:
    if unit_of(module) in ("families", "references"):
        return
    found = families_named(our_modules()[module].read_text(encoding="utf-8"))
    # What the page lists: the World tokenizer, text for people, and a method of quantization that
    # is called after a family.
    told = {
        "pleexport.checkpoint.compressed_tensors": {"gemma"},
        "pleexport.checkpoint.gemma_rules": {"gemma"},
        "pleexport.checkpoint.quantized": {"gemma"},
        "pleexport.cli": {"rwkv"},
        "pleexport.parity.coded": {"gemma"},
        "pleexport.parity.oracle": {"gemma"},
        "pleexport.runtime.world_tokenizer": {"rwkv"},
    }
    assert found <= told.get(module, set())


def test_a_family_that_is_asked_for_is_found() -> None:
    assert families_named("if model.family == 'gemma4': pass") == {"gemma"}
    assert families_named("from pleexport.families import lckv") == {"lckv"}
    assert families_named('"""Gemma."""\n\ndef f():\n    """RWKV."""\n    # lckv') == set()


def family_errors(source: str) -> list[str]:
    """The fixed parts of what a source says of families that contradict themselves."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "FamilyError":
            parts = [p for p in ast.walk(node.args[0]) if isinstance(p, ast.Constant)]
            texts += [str(part.value).replace("`", "").strip() for part in parts]
    return [text for text in texts if len(text) > 7]


def test_the_page_on_adding_a_family_lists_every_contradiction() -> None:
    rows = table(section(read("adding-a-family.md"), "## 8. What you are told"))
    told = " ".join(row[1] for row in rows).replace("`", "")
    errors = [e for path in our_modules().values() for e in family_errors(path.read_text("utf-8"))]
    assert len(errors) >= 5
    assert [error for error in errors if error not in told] == []
    assert family_errors("raise FamilyError(f'family {x} forgets its rows')") == [
        "forgets its rows"
    ]


# docs/adding-a-backend.md.


def members(protocol: type) -> set[str]:
    """Methods and attributes that a protocol asks for."""
    return {n for n in {*vars(protocol), *protocol.__annotations__} if not n.startswith("_")}


def test_the_page_on_adding_a_backend_answers_for_every_member() -> None:
    page = read("adding-a-backend.md")
    answers = section(page, "## 2. What each method answers")
    assert set(first_column(answers)) == members(base.Backend)
    for protocol in (base.WeightStorage, base.Session):
        for name in members(protocol):
            assert f"`{name}`" in page, name
    for name in ("exported", "contract", "arguments", "results", "hidden"):
        assert name in section(page, "## What is yours, and what is given")


def test_the_page_on_adding_a_backend_lists_our_operators() -> None:
    source = (PACKAGE / "operators.py").read_text(encoding="utf-8")
    defined = re.findall(r'custom_op\("(pleexport::\w+)"', source)
    listed = first_column(section(read("adding-a-backend.md"), "### Operators of our own"))
    assert listed == defined != []


@pytest.fixture
def eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backend that the page makes, as a part of the package; its modules' sources."""
    blocks = code_blocks(read("adding-a-backend.md"), "python")
    folder = tmp_path / "backends" / "eager"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('"""Traced programs, run by torch."""\n', encoding="utf-8")
    for name, block in zip(("backend", "lower", "session"), blocks, strict=True):
        (folder / f"{name}.py").write_text(block, encoding="utf-8")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(folder.parent)])
    for module in (registry, bundle_module):
        monkeypatch.setattr(module, "NAMES", (*registry.NAMES, "eager"))
    yield blocks
    for name in [name for name in sys.modules if name.startswith("pleexport.backends.eager")]:
        del sys.modules[name]
    delattr(backends, "eager")


def test_the_backend_of_the_page_computes_what_the_original_does(
    eager: list[str], gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = pleexport.build(
        gemma4_checkpoint,
        tmp_path / "bundle",
        backend="eager",
        weight_dtype="fp32",
        table_dtype="source",
        context=512,
    )
    assert bundle.manifest.parity.passed
    graph = bundle.decoder
    assert (graph.backend, graph.files) == ("eager", ["model.pt2"])
    checkpoint = Checkpoint(gemma4_checkpoint)
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    check_every_way_to_feed(bundle, open_oracle(matched).logits)


def test_the_backend_of_the_page_is_as_long_as_it_says(eager: list[str]) -> None:
    importlib.import_module("pleexport.backends.eager.backend")
    (row,) = [r for r in table(read("adding-a-backend.md")) if r[0] == "the backend"]
    assert int(row[2]) == sum(len(block.splitlines()) for block in eager)


# docs/security.md.


def test_the_page_on_security_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", read("security.md"))
    rows = table(section(read("security.md"), "## What is checked"))
    assert len(named) == len(rows) > 10
    for file, name in named:
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, name


def test_the_page_on_security_names_tests_in_kotlin_that_exist() -> None:
    rows = table(section(read("security.md"), "## What a download on a device checks"))
    tests = Path(__file__).parents[1] / "android-demo/runtime/src/test/kotlin/io/pleexport"
    for row in rows:
        file, name = re.findall(r"`([^`]+)`", row[-1])
        assert f"fun `{name}`()" in (tests / file).read_text(encoding="utf-8"), name
    assert len(rows) == 4
