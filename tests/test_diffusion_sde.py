"""Stochastic samplers of diffusion models: laws by superposition, papers' formulas, paths, limits and planted faults.

Laws are exact: on Gaussian data every sampler is affine in the start and in each normal, so a run whose samples carry
one unit of one of them gives mean and variance of the result without sampling.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

import sdeflow as sf
from sdeflow.noise import CORRECTOR
from sdeflow.solvers import (
    CATALOGUE,
    DDIM,
    DDPM,
    ERSDE,
    SEEDS,
    AncestralPredictor,
    AnnealedLangevin,
    DPMSolver,
    DPMSolverPP,
    EulerAncestral,
    EulerMaruyama,
    ExponentialMultistep,
    Langevin,
    NoiseScale,
    OwnEta,
    PredictorCorrector,
    ReverseDiffusion,
    SASolver,
    UniPC,
    Window,
    by_name,
)  # fmt: skip
from sdeflow.solvers.ancestral import LearnedVariance
from sdeflow.solvers.catalogue import SAMPLERS
from tests.exact import F64, NumpyVP, TableNoise, random_mixture, rms, slope, unit_increments
from tests.test_orders import flow_case

VP = sf.VP()
START, END = 0.8, 0.05
# three laws at once: a component each
MEAN, VARIANCE = torch.tensor([0.7, -0.4, 1.0], dtype=F64), torch.tensor([0.3, 1.5, 0.05], dtype=F64)
DATA = sf.problems.Gaussian(MEAN, VARIANCE)
MIXTURE = sf.problems.GaussianMixture(*random_mixture(5, 8, seed=4, spread=1.2))
MODEL = MIXTURE.model(VP)
X = torch.randn(6, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
# the grid of the formulas: four uneven steps
GRID = torch.tensor([0.8, 0.6, 0.35, 0.2, 0.1], dtype=F64)


def rising(t):
    """An eta that depends on t."""
    return 0.5 + t


def blend(x, t):
    """A learned variance that does not depend on the state, so that laws superpose."""
    return torch.tensor(0.4, dtype=x.dtype)


def power(exponent):
    """The noise scale x^exponent, that is eta^2 = exponent - 1."""
    return lambda x: x**exponent


# ---- exact laws


def levels(t):
    """(alpha, sigma, lam) of VP at t, as numbers, by the closed form."""
    log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
    return alpha, sigma, math.log(alpha / sigma)


def marginal(process, t):
    """(mean, variance) of the data noised to t."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


def law_after(monkeypatch, solver, problem, grid, start):
    """Exact (mean, variance) of what `solver` makes of the law `start`: one unit of noise, or of start, a sample."""
    count = at = 0

    def counting(nodes):
        nonlocal count
        count += nodes
        return torch.zeros(nodes, 1, 3, dtype=F64)

    def units(nodes):
        nonlocal at
        table = torch.zeros(nodes, count + 2, 3, dtype=F64)
        table[torch.arange(nodes), at + torch.arange(nodes)] = 1.0
        at += nodes
        return table

    with monkeypatch.context() as patch, torch.no_grad():
        TableNoise(patch, counting)
        sf.solve(problem, torch.zeros(1, 3, dtype=F64), solver, grid=grid, seed=0)
        TableNoise(patch, units)
        x = torch.zeros(count + 2, 3, dtype=F64)
        x[-1] = 1.0
        y = sf.solve(problem, x, solver, grid=grid, seed=0).x
    offset = y[count]
    gain, columns = y[-1] - offset, y[:count] - offset
    return gain * start[0] + offset, gain**2 * start[1] + columns.square().sum(0)


def distance(got, want):
    """2-Wasserstein distance of the three normal laws, in quadrature."""
    return float(torch.hypot(got[0] - want[0], got[1].sqrt() - want[1].sqrt()).norm())


def law_errors(monkeypatch, solver, eta, steps, process=VP, span=(START, END), grid=sf.grids.logsnr):
    """Distances of the end's law from the exact marginal, started from the exact marginal."""
    problem = process.reverse(DATA.model(process), eta)
    start, end = (marginal(process, t) for t in span)
    return [
        distance(law_after(monkeypatch, solver, problem, grid(process, n, *span), start), end) for n in steps
    ]  # fmt: skip


