"""Latents and back: round trips to a tolerance, DDIM inversion, the reversible solver, interpolation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import F64, covariance_matrices

import sdeflow as sf
from sdeflow.coding import decode, encode, interpolate, interpolate_data
from sdeflow.solvers.reversible import Coupled, Reversible, _Run, reversible_decode, reversible_encode
from sdeflow.variables import VARIABLES

DIM = 8
PROCESSES = {"VP": sf.VP, "SubVP": sf.SubVP, "VE": sf.VE, "EDM": sf.EDM, "RectifiedFlow": sf.RectifiedFlow}


def mixture(event=(DIM,)):
    means = torch.tensor(np.random.default_rng(3).normal(size=(3, *event)), dtype=F64)
    return sf.problems.GaussianMixture(means, covariance_matrices(3, DIM, 5), [0.2, 0.3, 0.5])


def noised(process, n, event=(DIM,)):
    z = torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(1))
    return process.perturb(mixture(event).sample(n, seed=2), process.t_min, z)


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def worst(a, b):
    return float((a - b).abs().max())


# ---- to a tolerance


@pytest.mark.parametrize("name", PROCESSES)
def test_round_trip_to_a_tolerance(name):
    process = PROCESSES[name]()
    model, x = mixture().model(process), noised(process, 6)
    latent = encode(model, x, rtol=1e-12, atol=1e-12)
    assert worst(decode(model, latent.x, rtol=1e-12, atol=1e-12).x, x) < 1e-8
    loose = encode(model, x)  # 1e-5 unless told otherwise
    assert int(loose.stats.nfe.max()) < int(latent.stats.nfe.max()) / 3
    assert worst(loose.x / process.prior_std, latent.x / process.prior_std) < 1e-3


def test_latents_of_gaussian_data_are_known():
    """The flow of N(m, c) is affine: z = m_1 + (x - m_0) sqrt(v_1/v_0); another variance is seen."""
    process, c = sf.VP(), 0.09
    x = torch.tensor([[1.4], [0.2]], dtype=F64)
    model = sf.problems.Gaussian([0.5], c).model(process)

    def law(t, c):
        return 0.5 * process.alpha(t), torch.sqrt(c * process.alpha(t) ** 2 + process.sigma(t) ** 2)

    def affine(c):
        (m0, s0), (m1, s1) = law(1e-3, c), law(1.0, c)
        return m1 + (x - m0) * s1 / s0

    got = encode(model, x, rtol=1e-10, atol=1e-10).x
    assert torch.allclose(got, affine(c), rtol=0, atol=1e-8)
    assert worst(got, affine(0.1)) > 1e-2
    assert torch.allclose(encode(model, x, steps=200).x, got, rtol=0, atol=1e-4)  # RK4
    part = encode(model, x, t0=0.2, t1=0.6, rtol=1e-10, atol=1e-10).x
    (m0, s0), (m1, s1) = law(0.2, c), law(0.6, c)
    assert torch.allclose(part, m1 + (x - m0) * s1 / s0, rtol=0, atol=1e-8)
    assert torch.allclose(decode(model, part, t0=0.2, t1=0.6, rtol=1e-10, atol=1e-10).x, x, rtol=0, atol=1e-8)


def test_encoding_of_any_sde_and_dtype():
    process = sf.GBM(0.3, 0.6, start=[[1.0], [1.6]])
    flow = process.probability_flow(process.score)
    x = process.marginal_sample(3, 0.3, seed=0)
    z = encode(flow, x, t0=0.3, rtol=1e-9, atol=1e-9)
    assert worst(decode(flow, z.x, t0=0.3, rtol=1e-9, atol=1e-9).x, x) < 1e-7
    vp = sf.VP()
    model, images = mixture((2, 2, 2)).model(vp), noised(vp, 3, (2, 2, 2)).float()
    back = decode(model, encode(model, images).x)
    assert back.x.dtype == torch.float32
    assert worst(back.x, images) < 1e-3
    single = encode(model, images[1:2]).x
    assert worst(single, encode(model, images).x[1:2]) < 1e-6


# ---- DDIM inversion


def test_ddim_inversion_is_the_papers_step():
    process = sf.VP()
    model, x = mixture().model(process), noised(process, 4)
    grid = sf.grids.uniform(process, 10, 1e-3, 1.0)
    got = encode(model, x, solver=sf.solvers.DDIM(), grid=grid).x
    y = x
    for s, t in pairwise(grid):
        eps = model.eps(y, s)
        y = process.alpha(t) * (y - process.sigma(s) * eps) / process.alpha(s) + process.sigma(t) * eps
    assert torch.allclose(got, y, rtol=1e-10, atol=1e-10)


def test_ddim_inversion_errs_by_one_over_steps():
    process = sf.VP()
    model, x = mixture().model(process), noised(process, 6)
    exact = encode(model, x, rtol=1e-11, atol=1e-11).x
    steps, there, back = (100, 200, 400, 800), [], []
    for n in steps:
        z = encode(model, x, solver=sf.solvers.DDIM(), steps=n).x
        there.append(worst(z, exact))
        back.append(worst(decode(model, z, solver=sf.solvers.DDIM(), steps=n).x, x))
    assert 0.8 < slope(steps, there) < 1.25, there
    assert 0.8 < slope(steps, back) < 1.25, back
    assert back[0] > 1e-3  # not a round trip


# ---- the reversible solver


@pytest.mark.parametrize("name", PROCESSES)
def test_reversible_round_trip_at_ten_steps(name):
    process = PROCESSES[name]()
    model, x = mixture().model(process), noised(process, 6)
    for steps in (1, 10):
        latent = reversible_encode(model, x, steps=steps)
        assert latent.nfe == 4 * steps
        back = reversible_decode(model, latent)
        assert worst(back.x, x) < 1e-12
        assert worst(back.other, x) < 1e-12
    # what does not carry the second state does not come back, nor do two solves (negative controls)
    forgot = reversible_decode(model, Coupled(latent.x, latent.x, latent.grid, 0))
    assert worst(forgot.x, x) > 1e-4
    two = decode(model, encode(model, x, solver=Reversible(), steps=10).x, solver=Reversible(), steps=10).x
    assert worst(two, x) > 1e-4


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("base", ["Euler", "RK4", "BogackiShampine"])
def test_every_base_and_variable_is_undone(variable, base):
    """Rounding grows by the decay undone: by 150 here in x/alpha."""
    process = sf.VP()
    model, x = mixture().model(process), noised(process, 4)
    solver = Reversible(getattr(sf.solvers, base)(), variable, coupling=0.9)
    latent = reversible_encode(model, x, solver=solver, grid=sf.grids.uniform(process, 12, 1e-3, 1.0))
    assert worst(reversible_decode(model, latent, solver=solver).x, x) < (1e-8 if variable == "x/alpha" else 1e-11)


@pytest.mark.parametrize(
    ("base", "order", "steps"),
    [
        ("Euler", 1, (80, 160, 320)),
        ("Midpoint", 2, (40, 80, 160)),
        ("Heun", 2, (40, 80, 160)),
        ("RK4", 4, (24, 48, 96)),
    ],
)
def test_order_of_the_reversible_solver(base, order, steps):
    process = sf.VP()
    model, x = mixture().model(process), noised(process, 6)
    solver = Reversible(getattr(sf.solvers, base)())
    assert solver.order == order
    z = encode(model, x, rtol=1e-12, atol=1e-12).x
    data = decode(model, z, rtol=1e-12, atol=1e-12).x
    grid = lambda n, down: sf.grids.power(process, n, *((1.0, 1e-3) if down else (1e-3, 1.0)))  # noqa: E731
    up = [worst(reversible_encode(model, x, solver=solver, grid=grid(n, False)).x, z) for n in steps]
    flow = process.probability_flow(model)
    down = [worst(sf.solve(flow, z, solver, grid=grid(n, True)).x, data) for n in steps]
    assert order - 0.3 < slope(steps, up) < order + 0.7, up
    assert order - 0.3 < slope(steps, down) < order + 0.7, down


def test_the_step_is_the_matrix_of_its_docstring():
    """y' = m y in the variable: the map of (y, z) against l, P and Q, its determinant l, and the bound of Euler."""
    process = sf.VE(0.1, 10.0)
    m, coupling = -0.7, 0.8

    class Linear(sf.Model):
        """E = m x/L in "x/sigma" is x_0 = m x/sigma."""

    model = Linear(lambda x, t: m * x / process.sigma(t), process, "x0", expand=False)
    grid = torch.tensor([0.9, 0.7], dtype=F64)
    h = float(1 / process.sigma(0.7) - 1 / process.sigma(0.9))
    for base, growth in (
        ("Euler", lambda w: 1 + w),
        ("Midpoint", lambda w: 1 + w + w**2 / 2),
        ("RK4", lambda w: 1 + w + w**2 / 2 + w**3 / 6 + w**4 / 24),
    ):
        solver = Reversible(getattr(sf.solvers, base)(), "x/sigma", coupling)
        run = _Run(solver, process.probability_flow(model), torch.eye(2, dtype=F64), grid)
        columns = [run.up(0, *unit.reshape(2, 1, 1).unbind()) for unit in torch.eye(2, dtype=F64)]
        got = torch.tensor([[float(v) for v in column] for column in columns], dtype=F64).T
        p, q = growth(h * m) - 1, growth(-h * m) - 1
        want = torch.tensor([[coupling, 1 - coupling + p], [-coupling * q, 1 - q * (1 - coupling + p)]], dtype=F64)
        assert torch.allclose(got, want, rtol=0, atol=1e-12)
        assert float(torch.linalg.det(got)) == pytest.approx(coupling, abs=1e-12)
    for share, stable in ((0.9, True), (1.1, False)):
        w = share * (1 - coupling)
        matrix = torch.tensor([[coupling, 1 - coupling - w], [-coupling * w, 1 - w * (1 - coupling - w)]], dtype=F64)
        assert (float(torch.linalg.eigvals(matrix).abs().max()) < 1) == stable


