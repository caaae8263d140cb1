"""Paths that the caller brings: recorded ones, pairs of opposite ones, and those that are refused."""

import itertools
import math
import sys

import pytest
import torch

import sdeflow as sf
from sdeflow.noise import Noise
from sdeflow.solvers import DDPM, SEEDS, SRA1, SRIW1, DPMSolverPP, EulerMaruyama
from tests.brownian_cases import GAUSSIAN, MAPS, VP, ZERO, Pure, recorded, uneven
from tests.exact import F64


class Linear(sf.SDE):
    """dX = (1 + t) A X dt + b dW: X is linear in the path and the start."""

    def drift(self, x, t):
        return -(1 + t.to(x.dtype)) * x @ torch.tensor([[1.0, 0.4], [-0.3, 0.7]], dtype=x.dtype)

    def diffusion(self, x, t):
        return torch.tensor([0.7, 1.3], dtype=x.dtype)


# ---- a path of one's own


class Counting(Linear):
    calls = 0

    def drift(self, x, t):
        self.calls += 1
        return super().drift(x, t)


@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1(), SRIW1()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["uniform", "quadratic"])
def test_a_recorded_path_replays_its_run(name, solver):
    """On its own grid, and on every second time of it: the run of the seed with half the steps."""
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.5]], dtype=F64)
    areas = solver.areas if hasattr(solver, "areas") else False
    grid = MAPS[name](torch.linspace(0, 1, 41, dtype=F64))
    path = recorded(grid, 3, (2,), areas=areas)
    for own in (grid, grid[::2], grid[::4]):
        want = sf.solve(Linear(), x, solver, grid=own, seed=3, save=True).xs
        got = sf.solve(Linear(), x, solver, grid=own, noise=path, save=True).xs
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    other = sf.solve(Linear(), x, solver, grid=grid, seed=4).x
    assert not torch.allclose(other, sf.solve(Linear(), x, solver, grid=grid, noise=path).x)


def test_a_recording_of_brownian_path_is_same_path():
    """Any sub-grid of 12 uneven times, with areas, against the solve along `SamePath` itself."""
    x, times = torch.ones(3, 2, dtype=F64), uneven(11, 4)
    path = sf.BrownianPath(8, (3, 2))
    w = torch.stack([path(0.0, t) for t in times.tolist()])
    areas = torch.stack([path.with_area(s, t).h for s, t in itertools.pairwise(times.tolist())])
    for rows in (list(range(12)), [0, 3, 4, 9, 11], [0, 11]):
        for solver in (SRA1(), EulerMaruyama()):
            want = sf.solve(Linear(), x, solver, grid=times[rows], noise=sf.SamePath(8)).x
            got = sf.solve(Linear(), x, solver, grid=times[rows], noise=sf.RecordedPath(times, w, areas)).x
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_recorded_path_is_replayed_by_an_exponential_sampler():
    """Its unit normals are W/sqrt(dt): those of the seed's run, put on a path in t, give the run."""
    problem = VP.reverse(GAUSSIAN.model(VP), 1.0)
    grid, x = torch.linspace(0.9, 0.1, 13, dtype=F64), torch.ones(4, 2, dtype=F64)
    plan = DPMSolverPP(2).plan(problem, grid)
    walk = Noise(5, 4).walk(grid, (2,), F64, lengths=torch.diff(plan.clock))
    unit = torch.stack([walk(k).w / walk.lengths[k].sqrt() for k in range(12)])
    w = torch.cat([torch.zeros(1, 4, 2, dtype=F64), (unit * torch.diff(grid).abs().sqrt()[:, None, None]).cumsum(0)])
    got = sf.solve(problem, x, DPMSolverPP(2), grid=grid, noise=sf.RecordedPath(grid, w)).x
    want = sf.solve(problem, x, DPMSolverPP(2), grid=grid, seed=5).x
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_recorded_path_of_general_noise():
    class Mixed(Linear):
        noise = "general"

        def diffusion(self, x, t):
            return torch.tensor([[1.0, 0.5, 0.2], [0.0, 2.0, -1.0]], dtype=x.dtype).expand(len(x), 2, 3)

    grid, x = torch.linspace(0, 1, 17, dtype=F64), torch.ones(4, 2, dtype=F64)
    got = sf.solve(Mixed(), x, EulerMaruyama(), grid=grid, noise=recorded(grid, 4, (3,), areas=False)).x
    torch.testing.assert_close(got, sf.solve(Mixed(), x, EulerMaruyama(), grid=grid, seed=3).x, rtol=0, atol=1e-12)


def test_a_recorded_path_can_be_run_backwards():
    """Time reversed: W changes its sign, H does not."""
    grid = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=F64)
    path = recorded(grid, 3, (2,))
    forwards = path.bind(3, None, "cpu").walk(grid, (2,), F64, areas=True)
    backwards = path.bind(3, None, "cpu").walk(grid.flip(0), (2,), F64, areas=True)
    whole = path.bind(3, None, "cpu").walk(grid[[3, 0]], (2,), F64, areas=True)(0)
    forwards_whole = path.bind(3, None, "cpu").walk(grid[[0, 3]], (2,), F64, areas=True)(0)
    for k in range(3):
        torch.testing.assert_close(backwards(2 - k).w, -forwards(k).w, rtol=0, atol=1e-14)
        torch.testing.assert_close(backwards(2 - k).h, forwards(k).h, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.w, -forwards_whole.w, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.h, forwards_whole.h, rtol=0, atol=1e-14)


