"""The tables of docs/choose.md: from the catalogue of solvers and from measured figures, docs/data/choose.json.

    python docs/hooks/choose.py            # write the tables into the page
    python docs/hooks/choose.py --check    # exit status 1 if the page is not what it would be

The figures are made by `python -m benchmarks.choose --json docs/data/choose.json`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdeflow.solvers.catalogue import CATALOGUE, Row

DOCS = Path(__file__).parent.parent
PAGE, FIGURES = DOCS / "choose.md", DOCS / "data" / "choose.json"
MARKED = re.compile(r"(<!-- generated: ([a-z: -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PROBLEMS = {
    "mixture-2d": "Eight Gaussians in the plane, exact score, VP:",
    "digits-exact": "The handwritten digits, each blurred by 0.2, exact score, EDM:",
    "digits-network": "The network for digits that ships, VP:",
}
ROWS: dict[str, Row] = {row.name: row for row in CATALOGUE}
STIFF = ("ROS2", "ROS34PW2", "SKROCK(5)")


def _flow(row: Row) -> bool:
    return row.order is not None and row.noise != ("own",) and row.name not in STIFF


CANDIDATES: dict[str, Callable[[Row], bool]] = {
    "flow": lambda row: _flow(row) and not row.noise,
    "noise": lambda row: "own" in row.noise or (bool(row.noise) and row.view == "transition"),
    "few": lambda row: _flow(row) and row.view == "transition" and row.nfe_per_step == 1,
    "many": lambda row: _flow(row) and (row.order or 0) >= 3,
    "tolerance": lambda row: row.adaptive and row.order is not None,
    "tolerance with noise": lambda row: row.adaptive and bool(row.noise),
    "additive": lambda row: row.view == "drift" and "additive" in row.noise,
    "diagonal": lambda row: row.view == "drift" and "diagonal" in row.noise,
    "commutative": lambda row: row.view == "drift" and "commutative" in row.noise,
    "general": lambda row: row.view == "drift" and "general" in row.noise,
    "stiff": lambda row: row.name in STIFF,
}
"""Which methods of the catalogue come into question."""


def figures() -> dict[str, Any]:
    """What was measured, by question."""
    return dict(json.loads(FIGURES.read_text()))


def tables() -> dict[str, str]:
    """Every generated table of the page by its name."""
    made = {f"candidates: {name}": _candidates(fits) for name, fits in CANDIDATES.items()}
    return made | {name: _figures(name, table) for name, table in figures().items()}


def _candidates(fits: Callable[[Row], bool]) -> str:
    """The methods that fit, in one line; the full table is on the solvers' page."""
    names = [f"`{row.name}`" for row in CATALOGUE if fits(row)]
    return f"In the catalogue ({len(names)}): {', '.join(names)}."


def _figures(question: str, table: dict[str, Any]) -> str:
    """A table of figures with what the catalogue says of each method; "problem, what" columns make one a problem."""
    problems = list(dict.fromkeys(column.split(", ")[0] for column in table["columns"] if ", " in column))
    if problems and problems[0] in PROBLEMS:
        return "\n\n".join(f"{PROBLEMS[name]}\n\n{_figures(question, _part(table, name))}" for name in problems)
    known = [row for row in table["rows"] if row[0] in ROWS]
    kind = question.removesuffix("-noise")
    facts: list[tuple[str, Callable[[Row], str]]] = []
    if known and kind in ("additive", "diagonal", "commutative", "general"):
        facts = [
            ("strong order", lambda row: _number(_strong(row, kind))),
            ("weak", lambda row: _number(row.weak_order)),
        ]
    elif known and question not in ("flow-or-noise", "gradient"):
        facts = [("order", lambda row: _number(row.order))]
    if known and question != "gradient":
        facts.append(("calls a step", lambda row: str(row.nfe_per_step)))
    head = ["", *(title for title, _ in facts), *table["columns"]]
    best = [_best(table["rows"], i) for i in range(1, len(table["columns"]) + 1)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table["rows"]:
        name = row[0]
        said = [about(ROWS[name]) if name in ROWS else "-" for _, about in facts]
        cells = [
            _cell(value, bold=value is not None and value == low) for value, low in zip(row[1:], best, strict=True)
        ]
        lines.append(
            f"| {' | '.join([f'`{name}`' if name in ROWS or '(' in name or '=' in name else name, *said, *cells])} |"
        )
    return "\n".join(lines)


def _part(table: dict[str, Any], problem: str) -> dict[str, Any]:
    """The columns of one problem."""
    chosen = [i for i, column in enumerate(table["columns"]) if column.startswith(f"{problem}, ")]
    columns = [table["columns"][i].removeprefix(f"{problem}, ") for i in chosen]
    return {"columns": columns, "rows": [[row[0], *(row[i + 1] for i in chosen)] for row in table["rows"]]}


def _strong(row: Row, kind: str) -> float | None:
    """The order on that kind; diagonal and commutative noise share a column of the catalogue."""
    if kind == "additive":
        return row.strong_order
    if kind == "general":
        return row.strong_general
    return row.strong_diagonal


def _best(rows: list[list[Any]], column: int) -> Any:
    """The smallest [error, grid] of a column that says which grid was best; None for other columns."""
    found = [row[column] for row in rows if isinstance(row[column], list)]
    return min(found) if found else None


def _cell(value: Any, *, bold: bool) -> str:
    if isinstance(value, list):
        error, grid = value
        text = f"{error:.1e} {grid}"
        return f"**{text}**" if bold else text
    if value is None:
        return "-"
    if isinstance(value, int) and value >= 10**6:
        return f"{value:.0e}"
    if isinstance(value, float):
        return f"{value:.1e}" if value else "0"
    return str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def current(text: str) -> str:
    """The page with its tables as they should be.

    Raises:
        ValueError: a marker of the page names no table, or a table has no place on it.
    """
    made = tables()
    wanted = {match[2] for match in MARKED.finditer(text)}
    if wanted != set(made):
        raise ValueError(
            f"choose.md: tables without a place {set(made) - wanted}, places without one {wanted - set(made)}"
        )
    return MARKED.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text()
    new = current(text)
    if "--check" in sys.argv[1:]:
        print(
            "docs/choose.md is current" if new == text else "docs/choose.md is out of date: python docs/hooks/choose.py"
        )
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
