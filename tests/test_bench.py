"""The benchmark: runs, files and report, on small problems."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import sdeflow as sf
from sdeflow.bench import charts, tables
from sdeflow.bench.results import Log

SOLVERS = ["Euler", "Heun", "DPMSolverPP(2)", "RK45 adaptive", "EulerMaruyama eta=1"]


def mixture(**changes):
    data = sf.problems.EightGaussians()
    values = {"samples": 16, "draws": 64, "tolerance": 1e-6, "centres": data.means, "sample": data.sample}
    return sf.bench.Problem(data.model(sf.VP()), shape=(2,), name="ring", **(values | changes))


def refuses(process, steps, t_start=None, t_end=None):
    """A grid that always fails."""
    raise ValueError("no grid <today>")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(results, folder) of one run, with a grid that fails."""
    out = tmp_path_factory.mktemp("ran")
    results = sf.bench.run(mixture(), solvers=SOLVERS, grids=["power", refuses], nfe=[5, 10], out=out, command="test")
    return results, out


def only(results, **wanted):
    return [r for r in results if all(getattr(r, k) == v for k, v in wanted.items())]


# ---- runs


def test_each_combination_is_one_result(ran):
    results, _ = ran
    on_grids = {(r.solver, r.grid, r.budget) for r in results if r.grid != "adaptive"}
    assert on_grids == {
        (s, g, n) for s in SOLVERS if "adaptive" not in s for g in ("power", "refuses") for n in (5, 10)
    }
    assert [r.tolerance for r in results if r.grid == "adaptive"] == [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    assert len(results) == 16 + 5


def test_calls_are_counted_and_within_the_budget(ran):
    for r in only(ran[0], status="ok", grid="power"):
        calls = sf.bench.METHODS[r.solver].calls
        assert r.nfe == r.budget - r.budget % calls
        assert r.steps == r.budget // calls


def test_budgets_below_one_step_are_left_out():
    results = sf.bench.run(mixture(), solvers=["RK4", "RK45"], grids=["power"], nfe=[3, 5, 8, 10])
    assert [(r.solver, r.budget, r.nfe) for r in results] == [
        ("RK4", 5, 4), ("RK4", 8, 8), ("RK4", 10, 8), ("RK45", 8, 6), ("RK45", 10, 6),
    ]  # fmt: skip
    eight, ten = only(results, solver="RK4")[1:]
    assert eight.median == ten.median


def test_errors_are_those_of_a_solve_against_a_tight_one(ran):
    problem = mixture()
    flow = sf.VP().probability_flow(problem.model)
    x = sf.VP().prior_sample((16, 2), 0, dtype=torch.float64)
    with torch.no_grad():
        end = sf.solve(flow, x, sf.solvers.Heun(), steps=5, grid=sf.grids.power).x
        truth = sf.solve(flow, x, sf.solvers.RK45(), rtol=1e-10).x
    error = sf.metrics.trajectory_error(end, truth, centres=problem.centres)
    [row] = only(ran[0], solver="Heun", grid="power", budget=10)
    assert row.median == pytest.approx(error.median, rel=1e-3)
    assert row.rms == pytest.approx(error.rms, rel=1e-3)
    assert row.flip_rate == error.flip_rate
    assert row.samples == 16
    assert row.seed == 0
    assert row.dtype == "float64"
    assert row.scale == pytest.approx(float((truth - truth.mean(0)).square().mean().sqrt()), rel=1e-4)
    floor = row.about["floors"]["median"]
    assert row.floor == floor
    assert floor < 1e-4
    assert row.resolved


def test_an_error_at_the_floor_is_not_resolved():
    results = sf.bench.run(mixture(tolerance=1e-3), solvers=["RK4"], grids=["quadratic"], nfe=[8, 200])
    assert [r.resolved for r in results] == [True, False]


def test_a_tolerance_near_the_references_own_is_left_out():
    results = sf.bench.run(mixture(tolerance=1e-4), solvers=["RK45 adaptive"], nfe=[5])
    assert [r.tolerance for r in results] == [1e-1, 1e-2, 1e-3]


def test_stochastic_solvers_are_compared_in_distribution():
    problem = mixture(draws=2000)
    results = sf.bench.run(problem, solvers=["EulerMaruyama eta=1", "DDPM"], grids=["quadratic"], nfe=[2, 100])
    for r in results:
        assert r.kind == "distribution"
        assert r.median is None
        assert 0 <= r.low <= r.sliced_w2 <= r.high
        assert 0 < r.floor < 0.3
        assert r.samples == 2000
    for solver in ("EulerMaruyama eta=1", "DDPM"):
        few, many = only(results, solver=solver)
        assert many.sliced_w2 < few.sliced_w2
        assert many.sliced_w2 < 3 * many.floor
        assert not many.resolved


def test_without_exact_draws_the_target_is_the_flow():
    [row] = sf.bench.run(mixture(sample=None), solvers=["DDPM"], grids=["power"], nfe=[20])
    assert "probability flow" in row.about["truth"]
    assert math.isfinite(row.sliced_w2)


def test_a_given_reference_is_used():
    gaussian = sf.problems.Gaussian(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0]))
    process = sf.VP()
    a1, s1, a0, s0 = (float(v) for t in (process.t1, process.t_min) for v in (process.alpha(t), process.sigma(t)))
    mean, variance = gaussian.means[0], gaussian.variances[0]
    stretch = torch.sqrt((a0**2 * variance + s0**2) / (a1**2 * variance + s1**2))
    exact = sf.bench.Problem(
        gaussian.model(process), shape=(2,), reference=lambda x: a0 * mean + stretch * (x - a1 * mean), samples=8
    )
    computed = dataclasses.replace(exact, reference=None, tolerance=1e-9)
    rows = [sf.bench.run(p, solvers=["Heun"], grids=["power"], nfe=[20])[0] for p in (exact, computed)]
    assert rows[0].median == pytest.approx(rows[1].median, rel=1e-5)
    assert rows[0].floor is None
    assert rows[0].about["floors"] == {}


