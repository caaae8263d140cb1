"""Progressive distillation, consistency losses and their sampler, against closed forms; every law has a control."""

import math

import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow.losses import consistency, grid_times, progressive, weights
from sdeflow.nets import MLP, EDMPreconditioned
from sdeflow.solvers import DDIM, ConsistencySampler
from sdeflow.training import train
from tests.exact import F64, random_mixture, slope
from tests.loss_cases import normals

VP = sf.VP()
MIXTURE = sf.problems.GaussianMixture(*random_mixture(5, 3, seed=4, spread=1.2))
PROCESSES = [VP, sf.CosineVP(), sf.SubVP(), sf.VE(0.02, 8.0), sf.EDM(), sf.RectifiedFlow()]


def drawn(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, dtype=F64, generator=generator)


def to_zero(process, steps):
    return sf.grids.cosine(process, steps, process.t1, process.t0)


def constant(process, value):
    """The model that predicts x_0 = value, whatever the state."""
    return sf.Model(lambda x, t: value.expand_as(x), process, "x0", expand=False)


def target_of(loss, process, x0, t, eps):
    """What the loss regresses x_0 on, from its gradient at the prediction 0: mean (0 - target)^2 has -2 target/dim."""
    prediction = torch.zeros_like(x0, requires_grad=True)
    loss(constant(process, prediction), x0, t, eps).sum().backward()
    return -prediction.grad * x0.shape[1] / 2


