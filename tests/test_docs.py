"""Code in the documentation does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import gemma4
from family_checkpoints import embformer, lckv
from rwkv_checkpoints import rwkv

import pleexport

DEFAULTS = {"table_dtype": "int8", "weight_dtype": "fp32", "context": 512, "verify": False}
RWKV_SIZES = {"vocab": 61, "width": 48, "head_size": 12, "de_rank": 6, "dea_width": 20}
DOCS = Path(__file__).parents[1] / "docs"


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
