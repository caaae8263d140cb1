"""The figures of the site, drawn by every build from runs of the library: SVG, some seconds altogether.

python docs/hooks/figures.py DIR        # write them, to look at
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import altair as alt
import torch
import vl_convert

import sdeflow as sf

COLOURS = ["#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#9d755d"]


class DoubleWell(sf.SDE):
    """dX = 4 (X - X^3) dt + 0.6 dW, from a Gaussian between the wells."""

    t0, t1 = 0.0, 1.0

    def drift(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 4 * (x - x**3)

    def diffusion(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.6 * torch.ones_like(x)


def draw() -> dict[str, str]:
    """The figures by their path in the site."""
    return {
        "assets/generated/paths.svg": _svg(paths()),
        "assets/generated/reversal.svg": _svg(reversal()),
        "assets/generated/work-precision.svg": _svg(work_precision()),
    }


def paths() -> alt.Chart:
    """Forty paths of the double well."""
    start = 0.3 * torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = DoubleWell().simulate(start, steps=200, seed=0, save=True)
    return _lines(solution, "time", "x", "A double well, forward: 40 paths of one seed")


def reversal() -> alt.Chart:
    """A mixture of two Gaussians under VP, back from noise: the reverse SDE and the flow, from equal starts."""
    vp = sf.VP()
    model = sf.problems.GaussianMixture([[-1.0], [1.0]], 0.02).model(vp)
    x = vp.prior_sample((30, 1), seed=1, dtype=torch.float64)
    charts = []
    for eta, title in ((1.0, "reverse SDE, eta = 1"), (0.0, "probability flow, eta = 0")):
        solution = sf.solve(vp.reverse(model, eta), x, sf.solvers.EulerMaruyama(), steps=200, seed=0, save=True)
        charts.append(_lines(solution, "time (0 is data)", "x", title))
    return alt.hconcat(*charts)


def work_precision() -> alt.Chart:
    """Median error against model calls of some samplers on an exact score."""
    problem = sf.bench.Problem(
        sf.problems.EightGaussians().model(sf.VP()), shape=(2,), samples=64, name="circle", tolerance=1e-9
    )
    names = ["Heun", "DDIM", "DPMSolverPP(2)", "UniPC(3)", "GaussianSplit(3)"]
    rows = sf.bench.run(problem, solvers=names, grids=["power"], nfe=[6, 10, 16, 24, 40, 64])
    data = [{"solver": row.solver, "calls": row.nfe, "error": row.median} for row in rows if row.median]
    return (
        alt.Chart(alt.Data(values=data), title="Eight Gaussians in the plane, exact score, grid: power")
        .mark_line(point=True)
        .encode(
            x=alt.X("calls:Q", scale=alt.Scale(type="log", domain=[5, 80]), title="model calls a sample"),
            y=alt.Y("error:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e"), title="median error"),
            color=alt.Color("solver:N", sort=names, scale=alt.Scale(range=COLOURS)),
        )
        .properties(width=520, height=300)
    )


def _lines(solution: sf.Solution, x_title: str, y_title: str, title: str) -> alt.Chart:
    """Every sample's path, one line each."""
    if solution.xs is None or solution.ts is None:
        raise ValueError("expected a solution with its states saved")
    every = slice(None, None, 2)
    times, states = solution.ts[every].tolist(), solution.xs[every, :, 0].tolist()
    data = [
        {"t": t, "x": value, "path": i}
        for t, row in zip(times, states, strict=True)
        for i, value in enumerate(row)
    ]  # fmt: skip
    return (
        alt.Chart(alt.Data(values=data), title=title)
        .mark_line(strokeWidth=0.8, opacity=0.7, color=COLOURS[0])
        .encode(x=alt.X("t:Q", title=x_title), y=alt.Y("x:Q", title=y_title), detail="path:N")
        .properties(width=340, height=240)
    )


def _svg(chart: Any) -> str:
    """On white, so that it reads in the dark theme too."""
    return vl_convert.vegalite_to_svg(chart.configure(background="white").to_json())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for path, svg in draw().items():
        (folder / Path(path).name).write_text(svg)
