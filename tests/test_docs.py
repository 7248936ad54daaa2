"""Code in the documentation does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import pleexport

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("table_dtype", ["source", "int8"])
def test_the_minimal_runner_of_the_graph_contract_writes_the_same_text(
    table_dtype: str, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    page = (DOCS / "graph-contract.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "pleexport" not in code.replace("pleexport.decoder/1", "").replace("pleexport-blob", "")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    bundle = pleexport.build(
        gemma4_checkpoint,
        tmp_path / "bundle",
        table_dtype=table_dtype,
        weight_dtype="fp32",
        verify=False,
    )
    prompt = [(7 * i) % 120 for i in range(100)]
    runner = pleexport.Runner(bundle)
    expected = [t.id for t in runner.generate(prompt, max_new_tokens=12, ignore_eos=True)]
    assert namespace["generate"](bundle.path, prompt, 12, piece=33) == expected


@pytest.mark.parametrize("page", sorted(DOCS.parent.glob("*.md")) + sorted(DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
