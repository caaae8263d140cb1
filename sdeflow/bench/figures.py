"""Still figures, PNG and SVG: every grid of every problem, and one figure of all problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdeflow.bench.charts import records, still
from sdeflow.bench.extras import need
from sdeflow.bench.results import Result, put
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
        written += _write([(part, _default_grid(part)) for part in flows], folder / "work-precision")
    for part in groups:
        stem = "work-precision" if part[0].kind == "trajectory" else "distribution"
        written += _write([(part, grid) for grid in _grids(part)], folder / f"{stem}-{part[0].problem}")
    return written


def _grids(part: list[Result]) -> list[str]:
    return list(dict.fromkeys(r.grid for r in part if r.grid != "adaptive")) or ["adaptive"]


def _default_grid(part: list[Result]) -> str:
    names, default = _grids(part), part[0].about.get("default_grid")
    return default if default in names else names[0]


_CONFIG = {
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "gridColor": "#eee"},
    "title": {"fontSize": 13, "anchor": "start"},
}


def _write(panels: list[tuple[list[Result], str]], stem: Path) -> list[Path]:
    """Panels (runs of a problem, grid) side by side, as SVG and PNG. Adaptive runs are in every panel."""
    alt, convert = need("altair"), need("vl_convert")
    parts = {part[0].problem: part for part, _ in panels}
    specifications = {name: still(part) for name, part in parts.items()}
    sources = {
        f"runs-{i}": [r for r in records(part) if r["grid"] in (grid, "adaptive")]
        for i, (part, grid) in enumerate(panels)
    }
    charts = [
        {
            **specifications[part[0].problem],
            "title": f"{part[0].problem}, {grid} grid",
            "data": {"name": name},
        }
        for (part, grid), name in zip(panels, sources, strict=True)
    ]
    figure = {
        "$schema": charts[0].pop("$schema"),
        "hconcat": [{k: v for k, v in chart.items() if k not in ("$schema", "config")} for chart in charts],
        "resolve": {"scale": {"x": "independent", "y": "independent", "color": "shared", "shape": "shared"}},
        "background": "white",
        "config": _CONFIG,
        "datasets": sources,
    }
    drawn = convert.vegalite_to_svg(figure, vl_version=vega_lite_version(alt, convert))
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    put(paths[0], drawn.encode())
    put(paths[1], convert.svg_to_png(drawn, scale=1.6))
    return paths


def vega_lite_version(alt: Any, convert: Any) -> str | None:
    """The version that altair writes, where the converter has it; else None, the converter's newest."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return version if version in convert.get_vegalite_versions() else None
