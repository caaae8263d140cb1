"""Rosenbrock-W methods: order conditions, orders, stiff stability, Jacobians a sample at a time."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.solvers.rosenbrock import ROS2, ROS2_TABLEAU, ROS34PW2, ROS34PW2_TABLEAU, RosenbrockTableau, linearised
from tests.exact import F64, rms, slope

METHODS = {"ROS2": ROS2, "ROS34PW2": ROS34PW2}
TABLEAUS = (ROS2_TABLEAU, ROS34PW2_TABLEAU)


class Driven(sf.ODE):
    """A nonlinear system whose drift depends on time: u' = v cos t - sin u, v' = sin 2t - v cos u."""

    t1 = 2.0

    def drift(self, x, t):
        u, v = x[..., :1], x[..., 1:]
        return torch.cat([v * torch.cos(t) - torch.sin(u), torch.sin(2 * t) - v * torch.cos(u)], -1)


class Detached(Driven):
    """The same, hiding its dependence on x from automatic differentiation."""

    def drift(self, x, t):
        return super().drift(x.detach(), t)


class Relaxing(sf.ODE):
    """y' = -rate (y - cos t), a rate a sample."""

    t1 = 2.0
    per_sample = ("rate",)

    def __init__(self, rate):
        self.rate = rate

    def drift(self, x, t):
        return -self.rate * (x - torch.cos(t))

    def on_the_slow_solution(self, t):
        rate, t = self.rate.to(F64), torch.tensor(t, dtype=F64)
        return (rate**2 * torch.cos(t) + rate * torch.sin(t)) / (1 + rate**2)


class VanDerPol(sf.ODE):
    t1 = 2000.0
    per_sample = ("mu",)

    def __init__(self, mu):
        self.mu = mu

    def drift(self, x, t):
        u, v = x[:, 0], x[:, 1]
        return torch.stack([v, self.mu * (1 - u * u) * v - u], 1)


class Counting(sf.ODE):
    """Counts the drift calls of another problem and records their times."""

    def __init__(self, inner):
        self.inner, self.t0, self.t1 = inner, inner.t0, inner.t1
        self.calls, self.seen = 0, []

    def drift(self, x, t):
        self.calls += 1
        self.seen.append(float(t.min()))
        return self.inner.drift(x, t)


def driven_reference(x, span):
    def drift(t, y):
        return [y[1] * np.cos(t) - np.sin(y[0]), np.sin(2 * t) - y[1] * np.cos(y[0])]

    runs = [solve_ivp(drift, span, row, "DOP853", rtol=1e-12, atol=1e-13) for row in x.to(F64).numpy()]
    return torch.tensor(np.array([run.y[:, -1] for run in runs]), dtype=F64)


def start(batch=5, dim=2, seed=0):
    return torch.tensor(np.random.default_rng(seed).uniform(-1, 1, size=(batch, dim)), dtype=F64)


# ---- the coefficients


def conditions(table, b):
    """What a W-method of order 3 must satisfy, by order: every J and f_t allowed."""
    a, g = table.matrices
    one = np.ones(len(b))
    alpha, gamma = a @ one, g @ one
    return {
        1: [b.sum() - 1],
        2: [b @ alpha - 1 / 2, b @ gamma],
        3: [b @ alpha**2 - 1 / 3, b @ a @ alpha - 1 / 6, b @ a @ gamma, b @ g @ alpha, b @ g @ gamma],
    }


def stability(table, z):
    a, g = table.matrices
    b = np.array(table.b)
    return 1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * (a + g), np.ones(len(b)))


@pytest.mark.parametrize("table", TABLEAUS, ids=lambda t: t.name)
def test_the_order_conditions_of_a_w_method_hold(table):
    met = conditions(table, np.array(table.b))
    for order in range(1, table.order + 1):
        np.testing.assert_allclose(met[order], 0.0, atol=5e-16)
    if table.order < 3:
        assert max(map(abs, met[table.order + 1])) > 1e-2
    if table.b_hat is not None:
        met = conditions(table, np.array(table.b_hat))
        np.testing.assert_allclose([*met[1], *met[2]], 0.0, atol=5e-16)
        assert max(map(abs, met[3])) > 1e-2


@pytest.mark.parametrize("table", TABLEAUS, ids=lambda t: t.name)
def test_l_stability(table):
    """|R| <= 1 on the imaginary axis and at infinity 0; R's one pole, 1/gamma, is on the right."""
    assert max(abs(stability(table, 1j * y)) for y in np.geomspace(1e-3, 1e6, 1000)) <= 1 + 1e-12
    assert abs(stability(table, -1e12)) < 1e-11
    assert table.gamma > 0


