"""Still figures, PNG and SVG: every grid of every problem, and one figure of all problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdeflow.bench.charts import records, still
from sdeflow.bench.extras import need
from sdeflow.bench.results import Result, replace
from sdeflow.bench.tables import by_problem


def save(results: Sequence[Result], folder: str | Path) -> list[Path]:
    """`work-precision.{png,svg}` of all problems, and `work-precision-NAME`, `distribution-NAME` of each.

    The figure of all problems shows each on its process's default grid; those of one problem
    have a panel a grid.
    """
    folder, written = Path(folder), []
    groups = by_problem(results)
    flows = [part for part in groups if part[0].kind == "trajectory"]
    if flows:
        written += _write([_on(part, _default_grid(part)) for part in flows], folder / "work-precision")
    for part in groups:
        stem = "work-precision" if part[0].kind == "trajectory" else "distribution"
        panels = [_on(part, grid) for grid in _grids(part)]
        written += _write(panels, folder / f"{stem}-{part[0].problem}")
    return written


def _grids(part: list[Result]) -> list[str]:
    return list(dict.fromkeys(r.grid for r in part if r.grid != "adaptive")) or ["adaptive"]


def _default_grid(part: list[Result]) -> str:
    names, default = _grids(part), part[0].about.get("default_grid")
    return default if default in names else names[0]


def _on(part: list[Result], grid: str) -> list[Result]:
    """The runs on a grid, and the adaptive ones for comparison."""
    return [r for r in part if r.grid in (grid, "adaptive")]


def _write(panels: list[list[Result]], stem: Path) -> list[Path]:
    """Panels side by side, as SVG and PNG."""
    alt, convert = need("altair"), need("vl_convert")
    names = [f"runs-{i}" for i in range(len(panels))]
    charts = [
        still(panel, name, f"{panel[0].problem}, {_grids(panel)[0]} grid")
        for panel, name in zip(panels, names, strict=True)
    ]
    figure = (
        alt.hconcat(*charts)
        .resolve_scale(x="independent", y="independent", color="shared", shape="shared")
        .configure(background="white")
        .configure_axis(labelFontSize=11, titleFontSize=12, gridColor="#eee")
        .configure_title(fontSize=13, anchor="start")
    )
    # data are added last: altair copies whatever a chart holds at each step of its making. Validation
    # against the schema costs more than the drawing, and is the tests' business.
    sources = {name: records(panel) for panel, name in zip(panels, names, strict=True)}
    specification = {**figure.to_dict(validate=False), "datasets": sources}
    drawn = convert.vegalite_to_svg(specification, vl_version=vega_lite_version(alt, convert))
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    replace(paths[0], drawn.encode())
    replace(paths[1], convert.svg_to_png(drawn, scale=2))
    return paths


def vega_lite_version(alt: Any, convert: Any) -> str | None:
    """The version that altair writes, where the converter has it; else None, the converter's newest."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return version if version in convert.get_vegalite_versions() else None
