"""Processes under test, and references that share no code with the library.

Log densities come from torch.distributions, flows from scipy on formulas written here in numpy,
orders from numpy's least squares, Brownian increments from a table.
"""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import sdeflow as sf
from sdeflow.bridge import Increment

F64 = torch.float64


# ---- processes


class Tanned(sf.GaussianSDE):
    """A user's process by its kernel only: alpha = 1/(1 + t^2), sigma = tan(t), on [0, 1.2]."""

    t1 = 1.2

    def alpha(self, t):
        return 1 / (1 + t**2)

    def sigma(self, t):
        return torch.tan(t)


class Warming(sf.GaussianSDE):
    """A user's process by its coefficients only: f = -t, g = 1 + sin(t)/2, on [0, 2]."""

    t1 = 2.0

    def drift_coeff(self, t):
        return -t

    def diffusion_coeff(self, t):
        return 1 + 0.5 * torch.sin(t)


PROCESSES = {
    "VP": sf.VP,
    "VP(.5, 7)": lambda: sf.VP(beta_min=0.5, beta_max=7.0),
    "SubVP": sf.SubVP,
    "VE": sf.VE,
    "CosineVP": sf.CosineVP,
    "EDM": sf.EDM,
    "RectifiedFlow": sf.RectifiedFlow,
    "DiscreteVP": lambda: sf.DiscreteVP(torch.linspace(1e-4, 0.02, 1000, dtype=F64)),
    "DiscreteVP(5)": lambda: sf.DiscreteVP([0.05, 0.2, 0.1, 0.4, 0.6]),
    "from_kernel": lambda: sf.GaussianSDE.from_kernel(torch.cos, lambda t: 0.05 + torch.sin(t), 0.0, 1.4),
    "from_coefficients": lambda: sf.GaussianSDE.from_coefficients(
        lambda t: -0.5 - t, lambda t: torch.sqrt(1 + t**2), 0.0, 1.5
    ),
    "subclass by kernel": Tanned,
    "subclass by coefficients": Warming,
}
NAMES = tuple(PROCESSES)


def make(name):
    return PROCESSES[name]()


def last_time(process):
    """The end of the times where f and g are finite and moderate."""
    return process.t1 if not isinstance(process, sf.RectifiedFlow) else 0.95


def times(process, count=23):
    """Times from t_min to `last_time`, spread by the golden ratio so that none is a knot of a table."""
    share = np.sort(np.modf(np.arange(1, count + 1) * 0.6180339887498949)[0])
    low, high = process.t_min, last_time(process)
    return torch.tensor(low + (high - low) * share, dtype=F64)


def knots(process, start, end):
    """Interior points of [start, end] where the coefficients jump."""
    if not isinstance(process, sf.DiscreteVP):
        return []
    n = process.betas.numel()
    return [k / n for k in range(1, n) if start < k / n < end]


def coefficients(process):
    """(f, g^2) as functions of a float."""
    return lambda t: float(process.drift_coeff(t)), lambda t: float(process.diffusion_coeff(t)) ** 2


# ---- exact laws


def mixture_log_density(means, covariances, weights, alpha=1.0, sigma=0.0):
    """log of sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I), differentiable in x, alpha and sigma."""
    means = torch.as_tensor(means, dtype=F64)
    covariances = torch.as_tensor(covariances, dtype=F64)
    alpha, sigma = (torch.as_tensor(v, dtype=F64) for v in (alpha, sigma))
    noise = sigma**2 * torch.eye(means.shape[1], dtype=F64)
    parts = MultivariateNormal(alpha * means, alpha**2 * covariances + noise, validate_args=False)
    weights = torch.as_tensor(weights, dtype=F64)
    return MixtureSameFamily(Categorical(weights), parts, validate_args=False).log_prob


def score_of(log_density, x):
    """grad log p at x (batch, dim) by autograd."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(log_density(leaf).sum(), leaf)[0]


def covariance_matrices(count, dim, seed, scale=1.0):
    """Random covariances (count, dim, dim) with eigenvalues of about 0.1 to 1 times `scale`."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        q, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
        out.append(q @ np.diag(scale * rng.uniform(0.1, 1.0, dim)) @ q.T)
    out = torch.tensor(np.array(out), dtype=F64)
    return 0.5 * (out + out.mT)


def random_mixture(count, dim, seed, spread=2.0, scale=1.0):
    """(means, covariances, weights) of a random mixture."""
    rng = np.random.default_rng(seed)
    means = torch.tensor(spread * rng.normal(size=(count, dim)), dtype=F64)
    weights = torch.tensor(rng.uniform(0.5, 1.5, count), dtype=F64)
    return means, covariance_matrices(count, dim, seed + 1, scale), weights / weights.sum()


