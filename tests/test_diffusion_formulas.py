"""Stochastic samplers of diffusion models against the papers' formulas, in plain Python on numbers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import sdeflow as sf
from sdeflow.noise import CORRECTOR
from sdeflow.solvers import (
    DDIM,
    DDPM,
    ERSDE,
    SEEDS,
    AncestralPredictor,
    AnnealedLangevin,
    DPMSolverPP,
    EulerAncestral,
    ExponentialMultistep,
    ReverseDiffusion,
    SASolver,
    Window,
)
from tests.diffusion_cases import END, GRID, MIXTURE, MODEL, START, VP, X, agree, blend, label, power, run
from tests.exact import F64, levels, rms, slope, unit_increments
from tests.test_orders import flow_case


def draws(lengths, seed=7):
    """The normals of steps whose noise is a Brownian motion over these lengths."""
    return unit_increments(seed, 6, (8,), lengths)


def time_at(lam):
    """The time of VP at lam, by the quadratic's root."""
    log_alpha = -0.5 * math.log1p(math.exp(-2 * lam))
    return (-0.05 + math.sqrt(0.05**2 - 19.9 * log_alpha)) / (0.5 * 19.9)


def seeds_stretches(order):
    """The variances of the stages' noise in x/alpha, step by step: differences of exp(-2 lam)."""
    out = []
    for s, t in itertools.pairwise(GRID.tolist()):
        l0, l1 = levels(s)[2], levels(t)[2]
        at = [l0 + (l1 - l0) * k / order for k in range(order + 1)]
        out += [math.exp(-2 * a) - math.exp(-2 * b) for a, b in itertools.pairwise(at)]
    return out


def seeds(order):
    """SEEDS-1, -2, -3 as printed, with r_1 = 1/2 and 1/3, r_2 = 2/3 (noise prediction, eta = 1)."""
    x, z = X, iter(draws(seeds_stretches(order)))
    for s, t in itertools.pairwise(GRID.tolist()):
        a0, _, l0 = levels(s)
        a1, s1, l1 = levels(t)
        h, e0 = l1 - l0, MODEL.eps(x, s)
        whole = a1 / a0 * x - 2 * s1 * math.expm1(h) * e0
        if order == 1:
            x = whole + s1 * math.sqrt(math.expm1(2 * h)) * next(z)
        elif order == 2:
            z1, z2 = next(z), next(z)
            m = time_at(l0 + h / 2)
            am, sm, _ = levels(m)
            u = am / a0 * x - 2 * sm * math.expm1(h / 2) * e0 + sm * math.sqrt(math.expm1(h)) * z1
            x = a1 / a0 * x - 2 * s1 * math.expm1(h) * MODEL.eps(u, m)
            x = x + s1 * (math.sqrt(math.exp(2 * h) - math.exp(h)) * z1 + math.sqrt(math.expm1(h)) * z2)
        else:
            z1, z2, z3 = next(z), next(z), next(z)
            r1, r2 = 1 / 3, 2 / 3
            t1, t2 = time_at(l0 + r1 * h), time_at(l0 + r2 * h)
            (am, sm, _), (an, sn, _) = levels(t1), levels(t2)
            u = am / a0 * x - 2 * sm * math.expm1(r1 * h) * e0 + sm * math.sqrt(math.expm1(2 * r1 * h)) * z1
            d1 = MODEL.eps(u, t1) - e0
            u = an / a0 * x - 2 * sn * math.expm1(r2 * h) * e0
            u = u - 2 * sn * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
            one, two = math.exp(2 * r1 * h), math.exp(2 * r2 * h)
            u = u + sn * (math.sqrt(two - one) * z1 + math.sqrt(one - 1) * z2)
            x = whole - 2 * s1 / r2 * (math.expm1(h) / h - 1) * (MODEL.eps(u, t2) - e0)
            three = math.exp(2 * h)
            x = x + s1 * (math.sqrt(three - two) * z1 + math.sqrt(two - one) * z2 + math.sqrt(one - 1) * z3)
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeds(order):
    agree(run(SEEDS(order), 1.0), seeds(order))


def fresh_variances(factor=1.0):
    """Of a data-prediction step: in units of the linear flow x/(sigma exp(-factor lam))."""
    lam = [levels(t)[2] for t in GRID.tolist()]
    return [math.exp(2 * factor * b) - math.exp(2 * factor * a) for a, b in itertools.pairwise(lam)]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.4])
