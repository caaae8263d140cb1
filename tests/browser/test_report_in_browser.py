"""The report of a real run, opened in Chromium: what it draws and prints is what the results say."""

import dataclasses
import json
import math
import os
import re

import pytest
from by_hand import (
    charts,
    check_marks,
    check_words,
    chosen,
    drawn,
    error_of,
    find,
    ranking,
    same_as_shown,
    sections,
    state,
    wall_ms,
)

import sdeflow as sf

pytestmark = pytest.mark.browser


# ---- figures


def test_each_result_is_drawn_once_with_its_figures(opened, ran):
    results, page = ran[0], opened()
    assert {r.status for r in results} == {"ok", "failed"}
    assert len({r.problem for r in results}) == 2
    page.choose(lines="all")
    figures = check_marks(page, results, lambda part: part)
    assert figures == 3 * sum(r.status == "ok" for r in results)


@pytest.mark.parametrize("lines", ["best", "default"])
def test_a_choice_of_grid_draws_only_that(opened, ran, lines):
    page = opened()
    page.choose(lines=lines)
    check_marks(page, ran[0], lambda part: drawn(part, None if lines == "best" else [part[0].about["default_grid"]]))


def test_marks_stand_where_the_axes_say(opened, ran):
    page = opened()
    page.choose(lines="all")
    for chart, part in charts(ran[0]):
        ticks = page.js(
            """(c) => [...document.querySelectorAll(`[id="${c}"] .role-axis`)].map((a) =>
                 [...a.querySelectorAll(".role-axis-label text")].map((t) => {
                   const m = t.getAttribute("transform").match(/translate\\(([-\\d.]+),\\s*([-\\d.]+)\\)/);
                   return [t.textContent.replace("\\u2212", "-"), Number(m[1]), Number(m[2])]; }))""",
            chart,
        )
        across, up = (axis for axis in ticks if axis)
        frame = page.js(
            """(c) => { const r = document.querySelector(`[id="${c}"] .role-frame > g > path`).getBoundingClientRect();
                 return [r.x, r.y]; }""",
            chart,
        )

        def line(ticks, column):
            (a, *one), (b, *two) = (ticks[0], ticks[-1])
            slope = (two[column] - one[column]) / math.log(float(b) / float(a))
            return lambda v: one[column] + slope * math.log(v / float(a))

        x_of, y_of = line([t for t in across if t[0]], 0), line([t for t in up if t[0]], 1)
        offset = None
        checked = 0
        for mark in page.marks(chart):
            result = find(part, mark["of"])
            if result.status != "ok" or mark["layer"] != page.marks(chart)[0]["layer"]:
                continue
            at = (mark["x"] - frame[0], mark["y"] - frame[1])
            y = at[1] - y_of(error_of(result))
            x = at[0] - x_of(result.nfe)
            offset = offset or (x, y)
            sideways = 1.5 if result.kind == "trajectory" else 40  # of intervals beside each other
            assert abs(x - offset[0]) < sideways, (result.solver, result.nfe, x, offset)
            assert abs(y - offset[1]) < 2.5, (result.solver, result.error, y, offset)
            checked += 1
        assert checked > 5


def test_pointing_at_a_mark_shows_its_exact_figures(opened, ran):
    page = opened()
    read = 0
    for chart, part in charts(ran[0]):
        page.js("(c) => document.getElementById(c).scrollIntoView({ block: 'center' })", chart)
        for mark in page.marks(chart)[::4]:
            page.page.mouse.move(mark["x"], mark["y"])
            tip = page.page.locator("#vg-tooltip-element.visible")
            tip.wait_for()
            of = page.js(
                "() => Object.fromEntries([...document.querySelectorAll('#vg-tooltip-element tr')]"
                ".map((r) => [...r.cells].map((c) => c.innerText)))"
            )
            assert "undefined" not in json.dumps(of)
            read += check_words(of, find(part, {"tolerance": "null", **of}), missing="")
            page.page.mouse.move(1, 1)
    assert read > 30


def open_figures(page):
    for summary in page.page.locator("details.figures > summary").all():
        summary.click()


def check_figures(page, results):
    """The table under each plot has a row for every result that is shown, with its figures to six digits."""
    for chart, part in charts(results):
        rows = page.js(
            "(c) => [...document.querySelectorAll(`details.figures[data-chart='${c}'] tbody tr`)]"
            ".map((r) => [...r.cells].map((d) => d.textContent))",
            chart,
        )
        names = ["median", "q90", "rms", "flip_rate"] if part[0].kind == "trajectory" else ["sliced_w2", "low", "high"]
        assert len(rows) == len(part)
        left = list(part)
        for solver, grid, calls, *figures, wall, message in rows:
            values = dict(zip(names, figures, strict=True))
            match = [
                r
                for r in left
                if (r.solver, r.grid, r.message or "") == (solver, grid, message)
                and same_as_shown(calls, r.nfe, digits=6)
                and all(same_as_shown(values[n], getattr(r, n), digits=6) for n in names)
                and same_as_shown(wall, wall_ms(r), digits=4)
            ]
            assert match, (solver, grid, calls, figures)
            left.remove(match[0])
        assert left == []


