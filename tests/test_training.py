import math

import pytest
import torch

import sdeflow as sf
from sdeflow.data import DATASETS, digits
from sdeflow.losses import denoising, stratified_times
from sdeflow.nets import MLP
from sdeflow.training import train, untrained

PREDICTIONS = ("x0", "eps", "score", "v", "velocity")


def _small(shape=(2,), process=None, seed=0):
    torch.manual_seed(seed)
    return sf.Model(MLP(shape, width=32, depth=1, embedding=16), process or sf.VP(), "v", "lam")


def _moons(n=512):
    return sf.problems.TwoMoons().sample(n, seed=0).float()


def _equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True))


# ---- data


def test_digits():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert torch.equal(torch.round((images + 1) * 8), (images + 1) * 8)
    assert labels.shape == (1797,)
    assert torch.equal(labels.unique(), torch.arange(10))
    assert DATASETS["digits"] is digits


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "sdeflow\[train\]"'):
        digits()


# ---- objectives


@pytest.mark.parametrize("process", [sf.VP(), sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow()], ids=repr)
def test_losses_of_two_predictions_differ_by_a_function_of_time(process):
    """The residual of row (c, d) is q times that of (a, b), q = (alpha d - sigma c)/(alpha b - sigma a)."""
    model = sf.problems.TwoMoons().model(process)
    x0 = sf.problems.TwoMoons().sample(16, seed=1)
    t = process.t_min + torch.linspace(0.1, 0.9, 16, dtype=torch.float64) * (process.t1 - process.t_min)
    eps = torch.randn(16, 2, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    d_alpha, d_sigma = process.derivatives(t)
    factors = {
        "x0": sigma / alpha,
        "score": 1 / sigma,
        "v": (alpha**2 + sigma**2) / alpha,
        "velocity": (alpha * d_sigma - sigma * d_alpha) / alpha,
    }
    base = denoising(model, x0, t, eps, "eps")
    for name, factor in factors.items():
        torch.testing.assert_close(denoising(model, x0, t, eps, name), factor**2 * base, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_model_has_the_least_loss(prediction):
    """For N(0, c): E |x_0 - E[x_0 | x_t]|^2 = c sigma^2/(alpha^2 c + sigma^2), and any other model is worse."""
    process, c, n = sf.VP(), 0.3, 20_000
    data = sf.problems.Gaussian(torch.zeros(4), c)
    exact = data.model(process)
    x0, eps = data.sample(n, seed=2), torch.randn(n, 4, dtype=torch.float64)
    t = torch.full((n,), 0.4, dtype=torch.float64)
    alpha, sigma = (float(v) for v in (process.alpha(0.4), process.sigma(0.4)))
    loss = denoising(exact, x0, t, eps, "x0")
    assert abs(float(loss.mean()) - c * sigma**2 / (alpha**2 * c + sigma**2)) < 4 * float(loss.std()) / math.sqrt(n)

    best = denoising(exact, x0, t, eps, prediction)
    for shift in (-0.4, 0.4):
        other = sf.Model(lambda x, t, s=shift: exact(x, t, prediction) * (1 + s), process, prediction, expand=False)
        worse = denoising(other, x0, t, eps) - best
        assert float(worse.mean()) > 4 * float(worse.std()) / math.sqrt(n)


def test_loss_checks_its_input():
    model = _small()
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        denoising(model, torch.zeros(3, 2), 0.5, torch.zeros(3, 2), "noise")
    with pytest.raises(ValueError, match="eps of the shape of x0"):
        denoising(model, torch.zeros(3, 2), 0.5, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="one time for all samples or one a sample"):
        denoising(model, torch.zeros(3, 2), torch.rand(2), torch.zeros(3, 2))


@pytest.mark.parametrize("process", [sf.VP(), sf.VE(), sf.EDM(), sf.RectifiedFlow(), sf.CosineVP()], ids=repr)
def test_stratified_times(process):
    """One time in each part, uniform within it, of the angle atan(sigma/alpha)."""
    low = process.t_min
    times = torch.stack([stratified_times(process, 8, low) for _ in range(500)])

    def angle_of(t):
        return torch.atan2(process.sigma(t), process.alpha(t))

    first, last = angle_of(low), angle_of(process.t1)
    angle = angle_of(times)
    place = (angle - first) / (last - first) * 8
    assert torch.equal(place.floor(), torch.arange(8, dtype=torch.float64).expand(500, 8))
    assert abs(float((place[:, 0]).mean()) - 0.5) < 4 / math.sqrt(12 * 500)


def test_default_times_reach_below_sampling():
    times = stratified_times(sf.VP(), 1000)
    assert times.dtype == torch.float64
    assert 1e-5 <= float(times.min()) < sf.VP().t_min
    assert 0.999 < float(times.max()) <= 1.0


# ---- training


def test_loss_decreases():
    data = 1.0 + 0.1 * torch.randn(512, 2)
    model, history = train(_small(), data, steps=125, batch=128, lr=3e-3, log_every=10)
    assert [row["step"] for row in history] == [*range(10, 121, 10), 125]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())


def test_training_finds_the_exact_model():
    data = sf.problems.Gaussian(torch.tensor([0.5, -0.5]), torch.tensor([[0.4, 0.3], [0.3, 0.4]]))
    model, _ = train(_small(), data.sample(4096, seed=0).float(), steps=400, lr=3e-3, ema=0.98)
    x0, eps = data.sample(4096, seed=1).float(), torch.randn(4096, 2)
    t = stratified_times(model.gaussian, 4096)
    with torch.no_grad():
        ours, least = (denoising(m, x0, t, eps).mean() for m in (model, data.model(model.gaussian)))
    assert float(least) < float(ours) < 1.1 * float(least)


def test_same_arguments_same_weights():
    before = torch.get_rng_state()
    first, again, other = (train(_small(), _moons(), steps=20, batch=32, seed=s) for s in (1, 1, 2))
    assert _equal(first[0], again[0])
    assert first[1] == again[1]
    assert not _equal(first[0], other[0])
    torch.set_rng_state(before)
    train(model := _small(), _moons(), steps=2, batch=8)
    state = torch.get_rng_state()
    train(model, _moons(), steps=2, batch=8)
    assert torch.equal(torch.get_rng_state(), state), "training must leave the caller's generator alone"


def test_the_given_model_stays_as_it_is():
    model = _small()
    weights = [p.clone() for p in model.net.parameters()]
    trained, _ = train(model, _moons(), steps=5, batch=16)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.net.parameters(), strict=True))
    assert all(p.requires_grad for p in model.net.parameters())
    assert model.nfe == 0
    assert trained.net is not model.net
    assert (trained.gaussian, trained.prediction, trained.time) == (model.gaussian, "v", "lam")


