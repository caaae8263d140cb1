"""Stochastic samplers of diffusion models: laws by superposition, paths, and planted faults that both must catch.

Laws are exact: on Gaussian data every sampler is affine in the start and in each normal, so a run whose samples carry
one unit of one of them gives mean and variance of the result without sampling.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.solvers import (
    DDIM,
    DDPM,
    ERSDE,
    SEEDS,
    AncestralPredictor,
    DPMSolver,
    DPMSolverPP,
    EulerAncestral,
    ExponentialMultistep,
    NoiseScale,
    ReverseDiffusion,
    SASolver,
    UniPC,
    Window,
)
from sdeflow.solvers.ancestral import LearnedVariance
from tests.diffusion_cases import (
    DATA,
    END,
    MEAN,
    MODEL,
    OWN_ETA,
    PATHS,
    READS_ETA,
    START,
    VARIANCE,
    VP,
    X,
    blend,
    distance,
    label,
    law_after,
    law_errors,
    marginal,
    power,
    rising,
    run,
)
from tests.exact import F64, NumpyVP, levels, random_mixture, slope

# ---- exact laws

CASES = [
    *((s, eta, weak) for s, weak in READS_ETA[:4] for eta in (0.5, 1.0, rising)),
    *((s, rising, weak) for s, weak in READS_ETA[4:]),
    *((s, 0.0, weak) for s, weak in OWN_ETA),
]


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


# ---- one path: 20 and 40 steps


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
