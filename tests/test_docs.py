"""Every Python block of the README and the docs runs, page by page; generated tables are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdeflow.solvers.catalogue import markdown_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = BLOCK.findall(page.read_text())
    assert blocks, f"{page.name} has no Python block"
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page.name}[{i}]", "exec"), namespace)


def test_the_solver_table_is_that_of_the_catalogue():
    text = (ROOT / "docs" / "solvers.md").read_text()
    table = re.search(r"<!-- generated: .*? -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert table, "the markers of the generated table are gone"
    assert table.group(1).strip() == markdown_table()