def test_a_tableau_with_a_slip_is_refused():
    with pytest.raises(ValueError, match="weights of sum 1"):
        RosenbrockTableau("slip", 2, 0.3, ((), (1.0,)), ((), (0.1,)), (0.5, 0.6), None, "")
    with pytest.raises(ValueError, match="row i of g"):
        RosenbrockTableau("slip", 2, 0.3, ((), (1.0,)), ((0.1,), ()), (0.5, 0.5), None, "")


# ---- orders


def errors(problem, method, x, reference, levels, span=None):
    return [rms(sf.solve(problem, x, method, steps=n, t_span=span).x - reference) for n in levels]


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.5)], ids=["up", "down"])
@pytest.mark.parametrize("name", METHODS)
def test_order_on_a_nonlinear_nonautonomous_system(name, span):
    method, levels = METHODS[name](), (32, 64, 128, 256, 512)
    x = start()
    found = errors(Driven(), method, x, driven_reference(x, span), levels, span)
    assert abs(slope(1 / np.array(levels), found) - method.order) < 0.2, found


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_jacobian_costs_no_order(name):
    """The W property: J = 0 here, as the drift detaches x."""
    method, levels = METHODS[name](), (32, 64, 128, 256, 512)
    x = start()
    found = errors(Detached(), method, x, driven_reference(x, (0.0, 2.0)), levels)
    assert abs(slope(1 / np.array(levels), found) - method.order) < 0.2, found


@pytest.mark.parametrize("name", METHODS)
def test_order_on_a_probability_flow(name):
    process = sf.VP()
    flow = process.probability_flow(sf.problems.EightGaussians().model(process))
    method, x, levels = METHODS[name](), start(8), (20, 40, 80, 160)
    span = (0.8, 0.4)
    reference = sf.solve(flow, x, sf.solvers.DOP853(), rtol=1e-12, atol=1e-12, t_span=span).x
    grids = [torch.linspace(*span, n + 1, dtype=F64) for n in levels]
    found = [rms(sf.solve(flow, x, method, grid=grid).x - reference) for grid in grids]
    assert abs(slope(1 / np.array(levels), found) - method.order) < 0.2, found


# ---- stiffness


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("name", "bound"), [("ROS2", 0.03), ("ROS34PW2", 1e-4)])
def test_stiff_relaxation_far_beyond_explicit_steps(name, bound, dtype):
    """rate h = 1e6: from off the slow solution, onto it and along it. The control: RK4 explodes at rate h = 1e3."""
    steps = 10
    problem = Relaxing(torch.tensor([[1e6 * steps / 2.0]], dtype=dtype))
    x = torch.tensor([[3.0]], dtype=dtype)
    got = sf.solve(problem, x, METHODS[name](), steps=steps).x
    assert got.dtype == dtype
    assert abs(float(got) - float(problem.on_the_slow_solution(2.0))) < bound
    mild = Relaxing(torch.tensor([[1e3 * steps / 2.0]], dtype=F64))
    assert abs(float(sf.solve(mild, x.to(F64), sf.solvers.RK4(), steps=steps, throw=False).x)) > 1e10


def test_the_time_derivative_is_needed_and_there():
    """ROS2 with f_t = 0 leaves the slow solution by O(h); ROS34PW2 ends each step on it, f_t or not."""
    problem, h = Relaxing(torch.tensor([[1e8]], dtype=F64)), 0.05
    exact, x = problem.on_the_slow_solution(2.0), problem.on_the_slow_solution(0.0)

    class Frozen(sf.ODE):
        """The same where the stages evaluate; at the time that gives f_t, the drift of the step's start."""

        t1 = 2.0

        def drift(self, y, t):
            since = float(t) % h
            return problem.drift(y, t - since if abs(since - h / 256) < 1e-9 else t)

    def error(ode, method):
        return abs(float(sf.solve(ode, x, method, steps=40).x - exact))

    assert error(problem, ROS34PW2()) < 1e-11
    assert error(problem, ROS2()) < 1e-3
    assert error(Frozen(), ROS2()) > 5e-3


@pytest.mark.parametrize("name", METHODS)
def test_van_der_pol_on_a_grid_where_rk4_explodes(name):
    """mu = 1000 on the slow branch: 200 steps, where RK4 fails with 2000."""
    x, span = torch.tensor([[2.0, 0.0]], dtype=F64), (0.0, 500.0)
    problem = VanDerPol(torch.tensor([1000.0], dtype=F64))
    run = solve_ivp(
        lambda t, y: [y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]], span, [2.0, 0.0], "Radau", rtol=1e-10, atol=1e-12
    )
    got = sf.solve(problem, x, METHODS[name](), steps=200, t_span=span).x
    np.testing.assert_allclose(got[0].numpy(), run.y[:, -1], rtol=1e-4)
    exploded = sf.solve(problem, x, sf.solvers.RK4(), steps=2_000, t_span=span, throw=False)
    assert exploded.status.tolist() == [sf.Status.NON_FINITE]


