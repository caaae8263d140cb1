"""Work-precision charts: error against model calls, log-log, with floors and failures drawn.

One specification serves the report, where signals choose grid, measure and solvers, and the still
figures, where these are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdeflow.bench.extras import need
from sdeflow.bench.results import Result
from sdeflow.bench.tables import best_of_grids
from sdeflow.bench.truth import MEASURES

COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#17a2b8",
    "#c69214", "#8c6d5a", "#d67195", "#7f7f7f", "#3b3fb6", "#6b8e23",
)  # fmt: skip
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "triangle-right", "triangle-left")
NAMES = {
    "median": "median error",
    "q90": "90th percentile of the error",
    "rms": "RMS error",
    "sliced_w2": "sliced W2 distance",
}
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [1, 4])
_SHIFT = 0.012
"""Sideways, relative, between solvers whose errors have intervals."""
_EDGE = 9
"""Pixels below the top edge where what has no place on the axis is drawn."""


@dataclass(frozen=True)
class Frame:
    """Axes shared by all charts of a problem, so that a filter does not move them.

    Attributes:
        calls: domain and ticks of the horizontal axis.
        errors: domain of the vertical axis; what is above is drawn at the top edge.
        solvers: in the order of colours.
    """

    calls: tuple[float, float]
    ticks: list[float]
    errors: tuple[float, float]
    solvers: list[str]


def frame(results: Sequence[Result]) -> Frame:
    """The axes for results of one problem and kind."""
    calls = [c for r in results if (c := r.nfe or r.budget)]
    measures = MEASURES if results[0].kind == "trajectory" else ("sliced_w2",)
    errors = [e for r in results for m in measures if (e := getattr(r, m)) and math.isfinite(e)]
    scale = results[0].scale or 1.0
    # an error of three spreads is no sample any more: how much worse it is is not worth the space
    high = min(3 * scale, 1.5 * max(errors, default=scale))
    low = min(0.5 * min(errors, default=high), 0.1 * high)
    floors = [r.floor for r in results if r.floor]
    if floors and 0.02 * low < min(floors) < 1.6 * low:
        low = min(floors) / 1.6
    ticks = sorted({float(r.budget) for r in results if r.budget})
    span = (min(calls, default=1.0) * 0.9, max(calls, default=10.0) * 1.1)
    last = ticks[-1] if ticks else 0.0
    ticks += [t for t in (10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0) if 1.3 * last < t < span[1]]
    return Frame(
        span, ticks or [10.0, 20.0, 50.0, 100.0, 200.0], (low, high), list(dict.fromkeys(r.solver for r in results))
    )


def marks(solvers: Iterable[str], turn: int = 0) -> dict[str, tuple[str, str]]:
    """The colour and the shape of each solver; the shape is another at another `turn`."""
    names = enumerate(dict.fromkeys(solvers))
    return {s: (COLOURS[i % len(COLOURS)], SHAPES[(i + 3 * turn) % len(SHAPES)]) for i, s in names}


def default_grid(results: Sequence[Result]) -> str | None:
    """The default grid of their process, if they ran on it."""
    name = results[0].about.get("default_grid")
    return name if any(r.grid == name for r in results) else None


def records(results: Iterable[Result]) -> list[dict[str, Any]]:
    """What charts and the report's page read of each result, of one problem and kind."""
    results = list(results)
    best = {id(r) for r in best_of_grids(results).values()}
    area = frame(results)
    edge = area.calls[1] / 1.1
    # intervals at the same number of calls would hide each other
    shift = _SHIFT if any(r.kind == "distribution" for r in results) else 0.0
    beside = {s: math.exp(shift * (i - 0.5 * (len(area.solvers) - 1))) for i, s in enumerate(area.solvers)}
    return [
        {
            "solver": r.solver, "grid": r.grid, "budget": r.budget, "tolerance": r.tolerance,
            "status": r.status, "message": r.message, "calls": r.nfe,
            "x": (r.nfe or r.budget or edge) * beside[r.solver],
            "median": r.median, "q90": r.q90, "rms": r.rms, "flip_rate": r.flip_rate,
            "sliced_w2": r.sliced_w2, "low": r.low, "high": r.high, "resolved": r.resolved,
            "wall_ms": None if r.wall_seconds is None else 1000 * r.wall_seconds,
            "model_ms": None if r.model_seconds is None else 1000 * r.model_seconds,
            "best": id(r) in best or r.budget is None, "single": r.steps == 1, "preview": r.preview,
        }
        for r in results
    ]  # fmt: skip


