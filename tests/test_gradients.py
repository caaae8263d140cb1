"""Gradients through solves: against finite differences, against torch's own record, and what they keep in memory."""

import math

import pytest
import torch

import sdeflow as sf
from benchmarks import gradients as bench
from sdeflow.solvers import (
    RK4,
    RK45,
    ROS2,
    SRIW1,
    AdamsBashforth,
    AdamsBashforthMoulton,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    Milstein,
    Reversible,
    ReversibleHeun,
    StochasticHeun,
    UniPC,
)
from tests.exact import slope

F64 = torch.float64
START = torch.linspace(-1, 1, 12, dtype=F64).view(4, 3)


def network(seed=0, dtype=F64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


class Flow(sf.ODE):
    def __init__(self, net=None):
        self.net = net or network()

    @property
    def parameters(self):
        return list(self.net.parameters())

    def drift(self, x, t):
        return self.net(x) * torch.cos(3 * t)


class Noisy(sf.SDE):
    """Diagonal or general noise with a parameter of its own, Ito unless told otherwise."""

    def __init__(self, noise="diagonal", interpretation="ito"):
        self.net, self.noise, self.interpretation = network(), noise, interpretation
        self.scale = torch.tensor(0.3, dtype=F64, requires_grad=True)

    @property
    def parameters(self):
        return [*self.net.parameters(), self.scale]

    def drift(self, x, t):
        return self.net(x)

    def diffusion(self, x, t):
        g = self.scale * torch.sin(x) + 0.2
        return g if self.noise == "diagonal" else torch.stack([g, self.scale * x], -1)


def reversal(eta):
    """A diffusion model's reverse process, with a network of its own."""
    net, process = network(), sf.VP()
    model = sf.Model(lambda x, t: net(x) * torch.tanh(t)[:, None], process, "eps")
    problem = process.reverse(model, eta)
    return problem, list(net.parameters())


def gradients(problem, parameters, solver, gradient, start=START, **options):
    """(loss, gradients of the start and of the parameters); saved states enter the loss too."""
    x = start.clone().requires_grad_()
    solution = sf.solve(problem, x, solver, gradient=gradient, **options)
    loss = solution.x.sin().sum()
    if solution.xs is not None:
        weights = torch.arange(1, len(solution.xs) + 1, dtype=start.dtype).view(-1, 1, 1)
        loss = loss + (solution.xs**2 * weights).sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *parameters])]


def gap(got, want):
    """The largest difference of two lists, relative to the largest number of each."""
    return max(float((u - v).abs().max() / v.abs().max()) for u, v in zip(got, want, strict=True))


# ---- finite differences


def of_a_parameter(problem, solver, gradient, **options):
    """The loss as a function of the start and of the network's last bias."""
    bias = problem.net[-1].bias
    del problem.net[-1]._parameters["bias"]

    def loss(x, b):
        problem.net[-1].bias = b
        return sf.solve(problem, x, solver, gradient=gradient, **options).x.sin().sum()

    return loss, (START[:2].clone().requires_grad_(), bias.detach().clone().requires_grad_())


CASES = [
    pytest.param(Flow, RK4(), "direct", {"steps": 6}, id="ODE direct"),
    pytest.param(Flow, RK4(), "checkpointed", {"steps": 6}, id="ODE checkpointed"),
    pytest.param(Flow, AdamsBashforth(3), "checkpointed", {"steps": 7}, id="multistep checkpointed"),
    pytest.param(Flow, ReversibleHeun(), "adjoint", {"steps": 6}, id="ODE undone"),
    pytest.param(Noisy, StochasticHeun(), "direct", {"steps": 6, "seed": 1}, id="SDE direct"),
    pytest.param(Noisy, StochasticHeun(), "checkpointed", {"steps": 6, "seed": 1}, id="SDE checkpointed"),
    pytest.param(Noisy, ReversibleHeun(), "adjoint", {"steps": 6, "seed": 1}, id="SDE undone"),
]


@pytest.mark.parametrize(("make", "solver", "gradient", "options"), CASES)
def test_finite_differences(make, solver, gradient, options):
    assert torch.autograd.gradcheck(*of_a_parameter(make(), solver, gradient, **options))


@pytest.mark.parametrize(
    ("solver", "options"), [(RK4(), {"steps": 60}), (RK45(), {"rtol": 1e-9, "atol": 1e-9})], ids=["grid", "tolerance"]
)
def test_finite_differences_of_the_adjoint_equation(solver, options):
    """The gradient of the solution: as near to that of the steps as the steps are to it."""
    loss, inputs = of_a_parameter(Flow(), solver, "adjoint", **options)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6, rtol=1e-6)


