"""Every Python block of the README and the docs runs, page by page; generated tables are current."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdeflow.cli import app
from sdeflow.solvers.catalogue import markdown_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "hooks"))

import blocks  # noqa: E402

PAGES = blocks.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for i, block in enumerate(PAGES[page]):
        exec(compile(block, f"{page.name}[{i}]", "exec"), namespace)


def test_no_block_is_missed():
    """Every fence that says python is a block that the pattern sees: one indented or with options would never run."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        fences = [
            line for line in page.read_text(encoding="utf-8").splitlines() if re.match(r"\s*(```|~~~)\s*py", line)
        ]
        assert len(fences) == len(PAGES.get(page, [])), page.name
    assert len(PAGES) > 20


def test_the_solver_table_is_that_of_the_catalogue():
    text = (ROOT / "docs" / "solvers.md").read_text()
    table = re.search(r"<!-- generated: .*? -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert table, "the markers of the generated table are gone"
    assert table.group(1).strip() == markdown_table()


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """Each `sdeflow` command of the README, at its size, on the file that the page shows."""
    text = (ROOT / "README.md").read_text()
    files = [block for block in PAGES[ROOT / "README.md"] if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text(files[0])
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("sdeflow ")]
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "results" / "mine" / "report.html").stat().st_size > 0


def test_the_commands_of_the_first_ten_minutes_run(tmp_path, monkeypatch):
    """Each `sdeflow` command of docs/start.md, on the file that the page has one save."""
    page = ROOT / "docs" / "start.md"
    parts = [block for block in PAGES[page] if block.startswith("# wells.py")]
    assert len(parts) == 2
    (tmp_path / "wells.py").write_text("\n\n".join(parts))
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in page.read_text().splitlines() if line.startswith("sdeflow ")]
    assert [command[1] for command in commands] == ["check", "sample"]
    for command in commands:
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