READS_ETA = [
    (SEEDS(1), 1), (SEEDS(2), 2), (SEEDS(3), 2), (ReverseDiffusion(), 1),
    (DPMSolverPP(1), 1), (DPMSolverPP(2), 2), (DPMSolverPP(3), 2), (DPMSolver(2, True), 2), (UniPC(2), 2),
]  # fmt: skip
OWN_ETA = [
    (DDPM(), 1), (DDPM("forward"), 1), (DDPM(blend), 1), (AncestralPredictor(), 1),
    (EulerAncestral(), 1), (EulerAncestral(0.5), 1), (EulerAncestral(1.5), 1),
    (SASolver(), 2), (SASolver(1, 0, 1.0), 1), (SASolver(1, 2, 1.0), 2), (SASolver(2, 0, 0.5), 2),
    (SASolver(2, 2, 0.5), 2), (SASolver(3, 0, rising), 2), (SASolver(3, 4, 1.0), 2), (SASolver(4, 5, rising), 2),
    (ERSDE(1), 1), (ERSDE(2), 2), (ERSDE(2, power(2.0)), 2), (ERSDE(3, power(1.25)), 2), (ERSDE(3, power(2.0)), 2),
]  # fmt: skip
CASES = [
    *((s, eta, weak) for s, weak in READS_ETA[:4] for eta in (0.5, 1.0, rising)),
    *((s, rising, weak) for s, weak in READS_ETA[4:]),
    *((s, 0.0, weak) for s, weak in OWN_ETA),
]


def label(value):
    if isinstance(value, sf.solvers.Solver):
        own = getattr(value, "eta", None)
        return value.name if own is None else f"{value.name}-{label(own)}"
    if isinstance(value, OwnEta):
        return type(value).__name__
    return getattr(value, "__name__", str(value))


def steps_of(solver):
    """Where the leading term of the error rules: high orders on Gaussian data leave much to the next ones."""
    if isinstance(solver, ExponentialMultistep) and solver.order + solver.corrector > 2:
        return (256, 512, 1024, 2048)
    return (128, 256, 512, 1024) if isinstance(solver, SEEDS) else (64, 128, 256, 512)


@pytest.mark.parametrize(("solver", "eta", "weak"), CASES, ids=label)
def test_weak_orders(monkeypatch, solver, eta, weak):
    steps = steps_of(solver)
    assert slope(1 / np.array(steps), law_errors(monkeypatch, solver, eta, steps)) == pytest.approx(weak, abs=0.2)


def test_er_sde_of_order_three_with_the_papers_scale(monkeypatch):
    """Its eta^2 is below 0.1 here: down to 512 steps the third-order error of the flow is the larger part."""
    steps = (64, 128, 256, 512)
    errors = law_errors(monkeypatch, ERSDE(3), 0.0, steps)
    assert slope(1 / np.array(steps), errors) > 1.8
    assert errors[2] < 1e-6 < 5e-5 < law_errors(monkeypatch, ERSDE(2), 0.0, (256,))[0]


@pytest.mark.parametrize(("solver", "weak"), READS_ETA, ids=label)
def test_the_law_at_the_end_does_not_depend_on_eta(monkeypatch, solver, weak):
    """The spread over eta falls as the error does; four times the steps, 4 or 16 times closer."""

    def spread(n):
        grid, start = sf.grids.logsnr(VP, n, START, END), marginal(VP, START)
        laws = [
            law_after(monkeypatch, solver, VP.reverse(DATA.model(VP), eta), grid, start)
            for eta in (0.0, 0.5, 1.0, 1.5, rising)
        ]
        return max(distance(a, b) for a, b in itertools.combinations(laws, 2))

    coarse, fine = spread(64), spread(256)
    assert fine < (0.001 if weak == 2 else 0.05)
    assert coarse / fine > 0.8 * 4**weak


def test_own_stochasticities_end_in_one_law(monkeypatch):
    """tau, phi, ancestral eta and kernels' variances: one marginal, though the step's noise differs by half."""
    solvers = [solver for solver, _ in OWN_ETA]
    errors = [law_errors(monkeypatch, solver, 0.0, (256,))[0] for solver in solvers]
    assert max(errors) < 0.025
    flow = VP.probability_flow(DATA.model(VP))
    grid = sf.grids.logsnr(VP, 16, START, END)
    noise = [float(s.plan(flow, grid).noise[8]) for s in solvers if hasattr(s, "plan")]
    assert max(noise) > 1.5 * min(v for v in noise if v > 0)