def test_euler_ancestral(eta):
    """k-diffusion's in x/alpha on sigma/alpha; for eta <= 1 it is DDIM."""
    solver = EulerAncestral(eta)
    flow = VP.probability_flow(MODEL)
    u = [levels(t)[1] / levels(t)[0] for t in GRID.tolist()]
    y, variances, scale, ups = X / levels(GRID[0].item())[0], [], 1.0, []
    for a, b in itertools.pairwise(u):
        up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
        down = math.sqrt(b**2 - up**2)
        scale *= down / a
        ups.append((up, down))
        variances.append(up**2 / scale**2 if scale > 0 else 1.0)
    z = draws(variances) if eta else torch.zeros(4, 6, 8, dtype=F64)
    if eta == 1.4:  # a step of which all noise is replaced leaves no clock: the plan's own
        z = draws(torch.diff(solver.plan(flow, GRID).clock))
        assert any(down == 0 for _, down in ups)
    for i, (t, a) in enumerate(zip(GRID.tolist(), u, strict=False)):
        if i == 4:
            break
        up, down = ups[i]
        y = y + (down - a) * MODEL.eps(levels(t)[0] * y, t) + up * z[i]
    agree(run(solver), levels(GRID[-1].item())[0] * y)
    if 0 < eta <= 1:
        assert torch.equal(run(solver), run(DDIM(eta)))


BETAS = np.linspace(0.01, 0.3, 8)


@pytest.mark.parametrize("kind", ["posterior", "forward", "learned", "columns"])
def test_ddpm_variances(kind):
    """From entry n to n - 1 of a table of betas (Ho et al. 2020, equation 7; Nichol and Dhariwal 2021, equation 15)."""
    process = sf.DiscreteVP(BETAS)
    model = MIXTURE.model(process)
    abar, n = np.cumprod(1 - BETAS), 5
    share = {"learned": torch.sigmoid(X), "columns": torch.linspace(0, 1, 8, dtype=F64)}.get(kind)
    seen = []

    def v(x, t):
        seen.append((x, float(t)))
        return share

    x0, xi = model.x0(X, (n + 1) / 8), draws([1.0])[0]
    mean = (math.sqrt(abar[n - 1]) * BETAS[n] * x0 + math.sqrt(1 - BETAS[n]) * (1 - abar[n - 1]) * X) / (1 - abar[n])
    low, high = (1 - abar[n - 1]) / (1 - abar[n]) * BETAS[n], BETAS[n]
    if kind == "posterior":
        std = math.sqrt(low)
    elif kind == "forward":
        std = math.sqrt(high)
    else:
        std = torch.exp(0.5 * (share * math.log(high) + (1 - share) * math.log(low)))
    got = run(DDPM(kind if share is None else v), 0.0, model, [(n + 1) / 8, n / 8])
    agree(got, mean + std * xi)
    if share is not None:
        assert torch.equal(seen[0][0], X)
        assert seen[0][1] == (n + 1) / 8


def test_learned_variance_at_its_ends_is_the_fixed_ones():
    for value, fixed in ((0.0, DDPM()), (1.0, DDPM("forward"))):
        low = DDPM(lambda x, t, value=value: torch.full_like(x, value))
        grid = GRID[:2] if value else GRID  # one step has one path whatever its variance
        agree(run(low, grid=grid), run(fixed, grid=grid), 1e-12)


@pytest.mark.parametrize("solver", [DDPM(), DDPM("forward"), DDPM(blend), AncestralPredictor()], ids=label)
def test_a_last_step_to_sigma_zero_draws_nothing(solver):
    """beta-tilde is 0 there and its logarithm is not finite: the mean, as in algorithm 2 of DDPM (z = 0)."""
    for seed in (1, 2):
        agree(run(solver, grid=[0.2, 0.0], seed=seed), MODEL.x0(X, 0.2))
    whole = run(solver, grid=[0.6, 0.2, 0.0])
    assert bool(torch.isfinite(whole).all())
    assert float((whole - run(solver, grid=[0.6, 0.2, 0.0], seed=8)).abs().max()) > 0.1


