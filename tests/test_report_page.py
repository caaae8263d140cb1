"""The report's page: its size, its data, its controls and what it does without a network."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

from sdeflow.bench import page as pages
from sdeflow.bench import tables
from sdeflow.bench.page import LIMIT, report
from sdeflow.bench.results import Result

SOLVERS = [f"AdamsBashforthMoulton({i})" for i in range(60)]
GRIDS = ["uniform", "quadratic", "power", "logsnr", "karras"]
BUDGETS = [5, 8, 10, 15, 20, 30, 50, 100]
PROBLEMS = ["mixture-2d", "mixture-8d", "power law, 48-D", "digits-exact"]
EXACT = ("solver", "grid", "budget", "tolerance", "status", "message", "median", "sliced_w2")
ROUNDED = ("q90", "rms", "flip_rate", "low", "high")
ENVIRONMENT = {"command": "sdeflow bench --suite zoo", "started": "today", "python": "3.11"}


def made(problem, solver, grid, budget, number, picture=None, **changes):
    """A result as a run makes it, its numbers from `number`."""
    about = {"title": "A problem", "process": "VP()", "shape": [2], "default_grid": "power", "truth": "RK45"}
    about |= {"floors": {"median": 1e-8, "q90": 2e-8, "rms": 3e-8}, "preview": picture}
    values = {"median": number(), "q90": number(), "rms": number(), "flip_rate": 3 / 256, "floor": 1e-8}
    times = {"wall_seconds": number(), "model_seconds": number(), "nfe": budget, "steps": budget}
    return Result(
        problem, solver, grid, "trajectory", budget=budget, samples=256, scale=1.0, preview=picture,
        about=about, environment=ENVIRONMENT, **(values | times | changes),
    )  # fmt: skip


def numbers(seed=0):
    generator = random.Random(seed)
    return lambda: 10 ** generator.uniform(-6, 0)


def zoo():
    """As many results as the zoo has, every one of two problems with a picture of its own."""
    number, generator = numbers(), random.Random(1)
    return [
        made(p, s, g, b, number, None if "mixture-8d" in p or "law" in p else picture(generator))
        for p in PROBLEMS for s in SOLVERS for g in GRIDS for b in BUDGETS
    ]  # fmt: skip


def picture(generator):
    return "data:image/png;base64," + base64.b64encode(generator.randbytes(500)).decode()


def small():
    """Two problems; a failed run, an adaptive one, a stochastic solver with intervals and one below the floor."""
    number = numbers()
    runs = [made(p, s, g, b, number) for p in PROBLEMS[:3:2] for s in SOLVERS[:3] for g in GRIDS[:3] for b in (5, 10)]
    runs[3] = dataclasses.replace(
        runs[3], status="failed", message="ValueError: </script>", nfe=None, median=None, q90=None, rms=None
    )
    runs[4] = dataclasses.replace(runs[4], median=1.5371845127e-8, resolved=False)
    adaptive = {"nfe": 61.5, "steps": 10.25, "tolerance": 1e-3}
    runs.append(made(PROBLEMS[0], "RK45 adaptive", "adaptive", None, number, **adaptive))
    interval = {"kind": "distribution", "median": None, "q90": None, "rms": None, "flip_rate": None}
    for budget in (5, 10):
        run = made(PROBLEMS[0], "Euler eta=1", "power", budget, number)
        runs.append(dataclasses.replace(run, **interval, sliced_w2=number(), low=number(), high=number()))
    return runs


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page, re.DOTALL).group(1))


@pytest.fixture(scope="module")
def of_zoo(tmp_path_factory):
    results, path = zoo(), tmp_path_factory.mktemp("zoo") / "report.html"
    report(results, path)
    return results, path.read_text()


@pytest.fixture(scope="module")
def of_small(tmp_path_factory):
    results, path = small(), tmp_path_factory.mktemp("small") / "report.html"
    report(results, path)
    return results, path.read_text()


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and which inputs are inside labels."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.labelled, self._labels = [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self._labels += tag == "label"
        if self._labels:
            self.labelled.append((tag, attributes))

    def handle_endtag(self, tag):
        self._labels -= tag == "label"


# ---- size and data


def test_a_page_of_the_zoo_is_below_5_mb(of_zoo):
    results, page = of_zoo
    assert len(results) == 9600
    assert len(page.encode()) < 5e6
    assert len(page) < LIMIT + 1000
    assert sum(map(len, (r.preview or "" for r in results))) > 2e6  # they alone did not fit before


def test_pictures_of_the_default_grid_stay_when_there_is_no_room_for_all(of_zoo):
    data, page = embedded(of_zoo[1]), of_zoo[1]
    charts = [c for c in data["charts"] if "8d" not in c["id"] and "law" not in c["id"]]
    shown = [r for c in charts for r in c["runs"] if "picture" in r]
    assert all("picture" in r for c in charts for r in c["runs"] if r["grid"] == "power")
    left_out = sum(len(c["runs"]) for c in charts) - len(shown)
    assert left_out > 0
    assert f"The pictures of {left_out} runs" in page
    assert sorted(r["picture"] for r in shown) == list(range(len(data["pictures"])))


def test_runs_refer_to_their_pictures_and_equal_ones_are_stored_once(tmp_path):
    generator, number = random.Random(0), numbers()
    kinds = [picture(generator) for _ in range(3)]
    results = [made("p", f"S{i}", "power", 5, number, kinds[i % 3]) for i in range(9)]
    report(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    data = embedded(page)
    assert [data["pictures"][r["picture"]] for r in data["charts"][0]["runs"]] == [r.preview for r in results]
    assert "are left out" not in page
    assert data["pictures"] == kinds


@pytest.mark.parametrize("which", ["of_zoo", "of_small"])
def test_every_figure_is_embedded_once(which, request):
    results, page = request.getfixturevalue(which)
    data = embedded(page)
    ordered = [r for part in tables.by_problem(results) for r in part]
    rows = [row for chart in data["charts"] for row in chart["runs"]]
    assert len(rows) == len(ordered)
    for result, row in zip(ordered, rows, strict=True):
        for name in EXACT:
            assert row.get(name) == getattr(result, name)
        for name in ROUNDED:
            value = getattr(result, name)
            assert row.get(name) == (None if value is None else pytest.approx(value, rel=1e-6))
        assert row.get("calls") == result.nfe
        assert row.get("resolved", True) == result.resolved
        assert row.get("wall_ms") == pytest.approx(1000 * result.wall_seconds, rel=1e-3)
        assert row.get("model_ms") == pytest.approx(1000 * result.model_seconds, rel=1e-3)
    # and not a second time, in a chart's specification or a table
    script = re.search(r'id="page">(.*?)</script>', page, re.DOTALL).group(1)
    found = re.findall(r'"(?:median|sliced_w2)":([^,}]+)', script)
    exact = [repr(r.error) for r in results if r.error is not None]
    assert set(exact) <= set(found)
    for value in exact[:: max(1, len(exact) // 50)]:
        assert page.count(value) == 1


def test_the_chart_library_is_there_once(of_small):
    page = of_small[1]
    assert len(re.findall(r"<script", page)) == 3
    assert page.count("vegaEmbed(") < 5


# ---- controls


def test_every_control_is_native_and_has_a_label(of_small):
    results, page = of_small
    elements = Elements(page)
    controls = [(t, a) for t, a in elements.tags if t in ("input", "select")]
    assert all(control in elements.labelled for control in controls)
    assert {a["type"] for t, a in controls if t == "input"} <= {"checkbox", "search"}
    boxes = [a for _, a in controls if a.get("type") == "checkbox"]
    values = {n: {a["value"] for a in boxes if a["name"] == n} for n in ("solver", "grid")}
    assert values["solver"] == {r.solver for r in results}
    assert values["grid"] == {r.grid for r in results} - {"adaptive"}
    names = {a["name"] for t, a in controls if t == "select"}
    assert names == {"lines", "measure", "x", "y", "focus", "theme", "nfe"}
    assert all("tabindex" not in a for _, a in elements.tags)
    ids = [a["id"] for _, a in elements.tags if "id" in a]
    assert len(ids) == len(set(ids))
    # a field of this name would hide the form's own
    assert not {a.get("id") or a.get("name") for t, a in elements.tags if t in ("input", "select", "button")} & {
        "reset", "submit", "elements",
    }  # fmt: skip


def test_problems_have_anchors_and_boxes_of_the_same_name(of_small):
    elements = Elements(of_small[1])
    sections = [a["id"] for t, a in elements.tags if t == "section" and a.get("class") == "problem"]
    assert sections == ["problem-mixture-2d", "problem-power-law-48-D"]
    boxes = [a["value"] for t, a in elements.tags if t == "input" and a["name"] == "problem"]
    assert [f"problem-{b}" for b in boxes] == sections
    links = {a["href"] for t, a in elements.tags if t == "a"}
    assert {f"#{s}" for s in sections} | {"#failures", "#environment"} <= links
    assert pages._anchors(["a b", "a-b", "a/b"]) == {
        "a b": "problem-a-b",
        "a-b": "problem-a-b-2",
        "a/b": "problem-a-b-3",
    }


def test_a_solver_has_the_same_mark_in_the_legend_and_in_every_chart():
    number = numbers()
    results = [made("p", s, "power", 5, number) for s in "ABC"] + [made("q", s, "power", 5, number) for s in "CB"]
    page = pages._html(results)
    legend = re.findall(r'value="(\w)" data-kind="trajectory".*?#shape-([\w-]+)" fill="(.*?)"', page)
    assert [s for s, _, _ in legend] == ["A", "B", "C"]
    for chart in embedded(page)["charts"]:
        points = next(layer["encoding"] for layer in chart["spec"]["layer"] if "shape" in layer["encoding"])
        colour, shape = points["color"]["scale"], points["shape"]["scale"]
        assert list(zip(colour["domain"], shape["range"], colour["range"], strict=True)) == legend
    keys = re.findall(r'<ul class="swatches"(.*?)</ul>', page, re.DOTALL)
    assert [re.findall(r'<li data-solver="(\w)">', key) for key in keys] == [["A", "B", "C"], ["B", "C"]]


def test_a_default_grid_that_was_not_run_gives_way_to_the_best():
    chart = embedded(pages._html([made("p", "A", "uniform", 5, numbers())]))["charts"][0]
    assert chart["grid"] is None
    assert next(p["value"] for p in chart["spec"]["params"] if p["name"] == "grid") == "best"


def test_what_is_shown_is_in_the_address(of_small):
    script = of_small[1].rsplit("<script>", 1)[1]
    for part in ("location.hash", "history.replaceState", '"hashchange"', "URLSearchParams"):
        assert part in script
    for name in ("problem", "grid", "run", "solver", "lines", "measure", "x", "y", "focus", "nfe", "theme"):
        assert f'"{name}"' in script


# ---- on its own, in the dark, on paper


def test_nothing_is_loaded(of_small):
    page = of_small[1]
    for tag, attributes in Elements(page).tags:
        assert tag not in ("iframe", "object", "embed")
        for name in ("src", "href", "srcset"):
            assert not re.match(r"\s*(https?:)?//", attributes.get(name) or "")
        assert tag != "script" or "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_text_of_results_does_not_end_a_script(of_small):
    page = of_small[1]
    assert "ValueError: </script>" not in page
    assert embedded(page)["charts"][0]["runs"][3]["message"] == "ValueError: </script>"


def test_the_dark_and_paper_have_rules(of_small):
    style = re.search(r"<style>(.*?)</style>", of_small[1], re.DOTALL).group(1)
    # on screen only: paper is white
    assert "@media screen and (prefers-color-scheme: dark)" in style
    paper = style[style.index("@media print") :]
    assert re.search(r"\.controls[^{]*\{ display: none", paper)
    assert re.search(r"\.swatches \{ display: flex", paper)  # the legend is among the controls
    assert "max-width: 100%" in paper
    assert style.count("{") == style.count("}")


# ---- ranking


def test_the_ranking_of_each_budget(of_small):
    results, page = of_small
    podiums = re.findall(r'class="podium"[^>]*>(.*?)</table>', page, re.DOTALL)
    for part, podium in zip(tables.by_problem(results), podiums, strict=True):
        best = tables.best_of_grids(part)
        rows = re.findall(r"<tr><th scope=\"row\">\d</th>(.*?)</tr>", podium, re.DOTALL)
        for column, budget in enumerate(sorted({b for _, b in best})):
            ranked = sorted((r for (_, b), r in best.items() if b == budget), key=tables.order)
            assert [re.findall(r">([^<]+)<br>", row)[column] for row in rows] == [r.solver for r in ranked]


def test_every_cell_of_the_ranking_knows_its_place(of_small):
    first = re.search(r'class="ranking"[^>]*>(.*?)</table>', of_small[1], re.DOTALL).group(1)
    assert len(re.findall(r"<tr data-solver=", first)) == 3
    assert sorted(re.findall(r'data-rank="(\d)"', first)) == ["1", "1", "2", "2", "3", "3"]


def test_failures_floors_and_the_command_are_on_the_page(of_small):
    page = of_small[1]
    shapes = json.dumps([chart["spec"] for chart in embedded(page)["charts"]])
    assert '"cross"' in shapes
    assert "twice" in shapes
    assert page.index('id="failures"') < page.index('id="environment"') < page.index("sdeflow bench --suite zoo")
