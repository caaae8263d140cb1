"""The site, as far as it can be tested without MkDocs: names, generated pages, navigation, links, short examples."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))

import api  # noqa: E402
import blocks  # noqa: E402
import choose  # noqa: E402
import commands  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def test_every_public_name_is_documented():
    names = api.names()
    assert len(names) > 900
    assert len({name.path for name in names}) == len(names)
    assert [name.path for name in names if not name.documented] == []


class Silent:
    """Says what `told` is."""

    told: int = 0
    untold: int = 0

    def method(self):
        pass

    def documented(self):
        """It does nothing."""

    @property
    def value(self):
        return 1


def test_a_name_without_documentation_is_found():
    found = {name.path: name.documented for name in api._of_value("Silent", Silent)}
    assert found == {
        "Silent": True, "Silent.told": False, "Silent.untold": False, "Silent.method": False,
        "Silent.documented": True, "Silent.value": False,
    }  # fmt: skip


@pytest.mark.parametrize(("page", "module"), [("choose.md", choose), ("cli.md", commands)])
def test_a_generated_page_is_current(page, module):
    """Otherwise: python docs/hooks/choose.py, or docs/hooks/commands.py."""
    text = (DOCS / page).read_text()
    assert module.current(text) == text
    broken = text.replace("<!-- end -->", "| one row more |\n<!-- end -->", 1)
    assert module.current(broken) == text
    with pytest.raises(ValueError, match="without"):
        module.current(text.replace("<!-- generated: ", "<!-- ", 1))


def test_the_figures_of_the_decision_page_are_of_methods_that_exist():
    """A figure of a method that the catalogue lost would stay unnoticed."""
    for question, table in choose.figures().items():
        known = [row[0] for row in table["rows"] if row[0] in choose.ROWS]
        if question != "likelihood":
            assert len(known) >= 2, question
        assert all(len(row) == len(table["columns"]) + 1 for row in table["rows"])
    candidates = {name: [row for row in choose.CATALOGUE if fits(row)] for name, fits in choose.CANDIDATES.items()}
    assert all(candidates.values())
    assert {row.name for row in candidates["general"]} >= {"EulerMaruyama", "LevyMilstein"}
    assert "Milstein" not in {row.name for row in candidates["general"]}


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    text = (ROOT / "mkdocs.yml").read_text()
    nav = re.findall(r"^ +- .*?: (\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    stored = {page for page in nav if not page.startswith("reference/")}
    assert stored == {page.relative_to(DOCS).as_posix() for page in PAGES[1:]}
    assert len(nav) == len(set(nav))
    references = {f"reference/{path.removeprefix('sdeflow.').replace('.', '-')}.md" for path in api.present()}
    assert set(nav) - stored == references


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(other), f"{page.name}: {target}: expected one of {sorted(_anchors(other))}"


def _anchors(page):
    """The headings' ids as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_examples_of_extending_are_under_twenty_lines():
    lengths = {}
    for block in blocks.pages()[DOCS / "extend.md"]:
        for node in ast.parse(block).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                lengths[node.name] = node.end_lineno - first + 1
    assert {"SineVP", "Platen", "ImplicitMidpoint", "Run", "chebyshev"} <= set(lengths)
    assert lengths["ImplicitMidpoint"] + lengths["Run"] < 30
    assert max(lengths.values()) < 20