def test_time_in_the_network_is_part_of_the_wall_time(ran):
    for r in only(ran[0], status="ok"):
        assert 0 < r.model_seconds < r.wall_seconds


def test_the_same_run_gives_the_same_numbers(ran):
    again = sf.bench.run(mixture(), solvers=["Heun", "EulerMaruyama eta=1"], grids=["power"], nfe=[10])
    for r in again:
        [first] = only(ran[0], solver=r.solver, grid="power", budget=10)
        assert r.error == first.error
    other = sf.bench.run(mixture(), solvers=["Heun"], grids=["power"], nfe=[10], seed=1)
    assert other[0].error != again[0].error


def test_own_methods_and_grids():
    singlestep = sf.bench.Method("2S", lambda: sf.solvers.DPMSolverPP(2, multistep=False), calls=2)

    def squares(process, steps, t_start=None, t_end=None):
        return sf.grids.power(process, steps, t_start, t_end, exponent=2.0)

    [mine, theirs] = sf.bench.run(mixture(), solvers=[singlestep], grids=[squares, "quadratic"], nfe=[11])
    assert (mine.solver, mine.grid, mine.nfe) == ("2S", "squares", 10)
    assert mine.median == theirs.median


# ---- the user's network


class Net(torch.nn.Module):
    """A linear network, float32 as networks are."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, t):
        return self.dropout(self.layer(torch.cat([x, t[:, None]], dim=1)))


def test_a_network_runs_in_float64_and_is_left_as_it_was():
    net = Net()
    problem = sf.bench.Problem(sf.Model(net, sf.VP(), "eps"), shape=(2,), samples=8)
    [row] = sf.bench.run(problem, solvers=["Heun"], grids=["power"], nfe=[10])
    assert row.dtype == "float64"
    assert row.floor < 1e-4 * row.scale
    assert net.training
    assert net.layer.weight.dtype == torch.float32


def test_a_network_that_refuses_float64_runs_in_float32():
    net = Net().eval()
    problem = sf.bench.Problem(sf.Model(lambda x, t: net(x, t), sf.VP(), "eps"), shape=(2,), samples=8)
    with torch.no_grad():
        [row] = sf.bench.run(problem, solvers=["Heun"], grids=["power"], nfe=[10])
    assert row.dtype == "float32"
    assert row.status == "ok"


def test_a_network_that_fails_is_one_error():
    problem = sf.bench.Problem(sf.Model(Net(), sf.VP(), "eps"), shape=(5,), name="wrong", samples=8)
    with pytest.raises(RuntimeError, match=r"the network of 'wrong' failed on x of shape \(2, 5\)"):
        sf.bench.run(problem, solvers=["Heun"], grids=["power"], nfe=[10])


def test_a_sample_that_becomes_infinite_is_a_failed_run():
    def explodes(x, t):
        return torch.where(t.reshape(-1, 1) < 0.05, torch.inf, 0.0) * torch.ones_like(x)

    model = sf.Model(explodes, sf.VP(), "x0")
    problem = sf.bench.Problem(model, shape=(2,), reference=lambda x: x, samples=8)
    late, early = sf.bench.run(problem, solvers=["Euler"], grids=["uniform"], nfe=[5, 50])
    assert late.status == "ok"
    assert early.status == "failed"
    assert "infinite or NaN" in early.message
    assert "null" in early.line()


def test_a_custom_process_runs_and_what_it_lacks_is_drawn_as_failed():
    class Shrink(sf.SDE):
        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return math.sqrt(2) * torch.ones_like(x)

    model = sf.Model(lambda x, t: -x, Shrink(), "score", expand=False)  # stationary: N(0, 1) stays itself
    with pytest.raises(ValueError, match="prior=draw"):
        sf.bench.Problem(model, shape=(1,))
    problem = sf.bench.Problem(
        model, shape=(1,), prior=lambda n, seed: torch.randn(n, 1, generator=torch.Generator().manual_seed(seed)),
        samples=8, draws=64,
    )  # fmt: skip
    results = sf.bench.run(problem, solvers=["Heun", "DDIM", "EulerMaruyama eta=1"], grids=["uniform"], nfe=[10])
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert results[0].median < 1e-6
    assert "transition view" in results[1].message


def test_bad_problems_are_refused():
    model = sf.problems.EightGaussians().model(sf.VP())
    for bad, error in [
        ({"shape": (0,)}, ValueError), ({"tolerance": 0.0}, ValueError),
        ({"samples": 1}, ValueError), ({"draws": 15}, ValueError), ({"name": "a/b"}, ValueError),
    ]:  # fmt: skip
        with pytest.raises(error, match=r"bench\.Problem: expected"):
            sf.bench.Problem(**({"model": model, "shape": (2,)} | bad))
    with pytest.raises(TypeError, match=r"model as a Model, got the function .*; wrap the network: sf\.Model"):
        sf.bench.Problem(lambda x, t: x, shape=(2,))
    with pytest.raises(ValueError, match="draws as a whole number, got True"):
        sf.bench.Problem(model, shape=(2,), draws=True)
    with pytest.raises(ValueError, match=r"expected sample\(n, seed\) of shape"):
        sf.bench.run(mixture(sample=lambda n, seed: torch.zeros(n, 3)), solvers=["DDPM"], grids=["power"], nfe=[5])
    nan = sf.Model(lambda x, t: x * torch.nan, sf.VP(), "eps")
    with pytest.raises(RuntimeError, match="did not converge"):
        sf.bench.run(sf.bench.Problem(nan, shape=(2,)), solvers=["Heun"], grids=["power"], nfe=[5])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"solvers": ["Hean"]},
            r"unknown solver 'Hean' \(did you mean Heun.*\?\): expected one of Euler, Midpoint, Heun",
        ),
        ({"grids": ["cubic"]}, "unknown grid 'cubic': expected one of uniform, quadratic"),
        ({"nfe": [0]}, "expected NFE budgets as positive integers"),
        ({"nfe": []}, "at least one NFE budget"),
        ({"solvers": []}, "at least one solver"),
        ({"problem": "quik"}, r"unknown suite 'quik' \(did you mean quick\?\)"),
    ],
)
def test_bad_axes_are_refused_before_anything_runs(arguments, match):
    with pytest.raises(ValueError, match=match):
        sf.bench.run(**({"problem": mixture()} | arguments))


def test_the_suite_covers_what_it_promises():
    suite = sf.bench.SUITES["quick"]
    assert suite.nfe == (5, 8, 10, 15, 20, 30, 50)
    assert set(suite.methods) <= set(sf.bench.METHODS)
    grids = {"uniform", "quadratic", "power", "logsnr", "karras", "logistic"}
    assert set(suite.grids) == grids <= set(sf.bench.GRIDS)
    problems = [make() for make in suite.problems]
    assert [type(p.model.sde).__name__ for p in problems] == ["VP", "EDM", "VP"]
    assert [p.shape for p in problems] == [(2,), (1, 8, 8), (1, 8, 8)]


# ---- files


def test_every_line_of_the_file_holds_the_whole_schema(ran):
    results, out = ran
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    names = {f.name for f in dataclasses.fields(sf.bench.Result)}
    for line, result in zip(lines, results, strict=True):
        assert set(line) == names | {"schema"}
        assert line["schema"] == 1
        environment = line["environment"]
        assert environment["command"] == "test"
        assert environment["torch"] == torch.__version__
        assert {"python", "numpy", "scipy", "sdeflow", "commit", "cpu", "cores", "memory_gb", "started"} <= set(
            environment
        )
        assert line["median"] == result.median
    assert sf.bench.read(out / "results.jsonl") == results
    ranked = list(csv.DictReader((out / "ranking.csv").read_text().splitlines()))
    for row in ranked:
        runs = [r for r in results if (r.solver, str(r.budget), r.kind) == (row["solver"], row["nfe"], row["kind"])]
        assert any(r.grid == row["grid"] for r in runs)
        if row["status"] == "ok":
            assert float(row["error"]) == pytest.approx(min(r.error for r in runs if r.status == "ok"), rel=1e-5)
    assert {(r["solver"], r["nfe"]) for r in ranked} == {(r.solver, str(r.budget)) for r in results if r.budget}


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"schema": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a result"):
        sf.bench.read(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one result"):
        sf.bench.report(path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_fields_of_a_later_version_are_ignored(ran, tmp_path):
    line = json.loads(ran[0][0].line())
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({**line, "new": 1}) + "\n")
    assert sf.bench.read(path) == [ran[0][0]]
    path.write_text(json.dumps({**line, "schema": 99}) + "\n")
    with pytest.raises(ValueError, match="newer sdeflow"):
        sf.bench.read(path)


def test_an_interrupted_run_keeps_what_was_finished(tmp_path):
    calls = 0

    def interrupts(x, t):
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt
        return torch.zeros_like(x)

    problem = sf.bench.Problem(sf.Model(interrupts, sf.VP(), "x0"), shape=(2,), reference=lambda x: x, samples=8)
    with pytest.raises(KeyboardInterrupt):
        sf.bench.run(problem, solvers=["Euler"], grids=["power"], nfe=[5, 10, 50], out=tmp_path)
    assert [r.budget for r in sf.bench.read(tmp_path / "results.jsonl")] == [5, 10]
    sf.bench.report(tmp_path / "results.jsonl", tmp_path / "report.html")


def test_a_file_in_progress_is_always_whole(ran, tmp_path):
    log = Log(tmp_path / "results.jsonl")
    for result in ran[0][:3]:
        log.add(result)
        log.save()
        assert sf.bench.read(tmp_path / "results.jsonl") == log.results
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


# ---- tables, charts and report


def test_the_ranking_takes_the_best_grid_and_marks_the_best_solver():
    results = sf.bench.run(
        mixture(), solvers=["Euler", "DDIM", "DPMSolverPP(1)", "RK4"], grids=["uniform", "quadratic"], nfe=[20]
    )
    [table] = tables.tables(results)
    for solver, [cell] in table.rows.items():
        assert cell.result.error == min(r.error for r in only(results, solver=solver))
        assert cell.first == (cell.result.error == min(r.error for r in results))
    assert tables.twins(results) == [["DDIM", "DPMSolverPP(1)"]]
    assert tables.initials(["power", "plain", "uniform", "p"]) == {
        "power": "po",
        "plain": "pl",
        "uniform": "u",
        "p": "p",
    }


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page, re.DOTALL).group(1))


def test_the_report_holds_every_result(ran):
    results, out = ran
    page = (out / "report.html").read_text()
    runs = [run for chart in embedded(page)["charts"] for run in chart["runs"]]
    got = {(r["solver"], r["grid"], r["budget"], r["tolerance"], r["median"], r["sliced_w2"]) for r in runs}
    assert len(runs) == len(results)
    assert got == {(r.solver, r.grid, r.budget, r.tolerance, r.median, r.sliced_w2) for r in results}
    for text in ("EightGaussians", "VP(beta_min", "RK45 at rtol", "<pre><code>test</code></pre>", "vegaEmbed"):
        assert (text in page) == (text != "EightGaussians")
    assert len(page) < 5e6
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_failed_runs_are_drawn_at_the_top_and_listed(ran):
    results, out = ran
    failed = only(results, status="failed")
    assert len(failed) == 8
    assert {r.message for r in failed} == {"ValueError: no grid <today>"}
    page = (out / "report.html").read_text()
    assert page.count("ValueError: no grid &lt;today&gt;") == 8 + page.count('title="ValueError')
    import vl_convert

    for chart in embedded(page)["charts"]:
        grid = next(p for p in chart["spec"]["params"] if p["name"] == "grid")
        grid["value"] = "refuses"
        spec = {**chart["spec"], "width": 400, "datasets": {**chart["spec"].get("datasets", {}), "runs": chart["runs"]}}
        scene = json.dumps(vl_convert.vegalite_to_scenegraph(spec))
        drawn = [r for r in chart["runs"] if r["status"] == "failed"]
        assert len(re.findall(r'"shape": ?"cross"', scene)) == len(drawn)


def test_the_specifications_are_valid(ran):
    import altair

    for part in tables.by_problem(ran[0]):
        altair.LayerChart.from_dict(charts.interactive(part), validate=True)
        altair.LayerChart.from_dict(charts.still(part), validate=True)


def test_the_figures_are_pictures(ran):
    _, out = ran
    for name in ("work-precision", "work-precision-ring", "distribution-ring"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.svg").read_text().startswith("<svg")


def test_several_runs_are_compared(ran, tmp_path):
    results, out = ran
    later = [dataclasses.replace(r, environment={**r.environment, "started": "later"}) for r in results]
    sf.bench.write(later, tmp_path / "later.jsonl")
    sf.bench.report([out / "results.jsonl", tmp_path / "later.jsonl"], tmp_path / "both.html")
    solvers = {s["name"] for s in embedded((tmp_path / "both.html").read_text())["solvers"]}
    assert {"Heun [1]", "Heun [2]"} <= solvers


def test_images_are_shown():
    images = torch.rand(20, 1, 4, 4, dtype=torch.float64)
    problem = sf.bench.Problem(sf.problems.Empirical(images, 0.1).model(sf.EDM()), shape=(1, 4, 4), samples=8)
    [row] = sf.bench.run(problem, solvers=["Heun"], grids=["karras"], nfe=[10])
    assert row.preview.startswith("data:image/png;base64,")
    assert row.about["preview"] != row.preview


def test_the_interval_of_sliced_w2_covers_its_spread():
    generator = torch.Generator().manual_seed(0)
    squares, intervals = [], []
    for seed in range(60):
        x, y = torch.randn(2, 400, 2, generator=generator, dtype=torch.float64)
        estimate = sf.metrics.sliced_w2(x + 0.3, y, projections=32, seed=seed)
        squares.append(estimate.value**2)
        intervals.append((estimate.low**2, estimate.high**2))
    mean = sum(squares) / len(squares)
    assert mean == pytest.approx(0.3**2, rel=0.25)
    assert sum(low <= mean <= high for low, high in intervals) >= 0.88 * len(intervals)


def test_without_the_extra_the_package_works_and_the_report_says_what_is_missing(tmp_path):
    code = """
        import importlib.abc, sys
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                extras = ("altair", "vl_convert", "jinja2", "PIL", "typer", "tqdm", "sklearn", "accelerate")
                if name.partition(".")[0] in extras:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        import sdeflow as sf
        problem = sf.bench.Problem(sf.problems.EightGaussians().model(sf.VP()), shape=(2,), samples=4)
        [row] = sf.bench.run(problem, solvers=["Heun"], grids=["power"], nfe=[10])
        assert row.status == "ok" and row.preview is None
        try:
            sf.bench.run(problem, out="unused")
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "pip install 'sdeflow[bench]'" in done.stdout


def test_grids_that_a_process_does_not_have_are_not_chosen_for_the_user():
    problem = sf.bench.Problem(sf.problems.TwoMoons().model(sf.RectifiedFlow()), shape=(2,), samples=16, draws=16)
    chosen = sf.bench.run(problem, solvers=["DDIM"], nfe=[4])
    assert {r.status for r in chosen} == {"ok"}
    assert len({r.grid for r in chosen}) >= 2
    asked = sf.bench.run(problem, solvers=["DDIM"], grids=["karras"], nfe=[4])
    assert [r.status for r in asked] == ["failed"]