def test_a_learned_variance_is_checked():
    with pytest.raises(ValueError, match=r"broadcast to x, \(6, 8\), got \(6, 3\)"):
        run(DDPM(lambda x, t: torch.zeros(6, 3)))
    with pytest.raises(ValueError, match="got float"):
        run(DDPM(lambda x, t: 0.5))
    with pytest.raises(ValueError, match="variance as 'posterior', 'forward' or a function, got 'large'"):
        DDPM("large")
    assert run(DDPM(blend), x=X.half()).dtype == torch.float16


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reverse_diffusion(eta):
    """Song et al. 2021, appendix E: VP with f = (sqrt(1 - beta) - 1) x, G^2 = beta, and VE with G^2 a difference."""
    factor = 1.0 if eta else 0.5
    process = sf.DiscreteVP(BETAS)
    model, n, z = MIXTURE.model(process), 5, draws([1.0])[0]
    beta = BETAS[n]
    want = X - (math.sqrt(1 - beta) - 1) * X + factor * beta * model.score(X, (n + 1) / 8) + eta * math.sqrt(beta) * z
    agree(run(ReverseDiffusion(), eta, model, [(n + 1) / 8, n / 8]), want)
    process = sf.VE(sigma_max=10.0)
    model, s, t = MIXTURE.model(process), 0.6, 0.5
    gap = (0.01 * 1000**s) ** 2 - (0.01 * 1000**t) ** 2
    want = X + factor * gap * model.score(X, s) + eta * math.sqrt(gap) * z
    agree(run(ReverseDiffusion(), eta, model, [s, t]), want)


def test_ancestral_predictor():
    """Song et al. 2021: (x + beta s)/sqrt(1 - beta) + sqrt(beta) z in VP; in VE the posterior's deviation."""
    process = sf.DiscreteVP(BETAS)
    model, n, z = MIXTURE.model(process), 5, draws([1.0])[0]
    beta = BETAS[n]
    want = (X + beta * model.score(X, (n + 1) / 8)) / math.sqrt(1 - beta) + math.sqrt(beta) * z
    agree(run(AncestralPredictor(), 0.0, model, [(n + 1) / 8, n / 8]), want)
    process = sf.VE(sigma_max=10.0)
    model, s, t = MIXTURE.model(process), 0.6, 0.5
    high, low = 0.01 * 1000**s, 0.01 * 1000**t
    gap = high**2 - low**2
    want = X + gap * model.score(X, s) + low * math.sqrt(gap) / high * z
    agree(run(AncestralPredictor(), 0.0, model, [s, t]), want)


def lagrange(nodes, j, v):
    return math.prod((v - c) / (nodes[j] - c) for k, c in enumerate(nodes) if k != j)


def sa_solver(predictor, corrector, tau):
    """Predict, evaluate, correct (Xue et al. 2023, algorithm 1), the integrals by adaptive quadrature."""
    ts = GRID.tolist()
    lam = [levels(t)[2] for t in ts]
    lengths = [math.exp(2 * tau**2 * b) - math.exp(2 * tau**2 * a) for a, b in itertools.pairwise(lam)]
    z = draws(fresh_variances(tau**2)) if tau else torch.zeros(4, 6, 8, dtype=F64)
    assert len(lengths) == 4

    def step(x, i, values, nodes):
        """From ts[i] with the evaluations `values` at `nodes`, and the step's noise."""
        (_, s0, l0), (a1, s1, l1) = levels(ts[i]), levels(ts[i + 1])
        c = 1 + tau**2
        y = s1 / s0 * math.exp(-(tau**2) * (l1 - l0)) * x
        for j, value in enumerate(values):
            weight = quad(
                lambda v, j=j: math.exp(-c * (l1 - v)) * c * lagrange(nodes, j, v), l0, l1, epsabs=1e-14, epsrel=1e-13
            )[0]
            y = y + a1 * weight * value
        return y + s1 * math.sqrt(-math.expm1(-2 * tau**2 * (l1 - l0))) * z[i]

    x, seen, at = X, [MODEL.x0(X, ts[0])], [lam[0]]
    for i in range(4):
        predicted = step(x, i, seen[:predictor], at[:predictor])
        if i == 3:
            return predicted
        new = MODEL.x0(predicted, ts[i + 1])
        seen, at = [new, *seen], [lam[i + 1], *at]
        x = step(x, i, seen[:corrector], at[:corrector]) if corrector else predicted
    return None


@pytest.mark.parametrize("orders", [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (2, 3), (3, 4), (4, 5)])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver(orders, tau):
    agree(run(SASolver(*orders, tau=tau)), sa_solver(*orders, tau))