def test_the_adjoint_equation_has_the_order_of_its_method():
    problem, errors, steps = Flow(), [], (4, 8, 16, 32)
    for n in steps:
        pair = [gradients(problem, problem.parameters, RK4(), way, steps=n)[1:] for way in ("adjoint", "direct")]
        errors.append(gap(*pair))
    assert slope([1 / n for n in steps], errors) > 3.7


# ---- torch's own record


EXACT = [
    *[(Flow, solver, {}) for solver in (RK4(), AdamsBashforthMoulton(3), ROS2(), ReversibleHeun())],
    *[(Noisy, solver, {"seed": 1}) for solver in (EulerMaruyama(), Milstein(), SRIW1(), ReversibleHeun())],
    *[(lambda: Noisy("general"), solver, {"seed": 1}) for solver in (EulerMaruyama(), ReversibleHeun())],
    (lambda: Noisy(interpretation="stratonovich"), ReversibleHeun(), {"noise": sf.SamePath(1)}),
]


@pytest.mark.parametrize("save", [None, True, [0.25, 0.5, 1.0]], ids=["end", "all", "some"])
@pytest.mark.parametrize(("make", "solver", "options"), EXACT)
def test_the_same_gradient_as_that_of_the_record(make, solver, options, save):
    problem = make()
    options = {**options, "steps": 20, "save": save}
    want = gradients(problem, problem.parameters, solver, "direct", **options)
    got = gradients(problem, problem.parameters, solver, "checkpointed", **options)
    assert torch.equal(got[0], want[0])  # the same steps, to the bit
    assert gap(got, want) < 1e-13
    if isinstance(solver, ReversibleHeun):
        assert gap(gradients(problem, problem.parameters, solver, "adjoint", **options), want) < 1e-12


@pytest.mark.parametrize(
    ("solver", "eta"),
    [(DPMSolverPP(3), 1.0), (UniPC(2), 0.0), (Reversible(), 0.0), (ReversibleHeun(), 1.0), (ReversibleHeun(), 0.0)],
)
def test_the_reversals_of_diffusion_models(solver, eta):
    problem, parameters = reversal(eta)
    options = {"steps": 20, "seed": 3, "save": True, "t_span": (1.0, 0.3)}
    want = gradients(problem, parameters, solver, "direct", **options)
    assert gap(gradients(problem, parameters, solver, "checkpointed", **options), want) < 1e-12
    if isinstance(solver, (Reversible, ReversibleHeun)):
        # undoing amplifies rounding where the solution decays
        assert gap(gradients(problem, parameters, solver, "adjoint", **options), want) < 1e-10


@pytest.mark.parametrize("save", [None, [0.1, 0.7, 1.0]], ids=["end", "dense"])
def test_to_a_tolerance(save):
    problem = Flow()
    options = {"rtol": 1e-8, "atol": 1e-8, "save": save}
    want = gradients(problem, problem.parameters, RK45(), "direct", **options)
    assert gap(gradients(problem, problem.parameters, RK45(), "adjoint", **options), want) < 1e-6


@pytest.mark.parametrize(("solver", "gradient"), [(RK4(), "checkpointed"), (ReversibleHeun(), "adjoint")])
def test_sixteen_bits(solver, gradient):
    problem = Flow(network(dtype=torch.bfloat16))
    options = {"steps": 9, "start": START.to(torch.bfloat16)}
    want = gradients(problem, problem.parameters, solver, "direct", **options)
    got = gradients(problem, problem.parameters, solver, gradient, **options)
    assert [v.dtype for v in got] == [v.dtype for v in want]
    assert gap(got, want) < 0.15  # the record adds up its parameters' gradients in 16 bits


def test_twice_through_the_same_solve():
    x = START.clone().requires_grad_()
    for gradient in ("checkpointed", "adjoint"):
        end = sf.solve(Noisy(), x, ReversibleHeun(), steps=9, seed=1, gradient=gradient).x
        first = torch.autograd.grad(end.sum(), x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(end.sum(), x)[0])


def test_a_parameter_that_is_computed():
    """The drift uses exp(raw), computed before the solve: the gradient gets to raw."""
    raw, start = torch.tensor(-0.5, dtype=F64, requires_grad=True), START + 2

    class Decay(sf.ODE):
        def drift(self, x, t):
            return -rate * x

    exact = math.exp(-0.5)
    want = -float(start.sum()) * math.exp(-exact) * exact
    for gradient, solver in (("checkpointed", RK4()), ("adjoint", RK4()), ("adjoint", ReversibleHeun())):
        rate = torch.exp(raw)
        end = sf.solve(Decay(), start, solver, steps=400, gradient=gradient).x
        assert float(torch.autograd.grad(end.sum(), raw)[0]) == pytest.approx(want, rel=1e-4)


