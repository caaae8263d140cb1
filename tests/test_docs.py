"""Every Python block of the README and the docs runs, page by page; generated tables are current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdeflow.cli import app
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


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """Each `sdeflow` command of the README, at its size, on the file that the page shows."""
    text = (ROOT / "README.md").read_text()
    files = [block for block in BLOCK.findall(text) if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text(files[0])
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("sdeflow ")]
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "results" / "mine" / "report.html").stat().st_size > 0