def gaussian_map(process, mean, variance, theta=0.0):
    """The end of the flow of N(mean, variance) from (x, t), in the variables of its components; exact at theta = 0.

    x/alpha - mean is stretched as the deviation sqrt(variance + (sigma/alpha)^2) is. theta bends it where there is
    noise: the condition at sigma = 0 stays.
    """

    def net(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = torch.sqrt(variance / (alpha**2 * variance + sigma**2))
        return mean + (1 + theta * torch.sin(torch.atan2(sigma, alpha))) * gain * (x - alpha * mean)

    return sf.Model(net, process, "x0", expand=False)


# ---- times


def test_times_are_uniform_over_the_starts_of_the_steps():
    """Chi-squared on 8 nodes: a right sampler fails on one seed in a million."""
    grid = sf.grids.cosine(VP, 8)
    times = grid_times(grid, generator=torch.Generator().manual_seed(0))(VP, 20_000)
    assert times.dtype == F64
    counts = (times[:, None] == grid).sum(0)
    assert int(counts[-1]) == 0
    assert int(counts.sum()) == 20_000
    assert stats.chisquare(counts[:-1].numpy()).pvalue > 1e-6
    skewed = torch.cat([counts[:1] + 400, counts[1:-1]])  # the control
    assert stats.chisquare(skewed.numpy()).pvalue < 1e-6


# ---- progressive distillation


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("zero", [False, True])
def test_one_step_of_the_student_is_two_of_the_teacher(process, zero):
    """To 1e-12 of the state's size, by the library's DDIM; not for a teacher that stops at another time between."""
    teacher = MIXTURE.model(process)
    grid = to_zero(process, 8) if zero else sf.grids.cosine(process, 8)
    x0, eps = MIXTURE.sample(16, 0), drawn(16, 3)
    loss = progressive(teacher, grid, weight=None)
    for i in range(0, 8, 2):
        x = process.perturb(x0, grid[i], eps)
        with torch.no_grad():
            want = sf.solve(process.probability_flow(teacher), x, DDIM(), grid=grid[i : i + 3]).x
        moved = grid.clone()
        moved[i + 1] = 0.5 * (grid[i + 1] + grid[i])
        errors = []
        for attempt in (loss, progressive(teacher, moved, weight=None)):
            target = target_of(attempt, process, x0, grid[i].expand(16), eps)
            student = process.probability_flow(constant(process, target))
            with torch.no_grad():
                got = sf.solve(student, x, DDIM(), grid=grid[[i, i + 2]]).x
            errors.append(float((got - want).abs().max() / want.abs().max()))
        assert errors[0] < 1e-12
        assert errors[1] > 1e-6


def test_the_loss_of_a_right_student_and_its_gradient_are_zero():
    grid = to_zero(VP, 8)
    x0, eps, t = MIXTURE.sample(64, 0), drawn(64, 3), grid[torch.arange(64) % 4 * 2]
    loss = progressive(MIXTURE.model(VP), grid)
    target = target_of(progressive(MIXTURE.model(VP), grid, weight=None), VP, x0, t, eps)
    for shift, wrong in ((0.0, False), (1e-3, True)):
        prediction = (target + shift).requires_grad_()
        value = loss(constant(VP, prediction), x0, t, eps)
        assert value.shape == (64,)
        value.sum().backward()
        assert bool((value.detach() > 1e-7).all()) == wrong
        assert bool((prediction.grad.abs() > 1e-4).all()) == wrong
        if not wrong:
            assert float(value.detach().max()) < 1e-24
            assert float(prediction.grad.abs().max()) < 1e-12


def test_weights_of_progressive_distillation():
    """max(SNR, 1) unless another is given; one of another prediction is converted."""
    grid = sf.grids.cosine(VP, 8)
    x0, eps, t = MIXTURE.sample(4, 0), drawn(4, 3), grid[:-2:2]
    teacher, student = MIXTURE.model(VP), constant(VP, torch.zeros(3, dtype=F64))
    plain = progressive(teacher, grid, weight=None)(student, x0, t, eps)
    snr = (VP.alpha(t) / VP.sigma(t)) ** 2
    torch.testing.assert_close(progressive(teacher, grid)(student, x0, t, eps), snr.clamp(min=1) * plain)
    noise = progressive(teacher, grid, weight=weights.uniform("eps"))(student, x0, t, eps)
    torch.testing.assert_close(noise, snr * plain)
    one = progressive(teacher, grid, weight=None)(student, x0[:1], float(t[0]), eps[:1])
    torch.testing.assert_close(one, plain[:1])


# ---- consistency: the teacher's step and the targets


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_steps_of_the_teacher(process):
    """Order 1 is the library's DDIM, to sigma = 0 too; order 2 is not. Both are exact for data at a point.

    Seen through a student x/alpha + 1, of which the target is x_s/alpha_s + 1 inside and x_s/alpha_s at the end.
    """
    student = sf.Model(lambda x, t: x / process.alpha(t) + 1, process, "x0", expand=False)
    point = sf.problems.Gaussian([0.4, -1.0, 0.2], 1e-24)
    for data in (MIXTURE, point):
        teacher, grid = data.model(process), to_zero(process, 6)
        x0, eps = data.sample(8, 0), drawn(8, 3)
        for i in range(1, 6):  # x/alpha is infinite at the start of a rectified flow
            x, last = process.perturb(x0, grid[i], eps), i == 5
            with torch.no_grad():
                want = sf.solve(process.probability_flow(teacher), x, DDIM(), grid=grid[i : i + 2]).x
            y = want / process.alpha(grid[i + 1]) + (not last)
            ours = x / process.alpha(grid[i]) + 1
            expected = (ours - y).square().mean(1)
            for order in (1, 2):
                value = consistency(grid, teacher=teacher, order=order)(student, x0, grid[i].expand(8), eps)
                error = float((value - expected).abs().max() / expected.abs().max())
                assert (error < 1e-10) == (order == 1 or data is point)


def test_consistency_training_has_one_noise_and_ends_at_the_data():
    """The loss written out: targets f(alpha_s x_0 + sigma_s eps, s) inside, x_0 itself at t0; none flows back."""
    mean, variance = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([0.5, 0.2], dtype=F64)
    theta = torch.tensor(0.1, dtype=F64, requires_grad=True)
    model = gaussian_map(VP, mean, variance, theta)
    grid, x0, eps = to_zero(VP, 5), drawn(5, 2, 1), drawn(5, 2, 2)
    value = consistency(grid)(model, x0, grid[:-1], eps)
    with torch.no_grad():
        inner = model.x0(VP.perturb(x0[:-1], grid[1:-1], eps[:-1]), grid[1:-1])
    target = torch.cat([inner, x0[-1:]])
    want = (model.x0(VP.perturb(x0, grid[:-1], eps), grid[:-1]) - target).square().mean(1)
    torch.testing.assert_close(value, want)
    slopes = [torch.autograd.grad(v.sum(), theta)[0] for v in (value, want)]
    torch.testing.assert_close(*slopes)


def test_a_grid_that_ends_above_t0_maps_there():
    """The target of the last step is the state itself, in the data's scale."""
    grid, x0, eps = sf.grids.cosine(VP, 5, 1.0, 0.1), drawn(3, 2, 1), drawn(3, 2, 2)
    model = constant(VP, torch.zeros(2, dtype=F64))
    value = consistency(grid)(model, x0, float(grid[-2]), eps)
    torch.testing.assert_close(value, (VP.perturb(x0, 0.1, eps) / VP.alpha(0.1)).square().mean(1))


def test_distance_gap_and_weight():
    grid, x0, eps = to_zero(VP, 5), drawn(5, 2, 1), drawn(5, 2, 2)
    model = constant(VP, torch.zeros(2, dtype=F64))
    t, s = grid[:-1], grid[1:]
    plain = consistency(grid)(model, x0, t, eps)
    huber = consistency(grid, huber=0.03)(model, x0, t, eps)
    torch.testing.assert_close(huber, torch.sqrt(plain + 0.03**2) - 0.03)
    level = VP.sigma(t) / VP.alpha(t) - VP.sigma(s) / VP.alpha(s)
    torch.testing.assert_close(consistency(grid, gap="level")(model, x0, t, eps), plain / level)
    angle = torch.atan(VP.sigma(t) / VP.alpha(t)) - torch.atan(VP.sigma(s) / VP.alpha(s))
    torch.testing.assert_close(consistency(grid, gap="angle")(model, x0, t, eps), plain / angle)
    both = consistency(grid, huber=0.03, gap="angle", weight=weights.snr())(model, x0, t, eps)
    torch.testing.assert_close(both, (VP.alpha(t) / VP.sigma(t)) ** 2 * huber / angle)
    flow = sf.RectifiedFlow()  # alpha = 0 at its start
    start = consistency(to_zero(flow, 4), gap="angle")(constant(flow, torch.ones(2, dtype=F64)), x0, 1.0, eps)
    assert bool(torch.isfinite(start).all())


@pytest.mark.parametrize("prediction", ["v", "eps", "edm"])
def test_networks_hold_the_condition_at_the_data(prediction):
    """f(x, t) -> x as sigma -> 0, by O(sigma), for any weights; a plain prediction of x_0 does not."""
    torch.manual_seed(1)
    net = MLP((2,), width=16, depth=1, embedding=16).double()
    torch.nn.init.normal_(next(p for n, p in net.named_parameters() if n.endswith("bias")), std=3.0)
    if prediction == "edm":
        process = sf.EDM()
        model = sf.Model(EDMPreconditioned(net), process, "x0", "sigma")
        plain = sf.Model(net, process, "x0", "lam")
    else:
        process = VP
        model, plain = (sf.Model(net, process, p, "lam") for p in (prediction, "x0"))
    x, t = drawn(8, 2), process.time_of_lam(math.log(1e6))
    with torch.no_grad():
        assert float((model.x0(x, t) - x).abs().max()) < 1e-4
        assert float((plain.x0(x, t) - x).abs().max()) > 0.1


# ---- consistency: the exact map is the minimiser in the limit

MEAN, VARIANCE = torch.tensor([0.6], dtype=F64), torch.tensor([0.3], dtype=F64)
STEPS = (16, 32, 64, 128, 256)


def expected(loss, process, steps, theta):
    """(mean loss, its slope in theta) of `gaussian_map` over data, noise and the starts of a grid's steps.

    Quadrature of 4 x 4 points: the squares of affine maps are integrated exactly.
    """
    grid = to_zero(process, steps)
    z, w = normals(4, 2)
    x0, eps = MEAN + torch.sqrt(VARIANCE) * z[:, :1], z[:, 1:]
    rows = x0.repeat(steps, 1), grid[:-1].repeat_interleave(len(w)), eps.repeat(steps, 1)
    leaf = torch.tensor(theta, dtype=F64, requires_grad=True)
    value = (loss(grid)(gaussian_map(process, MEAN, VARIANCE, leaf), *rows) * w.repeat(steps)).sum() / steps
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), float(gradient)


