"""`solve` on a batch: samples do not disturb each other, whatever their dtype, shape and layout."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.problems import GaussianMixture
from sdeflow.solvers import DDIM, DDPM, RK4, RK45, DPMSolverPP, Euler, EulerMaruyama, Heun, Langevin, PredictorCorrector
from tests.exact import F64
from tests.solve_cases import MIXTURE, PLANAR, VP, Decay, Pointwise, Poisoned, Walk, flow_of

# ---- samples do not disturb each other


def exact_net(problem):
    return lambda x, t: problem.model(VP).eps(x, t.to(F64))


def small_network(dim):
    torch.manual_seed(5)
    inner = torch.nn.Sequential(torch.nn.Linear(dim + 1, 48), torch.nn.SiLU(), torch.nn.Linear(48, dim))
    return lambda x, t: inner.to(x.dtype)(torch.cat([x, t[:, None].to(x.dtype)], 1))


SOLVES = {
    "DPM++(3)": (DPMSolverPP(3), {"steps": 12}, 0.0),
    "DPM++(2) with noise": (DPMSolverPP(2), {"steps": 12}, 1.0),
    "Euler-Maruyama": (EulerMaruyama(), {"steps": 12}, 1.0),
    "RK4": (RK4(), {"steps": 6}, 0.0),
    "RK45 adaptive": (RK45(), {"rtol": 1e-4}, 0.0),
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("batch", [5, 16, 29])
@pytest.mark.parametrize(
    ("net", "dtype"), [("exact", torch.float64), ("network", torch.float64), ("network", torch.float32)]
)
def test_one_samples_nan_leaves_the_others_bitwise_unchanged(name, batch, net, dtype):
    solver, how, eta = SOLVES[name]
    network = exact_net(MIXTURE) if net == "exact" else small_network(8)
    model = sf.Model(Poisoned(network), VP, "eps")
    x = torch.randn(batch, 8, dtype=F64).to(dtype)
    marked = torch.zeros(batch, dtype=torch.bool)
    marked[2] = True

    def run(who):
        with torch.no_grad():
            return sf.solve(VP.reverse(model.bind(marked=who), eta), x, solver, seed=0, throw=False, **how)

    clean, dirty = run(torch.zeros_like(marked)), run(marked)
    assert bool(clean.ok.all())
    assert torch.equal(dirty.x[~marked], clean.x[~marked])
    assert dirty.status.tolist() == [int(sf.Status.NON_FINITE) * int(m) for m in marked] or (
        "rtol" in how and dirty.status[~marked].sum() == 0 and dirty.status[2] != 0
    )


def test_a_failure_raises_with_the_solution_or_returns_it():
    model = sf.Model(Poisoned(exact_net(PLANAR)), VP, "eps").bind(marked=torch.tensor([False, True, False]))
    flow, x = VP.probability_flow(model), torch.randn(3, 2, dtype=F64)
    for how in ({"steps": 10}, {"rtol": 1e-4}):
        solver = RK45()
        with torch.no_grad():
            kept = sf.solve(flow, x, solver, throw=False, **how)
            with pytest.raises(sf.SolveError, match=r"1 of 3 samples .* \(samples 1\); pass throw=False") as info:
                sf.solve(flow, x, solver, **how)
        assert torch.equal(info.value.solution.x[kept.ok], kept.x[kept.ok])
        assert kept.ok.tolist() == [True, False, True]
        assert kept.status[1] != sf.Status.FINISHED
        assert "samples 1" in kept.failures()


def test_an_adaptive_failure_returns_the_last_finite_state():
    model = sf.Model(Poisoned(exact_net(PLANAR)), VP, "eps").bind(marked=torch.tensor([False, True, False]))
    with torch.no_grad():
        solution = sf.solve(VP.probability_flow(model), torch.randn(3, 2, dtype=F64), RK45(), rtol=1e-4, throw=False)
    assert bool(torch.isfinite(solution.x).all())


@pytest.mark.parametrize("name", SOLVES)
def test_results_do_not_change_with_the_batch(name):
    """64 samples alone, within 256, and as four runs of 16 with index offsets: to 1e-6, noise bitwise."""
    solver, how, eta = SOLVES[name]
    model = MIXTURE.model(VP)

    def run(num, index=None):
        return sf.sample(model, num, shape=(8,), solver=solver, eta=eta, seed=0, index=index, dtype=F64, **how).x

    x = run(64)
    torch.testing.assert_close(run(256)[:64], x, rtol=0, atol=1e-6)
    parts = torch.cat([run(16, index=16 * i) for i in range(4)])
    torch.testing.assert_close(parts, x, rtol=0, atol=1e-6)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(64, index=order), x[order], rtol=0, atol=1e-6)


def test_predictor_corrector_does_not_change_with_the_batch():
    """Its norms are per sample, not averaged over the batch."""
    solver = PredictorCorrector(EulerMaruyama(), Langevin(steps=2))
    model = MIXTURE.model(VP)

    def run(num, **options):
        return sf.sample(model, num, shape=(8,), solver=solver, steps=10, eta=1.0, dtype=F64, **options).x

    x = run(48)
    torch.testing.assert_close(run(64)[:48], x, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([run(16, index=16 * i) for i in range(3)]), x, rtol=0, atol=1e-6)


def test_the_noise_of_a_solve_is_bitwise_that_of_the_sample():
    """Pure noise through the whole of `solve`: nothing but the draws and their sums."""

    class Brownian(sf.SDE):
        def drift(self, x, t):
            return torch.zeros_like(x)

        def diffusion(self, x, t):
            return torch.ones_like(x)

    def run(batch, index=None, seed=0):
        return Brownian().simulate(torch.zeros(batch, 3), steps=20, seed=seed, index=index).x

    x = run(64)
    assert torch.equal(run(256)[:64], x)
    assert torch.equal(torch.cat([run(16, 16 * i) for i in range(4)]), x)
    order = torch.tensor([9, 3, 40])
    assert torch.equal(run(3, order), x[order])
    assert not torch.equal(run(64, seed=1), x)


def test_an_unseeded_solve_can_be_replayed():
    x = torch.zeros(3, 2)
    first, second = Walk().simulate(x, steps=5), Walk().simulate(x, steps=5)
    assert not torch.equal(first.x, second.x)
    assert torch.equal(Walk().simulate(x, steps=5, seed=first.seed).x, first.x)
    assert sf.solve(Decay(), x, Euler(), steps=2).seed is None
    torch.manual_seed(7)
    a = Walk().simulate(x, steps=5)
    torch.manual_seed(7)
    assert torch.equal(Walk().simulate(x, steps=5).x, a.x)


# ---- dtypes, shapes, layouts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{"steps": 20}, {"rtol": 1e-2}], ids=["grid", "adaptive"])
def test_the_state_keeps_its_dtype_and_time_is_float64(dtype, how):
    seen = set()

    class Watching(Decay):
        def drift(self, x, t):
            seen.add((x.dtype, t.dtype))
            return -x

    x = torch.ones(3, 2, dtype=dtype)
    solution = sf.solve(Watching(), x, RK45(), save=[0.0, 1.0] if "rtol" in how else True, **how)
    assert seen == {(dtype, F64)}
    assert solution.x.dtype == solution.xs.dtype == dtype
    assert solution.ts.dtype == F64
    torch.testing.assert_close(solution.x.to(F64), torch.full((3, 2), math.exp(-1), dtype=F64), rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [DDIM(), DDPM(), DPMSolverPP(3), EulerMaruyama(), Heun()], ids=lambda s: s.name)
def test_samples_keep_their_dtype(dtype, solver):
    seen = set()

    def net(x, t):
        seen.add((x.dtype, t.dtype))
        return 0.5 * x

    eta = 1.0 if solver.name == "EulerMaruyama" else 0.0
    got = sf.sample(sf.Model(net, VP, "x0"), 3, shape=(2,), solver=solver, steps=8, eta=eta, dtype=dtype)
    assert got.x.dtype == dtype
    assert seen == {(dtype, dtype)}


def test_many_small_steps_move_a_16_bit_state():
    """1000 steps of 1/1000 from 1: an increment below half a unit in the last place must not vanish."""
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    got = sf.solve(Decay(), x, Euler(), steps=1000).x
    torch.testing.assert_close(got.to(F64), torch.full((2, 2), math.exp(-1), dtype=F64), rtol=0.02, atol=0)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_a_16_bit_state_is_solved_to_its_own_precision(tol):
    """A tolerance below the resolution of bfloat16 makes the steps shorter, not the result worse."""
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    got = sf.solve(Decay(), x, RK45(), rtol=tol, max_steps=2000).x
    torch.testing.assert_close(got.to(F64), torch.full((2, 2), math.exp(-1), dtype=F64), rtol=0.01, atol=0)


class NoisyPointwise(sf.SDE):
    def drift(self, x, t):
        return torch.cos(t) - x**3

    def diffusion(self, x, t):
        return 0.3 + 0.1 * x


@pytest.mark.parametrize("shape", [(8,), (8, 1), (4, 2), (2, 1, 2, 2), (1, 8)])
def test_any_event_shape(shape):
    x = torch.linspace(-1, 1, 8, dtype=F64)
    flat = sf.solve(Pointwise(), x[:, None], RK4(), steps=10).x.flatten()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = sf.solve(Pointwise(), x.reshape(shape), RK4(), steps=10).x
            assert got.shape == shape
            torch.testing.assert_close(got.flatten(), flat, rtol=1e-14, atol=1e-15)
    adaptive = sf.solve(Pointwise(), x.reshape(shape), RK45(), rtol=1e-9, save=[0.0, 0.5, 1.0])
    assert adaptive.xs.shape == (3, *shape)
    torch.testing.assert_close(adaptive.x.flatten(), flat, rtol=0, atol=1e-4)
    noisy = NoisyPointwise().simulate(x.reshape(shape), steps=5, seed=0)
    assert noisy.x.shape == shape
    assert noisy.status.shape == (shape[0],)


def test_images_of_one_channel():
    problem = GaussianMixture(torch.randn(3, 1, 8, 8, dtype=F64), 0.1)
    model = problem.model(VP)
    for solver, eta in ((DPMSolverPP(2), 1.0), (Heun(), 0.0), (PredictorCorrector(EulerMaruyama()), 1.0)):
        got = sf.sample(model, 4, shape=(1, 8, 8), solver=solver, steps=10, eta=eta)
        assert got.x.shape == (4, 1, 8, 8)


def test_the_layout_in_memory_does_not_matter():
    x = torch.randn(2, 6, dtype=F64).T
    flow = flow_of()
    for solver in (DPMSolverPP(3), RK4()):
        with torch.no_grad():
            got = sf.solve(flow, x, solver, steps=8).x
            want = sf.solve(flow, x.contiguous(), solver, steps=8).x
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_the_callers_tensors_are_left_alone():
    x, grid = torch.randn(3, 2, dtype=F64), torch.linspace(1, 1e-3, 9, dtype=F64)
    before = x.clone(), grid.clone()
    with torch.no_grad():
        for solver in (DPMSolverPP(3), RK4(), EulerMaruyama()):
            sf.solve(flow_of(), x, solver, grid=grid, seed=0)
        sf.solve(flow_of(), x, RK45(), rtol=1e-4, save=[1.0, 0.5])
    assert torch.equal(x, before[0])
    assert torch.equal(grid, before[1])


def test_general_noise_takes_as_many_columns_as_the_diffusion_has():
    """Moments of dX = G dW with G (2, 3) over 20,000 paths, within 5 standard errors."""

    class Columns(sf.SDE):
        noise = "general"
        matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, -0.3, 0.8]], dtype=F64)

        def drift(self, x, t):
            return torch.zeros_like(x)

        def diffusion(self, x, t):
            return self.matrix.expand(x.shape[0], 2, 3)

    x = Columns().simulate(torch.zeros(20_000, 2, dtype=F64), steps=3, seed=1).x
    want = Columns.matrix @ Columns.matrix.T
    assert bool(((x.T @ x / 20_000 - want).abs() < 5 * 1.5 * math.sqrt(2 / 20_000)).all())


def test_inference_mode_and_no_grad_give_the_same_numbers():
    x = torch.randn(4, 2, dtype=F64)
    for solver in (DPMSolverPP(3), RK4(), EulerMaruyama()):
        with torch.no_grad():
            want = sf.solve(flow_of(), x, solver, steps=6).x
        with torch.inference_mode():
            assert torch.equal(sf.solve(flow_of(), x, solver, steps=6).x, want)
    with torch.inference_mode():
        assert bool(sf.solve(flow_of(), x, RK45(), rtol=1e-5, save=[0.5]).ok.all())
