"""The samplers of the field, by formulas of their papers written out here, and laws that all of them obey."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad

import sdeflow as sf
from sdeflow.solvers import (
    DEIS,
    DPM2,
    LMS,
    DPMSolver,
    DPMSolverPP,
    EDMHeun,
    ExponentialMultistep,
    GaussianSplit,
    InVariable,
    UniPC,
)  # fmt: skip
from sdeflow.solvers.catalogue import FAMILY
from tests.exact import F64, levels, random_mixture, unit_increments
from tests.test_orders import half_second_difference

VP = sf.VP()
MIXTURE = sf.problems.GaussianMixture(*random_mixture(5, 8, seed=4, spread=1.2))
MODEL = MIXTURE.model(VP)
FLOW = VP.probability_flow(MODEL)
X = torch.randn(6, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
GRID = sf.grids.power(VP, 12)


def time_at(lam):
    """The time of VP at lam, by the quadratic's root."""
    log_alpha = -0.5 * math.log1p(math.exp(-2 * lam))
    b = 0.05
    return (-b + math.sqrt(b**2 - 19.9 * log_alpha)) / (0.5 * 19.9)


def run(solver):
    with torch.no_grad():
        return sf.solve(FLOW, X, solver, grid=GRID).x


def agree(got, want):
    assert float((got - want).abs().max()) < 1e-9 * float(want.abs().max())


# ---- the papers' formulas


def dpm_solver(order):
    """DPM-Solver-2 (r = 1/2) and -3 (r1 = 1/3, r2 = 2/3), single steps in noise prediction (Lu et al. 2022)."""
    x = X
    ts = GRID.tolist()
    for s, t in itertools.pairwise(ts):
        a0, _, l0 = levels(s)
        a1, s1, l1 = levels(t)
        h = l1 - l0
        e0 = MODEL.eps(x, s)
        if order == 2:
            m = time_at(l0 + h / 2)
            am, sm, _ = levels(m)
            u = am / a0 * x - sm * math.expm1(h / 2) * e0
            x = a1 / a0 * x - s1 * math.expm1(h) * MODEL.eps(u, m)
            continue
        r1, r2 = 1 / 3, 2 / 3
        t1, t2 = time_at(l0 + r1 * h), time_at(l0 + r2 * h)
        (am, sm, _), (an, sn, _) = levels(t1), levels(t2)
        u = am / a0 * x - sm * math.expm1(r1 * h) * e0
        d1 = MODEL.eps(u, t1) - e0
        u = an / a0 * x - sn * math.expm1(r2 * h) * e0 - sn * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = MODEL.eps(u, t2) - e0
        x = a1 / a0 * x - s1 * math.expm1(h) * e0 - s1 / r2 * (math.expm1(h) / h - 1) * d2
    return x


def test_dpm_solver():
    agree(run(DPMSolver(2, second="midpoint")), dpm_solver(2))
    agree(run(DPM2()), dpm_solver(2))
    agree(run(DPMSolver(3)), dpm_solver(3))


def test_dpm_solver_pp_2m_and_2s():
    """(Lu et al. 2022, DPM-Solver++, algorithms 1 and 2.)"""
    ts, x, past = GRID.tolist(), X, None
    for i, (s, t) in enumerate(itertools.pairwise(ts)):
        _, s0, l0 = levels(s)
        a1, s1, l1 = levels(t)
        h, d0 = l1 - l0, MODEL.x0(x, s)
        d = d0 if past is None else (1 + h / (2 * (l0 - levels(ts[i - 1])[2]))) * d0
        if past is not None:
            d = d - h / (2 * (l0 - levels(ts[i - 1])[2])) * past
        x, past = s1 / s0 * x - a1 * math.expm1(-h) * d, d0
    agree(run(DPMSolverPP(2, second="midpoint")), x)

    x = X
    for s, t in itertools.pairwise(ts):
        _, s0, l0 = levels(s)
        a1, s1, l1 = levels(t)
        h = l1 - l0
        m = time_at(l0 + h / 2)
        am, sm, _ = levels(m)
        u = sm / s0 * x - am * math.expm1(-h / 2) * MODEL.x0(x, s)
        x = s1 / s0 * x - a1 * math.expm1(-h) * MODEL.x0(u, m)
    agree(run(DPMSolverPP(2, False, second="midpoint")), x)


