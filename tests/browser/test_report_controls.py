"""The controls of the report in Chromium: by mouse, by keyboard and by the page's address."""

import itertools

import pytest
from by_hand import charts, check_marks, drawn, sections, state

pytestmark = pytest.mark.browser


# ---- controls


def test_pointing_at_the_legend_highlights_the_solver_in_every_plot(opened, ran):
    page = opened()

    def bright():
        return [
            {m["of"]["solver"] for m in page.marks(c) if m["opacity"] > 0.9}
            for c, part in charts(ran[0]) if part[0].kind == "trajectory"
        ]  # fmt: skip

    everything = bright()
    label = page.page.locator("label", has=page.page.locator('input[name=solver][value="Heun"]'))
    label.hover()
    page.settle()
    assert bright() == [{"Heun"}, {"Heun"}]
    page.page.mouse.move(1, 1)
    page.settle()
    assert bright() == everything
    page.page.focus('input[name=solver][value="DDIM"]')
    page.settle()
    assert bright() == [{"DDIM"}, {"DDIM"}]
    page.page.focus("select[name=x]")
    page.choose(focus="Euler")
    assert bright() == [{"Euler"}, {"Euler"}]
    page.choose(focus="")
    # a click on a mark keeps it, a second one takes it back
    chart = next(iter(sections(ran[0])))
    mark = next(m for m in page.marks(chart) if m["of"]["solver"] == "Heun")
    page.page.mouse.click(mark["x"], mark["y"])
    page.settle()
    assert page.js("() => document.querySelector('select[name=focus]').value") == "Heun"
    assert bright() == [{"Heun"}, {"Heun"}]


@pytest.mark.parametrize("axis", ["x", "y"])
def test_axes_are_linear_on_demand(opened, ran, axis):
    page = opened()
    chart = next(iter(sections(ran[0])))

    def spread():
        ticks = page.js(
            """([c, n]) => { const a = [...document.querySelectorAll(`[id="${c}"] .role-axis`)]
                 .map((a) => [...a.querySelectorAll(".role-axis-label text")].map((t) => t.textContent))
                 .filter((a) => a.length);
                 return a[n]; }""",
            [chart, "xy".index(axis)],
        )
        return [float(t.replace("\u2212", "-")) for t in ticks if t]

    assert 0.0 not in spread()
    before = len(page.marks(chart))
    page.choose(**{axis: "linear"})
    ticks = spread()
    assert 0.0 in ticks
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert len(page.marks(chart)) == before
    page.choose(**{axis: "log"})
    assert 0.0 not in spread()


def test_every_control_changes_the_address_and_nothing_breaks(opened):
    page = opened()
    seen = {page.js("() => location.hash")}
    selects = page.js(
        "() => [...document.querySelectorAll('select')].map((s) => [s.name, [...s.options].map((o) => o.value)])"
    )
    for name, options in selects:
        for option in options[1:]:
            page.choose(**{name: option})
            address = page.js("() => location.hash")
            assert f"{name}=" in address
            seen.add(address)
        page.choose(**{name: options[0]})
        assert f"{name}=" not in page.js("() => location.hash")
    boxes = page.page.locator(".controls input[type=checkbox]")
    for box in boxes.all():
        before = page.js("() => location.hash")
        box.click()
        page.settle()
        assert page.js("() => location.hash") != before
        box.click()
        page.settle()
    for button in page.page.locator("button").all():
        button.click()
        page.settle()
    for summary in page.page.locator("summary:visible").all():
        was = summary.evaluate("(s) => s.parentElement.open")
        summary.click()
        assert summary.evaluate("(s) => s.parentElement.open") != was
    assert len(seen) > 15


def test_a_problem_can_be_hidden_and_shown(opened, ran):
    page = opened()
    page.tick("problem", "digits-exact", False)
    assert page.page.locator("section.problem:visible").count() == 1
    page.tick("problem", "digits-exact", True)
    assert page.page.locator("section.problem:visible").count() == 2
    check_marks(page, ran[0], drawn)


def test_the_list_of_solvers_is_searched(opened):
    page = opened()
    every = page.page.locator("input[name=solver]:visible").count()
    page.page.fill("input[name=find]", "dpms")
    names = page.js(
        "() => [...document.querySelectorAll('input[name=solver]')].filter((b) => b.offsetParent).map((b) => b.value)"
    )
    assert set(names) == {"DPMSolverPP(1)", "DPMSolverPP(2)", "DPMSolverPP(2) eta=1"}
    page.page.locator("button[data-check=solver][data-kind=trajectory]:not([data-on])").click()
    page.settle()
    off = page.js("() => [...document.querySelectorAll('input[name=solver]:not(:checked)')].map((b) => b.value)")
    assert set(off) == {"DPMSolverPP(1)", "DPMSolverPP(2)"}  # of what was found
    page.page.fill("input[name=find]", "")
    assert page.page.locator("input[name=solver]:visible").count() == every


def test_the_address_brings_back_what_was_shown(opened, ran):
    first = opened()
    first.choose(lines="all", measure="q90", y="linear", focus="Heun", nfe="20", theme="dark")
    first.tick("solver", "Euler", False)
    first.tick("grid", "karras", False)
    first.tick("problem", "mixture-2d", False)
    place = first.js("() => location.hash")
    second = opened(place=place)
    assert state(second) == state(first)
    chart = "problem-digits-exact-trajectory"
    assert second.ranking(chart) == first.ranking(chart)
    assert len(second.marks(chart)) == len(first.marks(chart)) > 0
    second.page.reload()
    second.settle()
    assert state(second) == state(first)
    assert state(opened()) != state(first)


def test_a_link_to_a_section_scrolls_there(opened):
    page = opened(place="#problem-digits-exact")
    page.page.wait_for_function(
        "() => Math.abs(document.getElementById('problem-digits-exact').getBoundingClientRect().y) < 60"
    )
    page.page.locator("a", has_text="Environment and command").first.click()
    page.page.wait_for_function("() => document.getElementById('environment').getBoundingClientRect().y < innerHeight")


# ---- by keyboard


def test_every_control_is_reached_and_worked_by_keyboard(opened):
    page = opened()
    wanted = page.js(
        """() => { const all = [...document.querySelectorAll("a[href], button, input, select, summary")]
             .filter((e) => e.offsetParent && !e.disabled && getComputedStyle(e).visibility !== "hidden");
             all.forEach((e, i) => { e.dataset.n = i; }); return all.length; }"""
    )
    reached = set()
    for _ in range(wanted + 20):
        page.page.keyboard.press("Tab")
        number, width, style = page.js(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.dataset.n ?? null, parseFloat(s.outlineWidth), s.outlineStyle]; }"
        )
        if number is not None:
            assert width >= 1, number
            assert style != "none", number
            reached.add(int(number))
        if len(reached) == wanted:
            break
    assert sorted(reached) == list(range(wanted))
    assert wanted > 40
    box = 'input[name=grid][value="karras"]'
    page.page.focus(box)
    page.page.keyboard.press("Space")
    page.settle()
    assert not page.page.is_checked(box)
    page.page.focus("table.ranking button")
    page.page.keyboard.press("Enter")
    page.settle()
    assert "nfe=5" in page.js("() => location.hash")
    page.page.focus("details.figures summary")
    page.page.keyboard.press("Enter")
    assert page.js("() => document.querySelector('details.figures').open")
    page.page.focus("select[name=lines]")
    page.page.keyboard.press("ArrowDown")
    page.settle()
    assert "lines=default" in page.js("() => location.hash")