def test_van_der_pol_through_its_jump_to_a_tolerance():
    """Each sample its own stiffness and its own steps."""
    mus, span = (1000.0, 500.0), (0.0, 900.0)
    problem = VanDerPol(torch.tensor(mus, dtype=F64))
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=F64)
    with torch.no_grad():
        got = sf.solve(problem, x, ROS34PW2(), rtol=1e-3, atol=1e-5, t_span=span)
    for row, mu in enumerate(mus):
        run = solve_ivp(
            lambda t, y, mu=mu: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]], span, x[row].numpy(), "Radau",
            rtol=1e-9, atol=1e-11,
        )  # fmt: skip
        np.testing.assert_allclose(got.x[row].numpy(), run.y[:, -1], rtol=2e-2)
    # what stability alone would cost an explicit method: |J| = 3 mu on the slow branch, 2.8 on RK4's axis
    assert int(got.stats.steps[0]) < 900 * 3000 / 2.8 / 1000


def test_the_error_of_adaptive_steps_follows_the_tolerance():
    x = start()
    reference = driven_reference(x, (0.0, 2.0))
    found = [rms(sf.solve(Driven(), x, ROS34PW2(), rtol=tol, atol=tol).x - reference) for tol in (1e-4, 1e-6, 1e-8)]
    assert found[0] < 1e-3
    assert found[1] < 2e-5
    assert found[2] < 4e-7


# ---- Jacobians, cost, batches


def test_the_jacobian_is_each_samples_own():
    weights = torch.tensor(np.random.default_rng(1).normal(size=(6, 6)), dtype=F64)

    def drift(x):
        return (torch.tanh(x.flatten(1) @ weights) * x.flatten(1).sum(1, keepdim=True)).reshape(x.shape)

    x = start(7, 6).reshape(7, 2, 3)
    value, jacobian = linearised(drift, x)
    dense = torch.autograd.functional.jacobian(drift, x).reshape(7, 6, 7, 6)
    torch.testing.assert_close(value, drift(x), rtol=0, atol=0)
    torch.testing.assert_close(jacobian, torch.stack([dense[i, :, i] for i in range(7)]), rtol=1e-13, atol=1e-13)
    assert jacobian.shape == (7, 6, 6)


@pytest.mark.parametrize(("name", "nfe"), [("ROS2", 3), ("ROS34PW2", 5)])
def test_cost_does_not_depend_on_the_batch(name, nfe):
    """nfe calls a step, in which the drift is evaluated, and one backward pass a component."""
    for batch, dim in itertools.product((1, 64), (2, 5)):
        problem = Counting(Relaxing(torch.ones(dim, dtype=F64)))
        problem.inner.per_sample = ()
        solution = sf.solve(problem, torch.ones(batch, dim, dtype=F64), METHODS[name](), steps=7)
        assert solution.stats.nfe == solution.stats.calls == 7 * nfe
        assert problem.calls == 7 * nfe
        run = METHODS[name]().stepper(problem, torch.ones(batch, dim, dtype=F64), torch.linspace(0, 1, 3), None)
        run.step(0, torch.ones(batch, dim, dtype=F64))
        assert (run.calls, run.products) == (nfe, dim)


def test_a_large_batch_needs_no_large_matrix():
    """The flattened batch's Jacobian would have 6e4^2 entries, 29 GB."""
    x = start(30_000)
    got = sf.solve(Driven(), x, ROS34PW2(), steps=2, t_span=(0.0, 0.1)).x
    torch.testing.assert_close(got[:3], driven_reference(x[:3], (0.0, 0.1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.0)], ids=["up", "down"])
def test_no_evaluation_leaves_the_span(span):
    problem = Counting(Driven())
    sf.solve(problem, start(), ROS34PW2(), steps=7, t_span=span)
    assert min(problem.seen) == 0.0
    assert max(problem.seen) == 2.0


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_does_not_depend_on_its_batch(name):
    x = start(13)
    whole = sf.solve(Driven(), x, METHODS[name](), steps=9).x
    alone = torch.cat([sf.solve(Driven(), x[i : i + 1], METHODS[name](), steps=9).x for i in range(13)])
    assert torch.equal(whole, alone)


