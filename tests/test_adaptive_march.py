"""The march of an embedded pair: each sample against a march written out plainly, host syncs, compiled steps.

Deterministic: fixed start states, no sampling error.
"""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.attempt import Attempt, Progress
from sdeflow.compiled import compiled_step, whole_step
from sdeflow.pid import PID
from sdeflow.solvers import DOP853, RK45, ROS34PW2, BogackiShampine, ExponentialRK, Heun, Tsit5, for_tolerance

F64 = torch.float64


class VanDerPol(sf.ODE):
    t0, t1 = 0.0, 3.0
    per_sample = ("mu",)

    def __init__(self, mu):
        self.mu = mu

    def drift(self, x, t):
        a, b = x[:, 0], x[:, 1]
        return torch.stack([b, self.mu * (1 - a * a) * b - a], 1)


class Forced(sf.ODE):
    """Depends on time; -inf at x = 0 and NaN below."""

    def drift(self, x, t):
        return torch.log(x) - 1 + 0.1 * torch.cos(5 * t)


class BlowUp(sf.ODE):
    def drift(self, x, t):
        return x**2


def oscillators(batch):
    mu = torch.linspace(0, 12, batch, dtype=F64).roll(batch // 3)
    return VanDerPol(mu), torch.tensor([[2.0, 0.0]], dtype=F64).repeat(batch, 1)


def alone(problem, x, table, tol, max_steps=100_000):
    """One sample (1, d), by the book: (end, status, accepted, rejected). The order and the controller of `PID`."""
    a = [[float(v) for v in row] for row in table.a]
    c = [float(v) for v in table.c]
    start, end = problem.span
    t, k = start, problem.drift(x, torch.full((1, 1), start, dtype=F64))

    def norm(e, *states):
        allowed = tol + tol * torch.stack([s.abs() for s in states]).amax(0)
        return float((e / allowed).square().mean().sqrt())

    def drift(y, s):
        return problem.drift(y, torch.full((1, 1), s, dtype=F64))

    # Hairer, Norsett and Wanner 1993, section II.4
    length, d0, d1 = end - start, norm(x, x), norm(k, x)
    guess = min(1e-6 * length if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, length)
    most = max(d1, norm(drift(x + guess * k, t + guess) - k, x) / guess)
    h = (0.01 / most) ** (1 / table.order) if most > 1e-15 else max(1e-3 * guess, 1e-6 * length)
    h = min(100 * guess, h, length)
    previous, accepted, rejected = 1.0, 0, 0
    while True:
        last = h >= (end - t) * (1 - 1e-12)
        step = end - t if last else h
        stages = [k]
        for row, share in zip(a[1:], c[1:], strict=True):
            y = x + step * sum(w * v for w, v in zip(row, stages, strict=True))
            stages.append(drift(y, t + share * step))
        estimates = [
            step * sum(float(w) * v for w, v in zip(row, stages, strict=True))
            for row in (table.b_error, table.b_error_low)
            if row is not None
        ]
        sizes = [norm(e, x, y) for e in estimates]
        size = sizes[0]
        if len(sizes) == 2 and size > 0:
            size = size**2 / math.sqrt(size**2 + 0.01 * sizes[1] ** 2)
        if size <= 1:
            x, k, t = y, stages[-1], end if last else t + step
            accepted += 1
        else:
            rejected += 1
        factor = 0.25
        if math.isfinite(size):
            factor = 0.9 * max(size, 1e-10) ** (-0.7 / table.order) * previous ** (0.4 / table.order)
            factor = min(max(factor, 0.2), 10.0 if size <= 1 else 1.0)
        if size <= 1:
            previous = max(size, 1e-4)
        h = step * factor
        if t == end:
            return x, sf.Status.FINISHED, accepted, rejected
        if not bool(torch.isfinite(k).all()):
            return x, sf.Status.NON_FINITE, accepted, rejected
        if h < 1e-14 * max(abs(start), abs(end)):
            return x, sf.Status.STEP_UNDERFLOW, accepted, rejected
        if accepted + rejected == max_steps:
            return x, sf.Status.STEP_LIMIT, accepted, rejected


CASES = {
    "oscillators": (*oscillators(13), {}),
    "step limit": (*oscillators(7), {"max_steps": 41}),
    "failures": (Forced(), torch.tensor([[0.5], [2.0], [0.2], [3.0], [0.1]], dtype=F64), {}),
    "blow up": (BlowUp(), torch.tensor([[0.5], [-3.0], [1.5], [0.1], [2.0]], dtype=F64), {}),
}


@pytest.mark.parametrize("solver", [RK45(), Tsit5(), DOP853(), BogackiShampine()], ids=lambda s: s.name)
@pytest.mark.parametrize("case", CASES)
def test_each_sample_is_the_march_written_out(case, solver):
    problem, x, how = CASES[case]
    tol = 1e-6
    got = sf.solve(problem, x, solver, rtol=tol, throw=False, **how)
    for i in range(len(x)):
        one = problem.take(torch.tensor([i]))
        end, status, accepted, rejected = alone(one, x[i : i + 1], solver.tableau, tol, **how)
        assert got.status[i] == status
        if status in (sf.Status.FINISHED, sf.Status.STEP_LIMIT):  # at a singularity rounding counts the attempts
            assert int(got.stats.accepted[i]) == accepted
            assert int(got.stats.rejected[i]) == rejected
            assert int(got.stats.nfe[i]) == 2 + (accepted + rejected) * (len(solver.tableau.c) - 1)
            torch.testing.assert_close(got.x[i : i + 1], end, rtol=1e-8, atol=1e-8)
    assert len(set(got.stats.nfe.tolist())) > 1 or "max_steps" in how


@pytest.mark.parametrize("solver", [RK45(), DOP853()], ids=lambda s: s.name)
def test_a_sample_is_the_same_in_every_batch(solver):
    """To rounding: torch's power differs in its last bit with the place in the batch, and with it the step sizes."""
    problem, x = oscillators(40)
    save = [0.0, 1.0, 2.5]
    whole = sf.solve(problem, x, solver, rtol=1e-6, save=save)
    for rows in (torch.arange(8, 24), torch.tensor([39, 3, 17, 5, 20, 11, 0, 30])):
        part = sf.solve(problem.take(rows), x[rows], solver, rtol=1e-6, save=save)
        torch.testing.assert_close(part.x, whole.x[rows], rtol=0, atol=1e-12)
        torch.testing.assert_close(part.xs, whole.xs[:, rows], rtol=0, atol=1e-12)
        for field in ("steps", "accepted", "rejected"):
            assert torch.equal(getattr(part.stats, field), getattr(whole.stats, field)[rows])


def test_saved_times_in_any_order_and_twice():
    problem, x = oscillators(5)
    times = [2.5, 0.0, 1.0, 3.0, 1.0, 0.001, 0.002]
    got = sf.solve(problem, x, Tsit5(), rtol=1e-9, save=times)
    assert torch.equal(got.xs[1], x)
    assert torch.equal(got.xs[2], got.xs[4])
    for i, t in enumerate(times):
        if t > 0:
            want = sf.solve(problem, x, Tsit5(), rtol=1e-9, t_span=(0.0, t)).x
            torch.testing.assert_close(got.xs[i], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.xs[3], got.x, rtol=0, atol=1e-12)


@pytest.fixture
def syncs(monkeypatch):
    """Counts how often the host asks a tensor for its value."""
    count = [0]
    for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def asked(self, *args, original=original):
            count[0] += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, asked)
    return count


