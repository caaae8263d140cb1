"""The Python blocks of the README and the pages: what the tests run, page by page in order.

python docs/hooks/blocks.py        # their number
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> dict[Path, list[str]]:
    """The blocks of every page that has some."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {page: BLOCK.findall(page.read_text(encoding="utf-8")) for page in every}
    return {page: blocks for page, blocks in found.items() if blocks}


def line() -> str:
    """The count in words: tests/test_docs.py runs exactly these, and fails if a fence of Python is not among them."""
    found = pages()
    return f"{sum(map(len, found.values()))} executed code blocks on {len(found)} pages"


if __name__ == "__main__":
    print(line())