def interactive(results: Sequence[Result], mark: dict[str, tuple[str, str]] | None = None) -> dict[str, Any]:
    """The specification of a problem's chart in the report; its data come from a source named "runs".

    Signals: `grid` ("best", "all" or a name), `measure`, `hidden` (solvers), `without` (grids), `focus`
    (a solver, or ""). Charts with the same `mark` (the colour and shape of each solver) have one legend.
    """
    alt = need("altair")
    shown = (
        "(grid == 'all' || datum.grid == grid || indexof(['adaptive', 'its own'], datum.grid) >= 0"
        " || (grid == 'best' && (datum.best || datum.status != 'ok')))"  # the best grid hides no failure
        " && indexof(hidden, datum.solver) < 0 && indexof(without, datum.grid) < 0"
    )
    line = "datum.solver + (grid == 'best' ? '' : '/' + datum.grid)"
    parameters = [
        alt.param(name="grid", value=default_grid(results) or "best"),
        alt.param(name="measure", value=_first_measure(results)),
        alt.param(name="hidden", value=[]),
        alt.param(name="without", value=[]),
        alt.param(name="focus", value=""),
    ]
    layers = _layers(alt, results, shown, line, "datum[measure]", linked=True, mark=mark)
    chart = alt.layer(*layers)
    chart = chart.add_params(*parameters).properties(width="container", height=400)
    return _specification(chart.configure_view(stroke=None))


def still(results: Sequence[Result], *, width: int = 330, height: int = 300) -> dict[str, Any]:
    """The specification of a chart with its own legend and without title and data: lines connect a
    solver's runs, so its data are runs on one grid."""
    alt = need("altair")
    value = f"datum.{_first_measure(results)}"
    chart = alt.layer(*_layers(alt, results, "true", "datum.solver", value, linked=False))
    return _specification(chart.properties(width=width, height=height))


def _specification(chart: Any) -> dict[str, Any]:
    """The chart as a dictionary whose runs are the source "runs", for the caller to name or fill.

    Altair copies whatever a chart holds at each step of its making, so it never sees the data; and it
    validates longer than anything else takes, so that is left to the tests.
    """
    values = chart.to_dict(validate=False)
    layers = [{k: v for k, v in layer.items() if k != "data" or v != {"name": "runs"}} for layer in values["layer"]]
    return {**values, "data": {"name": "runs"}, "layer": layers}


def _first_measure(results: Sequence[Result]) -> str:
    return "median" if results[0].kind == "trajectory" else "sliced_w2"


def _layers(
    alt: Any,
    results: Sequence[Result],
    shown: str,
    line: str,
    value: str,
    *,
    linked: bool,
    mark: dict[str, tuple[str, str]] | None = None,
) -> list[Any]:
    area, kind = frame(results), results[0].kind
    mark = mark or marks(area.solvers)
    low, high = area.errors
    marked = _marked(low, high)
    x = alt.X(
        "x:Q", title="model calls a sample",
        scale=alt.Scale(type="log", domain=area.calls, nice=False, clamp=True),
        axis=alt.Axis(values=area.ticks, format="d", grid=True),
    )  # fmt: skip
    name = "error" if linked and kind == "trajectory" else NAMES[_first_measure(results)]

    def y(field: str) -> Any:
        return alt.Y(
            f"{field}:Q", title=name,
            scale=alt.Scale(type="log", domain=[low, high], nice=False, clamp=True),
            axis=alt.Axis(format=".0e", values=marked, grid=True),
        )  # fmt: skip

    legend = None if linked else alt.Legend(title=None, symbolLimit=0, labelLimit=0)
    colour, shape = (
        channel("solver:N", scale=alt.Scale(domain=list(mark), range=[m[i] for m in mark.values()]), legend=legend)
        for i, channel in enumerate((alt.Color, alt.Shape))
    )
    faded = (
        alt.condition("focus == '' || focus == datum.solver", alt.value(1), alt.value(0.1)) if linked else alt.value(1)
    )
    tooltip = _tooltips(alt, kind)
    dashes = {}
    if linked:  # which grid a line is of shows when there are several
        names = sorted({r.grid for r in results})
        scale = alt.Scale(domain=["", *names], range=[[1, 0], *(DASHES[i % len(DASHES)] for i in range(len(names)))])
        dashes["strokeDash"] = alt.StrokeDash("dash:N", scale=scale, legend=None)
    runs = (
        alt.Chart(alt.NamedData(name="runs"))
        .transform_filter(shown)
        # the report leaves out an x that is the calls, to be small
        .transform_calculate(x="isValid(datum.x) ? datum.x : datum.calls")
        .transform_calculate(value=value, line=line, dash="grid == 'all' ? datum.grid : ''" if linked else "''")
        .transform_calculate(drawn=f"isValid(datum.value) ? max({low!r}, min(datum.value, {high!r})) : null")
        .transform_calculate(**{"from": f"max({low!r}, datum.low)", "to": f"min({high!r}, datum.high)"})
    )
    finite = "isValid(datum.value)"
    layers = [*_floor(alt, results, area, name, value if linked else None)]
    layers.append(
        runs.transform_filter(f"{finite} && datum.status == 'ok'")
        .mark_line(strokeWidth=1.6, clip=True)
        .encode(x=x, y=y("drawn"), color=colour, detail="line:N", opacity=faded, order="x:Q", **dashes)
    )
    if kind == "distribution":
        layers.append(
            runs.transform_filter(f"{finite} && datum.value <= {high!r}")
            .mark_rule(strokeWidth=1.4, clip=True)
            .encode(x=x, y=y("from"), y2="to:Q", color=colour, opacity=faded)
        )
    inside = f"{finite} && datum.status == 'ok' && datum.value <= {high!r}"
    above = f"{finite} && datum.status == 'ok' && datum.value > {high!r}"
    layers.append(
        runs.transform_filter(inside)
        .mark_point(filled=True, size=48, opacity=1)
        .encode(x=x, y=y("drawn"), color=colour, shape=shape, opacity=faded, tooltip=tooltip)
    )
    layers.append(
        runs.transform_filter(above)
        .mark_point(shape="M0,-1L0.8,0.3L0.25,0.3L0.25,1L-0.25,1L-0.25,0.3L-0.8,0.3Z", filled=True, size=70)
        .encode(x=x, y=alt.value(_EDGE), color=colour, opacity=faded, tooltip=tooltip)
    )
    layers.append(
        runs.transform_filter("datum.status != 'ok'")
        .mark_point(shape="cross", angle=45, filled=True, size=110)
        .encode(x=x, y=alt.value(_EDGE), color=colour, opacity=faded, tooltip=tooltip)
    )
    return layers


