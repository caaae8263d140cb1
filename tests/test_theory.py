"""The theory pages: formulas have tags, sections their module and source, modules that cite a source a place.

What the formulas say is checked by the pages' own blocks, which tests/test_docs.py runs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "theory").glob("*.md"))
NOTATION = ROOT / "docs" / "notation.md"
MODULE = re.compile(r"`(sdeflow/[\w/]+\.py)`")
TAG = re.compile(r"\(([A-Z])(\d+)\)")
TEXT_BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
YEAR = re.compile(r"\b(?:1[6-9]|20)\d\d\b")
SOURCE = re.compile(r"\bet al\b|\bequations? \d|\b(?:1[6-9]|20)\d\d\b")
OWN = ("Elementary", "This project's method", "DLMF")
"""What a section without a paper says instead."""


def mentioned(text: str) -> set[str]:
    return set(MODULE.findall(text))


def missing_files(text: str) -> list[str]:
    """Modules that a page names and that do not exist."""
    return sorted(name for name in mentioned(text) if not (ROOT / name).is_file())


def docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))


def has_source(source: str) -> bool:
    """Whether a module's docstrings cite a paper or a numbered equation."""
    return bool(SOURCE.search(source) and SOURCE.search(docstrings(source)))


def defined_tags(text: str) -> list[tuple[str, int]]:
    """The tags that close a line of a formula block, in order."""
    lines = [line for block in TEXT_BLOCK.findall(text) for line in block.splitlines()]
    found = [re.search(r"\s\(([A-Z])(\d+)\)$", line) for line in lines]
    return [(match.group(1), int(match.group(2))) for match in found if match]


def unsourced_sections(text: str) -> list[str]:
    """Sections with a formula that name no module, or no source, before their first formula."""
    bad = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        lead, formula, _ = section.partition("```text\n")
        if formula and not (mentioned(lead) and (YEAR.search(lead) or any(word in lead for word in OWN))):
            bad.append(section.splitlines()[0])
    return bad


ALL_TEXT = "\n".join(page.read_text() for page in PAGES)


def test_every_module_with_a_source_is_on_a_page():
    cited = {str(path.relative_to(ROOT)) for path in (ROOT / "sdeflow").rglob("*.py") if has_source(path.read_text())}
    assert len(cited) > 60
    left_out = sorted(cited - mentioned(ALL_TEXT))
    assert left_out == [], f"cite a source, and are on no page of docs/theory: {left_out}"


@pytest.mark.parametrize("page", [*PAGES, NOTATION], ids=lambda page: page.stem)
def test_a_page_names_modules_that_exist_and_is_short(page):
    text = page.read_text()
    assert missing_files(text) == []
    assert text.count("\n") <= 350
    for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text):
        assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "index"], ids=lambda page: page.stem)
def test_sections_have_modules_and_sources_and_formulas_tags(page):
    text = page.read_text()
    assert unsourced_sections(text) == []
    tags = defined_tags(text)
    letters = {letter for letter, _ in tags}
    assert len(letters) == 1, letters
    assert [number for _, number in tags] == list(range(1, len(tags) + 1))
    for block in TEXT_BLOCK.findall(text):
        assert max(map(len, block.splitlines())) <= 132


def test_tags_are_unique_listed_and_referred_to_where_they_exist():
    tags = [tag for page in PAGES for tag in defined_tags(page.read_text())]
    assert len(tags) == len(set(tags)) > 150
    index = (ROOT / "docs" / "theory" / "index.md").read_text()
    listed = dict(re.findall(r"^\| \[[^\]]+\]\((\w+)\.md\) \| ([A-Z]) \|", index, re.MULTILINE))
    assert {page.stem for page in PAGES} - {"index"} == set(listed)
    for page in PAGES:
        if page.stem != "index":
            assert defined_tags(page.read_text())[0][0] == listed[page.stem]
        prose = page.read_text()
        unknown = {tag for tag in ((a, int(n)) for a, n in TAG.findall(prose)) if tag not in set(tags)}
        assert unknown == set(), f"{page.name} refers to {unknown}"


def test_the_checks_of_this_file_can_fail():
    assert missing_files("see `sdeflow/gaussian.py` and `sdeflow/no_such_module.py`") == ["sdeflow/no_such_module.py"]
    assert has_source('"""(Song et al. 2021, equation 39.)"""')
    assert has_source('def f():\n    """As in 1992."""')
    assert not has_source('"""A plain sentence: what an equation is."""\nx = 1992  # in no docstring')
    formula = "```text\na = b   (Z1)\n```\n"
    assert defined_tags(formula + "prose (Z9)") == [("Z", 1)]
    assert unsourced_sections("## One\n\n`sdeflow/pid.py`. Soderlind 2003.\n\n" + formula) == []
    assert unsourced_sections("## No module\n\nSoderlind 2003.\n\n" + formula) == ["No module"]
    assert unsourced_sections("## No source\n\n`sdeflow/pid.py`.\n\n" + formula) == ["No source"]
    assert unsourced_sections("## After\n\nWords.\n\n" + formula + "`sdeflow/pid.py`, 2003.\n") == ["After"]
    cited = {"sdeflow/reverse.py", "sdeflow/gaussian.py"}
    assert cited - mentioned("`sdeflow/gaussian.py`") == {"sdeflow/reverse.py"}
