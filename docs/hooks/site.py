"""What MkDocs needs besides pages: the API reference, the figures, and links that leave the folder.

Nothing of it is stored: reference pages and figures are made anew by every build.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

import api
import figures
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the reference and the figures."""
    for path, text in reference_pages().items():
        files.append(File.generated(config, path, content=text))
    for path, svg in figures.draw().items():
        files.append(File.generated(config, path, content=svg))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file of the repository outside docs/ is its path here: the site has no copy of it."""
    return OUTSIDE.sub(lambda m: "[sdeflow](index.md)" if m[2] == "README.md" else f"{m[1]} (`{m[2]}`)", markdown)


def reference_pages() -> dict[str, str]:
    """The Markdown of each module's page: its public names, once each, in the order of its `__all__`."""
    pages = {}
    for path, module, members in api.each():
        title = "The main names" if path == "sdeflow" else path
        lines = [f"# {title}", "", (inspect.getdoc(module) or "").strip(), ""]
        for name, value in members:
            if api.documents_itself(value):
                lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
            else:
                lines += [f"::: {path}.{name}", "    options: {show_attribute_values: false}", ""]
        short = path.removeprefix("sdeflow.").replace(".", "-")
        pages[f"reference/{short}.md"] = "\n".join(lines)
    return pages