def _marked(low: float, high: float) -> list[float]:
    """The powers of ten of a logarithmic axis, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**k for k in powers if low <= 10.0**k <= high]
    if len(decades) >= 3:
        return decades
    return [v for k in powers for m in (1, 2, 5) if low <= (v := float(f"{m}e{k}")) <= high]


def _floor(alt: Any, results: Sequence[Result], area: Frame, name: str, value: str | None) -> list[Any]:
    """The floor as a dashed line with the band up to twice it; at the bottom edge when it is below the axis."""
    about = results[0].about.get("floors") or {}
    if not about:
        return []
    low, high = area.errors
    what = "the reference against itself" if results[0].kind == "trajectory" else "two sets of the target"
    measure = value or f"datum.{_first_measure(results)}"
    base = (
        alt.Chart(alt.Data(values=[about]))
        .transform_calculate(floor=measure)
        .transform_calculate(
            drawn=f"max({low!r}, min(datum.floor, {high!r}))",
            twice=f"max({low!r}, min(2 * datum.floor, {high!r}))",
            bottom=repr(low),
            text=f"(datum.floor < {low!r} ? '↓ floor ' : 'floor ') + format(datum.floor, '.1e') + ' ({what})'",
        )
    )
    scale = alt.Scale(type="log", domain=[low, high], nice=False, clamp=True)
    y = alt.Y("drawn:Q", scale=scale, title=name)
    return [
        base.mark_rect(opacity=0.13, color="#888").encode(y=alt.Y("bottom:Q", scale=scale, title=name), y2="twice:Q"),
        base.mark_rule(strokeDash=[5, 4], color="#888", strokeWidth=1.2).encode(y=y),
        # on its line, at the left: few calls have large errors
        base.mark_text(align="left", baseline="bottom", dx=5, dy=-3, color="#777", fontSize=11).encode(
            y=y, x=alt.value(0), text="text:N"
        ),
    ]


def _tooltips(alt: Any, kind: str) -> list[Any]:
    exact = ".5e"
    common = [
        alt.Tooltip("solver:N"),
        alt.Tooltip("grid:N"),
        alt.Tooltip("calls:Q", title="calls, counted", format=".4~g"),
        alt.Tooltip("budget:Q"),
        alt.Tooltip("tolerance:Q", format="~g"),
    ]
    errors = (
        [alt.Tooltip(f"{m}:Q", format=exact) for m in MEASURES]
        + [alt.Tooltip("flip_rate:Q", title="flipped", format=".1%")]
        if kind == "trajectory"
        else [
            alt.Tooltip("sliced_w2:Q", title="sliced W2", format=exact),
            alt.Tooltip("low:Q", title="95% from", format=exact),
            alt.Tooltip("high:Q", title="to", format=exact),
        ]
    )
    times = [
        alt.Tooltip("wall_ms:Q", title="wall, ms", format=".3~g"),
        alt.Tooltip("model_ms:Q", title="in the network, ms", format=".3~g"),
        alt.Tooltip("message:N"),
    ]
    return [*common, *errors, *times]