def test_a_singular_or_broken_sample_fails_alone():
    """Sample 1 has J = 1/(h gamma) exactly, sample 2 a drift that is not a number."""
    h, gamma = 0.25, ROS2_TABLEAU.gamma

    class Linear(sf.ODE):
        t1 = 1.0

        def drift(self, x, t):
            rates = torch.tensor([[-1.0], [1 / (gamma * h)], [float("nan")], [2.0]], dtype=F64)
            return rates * x

    x = torch.ones(4, 1, dtype=F64)
    solution = sf.solve(Linear(), x, ROS2(), steps=4, throw=False)
    assert solution.ok.tolist() == [True, False, False, True]
    assert abs(float(solution.x[0]) - np.exp(-1)) < 0.02


def test_dtypes_and_shapes():
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        x = start().to(dtype)
        got = sf.solve(Driven(), x, ROS34PW2(), steps=64).x
        assert got.dtype == dtype
        torch.testing.assert_close(got.to(F64), driven_reference(x, (0.0, 2.0)), rtol=bound, atol=bound)
    x = start(6).reshape(3, 2, 2)
    got = sf.solve(Driven(), x, ROS34PW2(), steps=64).x
    torch.testing.assert_close(got.reshape(6, 2), sf.solve(Driven(), x.reshape(6, 2), ROS34PW2(), steps=64).x)


def test_gradients_flow_and_other_modes_agree():
    x = start(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sf.solve(Driven(), x, ROS34PW2(), steps=3).x, x)
    for how in ({"steps": 3}, {"rtol": 1e-3}):
        want = sf.solve(Driven(), x, ROS34PW2(), **how).x.detach()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                assert torch.equal(sf.solve(Driven(), start(2), ROS34PW2(), **how).x, want)


def test_gradients_reach_the_parameters_of_the_drift_and_only_when_recorded():
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)

    class Learned(Driven):
        def drift(self, x, t):
            return super().drift(x, t) * weight

    x = start(2)
    sf.solve(Learned(), x, ROS34PW2(), steps=8).x.sum().backward()
    shifted = []
    for value in (0.7 + 1e-5, 0.7 - 1e-5):
        with torch.no_grad():
            weight.fill_(value)
            got = sf.solve(Learned(), x, ROS34PW2(), steps=8).x
        assert not got.requires_grad
        shifted.append(float(got.sum()))
    assert abs(float(weight.grad) - (shifted[0] - shifted[1]) / 2e-5) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_in_a_mode_without_gradients(mode):
    process = sf.VP()
    net = torch.nn.Linear(2, 2)
    model = sf.Model(lambda x, t: net(x) * t[:, None], process)
    flow = process.probability_flow(model)
    with mode():
        got = sf.solve(flow, start().float(), ROS34PW2(), steps=4).x
        assert model.nfe == 4 * 5
        again = sf.solve(flow, start().float(), ROS34PW2(), steps=4).x
    assert not got.requires_grad
    assert torch.equal(got, again)


def test_a_process_by_its_kernel_alone():
    """Its drift differentiates alpha and sigma by reverse mode inside."""
    process = sf.GaussianSDE.from_kernel(torch.cos, lambda t: 0.05 + torch.sin(t), 0.0, 1.4)
    flow = process.probability_flow(sf.problems.EightGaussians().model(process))
    x = start(4)
    want = sf.solve(flow, x, sf.solvers.DOP853(), rtol=1e-9, atol=1e-9).x
    torch.testing.assert_close(sf.solve(flow, x, ROS34PW2(), steps=256).x, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sf.solve(flow, x, ROS34PW2(), rtol=1e-6).x, want, rtol=1e-4, atol=1e-4)


# ---- errors


def test_a_problem_with_noise_is_refused():
    process = sf.VP()
    reverse = process.reverse(sf.problems.EightGaussians().model(process))
    with pytest.raises(ValueError, match="deterministic"):
        sf.solve(reverse, start(), ROS34PW2(), steps=5)


def test_ros2_has_no_error_estimate_and_no_pair_has_dense_output():
    with pytest.raises(ValueError, match="no error estimate"):
        sf.solve(Driven(), start(), ROS2(), rtol=1e-3)
    with pytest.raises(ValueError, match="no dense output"):
        sf.solve(Driven(), start(), ROS34PW2(), rtol=1e-3, save=[0.5])


def test_a_drift_of_another_shape_is_a_clear_error():
    class Wide(sf.ODE):
        def drift(self, x, t):
            return torch.cat([x, x], 1)

    with pytest.raises(ValueError, match=r"returned \(5, 4\) for x of shape \(5, 2\)"):
        sf.solve(Wide(), start(), ROS34PW2(), steps=2)