def test_calls_are_those_of_the_solve():
    problem, parameters = reversal(0.0)
    for gradient in ("direct", "checkpointed", "adjoint"):
        stats = sf.solve(problem, START, Heun(), steps=7, gradient=gradient, t_span=(1.0, 0.3)).stats
        assert (stats.nfe, stats.calls, stats.network_calls) == (14, 14, 14)
    assert parameters


def test_without_a_record_there_is_no_gradient():
    for gradient in ("checkpointed", "adjoint"):
        with torch.no_grad():
            assert not sf.solve(Flow(), START, RK4(), steps=3, gradient=gradient).x.requires_grad
        plain = Flow(network().requires_grad_(False))
        assert not sf.solve(plain, START, RK4(), steps=3, gradient=gradient).x.requires_grad


# ---- memory


def saved_numbers(solver, steps, gradient, problem=None):
    """The most numbers that torch's records hold at one time during a solve and its backward pass."""
    held = most = 0

    class Held:
        def __init__(self, v):
            nonlocal held, most
            self.v, self.count = v.detach(), v.numel()  # with its record it would hold itself
            held += self.count
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.count

    problem = problem or Flow()
    x = START.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.v):
        solution = sf.solve(problem, x, solver, steps=steps, seed=0, gradient=gradient)
        solution.x.sum().backward()
    return most


@pytest.mark.parametrize("problem", [Flow(), Noisy()], ids=["ODE", "SDE"])
def test_the_memory_of_each_way(problem):
    solver = ReversibleHeun()
    counts = {
        way: [saved_numbers(solver, n, way, problem) for n in (64, 256)]
        for way in ("direct", "checkpointed", "adjoint")
    }
    assert counts["direct"][1] > 3.8 * counts["direct"][0]  # the control: it grows with the steps
    assert 1.5 * counts["checkpointed"][0] < counts["checkpointed"][1] < 2.2 * counts["checkpointed"][0]
    assert counts["checkpointed"][1] < 0.2 * counts["direct"][1]
    assert counts["adjoint"][1] == counts["adjoint"][0] < 0.02 * counts["direct"][1]


def test_the_adjoint_equation_keeps_one_evaluation():
    low, high = (saved_numbers(RK4(), n, "adjoint") for n in (8, 64))
    assert low == high < 0.02 * saved_numbers(RK4(), 64, "direct")


# ---- walks that go back


@pytest.mark.parametrize("source", [sf.Noise(3, 5), sf.Noise(3, 5, one_path=True)], ids=["grid", "tree"])
@pytest.mark.parametrize("areas", [False, True])
def test_a_walk_gives_the_same_numbers_in_any_order(monkeypatch, source, areas):
    monkeypatch.setattr("sdeflow.grid_walk.BLOCK", 64)  # several blocks
    times = torch.linspace(0, 1, 25, dtype=F64) ** 1.5
    walk = source.walk(times, (2,), F64, areas=areas)
    ahead = [[None if v is None else v.clone() for v in walk(k)] for k in range(24)]
    for k in [23, 22, 3, 4, 17, 0, 12, 11]:
        for got, want in zip(walk(k), ahead[k], strict=True):
            assert got is want is None or torch.equal(got, want)


# ---- reversible Heun


class Rotation(sf.ODE):
    def drift(self, x, t):
        return torch.stack([x[:, 1], -x[:, 0]], 1) * (1 + t)


def test_the_order_on_an_ordinary_equation():
    x = torch.tensor([[1.0, 0.5]], dtype=F64)
    c, s = math.cos(1.5), math.sin(1.5)
    exact = torch.tensor([[c * 1.0 + s * 0.5, -s * 1.0 + c * 0.5]], dtype=F64)
    steps = (16, 32, 64, 128)
    errors = [float((sf.solve(Rotation(), x, ReversibleHeun(), steps=n).x - exact).norm()) for n in steps]
    assert 1.8 < slope([1 / n for n in steps], errors) < 2.2


class Grown(sf.SDE):
    """dX = -X dt + 0.5 X dW: X exp(-1.125 t + 0.5 W); or additive noise, on a fine path of its own."""

    def __init__(self, additive):
        self._additive = additive

    def drift(self, x, t):
        return torch.sin(x)

    def diffusion(self, x, t):
        return torch.full_like(x, 0.5) if self._additive else 0.5 * torch.cos(x)


