"""The options of every command in docs/cli.md, from the command line itself.

python docs/hooks/commands.py            # write them into the page
python docs/hooks/commands.py --check    # exit status 1 if the page is not what it would be
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sdeflow.cli import app

PAGE = Path(__file__).parent.parent / "cli.md"
MARKED = re.compile(r"(<!-- generated: options of ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
EVERYWHERE = ("help", "install_completion", "show_completion")


def commands() -> dict[str, Any]:
    """Every command by its name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def section(command: Any) -> str:
    """What it does, its example, and a table of its arguments and options."""
    rows = [_row(parameter) for parameter in command.params if parameter.name not in EVERYWHERE]
    said = " ".join(str(command.help or "").replace("\f", "").split())
    example = str(command.epilog or "").removeprefix("Example: ")
    head = ["| argument or option | default | what it is |", "|---|---|---|"]
    return "\n".join([said, "", "```sh", example, "```", "", *head, *rows])


def _row(parameter: Any) -> str:
    named = parameter.param_type_name == "option"
    name = "`" + ", ".join(parameter.opts + parameter.secondary_opts) + "`" if named else f"`{parameter.name.upper()}`"
    default = "required" if parameter.required else _default(parameter)
    text = " ".join(str(getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
    return f"| {name} | {default} | {text} |"


def _default(parameter: Any) -> str:
    value = parameter.default
    if callable(value) or value is None or value is False or value == ():
        return "-"
    return f"`{getattr(value, 'value', value)}`"


def current(text: str) -> str:
    """The page with its options as they should be.

    Raises:
        ValueError: a command has no section on the page, or a section no command.
    """
    known, found = commands(), set(_named(text))
    if found != set(known):
        raise ValueError(
            f"cli.md: commands without a section {set(known) - found}, sections without {found - set(known)}"
        )
    return MARKED.sub(lambda match: f"{match[1]}{section(known[match[2]])}\n{match[3]}", text)


def _named(text: str) -> Iterator[str]:
    return (match[2] for match in MARKED.finditer(text))


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text()
    new = current(text)
    if "--check" in sys.argv[1:]:
        print("docs/cli.md is current" if new == text else "docs/cli.md is out of date: python docs/hooks/commands.py")
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