def test_sa_solvers_default_is_the_papers_window():
    """1 on [0.2, 0.8] of the time range: steps inside it are those of tau = 1, below it those of the flow."""
    assert SASolver().eta == Window(0.2, 0.8, 1.0)
    flow = VP.probability_flow(MODEL)
    grid = torch.tensor([0.9, 0.85, 0.7, 0.5, 0.3, 0.15, 0.1], dtype=F64)
    own, one, zero = (SASolver(1, 0, tau).plan(flow, grid) for tau in (None, 1.0, 0.0))
    assert (own.noise > 0).tolist() == [False, True, True, True, True, False]
    for k, like in ((0, zero), (2, one), (3, one), (5, zero)):
        for table in ("ratio", "weights", "noise"):
            assert torch.equal(getattr(own, table)[k], getattr(like, table)[k])
    assert 0 < float(own.noise[1]) < float(one.noise[1])
    edm = sf.EDM().probability_flow(MIXTURE.model(sf.EDM()))
    assert (SASolver().plan(edm, torch.tensor([70.0, 50.0, 20.0, 10.0, 1.0], dtype=F64)).noise > 0).tolist() == [
        True, True, True, False,
    ]  # fmt: skip


def er_sde(order, phi):
    """The published steps in x/alpha, 1/phi integrated by adaptive quadrature; the third order with the parabola."""
    ts = GRID.tolist()
    u = [levels(t)[1] / levels(t)[0] for t in ts]
    gains = [phi(b) / phi(a) for a, b in itertools.pairwise(u)]
    variances = [b**2 - a**2 * g**2 for a, b, g in zip(u, u[1:], gains, strict=False)]
    z = draws(np.array(variances) / np.cumprod(gains) ** 2)
    y, seen = X / levels(ts[0])[0], []
    for i, (a, b) in enumerate(itertools.pairwise(u)):
        seen = [MODEL.x0(levels(ts[i])[0] * y, ts[i]), *seen]
        y = gains[i] * y + (1 - gains[i]) * seen[0] + math.sqrt(variances[i]) * z[i]
        if order > 1 and i > 0:
            first = (seen[0] - seen[1]) / (a - u[i - 1])
            if order > 2 and i > 1:
                second = 2 * (first - (seen[1] - seen[2]) / (u[i - 1] - u[i - 2])) / (a - u[i - 2])
                first = first + 0.5 * second * (a - u[i - 1])  # the parabola's slope at u; the published step lacks it
                moment = quad(lambda s, a=a: (s - a) / phi(s), b, a, epsabs=1e-15, epsrel=1e-13)[0]
                y = y + ((b - a) ** 2 / 2 + moment * phi(b)) * second
            y = y + (b - a + phi(b) * quad(lambda s: 1 / phi(s), b, a, epsabs=1e-15, epsrel=1e-13)[0]) * first
    return levels(ts[-1])[0] * y


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("exponent", [1.3, 2.0, 3.0])
def test_er_sde_with_powers(order, exponent):
    agree(run(ERSDE(order, power(exponent))), er_sde(order, lambda s: s**exponent), 1e-9)


def test_er_sde_with_the_papers_scale():
    """Order 1 is the published step; from order 2 on phi is a power inside a step: a relative O(h) of differences."""

    def phi(s):
        return s * (math.exp(s**0.3) + 10)

    agree(run(ERSDE(1)), er_sde(1, phi))
    agree(run(ERSDE(1)), run(ERSDE(1, lambda s: s * (torch.exp(s**0.3) + 10))), 1e-12)
    flow, sizes, gaps = VP.probability_flow(MODEL), (0.4, 0.2, 0.1, 0.05), []
    for h in sizes:
        grid = VP.time_of_lam(torch.tensor([-h, 0.0, h], dtype=F64))
        plan = ERSDE(2).plan(flow, grid)
        c, a, b = math.exp(h), 1.0, math.exp(-h)
        slope_weight = b - a + phi(b) * quad(lambda s: 1 / phi(s), b, a, epsabs=1e-15)[0]
        gaps.append(abs(float(plan.weights[1, 1] / VP.alpha(grid[-1])) * (c - a) / slope_weight - 1))
    assert gaps[0] < 0.02
    assert slope(sizes, gaps) > 0.8