@pytest.mark.parametrize("additive", [True, False])
def test_the_strong_order(additive):
    """Against itself on a fine grid of the same path: 1 for additive noise, at least 1/2 for diagonal noise."""
    problem, x = Grown(additive), torch.zeros(300, 1, dtype=F64)
    end = {n: sf.solve(problem, x, ReversibleHeun(), steps=n, noise=sf.SamePath(5)).x for n in (16, 32, 64, 128, 1024)}
    steps = (16, 32, 64, 128)
    errors = [float((end[n] - end[1024]).abs().mean()) for n in steps]
    fitted = slope([1 / n for n in steps], errors)
    assert 0.8 < fitted < 1.3 if additive else fitted > 0.4
    other = sf.solve(problem, x, StochasticHeun(), steps=1024, noise=sf.SamePath(5)).x
    assert float((end[1024] - other).abs().mean()) < 0.2 * errors[-1] + 2e-3  # the same equation


def test_the_contract_of_a_solver():
    report = sf.testing.check_solver(ReversibleHeun(), order=2, weak_order=2, strong_order=0.5)
    assert report.ok, str(report)


# ---- what cannot be done


class Late(sf.ODE):
    """Uses a parameter only after a while, and hides it."""

    def drift(self, x, t):
        return x if float(t) < 0.5 else x * HIDDEN


HIDDEN = torch.tensor(2.0, dtype=F64, requires_grad=True)


@pytest.mark.parametrize(
    ("solver", "gradient"), [(RK4(), "checkpointed"), (RK4(), "adjoint"), (ReversibleHeun(), "adjoint")]
)
def test_a_parameter_that_is_not_found_is_an_error_and_no_gradient_lost(solver, gradient):
    end = sf.solve(Late(), START.clone().requires_grad_(), solver, steps=9, gradient=gradient).x
    with pytest.raises(RuntimeError, match=r"shape \(\) .* its gradient would be lost"):
        end.sum().backward()
    problem = Late()
    problem.hidden = HIDDEN
    sf.solve(problem, START, solver, steps=9, gradient=gradient).x.square().sum().backward()
    assert float(HIDDEN.grad) > 0.1
    HIDDEN.grad = None


@pytest.mark.parametrize(
    ("problem", "solver", "options", "message"),
    [
        (Flow(), RK4(), {"gradient": "adjiont", "steps": 3}, "gradient as one of 'direct', 'checkpointed', 'adjoint'"),
        (Flow(), RK45(), {"gradient": "checkpointed", "rtol": 1e-3}, "needs a grid"),
        (Noisy(), EulerMaruyama(), {"gradient": "adjoint", "steps": 3}, "not for EulerMaruyama: .* ReversibleHeun"),
        (Noisy(), StochasticHeun(), {"gradient": "adjoint", "rtol": 1e-2}, "not for StochasticHeun to a tolerance"),
        (Flow(), ROS2(), {"gradient": "adjoint", "steps": 3}, "not for ROS2"),
        (reversal(0.0)[0], sf.solvers.Restart((sf.solvers.RestartInterval(0.1, 0.5, 2, 3),)),
         {"gradient": "checkpointed", "steps": 6}, "keeps a memory that cannot be put back"),
    ],
)  # fmt: skip
def test_refusals_come_before_the_first_step(problem, solver, options, message):
    with pytest.raises(ValueError, match=message):
        sf.solve(problem, START, solver, **options)


def test_second_derivatives_are_refused():
    x = START.clone().requires_grad_()
    for gradient in ("checkpointed", "adjoint"):
        end = sf.solve(Flow(), x, RK4(), steps=4, gradient=gradient).x
        with pytest.raises(RuntimeError, match='only gradient="direct" has second derivatives'):
            torch.autograd.grad(end.sum(), x, create_graph=True)


def test_the_check_sees_a_wrong_gradient(monkeypatch):
    """The control: replays with other noise."""
    problem = Noisy()
    want = gradients(problem, problem.parameters, EulerMaruyama(), "direct", steps=20, seed=1)
    step = sf.solvers.EulerMaruyama().stepper(problem, START, torch.linspace(0, 1, 21, dtype=F64), sf.Noise(1, 4))
    plain = type(step).step
    monkeypatch.setattr(type(step), "step", lambda self, i, x: plain(self, i, x) + 0.01 * torch.is_grad_enabled())
    got = gradients(problem, problem.parameters, EulerMaruyama(), "checkpointed", steps=20, seed=1)
    assert gap(got, want) > 1e-4


# ---- the benchmark


def test_the_loops_of_the_benchmark_are_the_methods():
    torch.manual_seed(0)
    neural, x = bench.Neural(), torch.randn(4, bench.SIZE)
    loop = bench.rk4_loop(neural, x, 20)
    torch.testing.assert_close(bench.ours(bench.Flow(neural), x, "direct")(20), loop)
    assert set(bench.measure("ODE, adjoint", 2)) == {"seconds", "MB"}