@pytest.mark.parametrize(
    "process", [sf.VE(), sf.EDM(), sf.RectifiedFlow(), sf.SubVP(), sf.CosineVP()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(
    ("solver", "eta"),
    [(SEEDS(2), 1.0), (ReverseDiffusion(), 1.0), (DDPM("forward"), 0.0), (DDPM(blend), 0.0),
     (AncestralPredictor(), 0.0), (EulerAncestral(), 0.0), (SASolver(), 0.0), (ERSDE(3), 0.0)],
    ids=label,
)  # fmt: skip
def test_any_gaussian_process(monkeypatch, process, solver, eta):
    """Between the same levels of lam, the law in x/alpha: the error falls with the steps."""
    span = [float(t) for t in process.time_of_lam(torch.tensor([-2.0, 2.0], dtype=F64))]
    errors = law_errors(monkeypatch, solver, eta, (64, 256), process, span)
    assert errors[0] / errors[1] > 3
    assert errors[1] < 0.02 * float(process.alpha(span[1]))


# ---- eta as a function of time: moments of the reverse equation from a law that is no marginal


def equation_moments(eta, jumps=()):
    """(mean, variance) at END from (0.5, 0.8) at START of the reverse equation with eta(t), by scipy."""
    vp = NumpyVP()
    law_mean, law_variance = MEAN.numpy(), VARIANCE.numpy()

    def rhs(t, state):
        beta, a = vp.beta(t), vp.alpha(t)
        spread = a**2 * law_variance + vp.sigma(t) ** 2
        pull = 0.5 * (1 + eta(t) ** 2) * beta / spread
        drift = -0.5 * beta * state[:3] + pull * (state[:3] - a * law_mean)
        return np.concatenate([drift, 2 * (pull - 0.5 * beta) * state[3:] - eta(t) ** 2 * beta])

    state = np.array([0.5] * 3 + [0.8] * 3)
    for span in itertools.pairwise([START, *jumps, END]):
        inside = (span[0] - 1e-12, span[1] + 1e-12)
        state = solve_ivp(rhs, inside, state, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return torch.tensor(state[:3]), torch.tensor(state[3:])


def equation_errors(monkeypatch, solver, eta, exact, steps):
    problem, start = VP.reverse(DATA.model(VP), eta), (torch.full((3,), 0.5), torch.full((3,), 0.8))
    grids = [sf.grids.logsnr(VP, n, START, END) for n in steps]
    return [distance(law_after(monkeypatch, solver, problem, grid, start), exact) for grid in grids]


@pytest.mark.parametrize(("solver", "weak"), READS_ETA, ids=label)
def test_an_eta_of_time_is_read(monkeypatch, solver, weak):
    steps = (128, 256, 512, 1024)
    errors = equation_errors(monkeypatch, solver, rising, equation_moments(rising), steps)
    assert slope(1 / np.array(steps), errors) > weak - 0.2
    wrong = equation_errors(monkeypatch, solver, 0.8, equation_moments(rising), steps)
    assert wrong[-1] > 10 * errors[-1]  # the control: another eta ends elsewhere
    assert slope(1 / np.array(steps), wrong) < 0.5


def paper_scale(t):
    """eta of phi(x) = x (exp(x^0.3) + 10) by its derivative on paper, under VP."""
    x = math.exp(-levels(float(t))[2])
    return math.sqrt(0.3 * x**0.3 * math.exp(x**0.3) / (math.exp(x**0.3) + 10))


def in_window(t):
    return 1.0 if 0.2 <= t <= 0.8 else 0.0


@pytest.mark.parametrize(
    ("solver", "eta", "jumps"),
    [
        (SASolver(2, 2, rising), rising, ()),
        (SASolver(), in_window, (0.2,)),
        (ERSDE(2), paper_scale, ()),
        (ERSDE(3), paper_scale, ()),
        (ERSDE(2, power(1.25)), lambda t: 0.5, ()),
    ],
    ids=["tau(t)", "window", "phi-2", "phi-3", "power"],
)
def test_own_stochasticities_are_the_eta_they_say(monkeypatch, solver, eta, jumps):
    steps = (128, 256, 512, 1024)
    errors = equation_errors(monkeypatch, solver, 0.0, equation_moments(eta, jumps), steps)
    assert slope(1 / np.array(steps), errors) > 1.75


def test_the_exact_mean_of_a_window_saves_its_order(monkeypatch):
    """The control: five points of a step function lose the order where they miss the jump."""
    steps = (128, 256, 512, 1024)
    exact = equation_moments(in_window, (0.2,))

    def windowed(t):
        return ((t >= 0.2) & (t <= 0.8)).to(F64)

    own = equation_errors(monkeypatch, SASolver(2, 2), 0.0, exact, steps)
    sampled = equation_errors(monkeypatch, SASolver(2, 2, windowed), 0.0, exact, steps)
    assert slope(1 / np.array(steps), own) > 1.8
    assert sampled[-1] > 8 * own[-1]
    for t in np.linspace(0.1, 0.9, 7):
        t = torch.tensor(t)
        assert float(Window().at(VP, t)) == float(windowed(t))
        assert float(NoiseScale().at(VP, t)) == pytest.approx(paper_scale(t), rel=1e-10)


# ---- eta = 0


@pytest.mark.parametrize(
    ("solver", "other"),
    [
        (SEEDS(1), DPMSolver(1)),
        (SEEDS(2), DPMSolver(2, second="midpoint")),
        (SEEDS(3), DPMSolver(3)),
        (EulerAncestral(0.0), DDIM()),
        (SASolver(3, 0, 0.0), DPMSolverPP(3)),
        (SASolver(3, 4, 0.0), UniPC(3, "exact")),
        (SASolver(2, 0, lambda t: 0 * t), DPMSolverPP(2)),
        (SASolver(3, 4, Window(value=0.0)), UniPC(3, "exact")),
        (ERSDE(1, power(1.0)), DDIM()),
        (ERSDE(2, power(1.0)), ExponentialMultistep(2, coordinate="rho")),
        (ERSDE(3, lambda x: x), ExponentialMultistep(3, coordinate="rho")),
    ],
    ids=label,
)
def test_without_noise_it_is_the_flows_method(solver, other):
    flow = VP.probability_flow(MODEL)
    for span in ((0.9, 0.01), (1.0, 1e-3)):
        with torch.no_grad():
            got, want = (sf.solve(flow, X, s, steps=12, t_span=span, seed=1).x for s in (solver, other))
        assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max())


def test_reverse_diffusion_on_the_flow_is_its_papers_flow_and_of_order_one(monkeypatch):
    """x - f + 1/2 G^2 s with the kernel's f and G: no other method of the library, so by its law."""
    steps = (64, 128, 256, 512)
    errors = law_errors(monkeypatch, ReverseDiffusion(), 0.0, steps)
    assert slope(1 / np.array(steps), errors) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("order", "weak"), [(1, 1), (2, 2), (3, 3)])
def test_seeds_on_the_flow_has_its_order(monkeypatch, order, weak):
    steps = (16, 32, 64, 128)
    assert slope(1 / np.array(steps), law_errors(monkeypatch, SEEDS(order), 0.0, steps)) == pytest.approx(weak, abs=0.2)


# ---- the papers' formulas, in plain Python on numbers


def run(solver, eta=0.0, model=MODEL, grid=GRID, x=X, seed=7):
    process = model.sde
    with torch.no_grad():
        return sf.solve(process.reverse(model, eta), x, solver, grid=grid, seed=seed).x


def agree(got, want, tolerance=1e-10):
    assert float((got - want).abs().max()) < tolerance * float(want.abs().max())


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


# ---- annealed Langevin: no path, no order in the grid


def test_annealed_langevin_mixes_to_the_last_level_with_first_order_in_its_step_size(monkeypatch):
    """e/(4w) of the variance w, once `steps` have mixed; whatever the problem's eta."""
    process, grid = sf.VE(sigma_max=10.0), torch.tensor([0.6, 0.55, 0.5], dtype=F64)
    start, end = marginal(process, 0.6), marginal(process, 0.5)
    sizes, errors = (0.08, 0.04, 0.02, 0.01), []
    for size in sizes:
        solver = AnnealedLangevin(steps=int(20 / size), step_size=size)
        mean, variance = law_after(monkeypatch, solver, process.reverse(DATA.model(process), 0.0), grid, start)
        assert float((mean - end[0]).abs().max()) < 1e-3
        errors.append(float((variance / end[1] - 1)[2]))
        assert errors[-1] == pytest.approx(size / (4 * float(end[1][2])), rel=0.2)
    assert slope(sizes, errors) == pytest.approx(1, abs=0.2)
    few = AnnealedLangevin(steps=4, step_size=0.01)  # the control: unmixed
    assert distance(law_after(monkeypatch, few, process.reverse(DATA.model(process)), grid, start), end) > 0.2
    solver = AnnealedLangevin(steps=5, step_size=0.01)
    model = MIXTURE.model(process)
    assert torch.equal(run(solver, 0.0, model, grid), run(solver, 1.0, model, grid))


def test_annealed_langevin_is_one_chain_in_x_over_alpha():
    """On the same levels every process gives the same samples."""
    lam, out = torch.tensor([-2.0, -1.0, 0.0, 1.0], dtype=F64), []
    for process in (VP, sf.VE(sigma_max=10.0), sf.RectifiedFlow()):
        grid = process.time_of_lam(lam)
        alpha = process.alpha(grid)
        model = MIXTURE.model(process)
        got = run(AnnealedLangevin(steps=4, step_size=0.1), 0.0, model, grid, 7 * float(alpha[0]) * X)
        out.append(got / alpha[-1])
    for y in out[1:]:
        torch.testing.assert_close(y, out[0], rtol=1e-9, atol=1e-9)


# ---- Langevin over the batch


def test_langevin_over_the_batch():
    """Song et al. 2021, algorithms 4 and 5, as published: the ratio of the norms' means."""
    solver = PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.2, size="batch"))
    alone = run(ReverseDiffusion(), 1.0, grid=[0.6, 0.5])
    z = sf.Noise(7, 6).normal(CORRECTOR, 0, (8,), F64)
    score = MODEL.score(alone, 0.5)
    size = 2 * (0.2 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    agree(run(solver, 1.0, grid=[0.6, 0.5]), alone + size * score + torch.sqrt(2 * size) * z)


def test_langevin_over_the_batch_couples_the_samples_and_the_others_do_not():
    def first(size, rows):
        solver = PredictorCorrector(EulerMaruyama(), Langevin(size=size))
        return sf.sample(MODEL, rows, shape=(8,), solver=solver, steps=4, eta=1.0, seed=0, dtype=F64).x[:4]

    assert float((first("batch", 4) - first("batch", 16)).abs().max()) > 1e-3
    for size in ("level", "sample"):
        torch.testing.assert_close(first(size, 4), first(size, 16), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="size as one of 'level', 'sample', 'batch', got 'mean'"):
        Langevin(size="mean")


def test_langevin_over_the_batch_is_near_the_level_in_few_dimensions_too():
    """At the level of noise |z| = sigma |s| up to 1/sqrt(dim), and up to 1/sqrt(dim batch) on average over a batch."""
    for dim in (10, 200):
        model = sf.problems.Gaussian(torch.zeros(dim), torch.full((dim,), 1e-6)).model(VP)
        x = VP.prior_sample((64, dim), seed=0, dtype=F64)
        level, batch, sample = (  # DDPM's steps are exact for data at a point
            run(PredictorCorrector(DDPM(), Langevin(size=size)), 1.0, model, [1.0, 0.9], x)
            for size in ("level", "batch", "sample")
        )
        assert float((batch - level).norm()) < 0.5 * float((sample - level).norm()) < 0.1 * float(level.norm())


@pytest.mark.parametrize("predictor", [ReverseDiffusion(), AncestralPredictor()], ids=label)
def test_predictors_with_a_corrector(monkeypatch, predictor):
    """Both serve in predictor-corrector sampling, and a corrector at the level mends a coarse predictor's law."""
    eta = 1.0 if isinstance(predictor, ReverseDiffusion) else 0.0
    alone = law_errors(monkeypatch, predictor, eta, (10,))[0]
    mended = law_errors(monkeypatch, PredictorCorrector(predictor, Langevin(snr=0.2, steps=4)), eta, (10,))[0]
    assert mended < 0.65 * alone


# ---- one path: 20 and 40 steps


PATHS = [
    *[(SEEDS(k), eta) for k in (1, 2, 3) for eta in (1.0, rising)],
    (ReverseDiffusion(), 1.0), (ReverseDiffusion(), rising),
    (DDPM(), 0.0), (DDPM("forward"), 0.0), (DDPM(lambda x, t: torch.sigmoid(x)), 0.0), (AncestralPredictor(), 0.0),
    (EulerAncestral(), 0.0), (EulerAncestral(0.5), 0.0),
    (SASolver(), 0.0), (SASolver(2, 2, rising), 0.0), (SASolver(3, 4, 1.0), 0.0),
    (ERSDE(1), 0.0), (ERSDE(2), 0.0), (ERSDE(3), 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "eta"), PATHS, ids=label)
@pytest.mark.parametrize("grid", [sf.grids.logsnr, sf.grids.quadratic], ids=lambda g: g.__name__)
def test_one_seed_is_one_path_at_any_number_of_steps(solver, eta, grid):
    """Medians over 200 samples of a mixture: n and 2n steps differ with strong order 1; another seed does not."""
    model = sf.problems.GaussianMixture(*random_mixture(3, 2, seed=6, spread=0.5)).model(VP)
    x = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * levels(START)[1]
    steps = (20, 40, 80, 160, 320)

    def gaps(seeds):
        ends = [run(solver, eta, model, grid(VP, n, START, END), x, seed) for n, seed in zip(steps, seeds, strict=True)]
        return [float((a - b).norm(dim=1).median()) for a, b in itertools.pairwise(ends)]

    same, other = gaps([3] * 5), gaps(range(5))
    assert 0.8 < slope(1 / np.array(steps[:-1]), same) < 1.35  # the coarse end of stages and long stencils is steeper
    assert same[0] < 0.35 < 1 < min(other)


# ---- planted faults


def mutant(change):
    """A class of the solver's plan, changed."""

    def of(solver):
        class Changed(type(solver)):
            def plan(self, problem, grid):
                return change(super().plan(problem, grid), problem, grid)

        return Changed(**{f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)})

    return of