def test_reversible_is_a_solver_like_others():
    process = sf.VP()
    model = mixture((2, 2, 2)).model(process)
    flow, z = process.probability_flow(model), torch.randn(5, 2, 2, 2, dtype=F64)
    solution = sf.solve(flow, z, Reversible(), steps=8, save=True)
    assert solution.stats.nfe == 32
    assert solution.xs.shape == (9, 5, 2, 2, 2)
    part = sf.solve(flow, z[1:3], Reversible(), steps=8)
    assert worst(part.x, solution.x[1:3]) < 1e-12
    sampled = sf.sample(model, 3, shape=(2, 2, 2), solver=Reversible(), steps=8)
    assert sampled.x.dtype == torch.float32
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        x = noised(process, 3, (2, 2, 2)).to(dtype)
        latent = reversible_encode(model, x, steps=6)
        assert latent.x.dtype == latent.other.dtype == dtype
        assert worst(reversible_decode(model, latent).x.double(), x.double()) < bound


# ---- interpolation


def test_spherical_interpolation():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, 2, dtype=F64, generator=g) for _ in range(2))
    path = interpolate(a, b, 7)
    assert path.shape == (7, 4, 3, 2)
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    assert torch.equal(path.flip(0), interpolate(b, a, 7))
    unit_a, unit_b = (v / torch.linalg.vector_norm(v.flatten(1), dim=1)[:, None, None] for v in (a, b))
    sphere = interpolate(3 * unit_a, 3 * unit_b, 9).flatten(2)
    assert torch.allclose(torch.linalg.vector_norm(sphere, dim=2), torch.full((9, 4), 3.0, dtype=F64))
    turns = (sphere[1:] * sphere[:-1]).sum(2) / 9
    assert torch.allclose(turns, turns[:1].expand_as(turns), rtol=0, atol=1e-12)  # equal angles
    middle = interpolate(torch.eye(2, dtype=F64)[:1], torch.eye(2, dtype=F64)[1:], 3)[1]
    assert torch.allclose(middle, torch.full((1, 2), math.sqrt(0.5), dtype=F64))
    # the chord is another path (negative control)
    straight = interpolate(a, b, 7, "linear")
    assert torch.allclose(straight[3], 0.5 * (a + b))
    assert worst(straight[3], path[3]) > 0.05
    assert torch.equal(interpolate(a, b, 7)[:, 2], interpolate(a[2:3], b[2:3], 7)[:, 0])