def test_a_long_recording_needs_no_table_of_all_pairs_of_times():
    """10,001 times: a table of pairs would take 0.8 GB, and was made twice."""
    grid = torch.linspace(0, 1, 10_001, dtype=F64)
    path = sf.RecordedPath(grid, torch.arange(10_001.0)[:, None, None])
    before = peak()
    walk = path.bind(1, None, "cpu").walk(grid, (1,), F64)
    assert all(float(walk(k).w) == 1.0 for k in range(10_000))
    assert peak() - before < 200e6


def peak():
    """The largest memory of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


GRID5 = torch.linspace(0, 1, 5, dtype=F64)
VALUES = torch.zeros(5, 3, 2, dtype=F64)


@pytest.mark.parametrize(
    ("solver", "path", "how", "error", "message"),
    [
        (SRA1(), (GRID5, VALUES), {"grid": GRID5}, ValueError, "expected a RecordedPath with areas"),
        (EulerMaruyama(), (GRID5, VALUES), {"steps": 8}, ValueError, "got 0.125, which was not recorded"),
        (EulerMaruyama(), (GRID5, VALUES), {"steps": 3}, ValueError, "which was not recorded"),
        (EulerMaruyama(), (GRID5, VALUES[:, :2]), {"steps": 4}, ValueError, "expected a batch of 2, .* got 3"),
        (EulerMaruyama(), (GRID5, VALUES[..., :1]), {"steps": 4}, ValueError, r"increments of shape \(2,\) a sample"),
        (EulerMaruyama(), (GRID5 / 2, VALUES), {"steps": 4}, ValueError, "which was not recorded"),
        (sf.solvers.AdaptiveSDE(), (GRID5, VALUES), {"rtol": 1e-2}, ValueError, "expected seed, got RecordedPath"),
    ],
)
def test_a_path_that_does_not_fit_is_refused_before_the_first_step(solver, path, how, error, message):
    problem = Counting()
    with pytest.raises(error, match=message):
        sf.solve(problem, torch.zeros(3, 2, dtype=F64), solver, noise=sf.RecordedPath(*path), **how)
    assert problem.calls == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GRID5[:4], VALUES), ValueError, r"expected values \(4, batch, ...\), got \(5, 3, 2\)"),
        ((GRID5[:1], VALUES[:1]), ValueError, "monotone times"),
        ((GRID5[[0, 2, 1, 3, 4]], VALUES), ValueError, "monotone times"),
        ((GRID5 * math.nan, VALUES), ValueError, "monotone times"),
        ((torch.tensor([0, 0.1, 0.2, 0.3, math.inf]), VALUES), ValueError, "expected finite, monotone times"),
        ((GRID5, VALUES, VALUES), ValueError, r"expected areas \(4, 3, 2\), got \(5, 3, 2\)"),
        ((GRID5, VALUES.tolist()), TypeError, "expected values as a tensor"),
        ((GRID5, VALUES.numpy()), TypeError, "expected values as a tensor"),
        ((GRID5, VALUES, VALUES[1:].tolist()), TypeError, "expected areas as a tensor"),
        ((GRID5, VALUES[:, 0, 0]), ValueError, "expected values"),
    ],
)
def test_a_recording_that_is_none_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sf.RecordedPath(*arguments)


# ---- pairs of opposite paths


@pytest.mark.parametrize("same_path", [False, True])
@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1(), SRIW1(), sf.solvers.Milstein()], ids=lambda s: s.name)
def test_antithetic_halves_cancel(solver, same_path):
    """A linear SDE from 0: the two of a pair are opposite to the bit; from x: their mean is the run without noise."""
    noise = sf.Antithetic(3, same_path=same_path)
    end = sf.solve(Linear(), torch.zeros(8, 2, dtype=F64), solver, steps=8, noise=noise).x
    # SRIW1 weighs W^2 - h with sums of coefficients that are 0 but for rounding
    torch.testing.assert_close(end[0::2], -end[1::2], rtol=0, atol=1e-14 if solver.name == "SRIW1" else 0.0)
    assert float(end.abs().min()) > 0
    assert not torch.isin(end[0::2][1:].abs(), end[0].abs()).any()
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=F64).repeat_interleave(2, 0)
    path = sf.RecordedPath(GRID5, torch.zeros(5, 4, 2), torch.zeros(4, 4, 2))
    two = sf.solve(Linear(), x, solver, grid=GRID5, noise=noise).x
    still = sf.solve(Linear(), x, solver, grid=GRID5, noise=path).x
    torch.testing.assert_close((two[0::2] + two[1::2]) / 2, still[0::2], rtol=0, atol=1e-14)
    for offset in (2, 3):
        part = sf.solve(Linear(), torch.zeros(4, 2, dtype=F64), solver, steps=8, noise=noise, index=offset).x
        assert torch.equal(part, end[offset : offset + 4])


@pytest.mark.parametrize("solver", [DDPM(), SEEDS(2), sf.solvers.AdaptiveSDE()], ids=lambda s: s.name)
def test_antithetic_halves_cancel_in_samplers_and_to_a_tolerance(solver):
    if solver.name == "AdaptiveSDE":
        end = sf.solve(Pure(), torch.zeros(6, 2, dtype=F64), solver, rtol=1e-2, noise=sf.Antithetic(3)).x
    else:
        problem = VP.reverse(ZERO[VP]["eps"], 0.0 if solver.name == "DDPM" else 1.0)
        end = sf.solve(problem, torch.zeros(6, 2, dtype=F64), solver, steps=6, noise=sf.Antithetic(3)).x
    assert torch.equal(end[0::2], -end[1::2])
    assert float(end.abs().min()) > 0


def test_antithetic_paths():
    path = sf.BrownianPath(3, (6, 2), antithetic=True)
    for v in path.with_area(0.2, 0.61):
        assert torch.equal(v[0::2], -v[1::2])
        assert float(v.abs().min()) > 0
    plain = sf.BrownianPath(3, (3, 2)).with_area(0.2, 0.61)
    torch.testing.assert_close(path(0.2, 0.61)[0::2], plain.w, rtol=0, atol=0)


# ---- what solve refuses


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"noise": sf.SamePath(1), "seed": 1}, ValueError, "expected seed or noise, not both"),
        ({"noise": sf.Antithetic(1), "seed": 0}, ValueError, "expected seed or noise, not both"),
        ({"noise": 3}, TypeError, r"SamePath\(seed\).* got 3"),
        ({"noise": sf.Noise(0, 3)}, TypeError, r"expected noise as"),
        ({"noise": sf.BrownianPath(0, (3, 2))}, TypeError, r"expected noise as"),
        ({"noise": sf.SamePath}, TypeError, "expected noise as .* got the class SamePath; call it to make one"),
        ({"noise": sf.SamePath(1), "index": torch.arange(4)}, ValueError, r"shape \(3,\), got shape \(4,\)"),
    ],
)
def test_errors_of_noise(how, error, message):
    problem = Counting()
    with pytest.raises(error, match=message):
        sf.solve(problem, torch.zeros(3, 2, dtype=F64), EulerMaruyama(), steps=4, **how)
    assert problem.calls == 0


def test_noise_of_no_seed_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match=r"seed as a whole number, got 1\.5"):
        sf.SamePath(1.5)
    with pytest.raises(TypeError, match="seed as a whole number, got '1'"):
        sf.Antithetic("1")


@pytest.mark.parametrize("noise", [None, sf.SamePath(1)])
@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1()], ids=lambda s: s.name)
def test_saving_between_steps_is_refused(solver, noise):
    problem = Counting()
    with pytest.raises(ValueError, match=r"got 0.3 \(nearest 0.25\).*not interpolated; put the time on the grid"):
        sf.solve(problem, torch.zeros(3, 2, dtype=F64), solver, steps=4, noise=noise, save=[0.0, 0.3, 1.0])
    assert problem.calls == 0
    run = sf.solve(problem, torch.zeros(3, 2, dtype=F64), solver, steps=4, noise=noise, save=[0.25, 1.0])
    assert run.xs.shape == (2, 3, 2)
    with pytest.raises(ValueError, match=r"AdaptiveSDE to a tolerance .*solve on a grid through them"):
        sf.solve(problem, torch.zeros(3, 2), sf.solvers.AdaptiveSDE(), rtol=0.1, noise=noise, save=[0.3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sf.BrownianPath(0, (3,))(0.0, 1.1), ValueError, r"times in \[0, 1\], got 0 and 1.1"),
        (lambda: sf.BrownianPath(0, (3,))(-1e-9, 0.5), ValueError, r"times in \[0, 1\]"),
        (lambda: sf.BrownianPath(0, (3,))(math.nan, 0.5), ValueError, "got nan"),
        (lambda: sf.BrownianPath(0, (3,), (1.0, 1.0)), ValueError, "start < end"),
        (lambda: sf.BrownianPath(0, (3,), (0.0, math.inf)), ValueError, "start < end"),
        (lambda: sf.BrownianPath(0, ()), ValueError, r"shape as \(batch, \*event\)"),
        (lambda: sf.BrownianPath(0, (3, 0)), ValueError, r"shape as \(batch, \*event\)"),
        (lambda: sf.BrownianPath(0, (3,), dtype=torch.float16), ValueError, "float32 or float64"),
        (lambda: sf.BrownianPath(0.0, (3,)), TypeError, "seed as a whole number"),
    ],
)
def test_errors_of_a_path(make, error, message):
    with pytest.raises(error, match=message):
        make()