@mutant
def own_draw_for_the_result(plan, problem, grid):
    """SEEDS whose result has a normal of its own, of the right variance, instead of the stages'."""
    noise = plan.noise.clone()
    last = torch.tensor([*(torch.diff(plan.step_of_row) > 0).tolist(), True])
    noise[last, -1] = torch.linalg.vector_norm(plan.noise[last], dim=1)
    noise[last, :-1] = 0.0
    return dataclasses.replace(plan, noise=noise)


@mutant
def variance_for_deviation(plan, problem, grid):
    """The noise's variance where its root belongs."""
    return dataclasses.replace(plan, noise=plan.noise**2)


@mutant
def flows_drift(plan, problem, grid):
    """Without the factor 1 + eta^2 of the prediction."""
    return dataclasses.replace(plan, weights=plan.weights / (1 + problem.eta**2))


@mutant
def noise_without_stepping_down(plan, problem, grid):
    """Euler to the level itself, then the ancestral noise on top."""
    process = problem.gaussian
    ratio = process.sigma(grid[1:]) / process.sigma(grid[:-1])
    weights = (process.alpha(grid[1:]) - process.alpha(grid[:-1]) * ratio)[:, None]
    return dataclasses.replace(plan, ratio=ratio, weights=weights)


@mutant
def no_decay(plan, problem, grid):
    """SA-Solver without exp(-int tau^2) of the state."""
    sigma = problem.gaussian.sigma(grid)
    return dataclasses.replace(plan, ratio=sigma[1:] / sigma[:-1])