def test_interpolation_between_parallel_vectors_and_zero():
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 0.0]], dtype=F64)
    b = torch.tensor([[2.0, 4.0], [1.0, 2.0], [3.0, 1.0], [1.0, 1e-9]], dtype=F64)
    assert torch.allclose(interpolate(a, b, 5), interpolate(a, b, 5, "linear"), rtol=0, atol=1e-12)
    assert torch.equal(interpolate(a.float(), b.float(), 3)[0], a.float())


def test_interpolating_data():
    process = sf.VP()
    model, x = mixture().model(process), noised(process, 4)
    a, b = x[:2], x[2:]
    path = interpolate_data(model, a, b, 3, rtol=1e-9, atol=1e-9)
    assert path.shape == (3, 2, DIM)
    assert worst(path[0], a) < 1e-6
    assert worst(path[-1], b) < 1e-6
    z = encode(model, x, rtol=1e-9, atol=1e-9).x
    middle = decode(model, interpolate(z[:2], z[2:], 3)[1], rtol=1e-9, atol=1e-9).x
    assert worst(path[1], middle) < 1e-9
    linear = interpolate_data(model, a, b, 3, mode="linear", solver=sf.solvers.RK4(), steps=30)
    assert worst(linear[1], path[1]) > 1e-2


def test_interpolating_data_with_conditions():
    """Each pair keeps its own condition through the stacked solves."""
    process = sf.VP()

    def net(x, t, mean):
        a, s = process.alpha(t.double()).reshape(-1, 1), process.sigma(t.double()).reshape(-1, 1)
        return -(x - a * mean) / (a**2 * 0.25 + s**2)

    mean = torch.tensor([[2.0], [-3.0]], dtype=F64)
    model = sf.Model(net, process, "score").bind(mean=mean)
    a, b = mean + 0.3, mean - 0.4
    path = interpolate_data(model, a, b, 3, mode="linear", rtol=1e-8, atol=1e-8)
    assert torch.allclose(path[0], a, rtol=0, atol=1e-5)
    assert torch.allclose(path[-1], b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="one row a sample"):
        interpolate_data(model, a[:1], b[:1], 3)


