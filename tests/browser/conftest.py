"""A real run of the benchmark, its report, and the system's Chromium to open it in."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

import sdeflow as sf
from sdeflow.bench import suites

SOLVERS = [
    "Euler", "Heun", "DDIM", "DPMSolverPP(1)", "DPMSolverPP(2)", "UniPC(3)", "RK45 adaptive",
    "EulerMaruyama eta=1", "DDPM", "DPMSolverPP(2) eta=1",
]  # fmt: skip
LOCAL = ("file:", "data:", "blob:")


def refuses(process, steps, t_start=None, t_end=None):
    """A grid that always fails."""
    raise ValueError("no grid <today>")


def points():
    return dataclasses.replace(suites.mixture(), samples=24, draws=200, tolerance=1e-6)


def images():
    return dataclasses.replace(suites.digits_exact(), samples=4, draws=16, tolerance=1e-4)


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """(results, folder): two problems, both kinds of solvers, four grids of which one fails, and a floor above
    the errors of the best."""
    suite = dataclasses.replace(suites.QUICK, problems=(points, images), tolerances=(1e-1, 1e-2))
    out = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "browser", suite)
        results = sf.bench.run(
            "browser", solvers=SOLVERS, grids=["power", "karras", "logsnr", refuses], nfe=[5, 10, 20],
            command="sdeflow bench --suite browser", progress=False,
        )  # fmt: skip
    sf.bench.write(results, out / "results.jsonl")
    sf.bench.report(out / "results.jsonl", out / "report.html")
    return sf.bench.read(out / "results.jsonl"), out


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("the browser's tests need Chromium: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, headless=True, args=arguments)
        yield browser
        browser.close()


class Opened:
    """A page in its own context, and all that went wrong in it."""

    def __init__(self, browser, address, *, width=1280, height=900, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.wrong = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith(LOCAL) else self.wrong.append(r.url))
        self.page.goto(address)
        self.settle()

    def settle(self):
        """Wait until every section that is shown is drawn, and what was asked of it is done."""
        self.page.evaluate(
            "drawing.then(() => Promise.all([...views.values()].map(({ view }) => view.runAsync()))).then(() => null)"
        )

    def js(self, text, argument=None):
        return self.page.evaluate(text, argument)

    def choose(self, **values):
        for name, value in values.items():
            self.page.select_option(f"select[name={name}]", value)
        self.settle()

    def tick(self, name, value, on):
        box = self.page.locator(f'input[name="{name}"][value="{value}"]').first
        box.set_checked(on)
        self.settle()

    def ranking(self, chart, name="ranking"):
        """The rows of a table of places, as the text of their cells."""
        rows = self.js(
            "([c, n]) => [...document.querySelectorAll(`table.${n}[data-chart='${c}'] tbody tr`)]"
            ".map((r) => [...r.cells].map((d) => d.innerText.replace(/\\s+/g, ' ').trim()))",
            [chart, name],
        )
        return rows

    def marks(self, chart):
        """What is drawn of each result: its words, by name, its place on the screen, opacity and layer."""
        found = self.js(
            """(c) => [...document.querySelectorAll(`[id="${c}"] .mark-symbol path`)].map((p) => {
                 const box = p.getBoundingClientRect();
                 return { text: p.getAttribute("aria-label"), layer: p.parentElement.getAttribute("class"),
                   opacity: Number(getComputedStyle(p).opacity), x: box.x + box.width / 2, y: box.y + box.height / 2 };
               })""",
            chart,
        )
        for mark in found:
            mark["of"] = dict(part.split(": ", 1) for part in mark["text"].split("; ") if ": " in part)
        return found

    def saved(self, folder, name):
        """A screenshot of the whole page in `folder`, and where the environment says."""
        path = Path(folder) / f"{name}.png"
        self.page.evaluate("() => scrollTo(0, 0)")  # the controls stay in sight, where the page is scrolled to
        self.page.screenshot(path=path, full_page=True)
        if kept := os.environ.get("SDEFLOW_SCREENSHOTS"):
            Path(kept).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
        return path

    def close(self):
        self.context.close()


@pytest.fixture
def opened(chromium, ran):
    """`opened(file, hash, width=..., scheme=...)`; at the end nothing may have gone wrong in what it opened."""
    pages = []

    def open_page(file=None, place="", **settings):
        address = (file or ran[1] / "report.html").as_uri() + place
        pages.append(Opened(chromium, address, **settings))
        return pages[-1]

    yield open_page
    wrong = [w for page in pages for w in page.wrong]
    for page in pages:
        page.close()
    assert wrong == []