def test_the_tables_of_figures_are_the_results(opened, ran):
    page = opened()
    page.choose(lines="all")
    open_figures(page)
    check_figures(page, ran[0])


def test_a_page_with_one_wrong_figure_is_caught(opened, ran, tmp_path):
    """The negative control of the comparisons above: one digit of one number of the page is another."""
    results, out = ran
    text = (out / "report.html").read_text()
    victim = next(r for r in results if r.status == "ok" and r.kind == "trajectory" and r.median > 1e-4)
    assert text.count(f'"median":{victim.median!r}') == 1
    wrong = tmp_path / "wrong.html"
    wrong.write_text(text.replace(f'"median":{victim.median!r}', f'"median":{victim.median * (1 + 3e-5)!r}'))
    page = opened(wrong)
    page.choose(lines="all")
    open_figures(page)
    with pytest.raises(AssertionError):
        check_figures(page, results)
    with pytest.raises(AssertionError):
        check_marks(page, results, lambda part: part)


# ---- rankings


def check_rankings(page, results, shown):
    for chart, part in charts(results):
        rows, columns = ranking(part, shown(part))
        assert page.ranking(chart) == rows
        places = page.ranking(chart, "podium")
        for number, column in enumerate(columns, start=1):
            names = [row[number].rsplit(" ", 2)[0] if "e" in row[number] else "" for row in places]
            cells = [row[number] for row in places if row[number]]
            assert len(cells) == min(5, len(column)), (names, column)
            for place, (text, solver) in enumerate(zip(cells, column, strict=False)):
                assert text.startswith(solver), (place, text, column)


def test_rankings_are_those_of_the_results(opened, ran):
    check_rankings(opened(), ran[0], chosen)


def test_rankings_follow_what_is_chosen(opened, ran):
    page = opened()
    page.tick("grid", "power", False)
    check_rankings(page, ran[0], lambda p: chosen(p, ["karras", "logsnr", "refuses"]))
    for cover in page.page.locator(".cover").all():
        assert "chosen grids (" in cover.inner_text()
        assert "power" not in cover.inner_text()
    page.tick("solver", "DDIM", False)
    check_rankings(page, ran[0], lambda p: chosen(p, ["karras", "logsnr", "refuses"], ["DDIM"]))
    assert "1 of 7 solvers are hidden" in page.page.locator(".cover").first.inner_text()
    page.choose(lines="default")
    check_rankings(page, ran[0], lambda p: chosen(p, [p[0].about["default_grid"]], ["DDIM"]))
    assert "power grid, the default" in page.page.locator(".cover").first.inner_text()
    page.page.click("#first-view")
    page.settle()
    check_rankings(page, ran[0], chosen)


def test_without_scripts_the_rankings_are_there_and_the_same(chromium, ran, opened):
    page = opened()
    context = chromium.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto((ran[1] / "report.html").as_uri())
    for chart, _ in charts(ran[0]):
        for name in ("ranking", "podium"):
            texts = plain.locator(f"table.{name}[data-chart='{chart}'] tbody tr").all_inner_texts()
            squeezed = [re.sub(r"\s+", " ", t).strip() for t in texts]
            assert squeezed == [re.sub(r"\s+", " ", " ".join(row)).strip() for row in page.ranking(chart, name)]
    assert "need JavaScript" in plain.locator("noscript").inner_text()
    context.close()


@pytest.mark.parametrize("by", ["heading", "list"])
def test_a_budget_to_rank_by(opened, ran, by):
    page = opened()
    if by == "list":
        page.choose(nfe="10")
    else:
        page.page.locator("table.ranking button", has_text="10").first.click()
    for chart, part in charts(ran[0]):
        _, columns = ranking(part, chosen(part))
        budgets = sorted({r.budget for r in part if r.budget})
        assert [row[0] for row in page.ranking(chart)][: len(columns[1])] == columns[budgets.index(10)]
        heads = page.page.locator(f"table.ranking[data-chart='{chart}'] th[aria-sort]").all_inner_texts()
        assert heads == ["10"]