# ---- errors, before any call of the model


ERRORS = {
    "model": (lambda m, x: encode(m.net, x), TypeError, "model as a Model or a ReverseSDE, got the function"),
    "noisy": (lambda m, x: encode(m.sde.reverse(m), x), ValueError, "eta = 0"),
    "times": (lambda m, x: encode(m, x, t0=0.5, t1=0.2), ValueError, "expected t0 < t1"),
    "grid down": (lambda m, x: encode(m, x, grid=[1.0, 0.1]), ValueError, "runs up"),
    "grid up": (lambda m, x: decode(m, x, grid=[0.1, 1.0]), ValueError, "runs down"),
    "grid and times": (lambda m, x: encode(m, x, t0=0.1, grid=[0.1, 1.0]), ValueError, "not both"),
    "no estimate": (lambda m, x: encode(m, x, solver=sf.solvers.DDIM()), ValueError, "no error estimate"),
    "rev grid down": (lambda m, x: reversible_encode(m, x, grid=[1.0, 0.1]), ValueError, "runs up"),
    "rev no grid": (lambda m, x: reversible_encode(m, x), ValueError, "steps="),
    "rev solver": (lambda m, x: reversible_encode(m, x, solver=sf.solvers.Heun(), steps=3), TypeError, "Reversible"),
    "rev latent": (lambda m, x: reversible_decode(m, x), TypeError, "Coupled"),
    "rev shapes": (
        lambda m, x: reversible_decode(m, Coupled(x, x[:1], torch.tensor([0.1, 0.2], dtype=F64), 0)),
        ValueError,
        "one shape",
    ),
    "rev both": (lambda m, x: reversible_encode(m, x, t0=0.1, grid=[0.1, 1.0]), ValueError, "not both"),
    "rev tolerance": (
        lambda m, x: sf.solve(m.sde.probability_flow(m), x, Reversible(), rtol=1e-3), ValueError, "no error estimate",
    ),
    "rev noise": (lambda m, x: sf.solve(m.sde.reverse(m), x, Reversible(), steps=3), ValueError, "deterministic"),
    "between grids": (lambda m, x: interpolate_data(m, x, x, 3, grid=[0.1, 1.0]), ValueError, "up and down"),
    "between one": (lambda m, x: interpolate_data(m, x, x, 1), ValueError, "n >= 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_come_before_the_first_call(name):
    model = mixture().model(sf.VP())
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(model, noised(sf.VP(), 2))
    assert model.nfe == 0


def test_errors_of_parts():
    a = torch.randn(2, 3)
    for call, kind, message in (
        (lambda: interpolate(a, -a, 3), ValueError, "opposite vectors"),
        (lambda: interpolate(a, a[:1], 3), ValueError, "one shape"),
        (lambda: interpolate(a, a.double(), 3), ValueError, "one shape"),
        (lambda: interpolate(a, a, 3, "cubic"), ValueError, "mode"),
        (lambda: interpolate(a, a, 2.5), TypeError, "n as a whole number, got 2.5"),
        (lambda: interpolate(a.long(), a, 2), TypeError, "floating-point"),
        (lambda: Reversible(sf.solvers.DDIM()), TypeError, "base as a RungeKutta such as"),
        (lambda: Reversible(coupling=0.0), ValueError, "coupling in"),
        (lambda: Reversible(coupling="1"), TypeError, "coupling as a number"),
        (lambda: Reversible(name_of_variable="y"), ValueError, "unknown variable"),
    ):
        with pytest.raises(kind, match=message):
            call()
    flow = sf.RectifiedFlow()
    with pytest.raises(ValueError, match="clock is infinite"):
        reversible_encode(
            mixture().model(flow), noised(flow, 2), solver=Reversible(name_of_variable="x/alpha"), steps=3
        )