# ---- the probability flow of a mixture under VP, in numpy


class NumpyVP:
    """The linear VP process of beta from `low` to `high`, by its own formulas."""

    def __init__(self, low=0.1, high=20.0):
        self.low, self.high = low, high

    def beta(self, t):
        return self.low + t * (self.high - self.low)

    def alpha(self, t):
        return np.exp(-0.5 * (self.low * t + 0.5 * t**2 * (self.high - self.low)))

    def sigma(self, t):
        return np.sqrt(1 - self.alpha(t) ** 2)


def levels(t):
    """(alpha, sigma, lam) of VP at t, as numbers, by the closed form."""
    log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
    return alpha, sigma, math.log(alpha / sigma)


class NumpyMixture:
    """Score of a noised mixture by plain sums over components."""

    def __init__(self, means, covariances, weights):
        self.means, self.covariances, self.weights = (
            np.asarray(v, dtype=np.float64) for v in (means, covariances, weights)
        )

    def score(self, x, alpha, sigma):
        """grad log p (batch, dim)."""
        dim = self.means.shape[1]
        logs, pulls = [], []
        for m, c, w in zip(self.means, self.covariances, self.weights, strict=True):
            cov = alpha**2 * c + sigma**2 * np.eye(dim)
            y = x - alpha * m
            z = np.linalg.solve(cov, y.T).T
            logs.append(math.log(w) - 0.5 * (y * z).sum(1) - 0.5 * np.linalg.slogdet(cov)[1])
            pulls.append(-z)
        logs = np.array(logs)
        share = np.exp(logs - logs.max(0))
        share = share / share.sum(0)
        return (share[:, :, None] * np.array(pulls)).sum(0)


def vp_flow(mixture, x, t_start, t_end, process=None, rtol=1e-12, atol=1e-12):
    """The probability flow of `mixture` under VP from x (batch, dim), by scipy's DOP853, sample by sample."""
    process = process or NumpyVP()

    def rhs(t, flat):
        y = flat.reshape(1, -1)
        score = mixture.score(y, process.alpha(t), process.sigma(t))
        return (-0.5 * process.beta(t) * (y + score)).ravel()

    out = [
        solve_ivp(rhs, (t_start, t_end), row, method="DOP853", rtol=rtol, atol=atol).y[:, -1]
        for row in np.asarray(x, dtype=np.float64)
    ]
    return torch.tensor(np.array(out), dtype=F64)


# ---- orders


def slope(sizes, errors):
    """The fitted exponent of errors against step sizes."""
    return float(np.polyfit(np.log(np.asarray(sizes)), np.log(np.asarray(errors)), 1)[0])


def rms(error):
    return float(error.to(F64).square().mean().sqrt())


# ---- noise from a table


class TableNoise:
    """Replaces the library's generator: `draw(k)` is `table[k]`, made for the number of steps asked for.

    Args:
        make: function of the number of nodes, returning normals (nodes, batch, *event).
    """

    def __init__(self, monkeypatch, make):
        def sequence(noise, stream, nodes, event, dtype):
            table = make(nodes).to(dtype)
            assert table.shape[1:] == (noise.index.numel(), *event)
            return lambda k: table[k]

        def walk(noise, times, event, dtype, *, areas=False, lengths=None):
            lengths = torch.diff(times).abs() if lengths is None else lengths
            return TableWalk(sequence(noise, None, lengths.numel(), event, dtype), lengths)

        monkeypatch.setattr(sf.Noise, "sequence", sequence)
        monkeypatch.setattr(sf.Noise, "walk", walk)


class TableWalk:
    """A walk whose increments are sqrt(length) times the rows of a table."""

    def __init__(self, row, lengths):
        self._row, self.lengths = row, lengths

    def __call__(self, k):
        return Increment(self._row(k) * self.lengths[k].sqrt(), None)


def unit_increments(seed, batch, event, lengths):
    """The normalised increments (steps, batch, *event) that a solve with this seed uses, from the generator itself."""
    lengths = torch.as_tensor(lengths, dtype=F64)
    clock = torch.cat([torch.zeros(1, dtype=F64), lengths.cumsum(0)])
    walk = sf.Noise(seed, batch).walk(clock, event, F64, lengths=lengths)
    return torch.stack([walk(k).w / lengths[k].sqrt() for k in range(lengths.numel())])


def paired_increments(fine, nodes):
    """Unit normals of `nodes` equal steps from those of a fine grid: the increments of one path."""
    per = fine.shape[0] // nodes
    assert per * nodes == fine.shape[0]
    return fine.reshape(nodes, per, *fine.shape[1:]).sum(1) / math.sqrt(per)