@pytest.mark.parametrize("save", [None, [0.5 * i for i in range(7)]], ids=["end", "saved"])
def test_the_host_asks_once_in_several_attempts(syncs, save):
    problem, x = oscillators(16)
    attempts = []
    for span in ((0.0, 1.5), (0.0, 3.0)):
        syncs[0] = 0
        given = None if save is None else [t for t in save if t <= span[1]]
        steps = int(sf.solve(problem, x, Tsit5(), rtol=1e-9, t_span=span, save=given).stats.steps.max())
        attempts.append((steps, syncs[0]))
    (short, few), (long, many) = attempts
    assert long > short + 30
    # what a longer solve asks more: once in eight attempts, twice with dense output
    assert many - few <= (1 if save is None else 2) * ((long - short) / 8 + 3)


def test_calls_end_with_the_last_sample():
    problem, x = oscillators(16)
    got = sf.solve(problem, x, Tsit5(), rtol=1e-7)
    assert got.stats.calls == int(got.stats.nfe.max())
    assert torch.equal(got.stats.nfe, 2 + 6 * got.stats.steps)


@pytest.mark.parametrize("solver", [ROS34PW2(), ExponentialRK(3)], ids=lambda s: s.name)
def test_pairs_that_do_not_end_in_their_next_stage(solver):
    process = sf.VP()
    flow = process.probability_flow(sf.problems.EightGaussians().model(process))
    x = torch.randn(6, 2, dtype=F64)
    with torch.no_grad():
        got = sf.solve(flow, x, solver, rtol=1e-4)
        want = sf.solve(flow, x, RK45(), rtol=1e-9)
    torch.testing.assert_close(got.x, want.x, rtol=0, atol=0.02)
    assert got.stats.calls == int(got.stats.nfe.max())