def test_leaders_are_the_solvers_that_rank_first(opened, ran):
    page = opened()
    page.page.locator("[data-leaders=trajectory]").click()
    page.settle()
    first = set()
    for _, part in charts(ran[0]):
        if part[0].kind == "trajectory":
            for budget in (5, 10, 20):
                column = [r for r in chosen(part) if r.budget == budget and error_of(r) < math.inf]
                least = min(map(error_of, column))
                first |= {r.solver for r in column if error_of(r) == least}
    on = page.js("() => [...document.querySelectorAll('input[data-kind=trajectory]:checked')].map((b) => b.value)")
    assert set(on) == first
    assert 0 < len(first) < 7


# ---- failures, floors, environment


def test_failures_are_crosses_and_a_list_with_the_reasons(opened, ran):
    page = opened()
    failed = [r for r in ran[0] if r.status == "failed"]
    crosses = [m for chart, _ in charts(ran[0]) for m in page.marks(chart) if "no grid <today>" in m["text"]]
    assert len(crosses) == len(failed) > 10
    assert page.page.locator("#failures tbody tr:visible").count() == len(failed)
    assert page.page.locator("#failures td.message").first.inner_text() == "ValueError: no grid <today>"
    page.tick("problem", "mixture-2d", False)
    left = sum(r.problem != "mixture-2d" for r in failed)
    assert page.page.locator("#failures tbody tr:visible").count() == left < len(failed)


def test_floors_are_drawn_and_what_is_below_them_is_grey(opened, ran):
    page = opened()
    for chart, part in charts(ran[0]):
        measure = "median" if part[0].kind == "trajectory" else "sliced_w2"
        floor = part[0].about["floors"][measure]
        texts = page.page.locator(f"[id='{chart}'] .mark-text.role-mark text").all_text_contents()
        assert len(texts) == 1
        assert float(re.search(r"floor (\S+)", texts[0].replace("\u2212", "-")).group(1)) == float(f"{floor:.1e}")
        dashed = page.page.locator(f"[id='{chart}'] .mark-rule.role-mark line[stroke-dasharray]").count()
        assert dashed == 1
        grey = sum(not r.resolved and r.budget is not None and r.status == "ok" for r in chosen(part))
        assert page.page.locator(f"table.ranking[data-chart='{chart}'] td.unresolved").count() == grey
    assert any(not r.resolved for r in ran[0])


def test_the_environment_and_the_command_are_at_the_end(opened, ran):
    page, where = opened(), ran[0][0].environment
    assert page.js("() => document.querySelector('main').lastElementChild.id") == "environment"
    assert page.page.locator("#environment pre").inner_text() == "sdeflow bench --suite browser"
    text = page.page.locator("#environment").inner_text()
    for name, value in where.items():
        if value is not None:
            assert str(value) in text, name


# ---- pictures


def test_the_gallery_shows_the_pictures_of_the_results(opened, ran):
    page = opened()
    for summary in page.page.locator("details.gallery > summary").all():
        summary.click()
    page.page.wait_for_function("() => [...document.images].every((i) => i.complete)")
    for chart, part in charts(ran[0]):
        shown = page.js(
            "(c) => [...document.querySelectorAll(`details.gallery[data-chart='${c}'] tbody img`)]"
            ".map((i) => [i.alt, i.src, i.naturalWidth])",
            chart,
        )
        wanted = {
            f"{r.solver}, {r.budget} calls, {r.grid} grid": r.preview
            for r in chosen(part) if r.budget is not None and r.status == "ok"
        }  # fmt: skip
        assert {alt: src for alt, src, _ in shown} == wanted
        assert all(width > 0 for _, _, width in shown)
        assert (
            page.page.locator(f"details.gallery[data-chart='{chart}'] p img").get_attribute("src")
            == part[0].about["preview"]
        )


# ---- on its own


def test_what_would_go_wrong_is_noticed(chromium, ran, tmp_path):
    """The negative control of "nothing went wrong": a request, an error and a message each fail a page."""
    from conftest import Opened

    text = (ran[1] / "report.html").read_text()
    for i, bad in enumerate(
        ("<img src='http://127.0.0.1:9/x.png'>", "<script>null.x</script>", "<script>console.error('no')</script>")
    ):
        path = tmp_path / f"{i}.html"
        path.write_text(bad.join(text.rsplit("</body>", 1)))
        page = Opened(chromium, path.as_uri())
        page.page.wait_for_timeout(100)
        assert page.wrong, bad
        page.close()


# ---- light, dark, narrow, on paper

CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const f = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => { return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const paper = light(parse(getComputedStyle(document.body).backgroundColor));
  const found = {};
  for (const [name, at, property] of [["text", "h1", "color"], ["note", ".note", "color"],
      ["link", "header a", "color"],
      ["axis", ".role-axis-label text", "fill"], ["floor", ".mark-text.role-mark text", "fill"],
      ["failed", "td.message", "color"]]) {
    const ink = light(parse(getComputedStyle(document.querySelector(at))[property]));
    found[name] = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  }
  return [paper, found];
}"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_at_each_width_light_and_dark(opened, tmp_path, width, scheme):
    page = opened(width=width, scheme=scheme)
    assert page.js("() => document.scrollingElement.scrollWidth") <= width
    paper, contrast = page.js(CONTRAST)
    assert (paper < 0.05) == (scheme == "dark")
    assert min(contrast.values()) >= 4.5, contrast
    for summary in page.page.locator("summary:visible").all():
        if not summary.evaluate("(s) => s.parentElement.open"):
            summary.click()
    page.settle()
    assert page.js("() => document.scrollingElement.scrollWidth") <= width
    assert page.saved(tmp_path, f"report-{width}-{scheme}").stat().st_size > 50_000


def test_colours_can_be_chosen_against_the_system(opened):
    for scheme, wanted in (("light", "dark"), ("dark", "light")):
        page = opened(scheme=scheme)
        page.choose(theme=wanted)
        paper, contrast = page.js(CONTRAST)
        assert (paper < 0.05) == (wanted == "dark")
        assert min(contrast.values()) >= 4.5, contrast


def test_on_paper_nothing_is_cut_and_the_controls_are_gone(opened, tmp_path):
    page = opened(scheme="dark")
    page.choose(theme="dark")
    page.page.emulate_media(media="print")
    page.page.set_viewport_size({"width": 700, "height": 1000})  # A4 without its margins
    paper, contrast = page.js(CONTRAST)
    assert paper > 0.95
    assert min(contrast.values()) >= 4.5, contrast
    assert not page.page.locator(".controls").is_visible()
    assert page.page.locator(".swatches li:visible").count() > 10
    right = page.js(
        "() => Math.max(...[...document.querySelectorAll('main *')].filter((e) => e.getClientRects().length)"
        ".map((e) => e.getBoundingClientRect().right))"
    )
    assert right <= 700
    if "SDEFLOW_SCREENSHOTS" in os.environ:
        page.saved(tmp_path, "report-print")
    page.page.emulate_media(media=None)
    assert page.page.pdf(format="A4").startswith(b"%PDF")


# ---- several runs, and the largest


def test_two_runs_are_told_apart_filtered_and_compared(opened, ran, tmp_path):
    results, out = ran
    later = {
        **results[0].environment,
        "commit": "bbbb33334444",
        "started": "2030-01-01T00:00:00Z",
        "cpu": "Another CPU",
    }

    def slower(r):
        changes = {"median": 2 * r.median} if r.solver == "Heun" and r.median else {}
        return dataclasses.replace(r, environment=later, **changes)

    sf.bench.write([slower(r) for r in results], tmp_path / "later.jsonl")
    sf.bench.report([out / "results.jsonl", tmp_path / "later.jsonl"], tmp_path / "both.html")
    page = opened(tmp_path / "both.html")
    page.choose(lines="all")
    for chart, part in charts(results):
        assert len(page.marks(chart)) == 2 * len(part)
    assert "Another CPU" in page.page.locator(".runs").inner_text()
    assert page.page.locator("#environment pre").count() == 2
    rows = page.js(
        "() => [...document.querySelectorAll('table.ratios tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    assert len(rows) == 18  # 9 of each problem: those on grids
    for solver, *cells in rows:
        assert [c.split()[0] for c in cells if c] == ["2.00" if solver == "Heun" else "1"] * len(cells)
    page.saved(tmp_path, "report-two-runs")
    page.tick("run", "2", False)
    for chart, part in charts(results):
        assert {m["of"]["solver"] for m in page.marks(chart)} == {f"{r.solver} [1]" for r in part}
        assert all(row[0].endswith("[1]") for row in page.ranking(chart))
    assert page.page.locator("details.compared:visible").count() == 0
    place = page.js("() => location.hash")
    again = opened(tmp_path / "both.html", place)
    assert state(again) == state(page)


def test_a_page_as_large_as_the_zoo_opens_and_is_below_5_mb(opened, ran, tmp_path):
    """Every result of the run again, under other names, until there are as many as the zoo has."""
    results = ran[0]
    copies = math.ceil(8500 / len(results))
    many = [dataclasses.replace(r, solver=f"{r.solver} no. {i}") for i in range(copies) for r in results]
    sf.bench.report(many, tmp_path / "many.html")
    assert (tmp_path / "many.html").stat().st_size < 5e6
    page = opened(tmp_path / "many.html")
    assert len(page.marks("problem-mixture-2d-trajectory")) == copies * len(
        drawn(sections(results)["problem-mixture-2d-trajectory"])
    )