def test_er_sdes_published_third_order_is_not_exact_for_a_parabola():
    """x_0 = s^2 on phi = s^2: the plan gives the integral, the published difference quotient does not."""
    flow = VP.probability_flow(MODEL)
    grid = VP.time_of_lam(torch.tensor([-0.9, -0.3, 0.1, 0.5], dtype=F64))
    plan = ERSDE(3, power(2.0)).plan(flow, grid)
    u = [math.exp(-v) for v in (-0.9, -0.3, 0.1, 0.5)]
    exact = u[3] ** 2 * quad(lambda s: 2 / s**3 * s**2, u[3], u[2])[0]
    past = [u[2] ** 2, u[1] ** 2, u[0] ** 2]
    got = sum(float(w) * v for w, v in zip(plan.weights[2], past, strict=True)) / float(VP.alpha(grid[-1]))
    assert got == pytest.approx(exact, rel=1e-10)
    assert ERSDE(3, power(2.0)).plan(flow, grid).weights.shape == (3, 3)
    first = (past[0] - past[1]) / (u[2] - u[1])
    moment = quad(lambda s: (s - u[2]) / s**2, u[3], u[2])[0]
    line = u[3] - u[2] + u[3] ** 2 * quad(lambda s: 1 / s**2, u[3], u[2])[0]
    published = (1 - u[3] ** 2 / u[2] ** 2) * past[0] + line * first
    published += ((u[3] - u[2]) ** 2 / 2 + moment * u[3] ** 2) * 2
    assert abs(published - exact) > 0.01 * exact


def test_annealed_langevin():
    """Algorithm 1 of Song and Ermon 2019 in VE: x + e/2 s + sqrt(e) z, e = step_size sigma^2/sigma_L^2."""
    process = sf.VE(sigma_max=10.0)
    model, grid = MIXTURE.model(process), [0.9, 0.7, 0.5]
    noise = sf.Noise(7, 6)
    x = X
    for i, t in enumerate(grid[1:]):
        size = 0.02 * (1000**t / 1000**0.5) ** 2
        for j in range(3):
            x = x + size / 2 * model.score(x, t) + math.sqrt(size) * noise.normal(CORRECTOR, 3 * i + j, (8,), F64)
    agree(run(AnnealedLangevin(steps=3, step_size=0.02), 0.0, model, grid), x)


def test_third_order_of_sde_dpm_solver_pp_by_parts():
    """The weight of the second derivative (lam - lam_0)^2/2 at eta = 1: with H = 2h,
    int_0^h 2 exp(-2(h - v)) v^2/2 dv = h^2/2 - int_0^h exp(-2(h - v)) v dv = h^2 ((1 - e^-H - H)/H^2 + 1/2)."""
    problem = VP.reverse(MODEL, 1.0)
    for h in (0.05, 0.4, 1.5):
        lam = [-0.2 - 1.7 * h, -0.2 - 0.8 * h, -0.2, -0.2 + h]
        grid = VP.time_of_lam(torch.tensor(lam, dtype=F64))
        plan = DPMSolverPP(3).plan(problem, grid)
        square = [0.0, (0.8 * h) ** 2 / 2, (1.7 * h) ** 2 / 2]
        got = sum(float(w) * v for w, v in zip(plan.weights[-1], square, strict=True)) / float(VP.alpha(grid[-1]))
        big = 2 * h
        coefficient = (1 - math.exp(-big) - big) / big**2 + 0.5
        assert got == pytest.approx(h**2 * coefficient, rel=1e-9)
        assert abs(got - h**2 * (coefficient - 1)) > 0.5 * got  # the sign as once released


def test_er_sdes_published_third_order_is_of_order_two_on_the_flow():
    """Its row is the parabola's less (u - u_-1) x_0[u, u_-1, u_-2] times the weight of the slope, on phi = u."""
    flow, x, end = flow_case()
    solver = ExponentialMultistep(3, coordinate="rho", start="singlestep", eta=0.0)
    steps, ours, published = (32, 64, 128, 256), [], []
    for n in steps:
        grid = sf.grids.logsnr(VP, n, START, END)
        plan = solver.plan(flow, grid)
        weights, u = plan.weights.clone(), [levels(t)[1] / levels(t)[0] for t in grid.tolist()]
        for i in range(2, n):
            a, b, p, q = u[i], u[i + 1], u[i - 1], u[i - 2]
            slope_weight = levels(grid[i + 1].item())[0] * (b - a + b * math.log(a / b))
            second = torch.tensor(
                [1 / ((a - p) * (a - q)), 1 / ((p - a) * (p - q)), 1 / ((q - a) * (q - p))], dtype=F64
            )
            row = plan.nfe - n + i
            columns = torch.nonzero(weights[row]).flatten()  # past the stages of the start
            assert columns.numel() == 3
            weights[row, columns] -= slope_weight * (a - p) * second
        with torch.no_grad():
            ours.append(rms(sf.solve(flow, x, plan).x - end))
            published.append(rms(sf.solve(flow, x, dataclasses.replace(plan, weights=weights)).x - end))
    assert slope(1 / np.array(steps), ours) == pytest.approx(3, abs=0.2)
    assert slope(1 / np.array(steps), published) == pytest.approx(2, abs=0.2)