def test_average_of_the_weights():
    """ema = 0 is the last iterate; otherwise the recursion with decay min(ema, (1 + k)/(10 + k)) over all iterates."""
    iterates = []

    class Watched(MLP):
        def forward(self, x, lam):
            iterates.append([p.detach().clone() for p in self.parameters()])
            return super().forward(x, lam)

    torch.manual_seed(0)
    net = Watched((2,), width=8, depth=1, embedding=4)
    start = sf.Model(net, sf.VP(), "v", "lam")
    steps, decay = 12, 0.4
    final, _ = train(start, _moons(), steps=steps, batch=16, ema=0.0)
    visited = [*iterates[1:steps], list(final.net.parameters())]
    average, _ = train(start, _moons(), steps=steps, batch=16, ema=decay)
    expected = visited[0]
    for k, weights in enumerate(visited[1:], start=1):
        d = min(decay, (1 + k) / (10 + k))
        expected = [d * m + (1 - d) * w for m, w in zip(expected, weights, strict=True)]
    for got, want in zip(average.net.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_own_times():
    seen = []

    def late(process, n):
        seen.append((process, n))
        return torch.full((n,), 0.9, dtype=torch.float64)

    train(_small(), _moons(), steps=2, batch=8, times=late)
    assert seen == [(sf.VP(), 8)] * 2


def test_times_with_weights():
    """Weights multiply the losses: those of importance sampling give the mean over uniform times."""
    drawn = []

    def weighted(process, n):
        t = sf.losses.uniform_times(process, n)
        drawn.append(t)
        return t, 2 * torch.ones_like(t)

    options = {"steps": 20, "batch": 64, "lr": 1e-12, "clip": 1e9, "weight_decay": 0.0, "log_every": 20}
    _, doubled = train(_small(), _moons(), times=weighted, **options)
    _, plain = train(_small(), _moons(), times=sf.losses.uniform_times, **options)
    assert len(drawn) == 20
    assert doubled[-1]["loss"] == pytest.approx(2 * plain[-1]["loss"], rel=1e-6)
    assert doubled[-1]["grad_norm"] == pytest.approx(2 * plain[-1]["grad_norm"], rel=1e-5)


def test_importance_times_learn_from_the_losses():
    """A loss that is large in one tenth of the span: its mean is kept, and that tenth is drawn more often."""

    def loss(model, x0, t, eps):
        return denoising(model, x0, t, eps) * 0 + torch.where(t < 0.1, 9.0, 1.0).float()

    times = sf.losses.ImportanceTimes(sf.losses.LossHistory(10, history=5), t_min=0.0)
    _, history = train(_small(), _moons(), steps=60, batch=256, log_every=60, loss=loss, times=times)
    assert times.history.ready
    assert float(times.history.probabilities[0]) == pytest.approx(0.5, abs=0.01)
    # 60 batches of 256 times: the weighted loss has no variance once every bin has its history
    assert history[-1]["loss"] == pytest.approx(1.8, abs=0.05)


def test_a_history_keeps_the_last_losses_of_each_bin():
    """As one loss after another would leave them, also where a batch has more of a bin than is kept."""
    together, single = sf.losses.LossHistory(4, history=3), sf.losses.LossHistory(4, history=3)
    torch.manual_seed(0)
    for n in (1, 5, 40, 7):
        bins, values = torch.randint(4, (n,)), torch.rand(n)
        together.update(bins, values)
        for k in range(n):
            single.update(bins[k : k + 1], values[k : k + 1])
        assert together.ready == single.ready
        torch.testing.assert_close(together.probabilities, single.probabilities, rtol=0, atol=0)
    assert together.ready


def test_times_with_weights_are_checked(tmp_path):
    with pytest.raises(ValueError, match="one weight a time"):
        train(
            _small(), _moons(), steps=1, batch=8, times=lambda process, n: (stratified_times(process, n), torch.ones(1))
        )
    with pytest.raises(ValueError, match="expected no file"):
        train(_small(), _moons(), steps=1, times=sf.losses.ImportanceTimes(), save=tmp_path / "run.safetensors")


def test_untrained_depends_on_the_seed_alone():
    torch.manual_seed(3)
    a = untrained((2,), seed=1)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert _equal(a, untrained((2,), seed=1))
    assert not _equal(a, untrained((2,), seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match=r"loss became (nan|inf) in steps 1 to 20: try a lower lr"):
        train(_small(), _moons(), steps=20, batch=16, lr=1e30)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps >= 1, got 0"),
        ({"batch": 1.5}, ValueError, "batch >= 1, got 1.5"),
        ({"lr": -1.0}, ValueError, "lr > 0"),
        ({"ema": 1.0}, ValueError, r"ema in \[0, 1\)"),
        ({"data": torch.zeros(3)}, ValueError, r"shape \(n, \*event\), got \(3,\)"),
        ({"data": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "torch.float32 on cpu, got torch.int64"),
        ({"data": torch.full((3, 2), math.nan)}, ValueError, "finite data"),
        ({"model": sf.Model(lambda x, t: x, sf.VP())}, TypeError, "Model of an nn.Module"),
        ({"model": sf.Model(torch.nn.Identity(), sf.VP())}, ValueError, "network with parameters"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"model": _small(), "data": _moons(8), "steps": 1, "batch": 4, **change}
    with pytest.raises(error, match=message):
        train(arguments.pop("model"), arguments.pop("data"), **arguments)