def distilled(process, order, variance=VARIANCE):
    teacher = sf.problems.Gaussian(MEAN, variance).model(process)
    return lambda grid: consistency(grid, teacher=teacher, order=order)


@pytest.mark.parametrize("process", [VP, sf.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("order", [1, 2])
def test_the_loss_of_the_exact_map_has_the_order_of_the_step(process, order):
    """The root of the mean loss is a local error, O(h^2) for order 1; that of training is O(h), one sample's noise.

    Order 2 has a local error of O(h^4) here, one better than for other data (next test): with z = q(theta) times a
    constant, q'' + q = variance/q^3, and the errors of its two stages cancel.
    """
    exact = [math.sqrt(expected(distilled(process, order), process, n, 0.0)[0]) for n in STEPS]
    assert abs(slope(STEPS, exact) + 2 * order) < 0.15
    trained = [math.sqrt(expected(consistency, process, n, 0.0)[0]) for n in STEPS]
    assert abs(slope(STEPS, trained) + 1) < 0.15
    wrong = [math.sqrt(expected(distilled(process, order), process, n, 0.3)[0]) for n in STEPS]
    assert abs(slope(STEPS, wrong) + 1) < 0.3


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_the_teachers_step(order):
    """The local error on a mixture, O(h^(order + 1)), against the flow solved to 1e-12."""
    teacher, start = MIXTURE.model(VP), VP.time_of_lam(0.0)
    x0, eps = MIXTURE.sample(32, 0), drawn(32, 3)
    errors, sizes = [], 0.2 * 0.5 ** torch.arange(4, dtype=F64)
    for h in sizes:
        end = VP.time_of_lam(-torch.log(torch.tan(math.pi / 4 - h)))
        with torch.no_grad():
            flow, x = VP.probability_flow(teacher), VP.perturb(x0, start, eps)
            span = (float(start), float(end))
            exact = sf.solve(flow, x, sf.solvers.DOP853(), rtol=1e-12, atol=1e-12, t_span=span).x
        loss = consistency(torch.stack([start, end]), teacher=teacher, order=order)
        target = target_of(loss, VP, x0, start, eps)  # the last node's: the state in the data's scale
        errors.append(float((VP.alpha(end) * target - exact).abs().median()))
    assert abs(slope(sizes, errors) - order - 1) < 0.25


def root(loss, process, steps):
    """(where the mean gradient is 0, how fast it rises there): it is affine in theta."""
    low, high = (expected(loss, process, steps, theta)[1] for theta in (0.0, 1.0))
    return -low / (high - low), high - low


@pytest.mark.parametrize("process", [VP, sf.RectifiedFlow()], ids=repr)
def test_training_comes_to_rest_at_the_exact_map(process):
    """The zero of the mean gradient goes to the exact map, one order slower than a step of the teacher; it is stable.

    A teacher of other data draws it elsewhere.
    """
    for loss, order in ((distilled(process, 1), 1), (distilled(process, 2), 3), (consistency, 1)):
        zeros, rises = zip(*[root(loss, process, n) for n in STEPS], strict=True)
        assert abs(slope(STEPS, [abs(z) for z in zeros]) + order) < 0.2
        assert min(rises) > 0
    other = [root(distilled(process, 2, torch.tensor([0.6], dtype=F64)), process, n)[0] for n in STEPS]
    assert min(abs(z) for z in other[-2:]) > 0.05


@pytest.mark.parametrize("process", [VP, sf.RectifiedFlow()], ids=repr)
def test_training_and_distillation_have_one_gradient_to_the_gap(process):
    """Theorem 2 of Song et al. 2023, for gradients: they differ by O(h^2) = o(h), at the exact map and elsewhere.

    The gradients themselves are O(h) away from it, and the training gradient at the exact map is O(h^2).
    """
    for theta, own in ((0.0, 2), (0.3, 1)):
        trained, taught = (
            torch.tensor([expected(loss, process, n, theta)[1] for n in STEPS], dtype=F64)
            for loss in (consistency, distilled(process, 2))
        )
        assert abs(slope(STEPS, (trained - taught).abs()) + 2) < 0.2
        assert abs(slope(STEPS, trained.abs()) + own) < 0.2


# ---- the sampler

LAW = sf.problems.Gaussian([0.5, -1.0], [[0.6, 0.25], [0.25, 0.3]])
COUNT = 20_000


def exact_map(process):
    """`gaussian_map` of LAW, in the axes of its covariance."""
    variance, axes = torch.linalg.eigh(LAW.covariance)
    inner = gaussian_map(process, LAW.mean @ axes, variance)
    return sf.Model(lambda x, t: inner.net(x @ axes, t) @ axes.T, process, "x0", expand=False)


def deviation(x, mean, covariance):
    """The largest error of the mean and covariance of the rows of x, in standard errors."""
    centred = x - mean
    of_mean = centred.mean(0) / torch.sqrt(torch.diagonal(covariance) / len(x))
    found = centred.T @ centred / len(x)
    own = torch.diagonal(covariance)
    of_covariance = (found - covariance) / torch.sqrt((own[:, None] * own + covariance**2) / len(x))
    return float(torch.cat([of_mean, of_covariance.flatten()]).abs().max())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_of_the_exact_map_have_the_law_of_the_data(steps):
    """Within 4.5 standard errors, 5 numbers a case: all three cases fail a right sampler on one seed in 10,000.

    With the exact denoiser instead they are far off, in any number of steps.
    """
    process = sf.RectifiedFlow()  # whose prior is exact
    options = {"shape": (2,), "solver": ConsistencySampler(), "steps": steps, "final": "zero", "dtype": F64}
    model = exact_map(process)
    solution = sf.sample(model, COUNT, seed=steps, **options)
    assert solution.stats.nfe == model.nfe == steps
    assert deviation(solution.x, LAW.mean, LAW.covariance) < 4.5
    denoised = sf.sample(LAW.model(process), COUNT, seed=steps, **options).x
    assert deviation(denoised, LAW.mean, LAW.covariance) > 20


def test_a_grid_that_ends_above_t0_gives_the_law_there():
    """VP from its own law at t1; 4.5 standard errors."""
    x1 = VP.perturb(LAW.sample(COUNT, 3), 1.0, drawn(COUNT, 2, 5))
    with torch.no_grad():
        flow = VP.probability_flow(exact_map(VP))
        end = sf.solve(flow, x1, ConsistencySampler(), grid=[1.0, 0.5, 0.2], seed=0).x
    alpha, sigma = VP.alpha(0.2), VP.sigma(0.2)
    covariance = alpha**2 * LAW.covariance + sigma**2 * torch.eye(2, dtype=F64)
    assert deviation(end, alpha * LAW.mean, covariance) < 4.5
    assert deviation(end, LAW.mean, LAW.covariance) > 20


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_plan_is_the_kernel_from_the_data(process):
    grid = torch.tensor([process.t1, 0.4 * process.t1 + 0.6 * process.t0, process.t0], dtype=F64)
    plan = ConsistencySampler().plan(process.probability_flow(MIXTURE.model(process)), grid)
    assert plan.nfe == 2
    assert plan.target == "x0"
    assert plan.ratio.tolist() == [0, 0]
    alpha, sigma = process.alpha(grid[1]), process.sigma(grid[1])
    left = process.sigma(process.t0)  # a VE process declares noise at t0
    torch.testing.assert_close(plan.weights[:, 0], torch.stack([alpha, torch.ones_like(alpha)]))
    torch.testing.assert_close(plan.noise, torch.stack([torch.sqrt(sigma**2 - (alpha * left) ** 2), 0 * alpha]))


def test_one_step_is_one_call_and_draws_nothing():
    model = exact_map(VP)
    options = {"shape": (2,), "solver": ConsistencySampler(), "final": "zero", "dtype": F64}
    x = sf.sample(model, 8, steps=1, seed=0, **options).x
    torch.testing.assert_close(x, model.x0(VP.prior_sample((8, 2), 0, dtype=F64), 1.0))
    part = sf.sample(model, 4, steps=3, seed=0, index=4, **options).x
    torch.testing.assert_close(part, sf.sample(model, 8, steps=3, seed=0, **options).x[4:])


class _Decay(sf.ODE):
    t0, t1 = 0.0, 1.0

    def drift(self, x, t):
        return -x


def test_the_sampler_refuses_what_it_cannot_do():
    solver, model, x = ConsistencySampler(), MIXTURE.model(VP), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"renews all of the noise .* got eta = 1"):
        sf.sample(model, 2, shape=(3,), solver=solver, steps=2, eta=1.0, final="zero")
    with pytest.raises(ValueError, match="falling times"):
        sf.solve(VP.probability_flow(model), x, solver, grid=[0.1, 0.5, 1.0], seed=0)
    with pytest.raises(ValueError, match="transition view"):
        sf.solve(_Decay(), x, solver, steps=2)
    with pytest.raises(ValueError, match="no error estimate"):
        sf.sample(model, 2, shape=(3,), solver=solver, rtol=1e-3)
    assert "ConsistencySampler" not in [row.name for row in sf.solvers.CATALOGUE]


# ---- errors, and training


def test_arguments_that_do_not_fit():
    model, grid = MIXTURE.model(VP), sf.grids.cosine(VP, 4)
    x0, eps = drawn(2, 3), drawn(2, 3)
    for make in (grid_times, consistency, lambda g: progressive(model, g)):
        for bad in ([0.5], grid.flip(0), [[0.5, 0.1]], [0.5, 0.5, 0.1], [math.nan, 0.1]):
            with pytest.raises(ValueError, match="falling times"):
                make(bad)
    with pytest.raises(ValueError, match=r"grid in \[0, 1\]"):
        progressive(model, [2.0, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"grid in \[0, 1\]"):
        consistency([2.0, 0.5], teacher=model)
    with pytest.raises(ValueError, match=r"grid in \[0, 1\]"):
        grid_times([2.0, 0.5])(VP, 4)
    with pytest.raises(ValueError, match="even number"):
        progressive(model, grid[:-1])
    for make in (lambda m: progressive(m, grid), lambda m: consistency(grid, teacher=m)):
        with pytest.raises(TypeError, match=r"teacher as a Model.*; wrap the network"):
            make(lambda x, t: x)
        with pytest.raises(ValueError, match="one process"):
            make(model)(MIXTURE.model(sf.CosineVP()), x0, grid[:1].expand(2), eps)
        with pytest.raises(ValueError, match=r"a step of its grid begins, got t = 0\.123"):
            make(model)(model, x0, torch.tensor([float(grid[0]), 0.123]), eps)
        with pytest.raises(ValueError, match="a step of its grid begins"):
            make(model)(model, x0, float(grid[-1]), eps)
    for bad in ({"order": 3}, {"order": 2}, {"huber": 0.0}, {"huber": math.inf}, {"gap": "lam"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            consistency(grid, **bad)


@pytest.mark.parametrize("labels", [False, True])
def test_they_train(labels):
    """Every loss falls by a third in 150 steps from a wrong start, with labels that reach the teacher too."""
    torch.manual_seed(0)
    data = sf.problems.TwoMoons().sample(256, 0).float()
    teacher, student = (sf.Model(MLP((2,), width=32, depth=1, embedding=16, classes=2), VP, "v", "lam") for _ in "ab")
    torch.nn.init.normal_(list(student.net.parameters())[-1], std=2.0)
    grid = to_zero(VP, 8)
    for loss, nodes in (
        (progressive(teacher, grid, weight=None), grid[::2]),
        (consistency(grid), grid),
        (consistency(grid, teacher=teacher, order=2, huber=0.01, gap="angle"), grid),
    ):
        given = {"labels": torch.arange(256) % 2} if labels else {}
        _, history = train(
            student, data, steps=150, batch=64, log_every=10, loss=loss, times=grid_times(nodes), **given
        )
        assert history[-1]["loss"] < 0.67 * history[0]["loss"]


def test_the_conditions_of_a_batch_reach_the_teacher():
    """Its labels are the student's; without them the teacher's call fails."""
    teacher = sf.Model(lambda x, t, label: label[:, None] * torch.ones_like(x), VP, "x0")
    student = sf.Model(lambda x, t, label=None: torch.zeros_like(x), VP, "x0")
    grid, x0 = to_zero(VP, 2), drawn(3, 2)
    label = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    for loss in (progressive(teacher, grid, weight=None), consistency(grid[1:], teacher=teacher)):
        t = float(grid[0]) if loss.__qualname__.startswith("progressive") else float(grid[1])
        torch.testing.assert_close(loss(student.bind(label=label), x0, t, x0), label**2)
        with pytest.raises(TypeError, match="label"):
            loss(student, x0, t, x0)