@mutant
def noise_of_the_ratio(plan, problem, grid):
    """ER-SDE's noise with phi's ratio instead of its square under the root."""
    process = problem.gaussian
    u = process.sigma(grid) / process.alpha(grid)
    gain = plan.ratio * process.alpha(grid[:-1]) / process.alpha(grid[1:])
    noise = process.alpha(grid[1:]) * torch.sqrt(torch.clamp(u[1:] ** 2 - u[:-1] ** 2 * gain**3, min=0.0))
    return dataclasses.replace(plan, noise=noise)


class WholeVariance(LearnedVariance):
    """A learned variance whose logarithm is not halved."""

    def stepper(self, problem, x, grid, noise):
        run = super().stepper(problem, x, grid, noise)
        plan = self._fixed.plan(problem, grid)
        run._low = [a + b for a, b in zip(run._low, torch.log(plan.noise).tolist(), strict=True)]
        run._rise = [2 * v for v in run._rise]
        return run


FAULTS = [
    (own_draw_for_the_result(SEEDS(2)), 1.0, 1.3),
    (own_draw_for_the_result(SEEDS(3)), 1.0, 1.3),
    (variance_for_deviation(SEEDS(1)), 1.0, 0.4),
    (flows_drift(SEEDS(2)), 0.5, 0.4),
    (flows_drift(ReverseDiffusion()), 0.5, 0.4),
    (variance_for_deviation(DDPM("forward")), 0.0, 0.4),
    (variance_for_deviation(DDPM()), 0.0, 0.4),
    (WholeVariance(blend), 0.0, 0.4),
    (noise_without_stepping_down(EulerAncestral()), 0.0, 0.4),
    (no_decay(SASolver()), 0.0, 0.4),
    (noise_of_the_ratio(ERSDE(2)), 0.0, 0.4),
]