def unipc(order, variant):
    """UniPC in data prediction by its linear systems, with rho = 1/2 for two points (Zhao et al. 2023, algorithm 1)."""
    ts, x, seen, corrected = GRID.tolist(), X, [], None
    for i, (s, t) in enumerate(itertools.pairwise(ts)):
        new = MODEL.x0(x, s)
        if i > 0:
            x = _uni(ts[i - 1], s, corrected, seen[: min(order, i)], ts, i - 1, variant, new)
        seen, corrected = [new, *seen], x
        x = _uni(s, t, x, seen[: min(order, i + 1)], ts, i, variant, None)
    return x


def _uni(s, t, x, seen, ts, i, variant, new):
    _, s0, l0 = levels(s)
    a1, s1, l1 = levels(t)
    h = l1 - l0
    b = -h if variant == "bh1" else math.expm1(-h)
    r = [(levels(ts[i - k])[2] - l0) / h for k in range(1, len(seen))]
    d = [(value - seen[0]) / rk for value, rk in zip(seen[1:], r, strict=True)]
    if new is not None:
        r, d = [*r, 1.0], [*d, new - seen[0]]
    base = s1 / s0 * x - a1 * math.expm1(-h) * seen[0]
    if not d:
        return base
    phi, rhs, factorial = math.expm1(-h) / -h - 1, [], 1.0
    for k in range(1, len(d) + 1):
        rhs.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    matrix = torch.tensor([[rk**p for rk in r] for p in range(len(r))], dtype=F64)
    rho = [0.5] if len(d) == 1 else torch.linalg.solve(matrix, torch.tensor(rhs, dtype=F64)).tolist()
    return base - a1 * b * sum(p * v for p, v in zip(rho, d, strict=True))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant):
    agree(run(UniPC(order, variant)), unipc(order, variant))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_two_point_rows_are_of_order_two_with_noise_too(variant, prediction, eta):
    """The weight of the older evaluation goes to the exact one as h does: halved distance for halved steps."""
    problem, vp = MODEL.sde.reverse(MODEL, eta), MODEL.sde
    gaps = []
    for steps in (50, 100, 200):
        grid = vp.time_of_lam(torch.linspace(-1, 1, steps + 1, dtype=F64))
        weight, exact = (
            UniPC(2, variant=v, prediction=prediction, corrector=False).plan(problem, grid).weights[steps // 2, 1]
            for v in (variant, "exact")
        )
        gaps.append(abs(float(weight / exact) - 1))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def test_edm_heun():
    """(Karras et al. 2022, algorithm 1) in x/alpha on sigma/alpha."""
    ts, x = GRID.tolist(), X
    y, u = x / levels(ts[0])[0], [levels(t)[1] / levels(t)[0] for t in ts]

    def slope(y, k):
        alpha = levels(ts[k])[0]
        return (y - MODEL.x0(alpha * y, ts[k])) / u[k]

    for k in range(len(ts) - 1):
        d = slope(y, k)
        z = y + (u[k + 1] - u[k]) * d
        y = y + (u[k + 1] - u[k]) * 0.5 * (d + slope(z, k + 1))
    agree(run(EDMHeun()), levels(ts[-1])[0] * y)


def multistep(order, coordinate, weight):
    """x1/a1 = x0/a0 + sum_j eps_j int l_j weight dt, by adaptive quadrature: DEIS and the linear multistep sampler."""
    ts, y, seen = GRID.tolist(), X / levels(GRID[0].item())[0], []
    for i, (s, t) in enumerate(itertools.pairwise(ts)):
        seen = [MODEL.eps(levels(s)[0] * y, s), *seen][:order]
        nodes = [coordinate(ts[i - j]) for j in range(len(seen))]
        for j, value in enumerate(seen):

            def integrand(tau, j=j, nodes=nodes):
                at = coordinate(tau)
                rest = [(at - c) / (nodes[j] - c) for k, c in enumerate(nodes) if k != j]
                return math.prod(rest) * weight(tau)

            y = y + quad(integrand, s, t, epsabs=1e-13, epsrel=1e-13, limit=200)[0] * value
    return levels(ts[-1])[0] * y


def rho(t):
    return levels(t)[1] / levels(t)[0]


def rho_slope(t):
    """d rho/dt = g^2/(2 alpha^2 rho)."""
    alpha = levels(t)[0]
    return (0.1 + 19.9 * t) / (2 * alpha**2 * rho(t))


def test_deis_and_lms():
    agree(run(DEIS(3)), multistep(3, lambda t: t, rho_slope))
    agree(run(LMS(4)), multistep(4, rho, rho_slope))
    agree(run(DEIS(3, coordinate="rho")), multistep(3, rho, rho_slope))


# ---- laws


ON_THE_FLOW = [row for row in FAMILY if row.view == "transition" and row.order is not None]
SCHEDULE_FREE = [row for row in ON_THE_FLOW if not row.name.startswith("DEIS")]  # which interpolates in the time itself


@pytest.mark.parametrize("row", SCHEDULE_FREE, ids=lambda r: r.name)
def test_one_grid_of_lam_gives_one_sample_whatever_the_schedule(row):
    """x/alpha depends on lam alone: VP, cosine and rectified flow agree (cutting the schedule out of the error)."""
    lam = torch.linspace(-2.5, 3.0, 11, dtype=F64)
    ends = []
    for process in (VP, sf.CosineVP(), sf.RectifiedFlow()):
        grid = process.time_of_lam(lam)
        alpha = process.alpha(grid)
        with torch.no_grad():
            flow = process.probability_flow(MIXTURE.model(process))
            ends.append(sf.solve(flow, 5 * alpha[0] * X, row.make(), grid=grid).x / alpha[-1])
    for end in ends[1:]:
        assert float((end - ends[0]).abs().max()) < 1e-10 * max(1.0, float(ends[0].abs().max()))


# an implicit method solves systems; its float32 is tested beside it
PLANNED = [row for row in FAMILY if row.order is not None and not row.name.startswith("ROS")]


@pytest.mark.parametrize("row", PLANNED, ids=lambda r: r.name)
def test_coefficients_survive_float32_and_a_thousand_steps(row):
    """Rounding of the state alone is left: no cancellation in short steps."""
    grid = sf.grids.logsnr(VP, 1000, 0.9, 0.01)
    with torch.no_grad():
        exact = sf.solve(FLOW, X, row.make(), grid=grid).x
        single = sf.solve(FLOW, X.float(), row.make(), grid=grid).x
    assert single.dtype == torch.float32
    assert float((single.to(F64) - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("coordinate", ["lam", "t", "rho"])
@pytest.mark.parametrize("corrector", [False, True])
def test_polynomials_are_integrated_exactly(order, prediction, coordinate, corrector):
    """N = w^k, k < order, of the coordinate w: every step after the start is the exact integral (to 1e-11)."""
    solver = ExponentialMultistep(order, prediction, coordinate=coordinate, corrector=order * corrector)
    grid = sf.grids.logsnr(VP, 8, 0.8, 0.1)
    plan = solver.plan(FLOW, grid)
    place = {"lam": lambda t: levels(t)[2], "t": lambda t: t, "rho": rho}[coordinate]
    ts = grid.tolist()
    for k in range(order):
        x, exact = 0.0, []
        for i in range(8):  # the plan, on a scalar state and a prediction that ignores it
            past = [place(ts[i - j]) ** k for j in range(min(plan.weights.shape[1], i + 1))]
            x = float(plan.ratio[i]) * x + sum(float(w) * v for w, v in zip(plan.weights[i], past, strict=False))
            exact.append(x)
        a1, s1, l1 = levels(ts[-1])
        a0, s0, l0 = levels(ts[-2])
        if prediction == "x0":
            whole = quad(lambda v, k=k, l1=l1: math.exp(v - l1) * place(time_at(v)) ** k, l0, l1, epsabs=1e-14)[0]
            want = s1 / s0 * exact[-2] + a1 * whole
        else:
            whole = quad(lambda v, k=k, l1=l1: math.exp(l1 - v) * place(time_at(v)) ** k, l0, l1, epsabs=1e-14)[0]
            want = a1 / a0 * exact[-2] - s1 * whole
        if not corrector:  # with one, the last step also enters the correction of the one before
            assert abs(exact[-1] - want) < 1e-11 * max(1.0, abs(want))
        else:
            same = ExponentialMultistep(order, prediction, coordinate=coordinate).plan(FLOW, grid)
            tail = same.weights[-1].tolist()
            predicted = sum(w * place(ts[-2 - j]) ** k for j, w in enumerate(tail))
            entered = sum(float(w) * place(ts[-2 - j]) ** k for j, w in enumerate(plan.weights[-1]) if j < len(ts) - 1)
            assert abs(entered - predicted) < 1e-11  # on a polynomial there is nothing to correct


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_gaussian_split_is_exact_for_gaussian_data(eta, kind):
    """One step is the law: the flow's map, and mean and covariance of the reverse kernel, to 1e-12."""
    root = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    covariance = {
        "scalar": 0.4 * torch.eye(3, dtype=F64),
        "diagonal": torch.diag(torch.tensor([0.1, 0.5, 2.0], dtype=F64)),
        "full": root @ root.T + 0.1 * torch.eye(3, dtype=F64),
    }[kind]
    mean = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
    given = {"scalar": 0.4, "diagonal": torch.diagonal(covariance), "full": covariance}[kind]
    solver = GaussianSplit(3, mean=mean, variance=given)
    s, t = 0.9, 0.2
    problem = VP.reverse(sf.problems.Gaussian(mean, covariance).model(VP), eta)
    start, grid = torch.randn(4, 3, dtype=F64), [s, t]
    with torch.no_grad():
        got = sf.solve(problem, start, solver, grid=grid, seed=0).x
        other = sf.solve(problem, torch.zeros(4, 3, dtype=F64), solver, grid=grid, seed=0).x
    (a0, s0, _), (a1, s1, _) = levels(s), levels(t)
    v0, v1 = (a**2 * covariance + q**2 * torch.eye(3, dtype=F64) for a, q in ((a0, s0), (a1, s1)))
    # in the eigenbasis the gain is (a1/a0) (total ratio)^((1 + eta^2)/2), totals of y = x/alpha
    values, axes = torch.linalg.eigh(covariance)
    ratio = (values + (s1 / a1) ** 2) / (values + (s0 / a0) ** 2)
    gain = axes @ torch.diag(a1 / a0 * ratio ** ((1 + eta**2) / 2)) @ axes.T
    torch.testing.assert_close(got - other, start @ gain.T, rtol=1e-12, atol=1e-12)
    # the noise makes up exactly the covariance that is missing
    missing = v1 - gain @ v0 @ gain.T
    std = axes @ torch.diag(a1 * ((values + (s1 / a1) ** 2) * (1 - ratio ** (eta**2))).sqrt()) @ axes.T
    torch.testing.assert_close(std @ std.T, missing, rtol=1e-11, atol=1e-12)
    z = unit_increments(0, 4, (3,), [1.0])[0]
    offset = a1 * mean - gain @ (a0 * mean)
    torch.testing.assert_close(other, offset + z @ std.T, rtol=1e-11, atol=1e-11)


def test_equivalences():
    agree(run(InVariable(sf.solvers.Euler(), "x/alpha")), run(sf.solvers.DDIM()))
    agree(run(InVariable(sf.solvers.Heun(), "x/alpha")), run(EDMHeun()))
    agree(run(GaussianSplit(3, variance=0.0, corrector=False)), run(DPMSolverPP(3)))
    agree(run(sf.solvers.ExponentialRK(3)), run(DPMSolverPP(3, False)))
    agree(run(DEIS(3, coordinate="rho")), run(sf.solvers.IPNDM(3)))


def test_plans_are_saved_and_loaded_exactly(tmp_path):
    for solver in (UniPC(3), GaussianSplit(3, mean=0.3), EDMHeun(s_churn=5.0), sf.solvers.RK45()):
        plan = solver.plan(FLOW, GRID)
        plan.save(tmp_path / "plan.json")
        again = sf.Plan.load(tmp_path / "plan.json")
        with torch.no_grad():
            first, second = (sf.solve(FLOW, X, p, seed=0).x for p in (plan, again))
        assert torch.equal(first, second)
        assert again.nfe == plan.nfe
    (tmp_path / "plan.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match="format"):
        sf.Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="JSON"):
        sf.Plan.load(tmp_path / "plan.json")


def test_churn_and_restart_keep_a_gaussians_law():
    """40 steps, 20,000 samples: variances within 5 standard errors and the 8% that second order leaves."""
    data = sf.problems.Gaussian([0.3, -0.2], [0.5, 0.3])
    process = sf.EDM()
    flow = process.probability_flow(data.model(process))
    x = process.prior_sample((20_000, 2), 0, dtype=F64)
    restart = sf.solvers.Restart((sf.solvers.RestartInterval(0.1, 1.0, 2, 12),))
    for solver in (EDMHeun(s_churn=10.0), restart):
        with torch.no_grad():
            y = sf.solve(flow, x, solver, steps=40, seed=1).x
        variance = y.var(0) / torch.tensor([0.5, 0.3], dtype=F64)
        assert bool(((variance - 1).abs() < 5 * math.sqrt(2 / 20_000) + 0.08).all())
        assert bool(((y.mean(0) - data.mean).abs() < 5 * math.sqrt(0.5 / 20_000) + 0.02).all())


def test_plans_tell_their_degree_without_a_model():
    """Ramps and limits of methods whose degree is known; half the second difference loses one."""
    grid = sf.grids.power(VP, 7)
    cases = [
        (DPMSolverPP(3), None, [0, 1, 2, 2, 2, 2, 2]),
        (DPMSolver(2, True), "lam", [0, 1, 1, 1, 1, 1, 1]),
        (DEIS(3), "t", [0, 1, 2, 2, 2, 2, 2]),
        (DEIS(3, coordinate="rho"), "rho", [0, 1, 2, 2, 2, 2, 2]),
        (LMS(4), "rho", [0, 1, 2, 3, 3, 3, 3]),
        (EDMHeun(), "rho", [1] * 7),
        (sf.solvers.AdamsBashforth(4), None, [0, 1, 2, 3, 3, 3, 3]),
        (sf.solvers.RK4(), None, [3] * 7),
    ]
    for solver, coordinate, want in cases:
        assert solver.plan(FLOW, grid).exact_degrees(FLOW, coordinate) == want, solver.name
    noisy = VP.reverse(MODEL, 1.0)
    assert DPMSolverPP(3).plan(noisy, grid).exact_degrees(noisy) == [0, 1, 2, 2, 2, 2, 2]
    plan = DPMSolverPP(3).plan(FLOW, grid)
    broken = half_second_difference(plan, VP)
    assert broken.exact_degrees(FLOW) == [0, 1, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="drift, x0 or eps"):
        GaussianSplit().plan(FLOW, grid).exact_degrees(FLOW)


@pytest.mark.parametrize("name", ["x", "x/alpha", "straight", "angle"])
def test_pairs_solve_to_a_tolerance_in_another_variable(name):
    """The error follows the tolerance over four decades, and the flow is the same."""
    with torch.no_grad():
        exact = sf.solve(FLOW, X, sf.solvers.DOP853(), rtol=1e-12, atol=1e-12).x
        errors = []
        for tol in (1e-4, 1e-6, 1e-8):
            run = sf.solve(FLOW, X, InVariable(sf.solvers.RK45(), name), rtol=tol, atol=tol)
            errors.append(float((run.x - exact).abs().median()) / tol)
    assert max(errors) < 30
    assert min(errors) > 1e-3


def test_every_multistep_constructor_takes_a_start_of_full_order():
    for make, start in [
        (UniPC, "singlestep"), (DEIS, "singlestep"), (DPMSolverPP, "singlestep"),
        (LMS, "runge-kutta"), (sf.solvers.IPNDM, "runge-kutta"), (sf.solvers.StraightABM, "runge-kutta"),
        (sf.solvers.AdamsBashforth, "runge-kutta"), (GaussianSplit, "runge-kutta"),
    ]:  # fmt: skip
        plain, full = make(3).plan(FLOW, GRID), make(3, start=start).plan(FLOW, GRID)
        assert full.nfe > plain.nfe == 12