# ---- by default


def test_the_default_goes_by_the_tolerance():
    assert for_tolerance(1e-5).name == "Tsit5"
    assert for_tolerance(1e-6).name == for_tolerance(1e-9).name == "DOP853"
    with pytest.raises(ValueError, match="rtol > 0"):
        for_tolerance(0.0)
    problem, x = oscillators(3)
    for how, solver in (({"rtol": 1e-4}, Tsit5()), ({"atol": 1e-8}, DOP853()), ({"rtol": 0.0, "atol": 1e-3}, Tsit5())):
        assert torch.equal(sf.solve(problem, x, **how).x, sf.solve(problem, x, solver, **how).x)
    with pytest.raises(TypeError, match="only a tolerance chooses one"):
        sf.solve(problem, x, steps=3)


# ---- compiled


def at_start(problem, x, attempt):
    full = torch.full((len(x),), problem.t0, dtype=F64)
    k = problem.drift(x, full[:, None])
    count = torch.zeros(len(x), dtype=torch.int64)
    return Progress(x, full, k, full + 0.01, full + 1, torch.ones(len(x), dtype=torch.bool), count, count)


@pytest.mark.parametrize("solver", [Tsit5(), DOP853()], ids=lambda s: s.name)
def test_the_step_is_one_graph_with_the_same_values(solver):
    torch._dynamo.reset()
    problem, x = oscillators(6)
    attempt = Attempt(solver.pair, PID(1e-6, 1e-6), 0.0, 3.0, x.device)
    step = compiled_step(solver.pair, problem, True, backend="eager")
    now = at_start(problem, x, attempt)
    for _ in range(3):
        want, passed = whole_step(attempt, problem, now, F64, True)
        got, same = step(attempt, problem, now, F64, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(same.step, passed.step)
        now = got
    torch._dynamo.reset()


def test_what_does_not_compile_says_so():
    problem, x = oscillators(3)
    for solver in (Heun(), sf.solvers.EulerMaruyama()):
        with pytest.raises(ValueError, match="takes a solver with an embedded pair"):
            sf.solve(problem, x, solver, compiled=True, rtol=1e-3)
    with pytest.raises(ValueError, match="explicit Runge-Kutta pair"):
        sf.solve(problem, x, ROS34PW2(), rtol=1e-3, compiled=True)
    with pytest.raises(ValueError, match="no gradients"):
        sf.solve(problem, x.clone().requires_grad_(), Tsit5(), rtol=1e-3, compiled=True)

    class Branching(sf.ODE):
        def drift(self, x, t):
            return -x if bool(x.sum() > 0) else x

    with pytest.raises(RuntimeError, match="Branching could not be compiled"):
        sf.solve(Branching(), x, Tsit5(), rtol=1e-3, compiled=True)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_solves_are_the_same():
    problem, x = oscillators(20)
    for tol in (1e-3, 1e-6, 1e-8):
        for save in (None, [0.5, 2.0]):
            want = sf.solve(problem, x, Tsit5(), rtol=tol, save=save)
            got = sf.solve(problem, x, Tsit5(), rtol=tol, save=save, compiled=True)
            torch.testing.assert_close(got.x, want.x, rtol=1e-7, atol=1e-7)
            assert got.stats.calls == want.stats.calls
            assert torch.equal(got.stats.nfe, want.stats.nfe)
            if save is not None:
                torch.testing.assert_close(got.xs, want.xs, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_flow_counts_its_model():
    process = sf.VP()
    model = sf.problems.EightGaussians().model(process)
    flow = process.probability_flow(model)
    x = torch.randn(8, 2, dtype=F64)
    with torch.no_grad():
        want = sf.solve(flow, x, Tsit5(), rtol=1e-4)
        before = model.nfe
        got = sf.solve(flow, x, Tsit5(), rtol=1e-4, compiled=True)
    torch.testing.assert_close(got.x, want.x, rtol=1e-7, atol=1e-7)
    assert model.nfe - before == got.stats.calls == got.stats.network_calls == want.stats.calls