@pytest.mark.parametrize(("solver", "eta", "most"), FAULTS, ids=lambda v: getattr(v, "name", str(v)))
def test_the_laws_catch_the_fault(monkeypatch, solver, eta, most):
    steps = (64, 128, 256, 512)
    assert slope(1 / np.array(steps), law_errors(monkeypatch, solver, eta, steps)) < most


def test_the_paths_catch_noise_without_a_path():
    """Normals of their own at every number of steps: the law holds, the path does not refine."""

    class Unrelated(EulerAncestral):
        """Draws by number of the step, as samplers without a path do."""

        def stepper(self, problem, x, grid, noise):
            noise = sf.Noise(noise.seed + grid.numel(), x.shape[0])
            return super().stepper(problem, x, grid, noise)

    model = sf.problems.GaussianMixture(*random_mixture(3, 2, seed=6, spread=0.5)).model(VP)
    x = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    ends = [run(Unrelated(), 0.0, model, sf.grids.logsnr(VP, n, START, END), x) for n in (20, 40, 80)]
    assert min(float((a - b).norm(dim=1).median()) for a, b in itertools.pairwise(ends)) > 1


# ---- float32, singular ends, refusals


@pytest.mark.parametrize(
    ("solver", "eta"),
    [(SASolver(), 0.0), (SASolver(3, 4, 1.0), 0.0), (SASolver(4, 5, 1.0), 0.0), (ERSDE(3), 0.0), (SEEDS(3), 1.0),
     (DDPM("forward"), 0.0), (EulerAncestral(), 0.0), (ReverseDiffusion(), 1.0)],
    ids=label,
)  # fmt: skip
def test_float32_at_800_steps(solver, eta):
    """Weights of absolute lam lose two digits at order 3 and all at order 4 here; by quadrature none."""
    grid = sf.grids.logsnr(VP, 800, 0.9, 0.01)
    exact, single = (run(solver, eta, grid=grid, x=x) for x in (X, X.float()))
    assert single.dtype == torch.float32
    assert float((single.to(F64) - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeds_to_sigma_zero_returns_the_prediction_of_the_data(order):
    problem = VP.reverse(MODEL, 1.0)
    plan = SEEDS(order).plan(problem, torch.tensor([0.6, 0.2, 0.0], dtype=F64))
    assert plan.nfe == order + 1
    assert float(plan.noise[-1].abs().max()) == 0.0
    y = run(SEEDS(order), 1.0, grid=[0.2, 0.0])
    agree(y, MODEL.x0(X, 0.2))


@pytest.mark.parametrize("solver", [SASolver(), ERSDE(3), EulerAncestral(), SASolver(3, 4, 1.0)], ids=label)
def test_infinite_levels_at_both_ends(solver):
    """From alpha = 0 to sigma = 0: the rectified flow's whole span."""
    process = sf.RectifiedFlow()
    model = sf.problems.Gaussian(MEAN, VARIANCE).model(process)
    flow = process.probability_flow(model)
    with torch.no_grad():
        x = torch.randn(4000, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
        y = sf.solve(flow, x, solver, grid=torch.linspace(1, 0, 101, dtype=F64), seed=0).x
    # four standard errors of 4000 samples, and what order 1 leaves of the narrowest variance
    assert float((y.mean(0) - MEAN).abs().max()) < 0.08 + 0.02
    assert float((y.var(0) / VARIANCE - 1).abs().max()) < 0.09 + 0.15


REFUSED = [
    (lambda: run(EulerAncestral(), 0.5), "EulerAncestral takes its stochasticity as"),
    (lambda: run(SASolver(), 1.0), "brings its own eta = Window"),
    (lambda: run(SASolver(tau=0.5), 1.0), r"brings its own eta = 0.5: .* or of that eta, got eta = 1.0"),
    (lambda: run(SASolver(tau=rising), lambda t: 0 * t), "brings its own eta = <function"),
    (lambda: run(ERSDE(), 1.0), "brings its own eta = NoiseScale"),
    (lambda: run(DDPM("forward"), 0.5), "brings its own eta = 1"),
    (lambda: run(DDPM(blend), 0.5), "brings its own eta = 1"),
    (lambda: run(AncestralPredictor(), 0.5), "brings its own eta = 1"),
    (lambda: run(ERSDE(2, lambda x: x**0.5)), "not decreasing"),
    (lambda: run(ERSDE(2, lambda x: -x)), "not decreasing"),
    (lambda: SEEDS(4), "order 1, 2 or 3"),
    (lambda: SEEDS(True), "order as a whole number, got True"),
    (lambda: ERSDE(4), "order 1, 2 or 3"),
    (lambda: SASolver(5), "order one of"),
    (lambda: SASolver(3, 1), "2 to 5 evaluations, or 0"),
    (lambda: SASolver(3, 6), "2 to 5 evaluations, or 0"),
    (lambda: SASolver(tau=-1.0), "tau >= 0"),
    (lambda: EulerAncestral(-0.1), "finite eta >= 0"),
    (lambda: EulerAncestral(math.inf), "finite eta >= 0"),
    (lambda: Window(0.8, 0.2), "low < high"),
    (lambda: Window(value=-1.0), "value >= 0"),
    (lambda: AnnealedLangevin(steps=0), "steps >= 1"),
    (lambda: AnnealedLangevin(step_size=0.0), "step_size > 0"),
    (lambda: run(AnnealedLangevin(step_size=0.5)), "the steps would grow"),
    (lambda: run(AnnealedLangevin(), grid=[0.5, 0.0]), "not finite at sigma = 0"),
    *(
        (lambda s=s: run(s, grid=[0.1, 0.3]), f"{s.name.split('(')[0]}.* runs from noise to data: .* 0.1 to 0.3")
        for s in (SASolver(), ERSDE(), EulerAncestral(), DDIM(0.5), DDPM(), DDPM("forward"), DDPM(blend))
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_langevin_predictor_would_repeat_the_correctors_numbers():
    for predictor in (AnnealedLangevin(), PredictorCorrector(EulerMaruyama())):
        with pytest.raises(TypeError, match="takes the corrector's own numbers"):
            PredictorCorrector(predictor)


@pytest.mark.parametrize(
    "solver",
    [SEEDS(2), ReverseDiffusion(), AncestralPredictor(), EulerAncestral(), SASolver(), ERSDE(), DDPM(blend),
     AnnealedLangevin(), DDPM("forward")],
    ids=label,
)  # fmt: skip
def test_they_need_a_gaussian_process(solver):
    class Line(sf.ODE):
        def drift(self, x, t):
            return x

    with pytest.raises(ValueError, match="transition view"):
        sf.solve(Line(), X, solver, steps=2)


@pytest.mark.parametrize(
    ("solver", "eta"), [(SEEDS(3), 1.0), (SASolver(), 0.0), (ERSDE(), 0.0), (EulerAncestral(), 0.0)], ids=label
)
def test_plans_of_them_are_saved_and_loaded(tmp_path, solver, eta):
    problem = VP.reverse(MODEL, eta)
    plan = solver.plan(problem, GRID)
    plan.save(tmp_path / "plan.json")
    with torch.no_grad():
        ends = [sf.solve(problem, X, p, seed=7).x for p in (plan, sf.Plan.load(tmp_path / "plan.json"))]
    assert torch.equal(*ends)
    assert torch.equal(ends[0], run(solver, eta))


# ---- the rows of the catalogue


WEAK = {solver.name: weak for solver, weak in [*READS_ETA, *OWN_ETA]}


@pytest.mark.parametrize("row", SAMPLERS, ids=lambda row: row.name)
def test_the_rows_of_samplers(row):
    """The weak orders declared are those measured above; calls are counted by the network."""
    solver = row.make()
    assert (solver.name, solver.view, solver.pair) == (row.name, row.view, None)
    assert row.weak_order == WEAK.get(row.name)
    assert row.strong_order == (1 if row.name in WEAK else None)
    assert any(solver == path for path, _ in PATHS) == (row.strong_order is not None)
    model = sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(VP)
    with torch.no_grad():
        end = sf.solve(VP.probability_flow(model), torch.randn(3, 2), solver, steps=6, seed=0)
    assert model.nfe == end.stats.nfe == 6 * row.nfe_per_step
    assert solver.draws_noise(VP.probability_flow(model)) == (row.noise == ("own",))
    assert by_name(row.name) is row
    if row.order is not None and not isinstance(solver, EulerAncestral):
        assert solver.order + bool(getattr(solver, "corrector", 0)) == row.order


def test_names_of_all_rows_are_unique():
    names = [row.name for row in CATALOGUE]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"expected one of Euler, .*SEEDS\(2\)"):
        by_name("SEED")


def test_repetitions_of_a_restart_draw_noise_of_their_own():
    """Churned steps down, 8 times: with one noise for all the variance was 1.24. 5 standard errors, fixed seed."""
    process = sf.EDM()
    model = sf.problems.Gaussian([0.0], 1.0).model(process)
    once = sf.solvers.EDMHeun(s_churn=40)
    often = sf.solvers.Restart((sf.solvers.RestartInterval(0.3, 2.0, 8, 8),), once)
    n = 4000
    variances = [
        float(sf.sample(model, n, shape=(1,), solver=s, steps=40, seed=0, dtype=torch.float64).x.var())
        for s in (once, often)
    ]
    assert abs(variances[1] - variances[0]) < 5 * math.sqrt(2 * 2 / n)
